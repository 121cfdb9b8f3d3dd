"""``python -m epsanet``, and ``torchrun -m epsanet``."""

import sys

from epsanet.cli import main

sys.exit(main())
