"""The native kernels against float64 ``conv2d``, on every instruction set of this processor."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import epsanet.network.epsanet  # noqa: F401 - registers the variants
from epsanet import kernels
from epsanet.network.psa import SPC, fit_groups

pytestmark = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")

FORWARD_ERROR, GRADIENT_ERROR = 1e-6, 1e-5


class Layer(NamedTuple):
    in_channels: int
    out_channels: int
    kernel_sizes: tuple[int, ...]
    groups: tuple[int, ...]
    stride: int
    split: bool


@functools.cache
def registered_layers() -> list[Layer]:
    layers = set()
    for name in timm.list_models("epsanet*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, SPC):
                convs = list(module.branches)
                in_channels = convs[0].in_channels * (len(convs) if module.mode == "split" else 1)
                out_channels = sum(conv.out_channels for conv in convs)
                sizes = tuple(conv.kernel_size[0] for conv in convs)
                groups = tuple(conv.groups for conv in convs)
                stride = convs[0].stride[0]
                layers.add(Layer(in_channels, out_channels, sizes, groups, stride, module.mode == "split"))
    return sorted(layers)


# What "amx" does of its own are 1×1 convolutions; all else it takes from "avx512".
BRANCH_SETS = [name for name in kernels.instruction_sets() if name != "amx"]


@pytest.fixture(params=BRANCH_SETS)
def branch_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.instruction_set()
    kernels.set_instruction_set(request.param)
    yield request.param
    kernels.set_instruction_set(before)


def relative_error(value: Tensor, reference: Tensor) -> float:
    scale = reference.norm().item()
    return (value.double() - reference).norm().item() / scale if scale else value.norm().item()


def branch_convolutions(x: Tensor, weights: Sequence[Tensor], layer: Layer) -> Tensor:
    inputs = x.chunk(len(weights), dim=1) if layer.split else (x,) * len(weights)
    return torch.cat(
        [
            F.conv2d(part, weight, None, layer.stride, weight.shape[-1] // 2, 1, count)
            for part, weight, count in zip(inputs, weights, layer.groups, strict=True)
        ],
        dim=1,
    )


def make_weights(layer: Layer) -> list[Tensor]:
    branches = len(layer.groups)
    seen = layer.in_channels // (branches if layer.split else 1)
    return [
        torch.randn(layer.out_channels // branches, seen // count, size, size)
        for size, count in zip(layer.kernel_sizes, layer.groups, strict=True)
    ]


def check_against_float64(layer: Layer, batch: int, height: int, width: int, together: bool = False) -> None:
    """Compare values and gradients; ``together`` where a gradient may be one number, which can cancel to nothing."""
    x, weights = torch.randn(batch, layer.in_channels, height, width), make_weights(layer)
    inputs = [x.requires_grad_(), *(weight.requires_grad_() for weight in weights)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    features, sums = kernels.pyramid_convolution(x, weights, layer.groups, layer.stride, layer.split)
    reference = branch_convolutions(exact[0], exact[1:], layer)
    assert relative_error(features, reference) < FORWARD_ERROR
    assert relative_error(sums, reference.sum((2, 3))) < GRADIENT_ERROR
    assert features.is_contiguous(memory_format=torch.channels_last)

    dy, dsums = torch.randn_like(features), torch.randn_like(sums)
    gradients = torch.autograd.grad([features, sums], inputs, [dy, dsums])
    references = torch.autograd.grad(
        [reference, reference.sum((2, 3))], exact, [dy.double().contiguous(), dsums.double()]
    )
    if together:
        gradients = (torch.cat([gradient.flatten() for gradient in gradients]),)
        references = (torch.cat([reference.flatten() for reference in references]),)
    for gradient, expected in zip(gradients, references, strict=True):
        assert relative_error(gradient, expected) < GRADIENT_ERROR


@pytest.mark.parametrize("layer", registered_layers(), ids=str)
@pytest.mark.usefixtures("branch_instruction_set")
def test_every_layer_of_every_variant_agrees_with_float64(layer: Layer) -> None:
    torch.manual_seed(0)
    size = (9, 11) if layer.in_channels <= 256 else (7, 7)
    check_against_float64(layer, 2, *size)


@pytest.mark.parametrize("layer", [layer for layer in registered_layers() if layer.in_channels <= 32], ids=str)
@pytest.mark.usefixtures("branch_instruction_set")
def test_narrow_layers_agree_when_lanes_are_images(layer: Layer) -> None:
    torch.manual_seed(0)
    check_against_float64(layer, 19, 8, 7)


@pytest.mark.parametrize("size", [(56, 56), (33, 62), (1, 1), (2, 70), (70, 2), (4, 4)], ids=str)
@pytest.mark.usefixtures("branch_instruction_set")
def test_sizes_from_one_pixel_to_many_bands_agree(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check_against_float64(Layer(64, 64, (3, 5, 7, 9), (1, 4, 8, 16), 1, False), 1, *size)
    check_against_float64(Layer(16, 16, (3, 5, 7, 9), (1, 4, 4, 4), 1, False), 9, *size)


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
@pytest.mark.usefixtures("branch_instruction_set")
def test_maps_as_high_as_the_kernel_and_narrower_agree(kernel_size: int) -> None:
    """As many taps as whole rows of the kernel would have, but of rows that are not whole."""
    torch.manual_seed(0)
    for width in range(1, kernel_size + 1):
        for batch in (1, 9):
            check_against_float64(Layer(2, 2, (kernel_size,), (1,), 1, False), batch, kernel_size, width)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_used", [1, 2, 3, 4])
def test_batches_of_1_to_33_agree_on_any_number_of_threads(threads_used: int) -> None:
    torch.manual_seed(threads_used)
    torch.set_num_threads(threads_used)
    for batch in range(threads_used, 34, 4):
        check_against_float64(Layer(32, 32, (3, 5, 7, 9), (1, 4, 8, 8), 1, False), batch, 8, 8)
        check_against_float64(Layer(64, 64, (3, 5, 7, 9), (1, 4, 8, 16), 2, False), batch, 10, 9)


@pytest.mark.usefixtures("branch_instruction_set", "threads")
def test_one_image_whose_result_channels_are_shared_by_four_threads_agrees() -> None:
    """A thread's sixteen channels are not neighbours in the natural order."""
    torch.manual_seed(0)
    torch.set_num_threads(4)
    check_against_float64(Layer(512, 512, (3, 5, 7, 9), (1, 4, 8, 16), 1, False), 1, 7, 7)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    branches = draw(st.integers(1, 4))
    split = draw(st.booleans())
    unit = draw(st.sampled_from([1, 3, 4, 8, 16, 20]))
    in_channels = branches * unit * draw(st.integers(1, 2))
    out_channels = branches * unit * draw(st.integers(1, 2))
    wanted = draw(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=branches, max_size=branches))
    groups = fit_groups(wanted, in_channels, out_channels, "split" if split else "multiplex")
    sizes = draw(st.lists(st.sampled_from([1, 3, 5, 7, 9, 11]), min_size=branches, max_size=branches))
    return Layer(in_channels, out_channels, tuple(sizes), tuple(groups), draw(st.integers(1, 3)), split)


@given(
    layer=layers(),
    batch=st.sampled_from([1, 2, 3, 8, 17]),
    height=st.integers(1, 13),
    width=st.integers(1, 19),
    name=st.sampled_from(BRANCH_SETS or ["none"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_layers_agree_with_float64(
    layer: Layer, batch: int, height: int, width: int, name: str, seed: int
) -> None:
    torch.manual_seed(seed)
    before = kernels.instruction_set()
    kernels.set_instruction_set(name)
    try:
        check_against_float64(layer, batch, height, width, together=True)
    finally:
        kernels.set_instruction_set(before)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.usefixtures("branch_instruction_set", "threads")
def test_repeated_runs_give_the_same_bits(batch: int) -> None:
    """Also when threads race; how many they are changes nothing but the order in which weight gradients are summed."""
    torch.manual_seed(0)
    for layer in (
        Layer(64, 64, (3, 5, 7, 9), (1, 4, 8, 16), 1, False),
        Layer(16, 16, (3, 5, 7, 9), (1, 4, 4, 4), 1, False),
    ):
        x = torch.randn(batch, layer.in_channels, 20, 20, requires_grad=True)
        weights = [weight.requires_grad_() for weight in make_weights(layer)]
        alone: list[Tensor] = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs = []
            for _ in range(3):
                features, sums = kernels.pyramid_convolution(x, weights, layer.groups, 1, False)
                dy, dsums = 2 * features.detach(), torch.ones_like(sums)
                runs.append([features, sums, *torch.autograd.grad([features, sums], [x, *weights], [dy, dsums])])
            alone = alone or runs[0]
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], alone[:3], strict=True))


@pytest.mark.usefixtures("instruction_set", "threads")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 7, 7), (2, 1, 1), (3, 9, 14), (17, 5, 3)], ids=str)
@pytest.mark.parametrize("channels", [(3, 5), (64, 256), (40, 100), (515, 48), (1100, 33)], ids=str)
def test_pointwise_convolutions_agree_with_float64_on_any_number_of_threads(
    channels: tuple[int, int], shape: tuple[int, int, int], stride: int
) -> None:
    (seen, made), (batch, height, width) = channels, shape
    x, weight, bias = torch.randn(batch, seen, height, width), torch.randn(made, seen, 1, 1), torch.randn(made)
    packed = kernels.pack_for_inference([weight], seen, [1], False)
    plain = F.conv2d(x.double(), weight.double(), bias.double(), stride)
    residual = torch.randn(plain.shape)
    for added, relu in ((None, False), (residual, True)):
        expected = plain if added is None else plain + added.double()
        results = []
        for threads_used in (1, 2, 3):
            torch.set_num_threads(threads_used)
            results.append(kernels.pointwise_convolution(x, packed, bias, added, stride, relu))
        assert relative_error(results[0], expected.relu() if relu else expected) < FORWARD_ERROR
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("instruction_set")
def test_a_nan_passes_through_a_pointwise_convolution_with_relu() -> None:
    x, weight = torch.ones(1, 3, 1, 2), torch.ones(18, 3, 1, 1)
    x[0, 1, 0, 1] = torch.nan
    packed = kernels.pack_for_inference([weight], 3, [1], False)
    result = kernels.pointwise_convolution(x, packed, torch.zeros(18), None, 1, True)
    assert torch.equal(result[..., 0], torch.full((1, 18, 1), 3.0))
    assert result[..., 1].isnan().all()


@pytest.mark.usefixtures("instruction_set")
def test_a_pointwise_convolution_keeps_every_bit_of_a_float() -> None:
    """Of sources and weights: numbers with all 24 significant bits set or not, times one, must come out as they are."""
    torch.manual_seed(0)
    bits = (
        (torch.rand(40, 40, 1, 1) + 1)
        * 2.0 ** torch.randint(-20, 21, (40, 40, 1, 1))
        * (torch.randn(40, 40, 1, 1)).sign()
    )
    one = torch.eye(40)[:, :, None, None]
    for x, weight in ((bits, one), (one, bits.transpose(0, 1).contiguous())):
        packed = kernels.pack_for_inference([weight], 40, [1], False)
        assert torch.equal(kernels.pointwise_convolution(x, packed, torch.zeros(40), None, 1, False), bits)


@pytest.mark.usefixtures("branch_instruction_set")
def test_the_lane_order_is_a_permutation_that_the_kernels_undo() -> None:
    torch.manual_seed(0)
    for layer in registered_layers():
        if layer.in_channels > 256 or layer.stride != 1:
            continue
        into = torch.tensor(kernels.input_order(layer.in_channels, layer.groups, layer.split))
        out = torch.tensor(kernels.output_order(layer.out_channels, layer.groups, layer.split))
        assert into.sort().values.tolist() == list(range(layer.in_channels))
        assert out.sort().values.tolist() == list(range(layer.out_channels))
        x, weights = torch.randn(2, layer.in_channels, 6, 5), make_weights(layer)
        features, sums = kernels.pyramid_convolution(x, weights, layer.groups, 1, layer.split)
        ordered = kernels.pyramid_convolution(x[:, into], weights, layer.groups, 1, layer.split, ordered=True)
        torch.testing.assert_close(ordered[0], features[:, out], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ordered[1], sums[:, out], rtol=1e-5, atol=1e-4)


def test_the_order_of_the_published_groups_is_the_digits_reversed() -> None:
    order = kernels.input_order(64, (1, 4, 8, 16), split=False)
    expected = [
        (4 * g4 + 2 * b1 + b0) * 4 + j for j in range(4) for b0 in range(2) for b1 in range(2) for g4 in range(4)
    ]
    assert list(order) == expected
