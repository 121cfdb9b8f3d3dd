"""epsanet as torchrun starts it, with one process that kills itself before torchrun has restarted any."""

import json
import os
import sys

from forking import Kill, arm

from epsanet.cli import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    arm(Kill(**json.loads(os.environ["EPSANET_TEST_KILL"])))
sys.exit(main())
