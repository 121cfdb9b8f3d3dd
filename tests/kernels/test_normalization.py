"""Batch norm in training, with attention, convolution, residual sum and ReLU, against torch in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from epsanet import kernels
from epsanet.kernels import choice

pytestmark = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")

EPSILON = 1e-5


class Case(NamedTuple):
    """What stands around a norm; ``results`` are those of a convolution, 0: none."""

    channels: int
    results: int = 0
    residual: bool = False
    relu: bool = True
    stride: int = 0
    attention: bool = False


CASES = [
    Case(1),
    Case(3, relu=False),
    Case(8, residual=True),
    Case(24),
    Case(100, residual=True),
    Case(16, 64, residual=True),
    Case(64, 16, stride=1),
    Case(64, 80, stride=2),
    Case(128, 96, relu=False),
    Case(592, 64, stride=3),
    Case(5, attention=True),
    Case(24, relu=False, attention=True),
    Case(144, residual=True, attention=True),
]


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def make_inputs(case: Case, batch: int, height: int, width: int) -> dict[str, Tensor]:
    made = case.results or case.channels
    inputs = {
        "x": channels_last(batch, case.channels, height, width) * 2 + torch.randn(case.channels, 1, 1),
        "weight": torch.randn(made),
        "bias": torch.randn(made),
    }
    if case.results:
        inputs["matrix"] = torch.randn(case.results, case.channels, 1, 1) / case.channels**0.5
    if case.residual:
        inputs["residual"] = channels_last(batch, made, height, width)
    if case.attention:
        inputs["attention"] = torch.rand(batch, case.channels)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def call(case: Case, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results (y, mean, variance, shortcut), and those of them that have gradients."""
    results = kernels.batch_norm(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        EPSILON,
        case.relu,
        inputs.get("matrix"),
        inputs.get("residual"),
        case.stride,
        inputs.get("attention"),
    )
    return list(results), [results[0], results[3]] if case.stride else [results[0]]


def compute(case: Case, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of all inputs for fixed gradients of y and shortcut."""
    results, outputs = call(case, inputs)
    return results, list(torch.autograd.grad(outputs, list(inputs.values()), slopes(outputs)))


def slopes(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]


def compute_exactly(case: Case, inputs: dict[str, Tensor], sign: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The same in float64, from formulas; ReLU passes where ``sign`` is positive, so that rounding flips none."""
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    z = F.conv2d(exact["x"], exact["matrix"]) if case.results else exact["x"]
    z = z * exact["attention"][:, :, None, None] if case.attention else z
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    normed = (z - mean[:, None, None]) / (variance[:, None, None] + EPSILON).sqrt()
    y = normed * exact["weight"][:, None, None] + exact["bias"][:, None, None]
    y = y + exact["residual"] if case.residual else y
    y = y * (sign > 0) if case.relu else y
    shortcut = exact["x"][:, :, :: case.stride, :: case.stride] if case.stride else exact["x"].new_empty(0)
    outputs = [y, shortcut] if case.stride else [y]
    return [y, mean, variance, shortcut], list(torch.autograd.grad(outputs, list(exact.values()), slopes(outputs)))


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.detach().double() - reference.detach()).norm() / reference.detach().norm().clamp_min(1e-12))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", [(2, 3, 2), (5, 7, 3), (33, 9, 11)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree_with_float64(case: Case, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(case, *size)
    results, gradients = compute(case, inputs)
    exact_results, exact_gradients = compute_exactly(case, inputs, results[0])
    for value, expected in zip(results, exact_results, strict=True):
        assert error(value, expected) < 1e-6
    for name, value, expected in zip(inputs, gradients, exact_gradients, strict=True):
        assert error(value, expected) < 1e-5, name


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    "case", [Case(64, residual=True), Case(64, 64, stride=2), Case(16, 48), Case(48, attention=True)], ids=str
)
def test_tensors_too_large_for_a_cache_agree_too(case: Case) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(case, 23, 81, 50)
    results, gradients = compute(case, inputs)
    assert results[0].numel() > 4 * 2**20
    exact_results, exact_gradients = compute_exactly(case, inputs, results[0])
    for value, expected in zip((*results, *gradients), (*exact_results, *exact_gradients), strict=True):
        assert error(value, expected) < 1e-5


def test_a_mean_far_from_zero_costs_the_variance_no_digits() -> None:
    torch.manual_seed(0)
    x = channels_last(8, 16, 32, 32) + 3000
    _, mean, variance, _ = kernels.batch_norm(x, torch.ones(16), torch.zeros(16), EPSILON, relu=False)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    # The mean of the squares less the square of the mean would be off by more than the variance.
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("instruction_set", "threads")
@pytest.mark.parametrize(
    "case", [Case(24, attention=True), Case(32, 64, residual=True), Case(64, 64, stride=2)], ids=str
)
def test_repeated_runs_give_the_same_bits_on_any_number_of_threads(case: Case) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(case, 9, 24, 17)
    found = []
    for count in (1, 2, 3, 4, 2):
        torch.set_num_threads(count)
        results, gradients = compute(case, inputs)
        found.append([*results, *gradients])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("case", [Case(16), Case(16, 64, residual=True)], ids=str)
def test_a_nan_and_an_infinity_are_not_hidden(case: Case) -> None:
    inputs = make_inputs(case, 4, 5, 5)
    for value in (torch.nan, torch.inf):
        broken = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        broken["x"][1, 3, 2, 2] = value
        broken = {name: tensor.requires_grad_() for name, tensor in broken.items()}
        results, gradients = compute(case, broken)
        reached = slice(3, 4) if not case.results else slice(None)
        assert results[0][:, reached].isnan().any()
        assert results[2][reached].isnan().all()
        assert gradients[0].isnan().any()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("case", [Case(24), Case(16, 32, residual=True), Case(24, attention=True)], ids=str)
def test_opcheck_finds_nothing_wrong(case: Case) -> None:
    inputs = {name: value.detach() for name, value in make_inputs(case, 2, 5, 4).items()}
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    attention, matrix, residual = inputs.get("attention"), inputs.get("matrix"), inputs.get("residual")
    arguments = (x, weight, bias, EPSILON, case.relu, attention, matrix, residual)
    torch.library.opcheck(torch.ops.epsanet.batch_norm.default, arguments)
    y, mean, variance, z = torch.ops.epsanet.batch_norm(*arguments)
    kept = (attention, matrix, None if matrix is None else z, None if residual is None else y)
    torch.library.opcheck(
        torch.ops.epsanet.batch_norm_gradient.default,
        (torch.randn_like(y), None, 0, x, weight, bias, EPSILON, case.relu, *kept, mean, variance),
    )


@pytest.mark.parametrize(
    "case", [Case(8, residual=True, attention=True), Case(64, 32, stride=2), Case(16, 16, stride=1)], ids=str
)
def test_batched_gradients_are_those_of_one_after_the_other(case: Case) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(case, 3, 6, 5)
    _, outputs = call(case, inputs)
    many = [torch.randn(3, *output.shape) for output in outputs]
    together = torch.autograd.grad(outputs, list(inputs.values()), many, retain_graph=True, is_grads_batched=True)
    for number in range(3):
        each = [part[number] for part in many]
        alone = torch.autograd.grad(outputs, list(inputs.values()), each, retain_graph=True)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_raise_and_name_the_way_out() -> None:
    inputs = make_inputs(Case(16, 32), 2, 4, 4)
    y, *_ = kernels.batch_norm(
        inputs["x"], inputs["weight"], inputs["bias"], EPSILON, relu=True, matrix=inputs["matrix"]
    )
    (first,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(ValueError, match=r"gradients of gradients.*reference"):
        first.sum().backward()


def test_parts_that_do_not_go_together_raise() -> None:
    x, ones, matrix = channels_last(2, 16, 4, 4), torch.ones(16), torch.randn(16, 16, 1, 1)
    with pytest.raises(ValueError, match="relu=True"):
        kernels.batch_norm(x, ones, ones, EPSILON, relu=False, residual=x)
    with pytest.raises(ValueError, match="shortcut_stride=0"):
        kernels.batch_norm(x, ones, ones, EPSILON, relu=True, shortcut_stride=1)
    with pytest.raises(ValueError, match="leave one of them out"):
        kernels.batch_norm(x, ones, ones, EPSILON, relu=True, matrix=matrix, attention_NC=torch.rand(2, 16))


def test_buffers_of_the_wrong_type_shape_or_layout_raise() -> None:
    x, matrix, row, wide = torch.randn(2, 5, 5, 16), torch.randn(32, 16), torch.ones(16), torch.ones(32)
    z = torch.empty(2, 5, 5, 32)
    forward: dict[str, Any] = {
        "x": x,
        "factors": None,
        "matrix": matrix,
        "z": z,
        "weight": wide,
        "bias": wide,
        "residual": None,
        "epsilon": EPSILON,
        "relu": True,
        "y": torch.empty_like(z),
        "mean": torch.empty(32),
        "variance": torch.empty(32),
        "threads": 1,
    }
    choice.native.batch_norm(**forward)
    backward: dict[str, Any] = {
        **{
            name: forward[name]
            for name in ("x", "factors", "matrix", "z", "weight", "bias", "epsilon", "relu", "threads")
        },
        "dy": torch.randn_like(z),
        "dshortcut": torch.randn(2, 3, 3, 16),
        "shortcut_stride": 2,
        "y": None,
        "mean": forward["mean"],
        "variance": forward["variance"],
        "dx": torch.empty_like(x),
        "dfactors": None,
        "dmatrix": torch.empty_like(matrix),
        "dresidual": None,
        "dweight": torch.empty(32),
        "dbias": torch.empty(32),
    }
    choice.native.batch_norm_gradient(**backward)
    wrong_forward: list[dict[str, Any]] = [
        {"x": torch.randn(0, 5, 5, 16), "z": torch.empty(0, 5, 5, 32), "y": torch.empty(0, 5, 5, 32)},
        {"z": None},
        {"factors": torch.ones(2, 32)},
        {"matrix": None, "z": None, "weight": row, "bias": row, "y": x.clone(), "factors": torch.ones(2, 8)},
        {"matrix": torch.randn(16, 32)},
        {"matrix": torch.randn(24, 16)},
        {"z": x},
        {"weight": row},
        {"bias": row},
        {"y": x.clone()},
        {"residual": x},
        {"mean": row},
        {"variance": row},
    ]
    wrong_backward: list[dict[str, Any]] = [
        {"dy": x},
        {"dshortcut": torch.randn(2, 2, 3, 16)},
        {"dshortcut": torch.randn(2, 3, 3, 32)},
        {"shortcut_stride": 0},
        {"dx": torch.empty_like(z)},
        {"dmatrix": None},
        {"dfactors": torch.empty(2, 32)},
        {"dmatrix": torch.empty(16, 32)},
        {"y": z},
        {"y": z, "dresidual": x.clone()},
        {"dweight": torch.empty(16)},
        {"dbias": torch.empty(16)},
        {"mean": row},
    ]
    for wrong in wrong_forward:
        with pytest.raises(ValueError, match=r"must|goes with"):
            choice.native.batch_norm(**{**forward, **wrong})
    for wrong in wrong_backward:
        with pytest.raises(ValueError, match=r"must|goes with"):
            choice.native.batch_norm_gradient(**{**backward, **wrong})
    for name in ("x", "y", "z", "matrix", "weight"):
        right = forward[name]
        for bad in (right.double(), torch.stack([right, right], -1)[..., 0]):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                choice.native.batch_norm(**{**forward, name: bad})
