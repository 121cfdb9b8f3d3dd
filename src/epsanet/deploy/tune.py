"""Which form of each branch is fastest in a runtime, by measuring (see ``portable`` for the forms).

A branch is timed between two 1×1 convolutions, as it stands in a block, so that what a runtime spends on changing
layouts is counted. Contenders take turns, and the best time of several rounds counts, so that other work on the
machine disturbs little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsanet import kernels
from epsanet.deploy.portable import DepthwiseSum, branch_forms, branch_in_form
from epsanet.network.bundle import open_runtime
from epsanet.network.psa import PSA

__all__ = ["TUNED_BATCHES", "best_forms", "race"]

TUNED_BATCHES = (1, 16)
_ROUNDS = 5
_GAIN = 0.95
"""Another form is taken when it needs less than this share of the branch's time; less is noise."""

Run = Callable[[Tensor], Tensor]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Passes items on and shows how far it is: items, their number, a title."""


def race(contenders: list[Run], images: Tensor, rounds: int = _ROUNDS) -> list[float]:
    """The best of each contender's times, in milliseconds.

    Args:
        contenders: take turns.
        images: each is given.
        rounds: turns of each, after one to warm up.
    """
    best = [float("inf")] * len(contenders)
    for lap in range(rounds + 1):
        for place, run in enumerate(contenders):
            start = time.perf_counter()
            run(images)
            if lap > 0:
                best[place] = min(best[place], (time.perf_counter() - start) * 1e3)
    return best


def best_forms(model: nn.Module, kind: str, shape: tuple[int, ...], progress: Progress) -> dict[str, list[int]]:
    """The fastest form of each branch of a network.

    Args:
        model: a classifier in float32 on the CPU.
        kind: the format whose runtime is measured.
        shape: of one image, ``3, H, W``.
        progress: shows how far this is.

    Returns:
        Groups of each branch's form by the name of its PSA module, as ``portable`` takes them.
    """
    found = _maps(model, shape)
    branches = {
        (*_shape_of(conv), size): conv
        for psa, size in found.values()
        for conv in psa.spc.branches
        if isinstance(conv, nn.Conv2d)
    }
    watched = progress(list(branches.items()), len(branches), "measuring branches")
    chosen = {key: _fastest(conv, key[-1], kind) for key, conv in watched}
    return {
        name: [chosen[*_shape_of(conv), size] for conv in psa.spc.branches if isinstance(conv, nn.Conv2d)]
        for name, (psa, size) in found.items()
    }


def _shape_of(conv: nn.Conv2d) -> tuple[int, ...]:
    return conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.dilation[0], conv.groups


def _maps(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[PSA, tuple[int, int]]]:
    """Each PSA module by name, with the height and width of its input."""
    sizes: dict[str, tuple[PSA, tuple[int, int]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PSA):

            def note(psa: PSA, inputs: tuple[Tensor, ...], name: str = name) -> None:
                sizes[name] = psa, (inputs[0].shape[2], inputs[0].shape[3])

            handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.inference_mode(), kernels.use("reference"):
            model(torch.zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _fastest(conv: nn.Conv2d, size: tuple[int, int], kind: str) -> int:
    forms = branch_forms(conv)
    if len(forms) == 1:
        return forms[0]
    before = nn.Conv2d(conv.in_channels, conv.in_channels, 1, bias=False)
    after = nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=False)
    runs = [_block(before, branch_in_form(conv, form), after, size, kind) for form in forms]
    ratios = torch.ones(len(forms), dtype=torch.float64)
    for batch in TUNED_BATCHES:
        times = torch.tensor(race(runs, torch.randn(batch, conv.in_channels, *size)), dtype=torch.float64)
        ratios *= times / times[0]
    best = int(ratios.argmin())
    return forms[best] if ratios[best] < _GAIN ** len(TUNED_BATCHES) else forms[0]


def _block(before: nn.Conv2d, branch: nn.Module, after: nn.Conv2d, size: tuple[int, int], kind: str) -> Run:
    """A branch between two 1×1 convolutions, in the runtime of a format."""
    if kind == "pt2":
        block = nn.Sequential(before, branch, after).eval()

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                logits: Tensor = block(images)
            return logits

        return run
    model = _onnx_block(before, branch, after)
    shape = (1, before.in_channels, *size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        path.write_bytes(model.SerializeToString())
        if kind == "openvino":
            import openvino

            network, path = openvino.Core().read_model(path), path.with_suffix(".xml")
            openvino.save_model(network, path, compress_to_fp16=False)
        return open_runtime(kind, path, shape)


def _onnx_block(before: nn.Conv2d, branch: nn.Module, after: nn.Conv2d) -> Any:
    """Written by hand: torch's exporter needs seconds for each of hundreds of these."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, f"constant{len(constants)}"))
        return str(constants[-1].name)

    def operator(kind: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> list[str]:
        made = [f"map{len(nodes)}_{place}" for place in range(outputs)]
        nodes.append(helper.make_node(kind, inputs, made, **attributes))
        return made

    def convolution(conv: nn.Conv2d, x: str) -> str:
        weight = constant(conv.weight.detach().numpy())
        padding = [int(pad) for pad in conv.padding]
        (y,) = operator(
            "Conv",
            [x, weight],
            group=conv.groups,
            pads=padding * 2,
            strides=list(conv.stride),
            dilations=list(conv.dilation),
        )
        return y

    x = convolution(before, "images")
    if isinstance(branch, DepthwiseSum):
        (x,) = operator("Gather", [x, constant(branch.order.numpy())], axis=1)
        parts = operator(
            "Split", [convolution(branch.depthwise, x)], branch.summands, axis=1, num_outputs=branch.summands
        )
        (x,) = operator("Sum", parts)
    else:
        assert isinstance(branch, nn.Conv2d)
        x = convolution(branch, x)
    x = convolution(after, x)
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", before.in_channels, "H", "W"])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", after.out_channels, "h", "w"])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
