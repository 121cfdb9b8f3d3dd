"""Which scale a module listens to, against the module written out with loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from network.longhand import attention, se_weight, spc
from torch import Tensor, nn

from epsanet import PSA, kernels
from epsanet.insight import figures
from epsanet.insight.scales import record_scales, scale_preferences

GROUPS = (1, 2, 4, 8)


class Two(nn.Module):
    """Two PSA modules, the second of stride 2 and with its own softmax."""

    def __init__(self, softmax: str = "scales") -> None:
        super().__init__()
        self.first = PSA(32, groups=GROUPS)
        self.second = PSA(32, groups=GROUPS, stride=2, softmax=softmax)  # type: ignore[arg-type]
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).relu()).mean((2, 3)))


def written_out(psa: PSA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention N, S, D and the root mean square of the weighted features N, S, H, W."""
    weights = [branch.weight for branch in psa.spc.branches]
    fc1, fc2 = psa.se.fc1, psa.se.fc2
    feats = spc(x, weights, list(GROUPS), psa.spc.branches[0].stride[0], 1, "multiplex")  # type: ignore[union-attr, arg-type]
    se = fc1.weight[:, :, 0, 0], fc1.bias, fc2.weight[:, :, 0, 0], fc2.bias
    found = attention([se_weight(feat, *se) for feat in feats], psa.softmax)  # type: ignore[arg-type]
    strength = [((feat * att[:, :, None, None]) ** 2).mean(1) ** 0.5 for feat, att in zip(feats, found, strict=True)]
    return torch.stack(found, 1), torch.stack(strength, 1)


@pytest.mark.parametrize("softmax", ["scales", "channels"])
@pytest.mark.parametrize("chosen", ["reference", "auto"])
def test_what_is_recorded_is_what_the_module_written_out_computes(softmax: str, chosen: kernels.Choice) -> None:
    model, x = Two(softmax).eval(), torch.randn(2, 32, 6, 5)
    with kernels.use(chosen):
        first, second = record_scales(model, x)
    assert (first.name, second.name) == ("first", "second")
    assert first.kernel_sizes == (3, 5, 7, 9)
    with torch.no_grad():
        between = copy.deepcopy(model.first)(x).relu()
        for found, psa, seen in ((first, model.first, x), (second, model.second, between)):
            attention_NSD, strength_NSHW = written_out(psa, seen)
            np.testing.assert_allclose(found.attention_NSD, attention_NSD, rtol=1e-4)
            np.testing.assert_allclose(found.strength_NSHW, strength_NSHW, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(
                found.attention_NS, attention_NSD.mean(2) / attention_NSD.mean(2).sum(1, keepdim=True), rtol=1e-4
            )
            energy = torch.stack([(part**2).sum((1, 2, 3)) for part in psa(seen).chunk(4, 1)], 1)
            np.testing.assert_allclose(found.contribution_NS, energy / energy.sum(1, keepdim=True), rtol=1e-3)


def test_the_softmax_over_channels_gives_every_scale_the_same_average() -> None:
    _, second = record_scales(Two("channels"), torch.randn(3, 32, 6, 5))
    np.testing.assert_allclose(second.attention_NS, 0.25, atol=1e-6)
    assert np.ptp(second.contribution_NS) > 0.01


def test_recording_leaves_no_trace() -> None:
    model = Two().train()
    model.second.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 32, 6, 5)
    expected = model(x)
    record_scales(model, x)
    with pytest.raises(RuntimeError):
        record_scales(model, torch.randn(2, 31, 6, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in (model, model.first, model.second)] == [True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_a_network_without_psa_says_so() -> None:
    with pytest.raises(ValueError, match="has no PSA modules"):
        record_scales(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))


def test_preferences_are_means_over_the_images_of_a_class_with_students_interval() -> None:
    from scipy import stats

    model, images, labels = Two().eval(), torch.randn(7, 32, 6, 5), torch.tensor([0, 2, 0, 0, 2, 2, 0])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    found = {(p.group, p.block, p.kernel_size): p for p in scale_preferences(model, batches, ["cat", "cow", "dog"])}
    assert {group for group, _, _ in found} == {"all", "cat", "dog"}
    assert len(found) == 3 * 2 * 4
    one = record_scales(model, images)[1]
    for group, chosen in (("all", labels >= 0), ("cat", labels == 0), ("dog", labels == 2)):
        for place, size in enumerate((3, 5, 7, 9)):
            preference = found[group, "second", size]
            assert preference.images == int(chosen.sum())
            for measure, shares in (("attention", one.attention_NS), ("contribution", one.contribution_NS)):
                values = shares[chosen.numpy(), place]
                low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
                assert getattr(preference, measure) == pytest.approx((values.mean(), low, high), rel=1e-4)


def test_equal_kernels_are_scales_of_their_own_and_a_class_called_all_is_not_all_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = nn.Sequential(PSA(32, kernel_sizes=(3, 5, 7, 7), groups=GROUPS)), torch.randn(3, 32, 6, 5)
    found = scale_preferences(model, [(images, torch.tensor([0, 0, 1]))], ["all", "$5_$10"])
    shares = record_scales(model, images)[0].attention_NS
    for group, chosen in (("all", [0, 1, 2]), ("class all", [0, 1]), ("$5_$10", [2])):
        of_group = [p for p in found if p.group == group]
        assert [(p.scale, p.kernel_size, p.images) for p in of_group] == [
            (place, size, len(chosen)) for place, size in enumerate((3, 5, 7, 7))
        ]
        assert [p.attention[0] for p in of_group] == pytest.approx(shares[chosen].mean(0).tolist(), rel=1e-5)
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))  # noqa: ARG005
    figures.save_preferences(Path("scales.png"), found, "a$ on b$_")
    drawn[0].draw_without_rendering()  # what looks like a formula and is none would raise
    attention = drawn[0].axes[0]
    means = [container.lines[0].get_ydata().tolist() for container in attention.containers]
    wanted = [[shares[[0, 1], place].mean(), shares[2, place]] for place in range(4)]
    assert [pytest.approx(mean, rel=1e-5) for mean in means] == wanted
    assert attention.lines[-1].get_ydata() == [0.25, 0.25], "all alike"


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        scale_preferences(Two(), [], ["cat"])
