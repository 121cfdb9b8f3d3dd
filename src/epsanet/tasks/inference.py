"""The network that evaluation and prediction run: optimised on CPUs, as it is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from epsanet.kernels import choice
from epsanet.network.bundle import RuntimeNetwork
from epsanet.network.optimize import optimize

__all__ = ["inference_network"]


def inference_network(
    model: nn.Module,
    input_size: Sequence[int],
    device: torch.device,
    precision: str = "32-true",
    note: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """The network with the same outputs, to 1e-4, that runs fastest: ``epsanet.optimize`` of it on a CPU in float32.

    Where the reference kernels are asked for (``epsanet.kernels.use``), the network stays as it is, as does a bundle's.

    Args:
        model: the network, in float32.
        input_size: of an image, ``3, H, W``.
        device: where it is to run.
        precision: Lightning's name of the arithmetic.
        note: told what was done, or why not.
    """
    if isinstance(model, RuntimeNetwork):  # of an exported bundle
        return model
    if device.type != "cpu" or precision != "32-true" or choice.chosen() == "reference":
        return model
    example = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        network = optimize(model, example)
    except ValueError as error:
        note(f"the network runs as it is: {error}")
        return model
    note("the network is optimised for this CPU (epsanet.optimize): norms folded, native kernels")
    return network
