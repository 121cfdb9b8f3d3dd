"""The networks of the comparison: one contract for all, and each own layer against its formula written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from longhand import convolution, se_weight
from timm.models._features_fx import FeatureGraphNet
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

import epsanet
from epsanet.network.rivals import RIVALS, TOP_FREQUENCIES, FrequencyAttention, dct_filter, frequencies
from epsanet.network.weights import load_model, save_model

SMALL = {name: rival for name, rival in RIVALS.items() if name != "epsanet"}
NARROW = {"channels": (16, 16, 16, 16), "layers": (1, 2, 2, 1)}

# At depth 50 and 101; 28.07 M (FcaNet), 27.5 M (SKNet, ResNeSt), 30.2 M and 49.2 M (BAT) are published.
PARAMETERS = {
    "resnet": (25_557_032, 44_549_160),
    "se": (28_088_024, 49_326_872),
    "cbam": (28_073_576, 49_295_628),
    "eca": (25_557_118, 44_549_331),
    "gc": (28_105_032, 49_363_481),
    "sk": (27_479_784, 48_736_040),
    "nonlocal": (32_915_496, 51_907_624),
    "bat": (30_226_008, 49_218_136),
    "resnest": (27_483_240, 48_275_016),
    "fca": (28_071_976, 49_292_328),
    "pyconv": (24_847_720, 42_307_944),
    "epsanet": (22_561_715, 38_900_279),
    "epsanet_split": (16_328_387, 27_144_263),
}


def create(name: str, size: Any, **kwargs: Any) -> nn.Module:
    rival = RIVALS[name]
    return timm.create_model(rival.models[size], **rival.model_args, **kwargs)


@pytest.mark.parametrize("name", RIVALS)
def test_the_parameters_at_depth_50_and_101_are_these(name: str) -> None:
    with torch.device("meta"):
        counts = tuple(sum(p.numel() for p in create(name, size).parameters()) for size in ("50", "101"))
    assert counts == PARAMETERS[name]


def test_all_small_forms_have_the_trunk_of_the_tiny_epsanets() -> None:
    with torch.device("meta"):
        models = {name: create(name, "tiny") for name in RIVALS}
    for name, model in models.items():
        assert model.conv1.kernel_size == (3, 3), name
        assert model.conv1.stride == (1, 1), name
        assert isinstance(model.maxpool, nn.Identity), name
        assert [info["num_chs"] for info in model.feature_info] == [64, 64, 128, 128, 256], name
        assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8], name
        assert [len(stage) for stage in model.stages] == [2, 2, 2, 2], name
        assert model.pretrained_cfg["input_size"] == (3, 32, 32), name


@pytest.fixture(scope="module", params=SMALL)
def subject(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(1)
    model = create(request.param, "tiny", **NARROW)
    for module in model.modules():  # as after training: layers that start by adding nothing add something
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.0)
        elif isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, epsanet.SEWeight):  # a hidden width of one is half the time a dead ReLU
            nn.init.normal_(module.fc1.weight, std=0.1)
            nn.init.ones_(module.fc1.bias)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(subject: nn.Module) -> None:
    model = copy.deepcopy(subject).train()
    x = torch.randn(8, 3, 32, 32)
    nn.functional.cross_entropy(model(x), torch.arange(8) % 10).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key.endswith("conv_attn.bias"):  # of GCNet: the softmax over positions does not see what is added to all
            assert parameter.grad.abs().max() < 1e-6, key
        else:
            assert parameter.grad.abs().max() > 0, key


def test_features_are_those_of_the_stages_run_by_hand(subject: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = [subject.act1(subject.bn1(subject.conv1(x)))]
        for stage in subject.stages:
            expected.append(stage(expected[-1]))
        found = subject.forward_intermediates(x, intermediates_only=True)
        logits = subject.fc(expected[-1].mean((2, 3)))
        torch.testing.assert_close(subject(x), logits, rtol=1e-4, atol=1e-4)
    assert [feature.shape[-1] for feature in expected] == [32, 32, 16, 8, 4]
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_features_of_a_traced_network_are_those_of_the_network(subject: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = FeatureGraphNet(subject, out_indices=(0, 1, 2, 3, 4))(x)
        expected = subject.forward_intermediates(x, intermediates_only=True)
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 1e-3
        torch.testing.assert_close(one, other)


def test_exported_equals_eager(subject: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(subject, (x,)).module()
    y = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = subject(y)
        assert expected.std() > 1e-3
        torch.testing.assert_close(exported(y), expected, rtol=1e-4, atol=1e-4)


def test_a_state_dict_makes_a_fresh_network_the_same(subject: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    cfg = subject.pretrained_cfg["architecture"]
    (name,) = {name for name, rival in SMALL.items() if rival.models["tiny"] == cfg}
    other = create(name, "tiny", **NARROW).eval()
    with torch.no_grad():
        assert not torch.equal(other(x), subject(x))
        other.load_state_dict(subject.state_dict())
        assert torch.equal(other(x), subject(x))


def test_without_classes_a_network_gives_what_its_classifier_reads(subject: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    bare = timm.create_model(subject.pretrained_cfg["architecture"], **{**subject._model_args, "num_classes": 0}).eval()
    bare.load_state_dict({key: value for key, value in subject.state_dict().items() if not key.startswith("fc.")})
    with torch.no_grad():
        torch.testing.assert_close(subject.fc(bare(x)), subject(x))


def test_no_weights_are_promised_and_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match="fcanet50 has no pretrained weights; train it"):
        timm.create_model("fcanet50", pretrained=True)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_folder_gives_back_every_small_network(name: str, tmp_path: Path) -> None:
    model = create(name, "tiny", num_classes=3, **NARROW).eval()
    save_model(tmp_path / "model", model, ["ant", "bee", "cow"])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model").model.eval()(x), model(x))


def test_the_dct_is_scipys() -> None:
    """The coefficient of a frequency is the product of image and basis function, summed."""
    from scipy.fft import dctn

    image = torch.randn(14, 14, dtype=torch.float64)
    expected = dctn(image.numpy(), type=2, norm="ortho")
    for v, u in TOP_FREQUENCIES:
        assert float((image * dct_filter((2 * v, 2 * u), 14)).sum()) == pytest.approx(expected[2 * v, 2 * u], abs=1e-9)
    assert len(set(TOP_FREQUENCIES)) == 16
    assert TOP_FREQUENCIES[0] == (0, 0)


def test_frequency_attention_is_its_formula_written_out() -> None:
    channels, size = 32, 14
    layer = FrequencyAttention(channels, size)
    x = torch.randn(2, channels, size, size)
    w1, w2 = layer.fc1.weight[:, :, 0, 0], layer.fc2.weight[:, :, 0, 0]
    for n in range(2):
        squeezed = []
        for c in range(channels):
            v, u = (2 * number for number in TOP_FREQUENCIES[c // 2])  # of 14×14, the frequency of 7×7 doubled
            total = 0.0
            for i in range(size):
                for j in range(size):
                    basis = math.cos(math.pi * v * (i + 0.5) / size) * math.cos(math.pi * u * (j + 0.5) / size)
                    total += float(x[n, c, i, j]) * basis
            scale = math.prod(math.sqrt((2 if number else 1) / size) for number in (v, u))
            squeezed.append(total * scale)
        weights = torch.sigmoid(w2 @ torch.relu(w1 @ torch.tensor(squeezed)))
        torch.testing.assert_close(layer(x)[n], x[n] * weights[:, None, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 14, 16, 32, 56])
def test_each_sixteenth_of_the_channels_has_a_frequency_of_its_own(size: int) -> None:
    filters = FrequencyAttention(32, size).filters
    gram = torch.einsum("ahw,bhw->ab", filters, filters)  # the basis is orthonormal
    pairs = torch.eye(16).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(gram, pairs, rtol=0, atol=1e-5)


def test_the_release_multiplies_the_frequencies_by_how_often_the_grid_fits() -> None:
    assert frequencies(32) == [(4 * v, 4 * u) for v, u in TOP_FREQUENCIES]
    assert frequencies(4)[0] == (0, 0)


@pytest.mark.parametrize("key", ["se", "cbam", "gc", "fca"])
def test_no_rival_has_a_narrower_attention_than_another(key: str) -> None:
    """A sixteenth of the channels, at least 8."""
    model = create(key, "tiny")
    hidden = {
        (max(layer.weight.shape[:2]), min(layer.weight.shape[:2]))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and ".se." in name and layer.kernel_size == (1, 1) and layer.weight.shape[0] > 1
    }
    assert hidden == {(64, 8), (128, 8), (256, 16)}


def test_a_network_that_was_built_without_memory_computes_its_filters_again() -> None:
    """As transformers does: weights come from the file, buffers that are in no file from the module's own method."""
    model, x = create("fca", "tiny", **NARROW).eval(), torch.randn(2, 3, 32, 32)
    with torch.device("meta"):
        again = create("fca", "tiny", **NARROW).eval()
    again.to_empty(device="cpu")
    for buffer in again.buffers():
        buffer.zero_()
    again.load_state_dict(model.state_dict())
    assert len(reinit_non_persistent_buffers(again)) == 6
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_frequency_attention_averages_a_map_of_another_size_first() -> None:
    layer = FrequencyAttention(16, 8)
    x = torch.randn(1, 16, 16, 16)
    averaged = x.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    weights = (layer(averaged) / averaged)[:, :, :1, :1]
    torch.testing.assert_close(layer(x), x * weights, rtol=1e-3, atol=1e-5)


def test_senet_is_fcanet_of_the_lowest_frequency() -> None:
    """With frequency (0, 0) alone the DCT is the average times the size."""
    size = 7
    x = torch.randn(size, size, dtype=torch.float64)
    assert float((x * dct_filter((0, 0), size)).sum()) == pytest.approx(float(x.mean()) * size)


def test_the_pyramids_of_pyconvresnet_are_those_of_its_paper() -> None:
    """Of stage 2 the paper's 7×7 convolution makes half of the channels in 8 groups: two of a quarter have its cost."""
    with torch.device("meta"):
        model = create("pyconv", "50")
    widths = (64, 128, 256, 512)
    expected = [
        {(3, 1): 16, (5, 4): 16, (7, 8): 16, (9, 16): 16},
        {(3, 1): 32, (5, 4): 32, (7, 8): 64},
        {(3, 1): 128, (5, 4): 128},
        {(3, 1): 512},
    ]
    for stage, width, pyramid in zip(model.stages, widths, expected, strict=True):
        for block in stage:
            found: dict[tuple[int, int], int] = {}
            weights = 0
            for conv in (m for m in block.conv2.modules() if isinstance(m, nn.Conv2d)):
                key = (conv.kernel_size[0], conv.groups)
                found[key] = found.get(key, 0) + conv.out_channels
                weights += conv.weight.numel()
                assert conv.in_channels == width
            assert found == pyramid
            assert weights == sum(k * k * width // g * made for (k, g), made in pyramid.items())
    assert [stage[0].downsample[0].stride for stage in model.stages] == [2, 2, 2, 2]
    assert all(isinstance(stage[0].downsample[0], nn.MaxPool2d) for stage in model.stages)
    assert isinstance(model.maxpool, nn.Identity)


def test_pyconvresnet_for_large_images_has_the_sizes_of_a_resnet() -> None:
    model = create("pyconv", "50", **NARROW).eval()
    with torch.no_grad():
        features = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    assert [feature.shape[-1] for feature in features] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize(("size", "expected"), [("50", ((1, 3), (1, 3, 5))), ("101", ((1, 3), (6, 13, 20)))])
@pytest.mark.parametrize("name", ["nonlocal", "bat"])
def test_non_local_layers_stand_where_the_release_of_bat_has_them(
    name: str, size: Any, expected: tuple[tuple[int, ...], ...]
) -> None:
    with torch.device("meta"):
        model = create(name, size)
    found = tuple(
        tuple(place for place, block in enumerate(stage) if isinstance(block, nn.Sequential)) for stage in model.stages
    )
    assert found == ((), *expected, ())


def test_layers_of_global_context_start_by_adding_nothing() -> None:
    model, plain = create("gc", "tiny"), create("resnet", "tiny")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".se." not in key})
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-5)


def test_bat_takes_the_images_of_imagenet() -> None:
    model = create("bat", "50", **NARROW).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 224, 224))
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "the logits do not depend on the image"


# ------------------------------------------------------------------------------------- PSA's settings of the ablation


def leaves(psa: epsanet.PSA) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Weights of branches, and of each SEWeight."""
    modules = [] if psa.se is None else list(psa.se) if isinstance(psa.se, nn.ModuleList) else [psa.se]
    weights = [
        (m.fc1.weight[:, :, 0, 0], m.fc1.bias, m.fc2.weight[:, :, 0, 0], m.fc2.bias)  # type: ignore[union-attr]
        for m in modules
    ]
    return [branch.weight for branch in psa.spc.branches], weights


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("softmax", ["scales", "channels", "none"])
@pytest.mark.parametrize("se", ["shared", "branches", "none"])
def test_every_setting_of_psa_is_its_formula_written_out(se: Any, softmax: Any, fusion: Any, kernels: Any) -> None:
    from epsanet import kernels as implementations

    psa = epsanet.PSA(16, 16, (3, 5), (1, 2), softmax=softmax, se=se, fusion=fusion, reduction=2)
    x = torch.randn(2, 16, 5, 6)
    weights, squeezes = leaves(psa)
    feats = [convolution(x, weight, groups, 1, 1) for weight, groups in zip(weights, (1, 2), strict=True)]
    if se == "none":
        attention = [torch.ones_like(feat[:, :, :1, :1]) for feat in feats]
    else:
        own = squeezes * 2 if se == "shared" else squeezes
        assert len(own) == 2
        zs = [se_weight(feat, *weight)[:, :, None, None] for feat, weight in zip(feats, own, strict=True)]
        total = torch.exp(zs[0]) + torch.exp(zs[1])
        attention = {
            "scales": [torch.exp(z) / total for z in zs],
            "channels": [torch.exp(z) / torch.exp(z).sum(1, keepdim=True) for z in zs],
            "none": zs,
        }[softmax]
    parts = [feat * weight for feat, weight in zip(feats, attention, strict=True)]
    expected = torch.cat(parts, 1) if fusion == "concat" else parts[0] + parts[1]
    assert expected.shape == (2, 16, 5, 6)
    with implementations.use(kernels):
        torch.testing.assert_close(psa(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(psa.attention(torch.stack(feats, 1)), torch.stack(attention, 1)[..., 0, 0])


@pytest.mark.parametrize("block_args", [{"se": "branches"}, {"se": "none"}, {"softmax": "none"}, {"fusion": "sum"}])
def test_optimised_and_portable_networks_have_the_logits_of_every_setting(block_args: dict[str, Any]) -> None:
    from epsanet.deploy.portable import portable

    torch.manual_seed(0)
    model = timm.create_model("epsanet14_tiny", block_args=block_args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
        expected = model.eval()(x)
        assert expected.std() > 1e-2
        torch.testing.assert_close(epsanet.optimize(model, x)(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(portable(model)(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "choices"), [("se", "'shared' or 'branches' or 'none'"), ("fusion", "'concat' or 'sum'")]
)
def test_a_setting_that_is_unknown_is_named(name: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='both' is unknown; use {choices}"):
        epsanet.PSA(16, 16, **{name: "both"})


def test_a_network_with_a_setting_of_the_ablation_is_no_checkpoint_of_the_released_code(tmp_path: Any) -> None:
    from epsanet.network.weights import save_released

    model = timm.create_model("epsanet50_small", channels=(64, 64, 64, 64), block_args={"se": "branches"})
    with pytest.raises(ValueError, match="the released code holds only"):
        save_released(tmp_path / "x.pth", model)
