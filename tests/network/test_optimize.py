"""Inference networks: the same logits, and what may be folded is."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from torch import Tensor, nn
from trained import trained_looking

import epsanet.network.epsanet  # noqa: F401 - registers the variants
from epsanet import PSA, kernels, optimize
from epsanet.network.optimize import _Attention


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
    model = trained_looking("epsanet14_tiny")
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
