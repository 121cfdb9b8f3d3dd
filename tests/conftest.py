"""What all tests share: reproducible randomness."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A failure must come back on the next run and on the next machine, and a busy machine must not make one.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run() -> None:
    import torch  # here, so that tests of a light import can be collected without it

    torch.manual_seed(0)
