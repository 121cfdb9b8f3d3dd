"""The native module itself: what it refuses, how many threads it takes, and its operators of inference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epsanet import kernels
from epsanet.kernels import choice

pytestmark = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")

KERNEL_SIZES, GROUPS = [3, 5, 7, 9], [1, 4, 8, 16]


def make_weights(channels: int) -> list[Tensor]:
    return [
        torch.randn(channels // 4, channels // count, size, size, requires_grad=True)
        for size, count in zip(KERNEL_SIZES, GROUPS, strict=True)
    ]


@pytest.mark.parametrize(
    ("split", "into", "out"),
    [
        (True, [*range(8, 16), *range(8)], list(range(16))),
        (False, list(range(16)), [*range(8, 16), *range(8)]),
        (False, [0, 0, *range(2, 16)], list(range(16))),
        (False, list(range(16)), [*range(15), 14]),
    ],
    ids=["input leaves its branch", "output leaves its branch", "input named twice", "output named twice"],
)
def test_an_order_that_is_no_permutation_of_each_branch_raises(split: bool, into: list[int], out: list[int]) -> None:
    with pytest.raises(ValueError, match="each channel of a branch once"):
        choice.native.Layer(16, 16, [3, 3], [1, 1], 1, split, into, out)


def test_gradients_of_sums_and_residuals_of_another_type_or_layout_raise() -> None:
    natural = list(range(16))
    layer, pointwise = (choice.native.Layer(16, 16, [size], [1], 1, False, natural, natural) for size in (3, 1))
    x, dsums, weights = torch.randn(2, 5, 5, 16), torch.randn(2, 16), [torch.randn(16, 16, 3, 3)]
    packed, packed_back = torch.zeros(pointwise.packed_size(False)), torch.zeros(layer.packed_size(True))
    result, bias, gradients = torch.empty_like(x), torch.zeros(16), [torch.empty_like(weights[0])]
    calls = {
        "input gradient": lambda dsums: layer.input_gradient(x, dsums, packed_back, result, True, 1),
        "weight gradient": lambda dsums: layer.weight_gradient(x, x, dsums, gradients, True, 1),
        "residual": lambda residual: pointwise.infer_pointwise(x, packed, bias, residual, result, False, 1),
    }
    with pytest.raises(ValueError, match="only one dense 1×1 convolution"):
        layer.infer_pointwise(x, torch.zeros(layer.packed_size(False)), bias, None, result, False, 1)
    for name, call in calls.items():
        right = x if name == "residual" else dsums
        call(right)
        call(None)
        for wrong in (right.double(), right.mT.contiguous().mT):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                call(wrong)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_threads_follow_torchs_number_and_small_work_is_not_split(wanted: int) -> None:
    torch.set_num_threads(wanted)
    weights = [weight.detach() for weight in make_weights(64)]
    for height, width, used in ((2, 1, 1), (12, 12, wanted)):
        x = torch.randn(2, 64, height, width, requires_grad=True)
        features, _ = kernels.pyramid_convolution(x, weights, GROUPS, 1, False)
        assert choice.native.threads_used() == used
        torch.autograd.grad(features.sum(), x)
        assert choice.native.threads_used() == used


@pytest.mark.parametrize("ordered", [False, True])
def test_opcheck_finds_nothing_wrong_with_the_whole_module(ordered: bool) -> None:
    packed = kernels.pack_for_inference(make_weights(64), 64, GROUPS, False)
    squeeze_excite = [torch.randn(2, 16), torch.randn(2), torch.randn(16, 2), torch.randn(16)]
    for batch in (2, 0):
        arguments = (torch.randn(batch, 64, 7, 6), packed, squeeze_excite, torch.randn(64), torch.randn(64))
        settings = (KERNEL_SIZES, GROUPS, 2, False, True, True, ordered)
        torch.library.opcheck(torch.ops.epsanet.pyramid_attention.default, (*arguments, *settings))


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck_finds_nothing_wrong_with_the_pointwise_convolution(residual: bool) -> None:
    packed, bias = kernels.pack_for_inference([torch.randn(24, 16, 1, 1)], 16, [1], False), torch.randn(24)
    for batch in (2, 0):
        x, added = torch.randn(batch, 16, 7, 6), torch.randn(batch, 24, 4, 3) if residual else None
        torch.library.opcheck(torch.ops.epsanet.pointwise_convolution.default, (x, packed, bias, added, 2, True))
