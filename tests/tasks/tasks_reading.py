"""Comparing what two runs left."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def same_state(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Every tensor, bit by bit."""
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ, first {different[0]}"
