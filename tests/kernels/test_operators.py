"""The kernels as torch operators and inside ``PSA``: compile, export, autograd, caching, choice, wrong input."""

from __future__ import annotations

import copy
import gc
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from epsanet import kernels
from epsanet.kernels import choice
from epsanet.network.psa import PSA

needs_native = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")

GROUPS = [1, 4, 8, 16]


def make_weights(channels: int = 64) -> list[Tensor]:
    return [
        torch.randn(channels // 4, channels // count, size, size, requires_grad=True)
        for size, count in zip((3, 5, 7, 9), GROUPS, strict=True)
    ]


def output_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


@needs_native
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_psa_gives_the_same_values_and_gradients_natively(stride: int, split: bool) -> None:
    torch.manual_seed(0)
    groups = (4, 8, 16, 16) if split else tuple(GROUPS)
    module = PSA(64, 128, groups=groups, stride=stride, spc="split" if split else "multiplex")
    x = torch.randn(3, 64, 14, 13)
    with kernels.use("native"):
        native = output_and_gradients(module, x)
    with kernels.use("reference"):
        reference = output_and_gradients(module, x)
        exact = output_and_gradients(copy.deepcopy(module).double(), x.double())
    torch.testing.assert_close(native[0], reference[0], rtol=1e-6, atol=1e-4)
    # All gradients as one vector: those of the biases before the softmax nearly cancel, in either implementation.
    value, expected = (torch.cat([part.double().flatten() for part in parts[1:]]) for parts in (native, exact))
    assert (value - expected).norm() <= 1e-5 * expected.norm()


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("batch", [2, 9])
def test_opcheck_finds_nothing_wrong(batch: int) -> None:
    x = torch.randn(batch, 64, 7, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.epsanet.pyramid_convolution.default, (x, make_weights(), GROUPS, 2, False, False))
    weights = [weight.detach() for weight in make_weights()]
    dy, dsums = torch.randn(batch, 64, 7, 6), torch.randn(batch, 64)
    torch.library.opcheck(
        torch.ops.epsanet.pyramid_convolution_input_gradient.default,
        (dy, dsums, weights, 7, 6, 64, GROUPS, 1, False, False),
    )
    torch.library.opcheck(
        torch.ops.epsanet.pyramid_convolution_weight_gradient.default,
        (x.detach(), dy, dsums, weights, GROUPS, 1, False, False),
    )


@needs_native
def test_compile_does_not_break_the_graph_and_trains_alike() -> None:
    torch.manual_seed(0)
    module, x = PSA(64), torch.randn(2, 64, 8, 8)
    with kernels.use("native"):
        eager = output_and_gradients(module, x)
        torch._dynamo.reset()
        compiled = output_and_gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    for value, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_torchs_flop_counter_sees_as_much_work_in_either_implementation() -> None:
    module, x = PSA(64), torch.randn(2, 64, 9, 9)
    counts = {}
    for chosen in ("native", "reference"):
        with kernels.use(chosen), FlopCounterMode(display=False) as counter:
            module(x)
        counts[chosen] = counter.get_total_flops()
    assert counts["native"] == counts["reference"] > 0


@needs_native
def test_a_branch_that_is_watched_or_wrapped_is_called() -> None:
    module, x, seen = PSA(64), torch.randn(2, 64, 9, 9), []
    module.spc.branches[2].register_forward_hook(lambda *_: seen.append("called"))
    module(x)
    assert seen == ["called"]


@needs_native
def test_an_exported_psa_calls_the_operator_and_takes_other_batches() -> None:
    torch.manual_seed(0)
    module = PSA(64).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (torch.randn(3, 64, 9, 9),), dynamic_shapes=({0: batch},))
    assert any("epsanet.pyramid_convolution" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 64, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), module(x))


@needs_native
def test_an_optimiser_step_between_two_forwards_is_never_missed() -> None:
    torch.manual_seed(0)
    module, x = PSA(64), torch.randn(2, 64, 8, 8)
    for optimiser in (torch.optim.SGD(module.parameters(), 0.1), torch.optim.AdamW(module.parameters(), fused=True)):
        for _ in range(2):
            with kernels.use("native"):
                module(x).square().mean().backward()
                optimiser.step()
                optimiser.zero_grad()
                native = module(x)
            with kernels.use("reference"):
                torch.testing.assert_close(native, module(x), rtol=1e-5, atol=1e-5)


@needs_native
def test_loaded_weights_and_inference_tensors_are_never_stale() -> None:
    torch.manual_seed(0)
    module, other, x = PSA(64), PSA(64), torch.randn(2, 64, 8, 8)
    with torch.no_grad(), kernels.use("native"):
        module(x)
        module.load_state_dict(other.state_dict())
        torch.testing.assert_close(module(x), other(x))
    with torch.inference_mode(), kernels.use("native"):
        weights = [weight.clone() for weight in make_weights()]
        before = kernels.pyramid_convolution(x, weights, GROUPS, 1, False)[0]
        for weight in weights:
            weight.mul_(2)
        torch.testing.assert_close(kernels.pyramid_convolution(x, weights, GROUPS, 1, False)[0], 2 * before)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="pages of a process as Linux counts them")
def test_memory_does_not_grow_with_calls() -> None:
    x = torch.randn(1, 64, 1, 1, requires_grad=True)
    weights = [weight.requires_grad_() for weight in make_weights()]

    def run(calls: int) -> int:
        for _ in range(calls // 3):  # forward, input gradient, weight gradient
            kernels.pyramid_convolution(x, weights, GROUPS, 1, False)[0].sum().backward()
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # resident

    with kernels.use("native"):
        before = run(1_000)
        grown = run(10_000) - before
    assert grown < 8 * 2**20  # benchmarks/memory.py makes 100,000 calls


@needs_native
def test_layers_that_the_kernels_cannot_compute_fall_back_or_raise_the_reason() -> None:
    x = torch.randn(2, 24, 6, 6)
    dilated, odd_groups = PSA(64, dilation=2), PSA(24, groups=(1, 2, 3, 6))
    with kernels.use("native"):
        with pytest.raises(ValueError, match="dilation is 2"):
            dilated(torch.randn(1, 64, 6, 6))
        with pytest.raises(ValueError, match="not all 1, 2, 4, 8"):
            odd_groups(x)
        with pytest.raises(ValueError, match=r"torch\.float64"):
            PSA(64).double()(torch.randn(1, 64, 6, 6, dtype=torch.float64))
        with pytest.raises(ValueError, match="'meta'"):
            PSA(64, device="meta")(torch.randn(1, 64, 6, 6, device="meta"))
        with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            PSA(64)(torch.randn(1, 64, 6, 6))
    with kernels.use("auto"):
        automatic = odd_groups(x)
        assert PSA(64).bfloat16()(torch.randn(1, 64, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert PSA(64, device="meta")(torch.randn(1, 64, 6, 6, device="meta")).shape == (1, 64, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert PSA(64)(torch.randn(1, 64, 6, 6)).isfinite().all()
    with kernels.use("reference"):
        torch.testing.assert_close(automatic, odd_groups(x))


def test_the_choice_ends_with_its_block_and_unknown_ones_raise() -> None:
    before = choice.chosen()
    with kernels.use("reference"):
        assert choice.chosen() == "reference"
        with kernels.use("auto"):
            assert choice.chosen() == "auto"
        assert choice.chosen() == "reference"
    assert choice.chosen() == before
    with pytest.raises(ValueError, match="'auto' or 'native' or 'reference'"):
        kernels.use("fast")  # type: ignore[arg-type]
    if kernels.available():
        with pytest.raises(ValueError, match="not on this processor"):
            kernels.set_instruction_set("avx1024")


@needs_native
def test_environment_variables_choose_kernels_and_instruction_set() -> None:
    names = kernels.instruction_sets()
    program = f"""
import os, sys, torch
for name in {names}:
    child = os.fork()
    if not child:
        os.environ["EPSANET_KERNELS_ISA"] = name
        from epsanet import kernels
        from epsanet.kernels import choice
        print(kernels.instruction_set(), choice.chosen())
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, name
"""
    environment = {"EPSANET_KERNELS": "native", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"{name} native" for name in names]


@needs_native
def test_training_leaves_no_nanobind_leak_behind() -> None:
    program = (
        "import torch; from epsanet.network.psa import PSA; from epsanet import kernels; kernels.use('native');"
        "PSA(64)(torch.randn(2, 64, 8, 8)).sum().backward(); print('done')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "done"
    assert "nanobind" not in run.stderr


def test_a_missing_library_is_said_once_and_conv2d_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = PSA(64), torch.randn(2, 64, 8, 8)
    with kernels.use("reference"):
        expected = module(x)
    monkeypatch.setattr(choice, "native", None)
    monkeypatch.setattr(choice, "_missing", "no module", raising=False)
    monkeypatch.setattr(choice, "_said_missing", False)
    with kernels.use("auto"):
        with pytest.warns(UserWarning, match="not in this installation"):
            first = module(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = module(x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)
    with pytest.raises(ValueError, match="not in this installation"):
        kernels.use("native")


@needs_native
def test_gradients_of_gradients_raise_and_name_the_way_out() -> None:
    x = torch.randn(1, 64, 6, 6, requires_grad=True)
    module = PSA(64)
    with kernels.use("native"):
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(ValueError, match=r"epsanet\.kernels\.use\('reference'\)"):
            gradient.square().sum().backward()


@needs_native
def test_buffers_of_the_wrong_type_shape_or_layout_raise() -> None:
    native = choice.native
    layer = native.Layer(16, 16, [3], [1], 1, False, list(range(16)), list(range(16)))
    packed = torch.zeros(layer.packed_size(False))
    x, y, sums = torch.zeros(2, 5, 5, 16), torch.zeros(2, 5, 5, 16), torch.zeros(2, 16)
    layer.forward(x, packed, y, sums, False, 1)
    for wrong in (
        (x.double(), packed, y, sums),
        (x.permute(0, 3, 1, 2), packed, y, sums),
        (x[0], packed, y, sums),
        (x, packed.int(), y, sums),
        (x.to("meta"), packed, y, sums),
    ):
        with pytest.raises((TypeError, BufferError, NotImplementedError)):
            layer.forward(*wrong, False, 1)
    for wrong in (
        (x, packed[:-1], y, sums),
        (x[:1], packed, y, sums),
        (x, packed, y[:, :4].contiguous(), sums),
        (x, packed, y, sums[:1]),
        (torch.zeros(2, 5, 5, 8), packed, y, sums),
    ):
        with pytest.raises(ValueError, match=r"must|size"):
            layer.forward(*wrong, False, 1)
    with pytest.raises(ValueError, match="D × C"):
        layer.pack([torch.zeros(16, 8, 3, 3)], packed, False, 1)
    for order in (list(range(15)), [*range(15), 16], [-1, *range(1, 16)]):
        with pytest.raises(ValueError, match="order"):
            native.Layer(16, 16, [3], [1], 1, False, order, list(range(16)))
    with pytest.raises(ValueError, match="groups"):
        native.Layer(16, 16, [3], [3], 1, False, list(range(16)), list(range(16)))


def test_layers_that_share_their_first_weight_do_not_take_each_others_packed_weights() -> None:
    torch.manual_seed(5)
    x = torch.randn(2, 32, 9, 7)
    first, *others = (torch.randn(8, 32 // groups, size, size) for size, groups in ((3, 1), (5, 2), (5, 2), (5, 4)))
    for _ in range(2):  # the second time from the cache
        for second, groups in zip(others, (2, 2, 4), strict=True):
            features, _ = kernels.pyramid_convolution(x, [first, second], [1, groups], 1, False)
            expected = torch.cat([F.conv2d(x, first, padding=1), F.conv2d(x, second, padding=2, groups=groups)], 1)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
