"""One contract that every registered network passes.

Each network is built once and shared; tests that change one take a copy. Twins with other arguments are built on the
meta device and given the same tensors, so that what differs is the argument alone. The networks for ImageNet come
here with a quarter of their width and two blocks a stage, which keeps every kind of layer and option of the variant;
those that differ from another one in the number of blocks alone come as that one. The first test takes all as they are.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import epsanet
from epsanet.network.epsanet import EPSABasicBlock, EPSABlock

VARIANTS = sorted(timm.list_models("epsanet*"))
DEEPER = {
    "epsanet34": "epsanet18",
    "epsanet101_small": "epsanet50_small",
    "epsanet101_large": "epsanet50_large",
    "epsanet101_large_g32": "epsanet50_large_g32",
    "epsanet38_tiny": "epsanet26_tiny",
    "epsanet50_tiny_x2": "epsanet26_tiny_x2",
}
"""Another variant with more blocks, and which."""
LAYERS = (2, 2, 2, 2)


class Subject(NamedTuple):
    name: str
    model: nn.Module
    size: int
    """Height and width of the test images: as small as five stages allow."""
    narrow: dict[str, Any]
    """The arguments that make it a quarter as wide, and no deeper than it must be."""

    @property
    def strides(self) -> list[int]:
        return [1, 1, 2, 4, 8] if "tiny" in self.name else [2, 4, 8, 16, 32]

    def images(self, batch: int = 2, channels: int = 3) -> Tensor:
        return torch.randn(batch, channels, self.size, self.size)

    def twin(self, **arguments: Any) -> nn.Module:
        """The same tensors (those of the same shape) in a network with other arguments; shares the memory."""
        with torch.device("meta"):
            twin = timm.create_model(self.name, **self.narrow, **arguments).eval()
        wanted = twin.state_dict()
        twin.load_state_dict(
            {key: value for key, value in self.model.state_dict().items() if key in wanted}, assign=True
        )
        assert not any(tensor.is_meta for tensor in twin.state_dict().values())
        return twin


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name not in DEEPER])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    torch.manual_seed(1)
    tiny = "tiny" in request.param
    narrow = {} if tiny else {"channels": (16, 32, 64, 128), "layers": LAYERS}
    model = timm.create_model(request.param, **narrow)
    subject = Subject(request.param, model, 32 if tiny else 64, narrow)
    norms = [module for module in subject.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    for module in subject.model.modules():
        if isinstance(module, EPSABlock | EPSABasicBlock):  # as in a trained network: what a block adds is a part
            last = module.bn3 if isinstance(module, EPSABlock) else module.bn2
            nn.init.uniform_(last.weight, 0.1, 0.3)
        if isinstance(module, epsanet.SEWeight):  # a hidden width of one is half the time a dead ReLU
            nn.init.normal_(module.fc1.weight, std=0.1)
            nn.init.ones_(module.fc1.bias)
    with torch.no_grad():
        subject.model.train()(subject.images(4))  # statistics as after training, so that depth explodes nothing
    for norm in norms:
        norm.momentum = 0.1
    subject.model.eval()
    return subject


def assert_near(output: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference, in units of the expected values' standard deviation."""
    assert output.shape == expected.shape
    assert expected.isfinite().all()
    assert expected.std() > 1e-3, "constant output: nothing is compared"
    distance = (output.float() - expected.float()).abs().max() / expected.float().std()
    assert distance <= tolerance, f"differs by {distance:.2g} standard deviations"


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    labels = torch.arange(len(x)) % 2
    model.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
def test_at_full_width_backward_gives_every_parameter_a_finite_gradient_that_is_not_zero(name: str) -> None:
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, epsanet.SEWeight):  # a hidden width of one is half the time a dead ReLU
            nn.init.normal_(module.fc1.weight, std=0.1)
            nn.init.ones_(module.fc1.bias)
    x = torch.randn(2, 3, *(2 * (32,) if "tiny" in name else (32, 64)))
    for key, gradient in gradients(model, x).items():
        assert gradient is not None, f"{key} has no part in the output"
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize(("deeper", "name"), DEEPER.items())
def test_a_deeper_variant_with_as_many_blocks_is_the_other_one(deeper: str, name: str) -> None:
    def parts(variant: str) -> list[tuple[str, type[nn.Module], dict[str, Any]]]:
        with torch.device("meta"):
            model = timm.create_model(variant, layers=LAYERS)
        return [
            (place, type(module), {key: value for key, value in vars(module).items() if not key.startswith("_")})
            for place, module in model.named_modules()
            if module is not model
        ]

    assert parts(deeper) == parts(name)


def test_a_step_along_the_gradient_lowers_the_loss_as_much_as_the_gradient_says(subject: Subject) -> None:
    """The derivative along a direction, by differences: gradients of the whole network, not of one module."""
    model = subject.twin()
    x = subject.images()
    parameters = dict(model.named_parameters())
    slopes = gradients(model, x)
    length = math.sqrt(sum(float(slope.square().sum()) for slope in slopes.values()))
    step = 1e-3 / length

    def loss(sign: int) -> float:
        moved = {name: parameters[name] + sign * step * slopes[name] for name in parameters}
        output = torch.func.functional_call(model, moved, (x,))
        return float(nn.functional.cross_entropy(output.double(), torch.arange(2) % 2))

    with torch.no_grad():
        measured = (loss(1) - loss(-1)) / (2 * step)
    assert measured == pytest.approx(length**2, rel=0.1)


def test_every_stage_hands_out_its_features_at_its_stride(subject: Subject) -> None:
    model, x = subject.model, subject.images()
    extractor = subject.twin(features_only=True)
    with torch.no_grad():
        by_hand = [model.act1(model.bn1(model.conv1(x)))]
        y = model.maxpool(by_hand[0])
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            y = stage(y)
            by_hand.append(y)
        features = extractor(x)
        final, intermediates = model.forward_intermediates(x)
        expected_logits = model.fc(y.mean((2, 3)))
        assert_near(model(x), expected_logits, 1e-5)
    assert extractor.feature_info.reduction() == subject.strides
    assert len(features) == len(intermediates) == 5
    for stride, expected, feature, intermediate in zip(subject.strides, by_hand, features, intermediates, strict=True):
        assert expected.shape[-2:] == (subject.size // stride,) * 2
        assert_near(feature, expected, 1e-5)
        assert_near(intermediate, expected, 1e-5)
    torch.testing.assert_close(final, intermediates[-1], rtol=0, atol=0)
    assert extractor.feature_info.channels() == [feature.shape[1] for feature in by_hand]


def test_an_odd_image_gives_features_of_its_size_over_the_stride_rounded_up(subject: Subject) -> None:
    height, width = (23, 33) if "tiny" in subject.name else (45, 67)
    with torch.no_grad():
        intermediates = subject.model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    for stride, feature in zip(subject.strides, intermediates, strict=True):
        assert feature.shape[-2:] == (math.ceil(height / stride), math.ceil(width / stride))
        assert feature.isfinite().all()
        assert feature.std() > 1e-3


def test_torch_export_with_a_free_batch_size_equals_eager(subject: Subject) -> None:
    exported = torch.export.export(
        subject.model, (subject.images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    x = subject.images(3)
    with torch.no_grad():
        assert_near(exported.module()(x), subject.model(x), 1e-5)


def test_channels_last_equals_contiguous(subject: Subject) -> None:
    x = subject.images()
    with torch.no_grad():
        expected = subject.model(x)
        model = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
        assert_near(model(x.to(memory_format=torch.channels_last)), expected, 1e-4)


def test_one_image_gives_the_row_it_gives_in_a_batch(subject: Subject) -> None:
    x = subject.images(3)
    with torch.no_grad():
        rows = subject.model(x)
        for index in range(3):
            assert_near(subject.model(x[index : index + 1]), rows[index : index + 1], 1e-4)
    assert (rows[0] - rows[1]).abs().max() > 1e-3, "all images give the same row"


def test_bfloat16_autocast_is_close_to_float32_forwards_and_backwards(subject: Subject) -> None:
    x = subject.images()
    model = subject.twin()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
    assert output.dtype == torch.bfloat16
    cosine = nn.functional.cosine_similarity(output.float(), expected, dim=1)
    assert (cosine > 0.995).all(), cosine
    exact = torch.cat([slope.flatten() for slope in gradients(model, x).values()])
    with torch.autocast("cpu", torch.bfloat16):
        slopes = gradients(model, x)
    assert all(slope.dtype == torch.float32 and slope.isfinite().all() for slope in slopes.values())
    cosine = nn.functional.cosine_similarity(torch.cat([slope.flatten() for slope in slopes.values()]), exact, dim=0)
    assert cosine > 0.95, cosine


def test_gradient_checkpointing_gives_the_same_gradients_by_running_the_stages_twice(subject: Subject) -> None:
    x = subject.images()
    model = subject.twin()
    expected = {name: slope.clone() for name, slope in gradients(model, x).items()}
    runs: list[int] = []
    model.layer3[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing(True)
    slopes = gradients(model, x)
    assert len(runs) == 2, "nothing was recomputed"
    for name, slope in expected.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()), msg=name)


def test_drop_path_leaves_out_whole_blocks_of_single_images_and_scales_the_others(subject: Subject) -> None:
    rate = 0.5
    model = subject.twin(drop_path_rate=rate)
    x = subject.images()
    with torch.no_grad():
        assert torch.equal(model(x), subject.model(x)), "evaluation drops paths"

    block = copy.deepcopy(model.layer4[-1]).train()
    channels = block.conv1.in_channels if hasattr(block, "conv3") else block.bn1.num_features
    one = torch.rand(1, channels, 2, 2)
    x = torch.cat([one, one.flip(1)]).repeat(32, 1, 1, 1)  # the same two images, hence the same norms, many times
    plain = copy.deepcopy(block)
    plain.drop_path = None
    shortcut = x if plain.downsample is None else copy.deepcopy(plain.downsample)(x).detach()
    setattr(plain, "act3" if hasattr(block, "conv3") else "act2", nn.Identity())
    with torch.no_grad():
        branch = plain(x.clone()) - shortcut
        dropped, kept = torch.relu(shortcut), torch.relu(shortcut + branch / (1 - rate))
        output = block(x.clone())
    was_dropped = (output - dropped).abs().amax((1, 2, 3)) < 1e-4
    was_kept = (output - kept).abs().amax((1, 2, 3)) < 1e-4 * kept.abs().max()
    assert (was_dropped ^ was_kept).all()
    assert 16 <= int(was_dropped.sum()) <= 48  # 32 expected of 64, four standard deviations either way


def test_another_number_of_image_channels_is_another_stem_and_nothing_else(subject: Subject) -> None:
    """A grey image in a network of one channel is a colour image of three equal channels."""
    state = subject.model.state_dict()
    with torch.device("meta"):
        model = timm.create_model(subject.name, in_chans=1, **subject.narrow).eval()
    model.load_state_dict({**state, "conv1.weight": state["conv1.weight"].sum(1, keepdim=True)}, assign=True)
    grey = subject.images(channels=1)
    with torch.no_grad():
        assert_near(model(grey), subject.model(grey.expand(-1, 3, -1, -1)), 1e-4)


def test_every_global_pool_is_the_formula_of_its_name(subject: Subject) -> None:
    model = subject.twin()
    with torch.no_grad():
        features = subject.model.forward_features(subject.images())
        mean, largest = features.mean((2, 3)), features.amax((2, 3))
        expected = {
            "avg": mean,
            "max": largest,
            "avgmax": (mean + largest) / 2,
            "catavgmax": torch.cat([mean, largest], 1),
        }
        for pool, pooled in expected.items():
            model.reset_classifier(0, pool)
            assert_near(model.forward_head(features), pooled, 1e-5)
    assert model.num_classes == 0


def test_a_new_classifier_is_a_linear_map_of_the_same_pooled_features(subject: Subject) -> None:
    model = subject.twin()
    model.reset_classifier(7)
    x = subject.images()
    with torch.no_grad():
        pooled = subject.model.forward_features(x).mean((2, 3))
        assert_near(model.forward_head(model.forward_features(x), pre_logits=True), pooled, 1e-5)
        assert_near(model(x), pooled @ model.get_classifier().weight.T + model.fc.bias, 1e-4)
    assert model.num_classes == 7
    assert subject.model.fc.out_features == subject.model.num_classes


def test_a_state_dict_makes_a_fresh_network_the_same_to_the_last_bit(subject: Subject) -> None:
    file = io.BytesIO()
    torch.save(subject.model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = timm.create_model(subject.name, **subject.narrow).eval()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    x = subject.images()
    with torch.no_grad():
        assert torch.equal(other(x), subject.model(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_deep_copy_and_a_pickled_network_are_the_same_and_independent(subject: Subject, duplicate: Any) -> None:
    x = subject.images()
    other = duplicate(subject.model)
    with torch.no_grad():
        expected = subject.model(x)
        assert torch.equal(other(x), expected)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(other(x), expected)
        assert torch.equal(subject.model(x), expected)
