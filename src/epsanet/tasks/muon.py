"""timm's Muon on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.optim import muon

__all__ = ["muon_in_float32"]


@contextmanager
def muon_in_float32() -> Iterator[None]:
    """Within it timm's Muon orthogonalises its updates in float32.

    timm does it in bfloat16, with no argument for another type. That is fast on a GPU; a processor without
    instructions for bfloat16 can take longer for it than for the rest of a training step of a small network.
    """
    in_bfloat16 = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(in_bfloat16, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = in_bfloat16
