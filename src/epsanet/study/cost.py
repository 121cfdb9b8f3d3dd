"""What each network costs: parameters and multiply-accumulates, counted, beside the published figures."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from epsanet.network.weights import create_model
from epsanet.study.published import PUBLISHED, Published

__all__ = ["Cost", "cost", "cost_table"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic of a network at its own input size."""

    name: str
    """As timm knows it."""
    input_size: int
    """Height and width in pixels."""
    parameters: int
    """All of them."""
    macs: int
    """Multiply-accumulates of convolutions and linear layers for one image."""
    published: Published | None
    """What the paper says, if it has the network."""


def cost(name: str) -> Cost:
    """Count a network without memory for its weights.

    Args:
        name: any network of timm.

    Raises:
        ValueError: when there is none of that name.
    """
    with torch.device("meta"):
        model = create_model(name).eval()
        size = tuple(model.pretrained_cfg["input_size"])
        image = torch.empty(1, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return Cost(
        name=name,
        input_size=size[-1],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        published=PUBLISHED.get(name),
    )


def cost_table() -> list[Cost]:
    """Every EPSANet, the published ones first, each group by size."""
    rows = [cost(name) for name in timm.list_models("epsanet*")]
    return sorted(rows, key=lambda row: (row.published is None, -row.input_size, row.parameters))
