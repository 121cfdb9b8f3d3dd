"""Frozen weights, forward mode, ``torch.func`` and batched gradients: right from the kernels, or left to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from epsanet import kernels
from epsanet.network.psa import PSA

pytestmark = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")


def in_both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    with kernels.use("auto"):
        found = compute()
    with kernels.use("reference"):
        return found, compute()


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0, "comparing with nothing proves nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("alone", ["input", "weight"])
def test_the_input_alone_and_a_weight_alone_get_their_gradient(alone: str) -> None:
    module, x = PSA(64).requires_grad_(False), torch.randn(2, 64, 7, 6)
    wanted = (x if alone == "input" else module.spc.branches[2].weight).requires_grad_()
    found, expected = in_both(lambda: torch.autograd.grad(module(x).square().sum(), wanted)[0])
    close(found, expected)


def forward_mode(module: PSA, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
        return torch.zeros(1) if result.tangent is None else result.tangent


def forward_mode_of_a_weight(module: PSA, x: Tensor, _: Tensor) -> Tensor:
    name, weight = "spc.branches.2.weight", module.spc.branches[2].weight
    with forward_ad.dual_level():
        parameters = {name: forward_ad.make_dual(weight.detach(), torch.ones_like(weight))}
        result = forward_ad.unpack_dual(torch.func.functional_call(module, parameters, x))
        return torch.zeros(1) if result.tangent is None else result.tangent


WAYS: dict[str, Callable[[PSA, Tensor, Tensor], Tensor]] = {
    "jvp": lambda module, x, tangent: torch.func.jvp(module, (x,), (tangent,))[1],
    "dual numbers": forward_mode,
    "dual weights": forward_mode_of_a_weight,
    "jacfwd": lambda module, x, _: torch.func.jacfwd(lambda part: module(x + part).sum((2, 3)))(torch.zeros(6)),
    "grad": lambda module, x, _: torch.func.grad(lambda x: module(x).square().sum())(x),
    "jacrev": lambda module, x, _: torch.func.jacrev(lambda x: module(x).square().sum((0, 2, 3))[:3])(x),
    "vmap": lambda module, x, tangent: torch.vmap(module)(torch.stack([x, tangent])),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode calls it
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_the_kernels_cannot_differentiate_torch_does(way: Callable[[PSA, Tensor, Tensor], Tensor]) -> None:
    module, x, tangent = PSA(64).requires_grad_(False), torch.randn(1, 64, 5, 6), torch.randn(1, 64, 5, 6)
    found, expected = in_both(lambda: way(module, x, tangent))
    close(found, expected)
    with (
        kernels.use("native"),
        pytest.raises(
            ValueError, match=r"cannot compute this layer: (a transform of torch\.func|.* carries a tangent)"
        ),
    ):
        way(module, x, tangent)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_jvp_is_the_slope_along_the_tangent() -> None:
    module, x, tangent = PSA(64), torch.randn(1, 64, 5, 6), torch.randn(1, 64, 5, 6)
    slope = torch.func.jvp(module, (x,), (tangent,))[1]
    exact, step = module.double(), 1e-6
    difference = (exact(x.double() + step * tangent) - exact(x.double() - step * tangent)) / (2 * step)
    close(slope, difference.float())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("split", "groups"), [(False, (1, 4, 8, 16)), (True, (4, 8, 16, 16))])
def test_batched_gradients_are_those_of_one_after_the_other(
    split: bool, groups: tuple[int, ...], ordered: bool
) -> None:
    x = torch.randn(2, 64, 7, 6, requires_grad=True)
    weights = [
        torch.randn(16, (16 if split else 64) // count, size, size, requires_grad=True)
        for size, count in zip((3, 5, 7, 9), groups, strict=True)
    ]
    features, sums = kernels.pyramid_convolution(x, weights, groups, 2, split, ordered)
    targets = torch.stack([features.square().sum(), sums.square().sum(), (features[:, 5].sum() * sums[0, 3])])
    inputs = [x, *weights]
    single = [torch.autograd.grad(target, inputs, retain_graph=True) for target in targets]
    batched = torch.autograd.grad(targets, inputs, torch.eye(3), is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda row: torch.autograd.grad(targets, inputs, row, retain_graph=True))(torch.eye(3))
    for row, expected in enumerate(single):
        for found in (batched, mapped):
            for value, wanted in zip(found, expected, strict=True):
                # A branch that a target does not touch gets zeros.
                torch.testing.assert_close(value[row], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
