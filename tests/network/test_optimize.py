"""Inference networks: the same logits, and what may be folded is."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import io
import shutil
import sys
import threading

import pytest
import timm
import torch
from torch import Tensor, nn
from trained import trained_looking

import epsanet.network.epsanet  # noqa: F401 - registers the variants
from epsanet import PSA, kernels, optimize
from epsanet.network.optimize import _Attention, _Chain, _NativeConvolution


def images(name: str, batch: int) -> Tensor:
    size = 32 if "tiny" in name else 64
    return torch.randn(batch, 3, size, size)


def check_same_logits(model: nn.Module, optimized: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    logits = optimized(x)
    assert (logits - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
    assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("name", timm.list_models("epsanet*"))
def test_every_variant_gives_the_same_logits_at_other_batches_and_sizes(name: str) -> None:
    model = trained_looking(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = optimize(model, images(name, 2))
    check_same_logits(model, optimized, images(name, 3))
    x = torch.randn(1, 3, 75, 50)
    check_same_logits(model, optimized, x.contiguous(memory_format=torch.channels_last))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimized.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kernels.available():
        assert not any(isinstance(module, PSA) for module in optimized.modules())


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_bottleneck_blocks_keep_the_lane_order_between_their_convolutions() -> None:
    optimized = optimize(trained_looking("epsanet26_tiny"), images("epsanet26_tiny", 2))
    attentions = [module for module in optimized.modules() if isinstance(module, _Attention)]
    assert len(attentions) == 8
    assert all(attention.ordered and attention.relu for attention in attentions)


@pytest.mark.parametrize(
    "block_args", [{"softmax": "channels"}, {"spc": "split", "groups": (1, 1, 2, 4)}, {"groups": (1, 2, 2, 8)}], ids=str
)
def test_other_softmax_groups_and_branches_give_the_same_logits(block_args: dict[str, object]) -> None:
    model = trained_looking("epsanet14_tiny", block_args=block_args)
    check_same_logits(model, optimize(model, images("tiny", 2)), images("tiny", 4))


def test_dilated_stages_and_missing_kernels_keep_torchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_looking("epsanet14_tiny", output_stride=2)
    check_same_logits(model, optimize(model, images("tiny", 2)), images("tiny", 3))
    monkeypatch.setattr(kernels.choice, "native", None)
    monkeypatch.setattr(kernels.choice, "_missing", "no module", raising=False)
    monkeypatch.setattr(kernels.choice, "_said_missing", True)
    optimized = optimize(model, images("tiny", 2))
    assert any(isinstance(module, PSA) for module in optimized.modules())
    check_same_logits(model, optimized, images("tiny", 3))


@pytest.mark.parametrize("name", ["resnet18", "seresnet50", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_other_networks_get_what_applies(name: str) -> None:
    model = trained_looking(name)
    x = torch.randn(2, 3, 224 if "vit" in name else 64, 224 if "vit" in name else 64)
    check_same_logits(model, optimize(model, x), x)


def test_a_psa_whose_neighbours_are_shared_keeps_the_natural_order() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.psa, self.after = nn.Conv2d(3, 64, 1), PSA(64), nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            z = self.psa(y)
            return (self.after(z) + y + self.after(y)).mean((2, 3))

    model = Shared().eval()
    x = torch.randn(2, 3, 9, 9)
    check_same_logits(model, optimize(model, x), x)


def test_a_network_that_cannot_be_traced_is_still_served() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y if y.sum() > 0 else -y).mean((2, 3))

    model, x = Branching().eval(), torch.randn(2, 3, 9, 9)
    check_same_logits(model, optimize(model, x), x)


def test_models_that_are_not_float32_on_the_cpu_raise() -> None:
    with pytest.raises(ValueError, match=r"use model\.float\(\)\.cpu\(\)"):
        optimize(nn.Conv2d(3, 3, 1).double(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="example_input is"):
        optimize(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4, device="meta"))


def test_a_model_in_training_mode_stays_so_and_is_optimised_for_evaluation() -> None:
    model = trained_looking("epsanet14_tiny").train()
    model.get_submodule("bn1").eval()
    optimized = optimize(model, images("tiny", 2))
    assert model.training
    assert not model.get_submodule("bn1").training
    assert model.get_submodule("layer1.0.bn1").training
    check_same_logits(model.eval(), optimized, images("tiny", 2))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_inference_network_gives_the_same_logits_also_for_other_shapes() -> None:
    """Of one block: with more of them, the compiler has the same kernels to make more often."""
    whole = trained_looking("epsanet14_tiny")
    (block,) = whole.layer1
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(whole.feature_info[1]["num_chs"], 17)
    model = nn.Sequential(whole.conv1, whole.bn1, whole.act1, block, *head).eval()
    optimized = optimize(model, images("epsanet14_tiny", 4), compile=True)
    check_same_logits(model, optimized, images("epsanet14_tiny", 4))
    check_same_logits(model, optimized, torch.randn(3, 3, 40, 40))


def test_a_sum_that_broadcasts_is_left_as_it_is() -> None:
    class Broadcasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + self.pool(x)).mean((2, 3))

    model, x = Broadcasting().eval(), torch.randn(2, 3, 9, 9)
    check_same_logits(model, optimize(model, x), x)


def test_a_sum_that_broadcasts_only_at_other_sizes_is_left_as_it_is() -> None:
    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(x)
            return (y + self.conv(y.mean((2, 3), keepdim=True))).flatten(1)

    model = Context().eval()
    optimized = optimize(model, torch.randn(2, 3, 4, 4))  # maps of 1×1 there
    for size in (4, 9):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(optimized(x), model(x))


class Around(nn.Module):
    """A PSA module with what stands before and after it in a block; how they are called differs."""

    def __init__(self, calls: str = "") -> None:
        super().__init__()
        self.calls = calls
        self.before, self.other, self.psa = nn.Conv2d(3, 64, 1), nn.Conv2d(3, 64, 1), PSA(64)
        self.bn, self.relu, self.after = nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == "keyword":
            y = self.relu(input=self.bn(input=self.psa(x_NCHW=self.before(input=x))))
            return self.after(input=y).mean((2, 3))
        y = self.before(x)
        if self.calls == "twice":
            y = self.psa(y)
        z = self.after(self.relu(self.bn(self.psa(y))))
        if self.calls == "reader":
            z = z + self.after(self.other(x))
        if self.calls == "weight":
            z = z + nn.functional.conv2d(self.other(x), self.after.weight)
        return z.mean((2, 3))


@pytest.mark.parametrize("calls", ["", "twice", "reader", "weight", "keyword"])
def test_layers_may_be_called_twice_shared_and_called_by_keyword(calls: str) -> None:
    model, x = Around(calls).eval(), torch.randn(2, 3, 9, 9)
    optimized = optimize(model, x)
    check_same_logits(model, optimized, x)
    if kernels.available():
        ordered = [layer.ordered for layer in optimized.modules() if isinstance(layer, _Attention)]
        assert ordered == {"twice": [], "reader": [False], "weight": [False]}.get(calls, [True])


@pytest.mark.parametrize("watched", ["before", "psa", "psa.spc", "psa.spc.branches.1", "psa.se", "bn", "relu", "after"])
def test_a_layer_that_is_watched_is_still_called(watched: str) -> None:
    model, x, seen = Around().eval(), torch.randn(2, 3, 9, 9), []
    model.get_submodule(watched).register_forward_hook(lambda *_: seen.append(watched))
    optimized = optimize(model, x)
    seen.clear()
    optimized(x)
    assert seen == [watched] * (4 if watched == "psa.se" else 1)  # once a branch
    check_same_logits(model, optimized, x)


@pytest.mark.parametrize("watched", ["", "layer2", "layer1.0"])
def test_blocks_and_networks_that_are_watched_are_still_called_with_what_they_take(watched: str) -> None:
    model, x, seen = trained_looking("epsanet14_tiny"), images("tiny", 2), list[torch.Tensor]()
    model.get_submodule(watched).register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    optimized = optimize(model, x)
    if kernels.available():
        assert any(isinstance(module, _Attention) for module in optimized.modules()) == (watched != "")
    seen.clear()
    check_same_logits(model, optimized, x)
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2], rtol=1e-4, atol=1e-4)


def test_changed_branches_stay_as_they_are() -> None:
    x = torch.randn(2, 3, 9, 9)
    for branch in (
        nn.Conv2d(64, 16, 5, padding=2, groups=4),
        nn.Conv2d(64, 16, 5, padding=2, groups=4, bias=False, padding_mode="circular"),
        nn.Conv2d(64, 16, 5, padding=4, dilation=2, groups=4, bias=False),
        nn.Sequential(nn.Conv2d(64, 16, 5, padding=2, groups=4, bias=False)),
    ):
        model = Around().eval()
        model.psa.spc.branches[1] = branch
        with kernels.use("reference"), torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(optimize(model, x)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_another_default_type_or_device_changes_nothing(default: str) -> None:
    """Neither a step of training nor the optimised network; PyTorch's defaults are those of the caller."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False), PSA(64), nn.Conv2d(64, 8, 1, bias=False)).eval()
    x = images("tiny", 2)
    weights = list(model.parameters())
    with kernels.use("reference"):
        expected = model(x)
        gradients = torch.autograd.grad(expected.square().mean(), weights)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if default == "float64" else before)
    try:
        with torch.device("meta" if default == "meta" else "cpu"):
            found = torch.autograd.grad(model(x).square().mean(), weights)
            optimized = optimize(model, x)
            y = optimized(x)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip((*found, y), (*gradients, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, _Attention) for module in optimized.modules()) == kernels.available()


def test_an_empty_batch_gives_no_logits() -> None:
    for model in (Around().eval(), trained_looking("epsanet14_tiny"), trained_looking("resnet18")):
        x = images("tiny", 2)
        optimized = optimize(model, x)
        with torch.no_grad():
            assert optimized(x[:0]).shape == model(x[:0]).shape


def test_the_reference_has_none_of_the_kernels() -> None:
    model, x = Around().eval(), torch.randn(2, 3, 9, 9)
    with kernels.use("reference"):
        optimized = optimize(model, x)
        assert not any(isinstance(layer, _Attention | _NativeConvolution) for layer in optimized.modules())
        check_same_logits(model, optimized, x)


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_kernels_that_compute_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Around().eval(), torch.randn(2, 3, 9, 9)
    model.psa.softmax = "none"  # an ablation's, whose module stays and calls the kernels itself
    right = kernels.pyramid_convolution
    monkeypatch.setattr(kernels, "pyramid_convolution", lambda *layer: [2 * part for part in right(*layer)])
    with pytest.raises(ValueError, match="outputs differ"):
        optimize(model, x)


def test_a_network_that_asserts_what_its_input_is_cannot_be_traced_and_is_still_served() -> None:
    class Asserting(Around):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, Tensor)
            assert len(x) > 0
            return super().forward(x)

    model, x = Asserting().eval(), torch.randn(2, 3, 9, 9)
    check_same_logits(model, optimize(model, x), x)


def only_chain(network: nn.Module) -> _Chain:
    (chain,) = (module for module in network.modules() if isinstance(module, _Chain))
    return chain


def one_by_one(chain: _Chain, x: Tensor) -> Tensor:
    """What the chain's layers give when Python calls each of them, as for any other kind of tensor."""
    result: Tensor = chain(nn.Parameter(x, requires_grad=False))
    return result


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_all_blocks_of_a_network_are_one_chain_that_gives_what_its_layers_give_in_any_thread(
    request: pytest.FixtureRequest,
) -> None:
    interval = sys.getswitchinterval()
    model = trained_looking("epsanet26_tiny")
    shortcuts = sum(name.endswith("downsample.0") for name, _ in model.named_modules())
    chain = only_chain(optimize(model, images("tiny", 2)))
    assert len(chain.layers) == 8 * 3 + shortcuts
    maps = [
        torch.randn(batch, chain.layers[0].in_channels, size, size)
        for batch, size in ((1, 32), (5, 24), (2, 40), (1, 1))
    ]
    expected = [one_by_one(chain, x) for x in maps]
    sys.setswitchinterval(1e-6)
    request.addfinalizer(functools.partial(sys.setswitchinterval, interval))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            fresh, barrier = copy.deepcopy(chain), threading.Barrier(4)

            def run(x: Tensor, fresh: _Chain = fresh, barrier: threading.Barrier = barrier) -> Tensor:
                barrier.wait()  # so that all threads find it without its native side
                result: Tensor = fresh(x)
                return result

            for found, wanted in zip(pool.map(run, maps), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_copies_of_a_chain_have_weights_of_their_own_and_changed_weights_count() -> None:
    network, x = optimize(trained_looking("epsanet14_tiny"), images("tiny", 2)), images("tiny", 3)
    expected = network(x)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(network), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
        bias = only_chain(other).layers[-1].bias
        bias += 1
        assert not torch.equal(other(x), expected)
    assert torch.equal(network(x), expected)
    network.double().float()
    assert torch.equal(network(x), expected)


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_a_backbone_has_a_chain_for_each_of_its_feature_maps() -> None:
    backbone = timm.create_model("epsanet26_tiny", features_only=True).eval()
    backbone.load_state_dict(trained_looking("epsanet26_tiny").state_dict(), strict=False)
    network, x = optimize(backbone, images("tiny", 2)), images("tiny", 3)
    assert sum(isinstance(module, _Chain) for module in network.modules()) == 4
    with torch.no_grad():
        expected = backbone(x)
    for found, wanted in zip(network(x), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max().item())
