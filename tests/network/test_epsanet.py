"""The networks against the figures of the paper, timm's and torchvision's ResNets, and blocks written out longhand."""

from __future__ import annotations

import math
import re
from typing import Any

import longhand
import pytest
import timm
import torch
import torchvision
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import epsanet
from epsanet.network.epsanet import EPSABasicBlock, EPSABlock

# Parameters and multiply-adds (in units of 10^9, at 224×224) as the paper's configurations give them, typed from the
# reading of the paper and not computed here; the published figures round them.
PUBLISHED = {
    "epsanet50_small": (22_561_715, 3.598),
    "epsanet101_small": (38_900_279, 6.788),
    "epsanet50_large": (27_899_518, 4.693),
    "epsanet101_large": (49_592_198, 8.924),
    "epsanet50_large_g32": (30_100_094, 5.053),
    "epsanet101_large_g32": (53_742_470, 9.666),
}
TINY = (
    "epsanet14_tiny",
    "epsanet26_tiny",
    "epsanet38_tiny",
    "epsanet23_tiny_wide",
    "epsanet26_tiny_x2",
    "epsanet50_tiny_x2",
)


def on_meta(name: str, **arguments: Any) -> nn.Module:
    """A network without memory: for counting."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def randomise_norms(model: nn.Module) -> None:
    """Statistics and affine maps that differ between channels, so that no exchange of channels stays unseen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [(name, count) for name, (count, _) in PUBLISHED.items()])
def test_parameters_are_the_published_ones_to_the_last_digit(name: str, expected: int) -> None:
    assert parameters(on_meta(name)) == expected


@pytest.mark.parametrize(("name", "expected"), [(name, macs) for name, (_, macs) in PUBLISHED.items()])
def test_multiply_adds_are_the_published_ones_to_a_thousandth_of_a_billion(name: str, expected: float) -> None:
    model = on_meta(name).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=0.0005)


def test_basic_block_variants_have_the_parameters_that_counting_by_hand_gives() -> None:
    for name, layers in {"epsanet18": (2, 2, 2, 2), "epsanet34": (3, 4, 6, 3)}.items():
        count = 3 * 64 * 49 + 2 * 64  # stem
        seen = 64
        for width, blocks in zip((64, 128, 256, 512), layers, strict=True):
            branch, hidden = width // 4, max(1, width // 4 // 16)
            se = 2 * branch * hidden + hidden + branch
            for _ in range(blocks):
                for channels in (seen, width):
                    count += sum(channels * branch * k * k // g for k, g in ((3, 1), (5, 4), (7, 8), (9, 16)))
                    count += se + 2 * width
                if seen != width:
                    count += seen * width + 2 * width
                seen = width
        assert parameters(on_meta(name)) == count + 512 * 1000 + 1000


def test_the_family_for_small_images_spans_a_tenth_of_a_million_to_two_million_parameters() -> None:
    counts = {name: parameters(on_meta(name)) for name in TINY}
    assert all(100_000 <= count <= 2_000_000 for count in counts.values()), counts
    assert list(counts.values()) == sorted(counts.values())
    assert max(counts.values()) > 8 * min(counts.values())


def test_a_stage_too_narrow_for_the_published_groups_uses_the_greatest_common_divisor() -> None:
    model = on_meta("epsanet14_tiny")
    for stage, width in zip((model.layer1, model.layer2, model.layer3, model.layer4), (16, 32, 32, 64), strict=True):
        groups = [branch.groups for branch in stage[0].conv2.spc.branches]
        assert groups == [math.gcd(wanted, width, width // 4) for wanted in (1, 4, 8, 16)]


# --- blocks ---------------------------------------------------------------------------------------------------------


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Batch norm in evaluation, written out."""
    weight, bias, mean, variance = (
        state[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def psa_in(block: dict[str, Tensor], name: str, x: Tensor, **options: Any) -> Tensor:
    leaves = {key.removeprefix(f"{name}."): value for key, value in block.items() if key.startswith(f"{name}.")}
    return longhand.psa_of(leaves, x, **options)


def shortcut_of(x: Tensor, state: dict[str, Tensor], stride: int) -> Tensor:
    if "downsample.0.weight" not in state:
        return x
    return norm(longhand.convolution(x, state["downsample.0.weight"], 1, stride, 1), state, "downsample.1")


def first_block(name: str, stage: str, index: int, **arguments: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = timm.create_model(name, num_classes=2, **arguments)
    randomise_norms(model)
    block = getattr(model, stage)[index].double().eval()
    return block, {key: value.detach().double() for key, value in block.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "stage", "index", "stride", "options"),
    [
        ("epsanet50_small", "layer1", 0, 1, {"groups": [1, 4, 8, 16]}),
        ("epsanet50_small", "layer1", 1, 1, {"groups": [1, 4, 8, 16]}),
        ("epsanet50_small", "layer2", 0, 2, {"groups": [1, 4, 8, 16]}),
        ("epsanet50_large", "layer1", 0, 1, {"groups": [4, 8, 16, 16], "mode": "split"}),
        ("epsanet50_large_g32", "layer1", 0, 1, {"groups": [32, 32, 32, 32]}),
        ("epsanet14_tiny", "layer2", 0, 2, {"groups": [1, 4, 8, 8]}),
    ],
)
def test_the_block_is_the_papers_bottleneck_written_out(
    name: str, stage: str, index: int, stride: int, options: dict[str, Any]
) -> None:
    block, state = first_block(name, stage, index)
    x = torch.rand(1, state["conv1.weight"].shape[1], 3, 4, dtype=torch.float64) - 0.3
    y = F.relu(norm(longhand.convolution(x, state["conv1.weight"], 1, 1, 1), state, "bn1"))
    y = F.relu(norm(psa_in(state, "conv2", y, stride=stride, **options), state, "bn2"))
    y = norm(longhand.convolution(y, state["conv3.weight"], 1, 1, 1), state, "bn3")
    expected = F.relu(y + shortcut_of(x, state, stride))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("stage", "index", "stride"), [("layer1", 0, 1), ("layer2", 0, 2)])
def test_the_basic_block_has_a_psa_module_in_the_place_of_both_convolutions(
    stage: str, index: int, stride: int
) -> None:
    block, state = first_block("epsanet18", stage, index)
    groups = [1, 4, 8, 16]
    x = torch.rand(1, 64, 3, 4, dtype=torch.float64) - 0.3
    y = F.relu(norm(psa_in(state, "conv1", x, stride=stride, groups=groups), state, "bn1"))
    y = norm(psa_in(state, "conv2", y, groups=groups), state, "bn2")
    expected = F.relu(y + shortcut_of(x, state, stride))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-10)


# --- the trunk ------------------------------------------------------------------------------------------------------


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """A network on the meta device with every PSA module taken out again and a 3×3 convolution put in its place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, epsanet.PSA):
            branches = module.spc.branches
            channels = sum(branch.out_channels for branch in branches)
            seen = branches[0].in_channels * (len(branches) if module.spc.mode == "split" else 1)
            step = branches[0].dilation
            plain = nn.Conv2d(
                seen, channels, 3, branches[0].stride, padding=step, dilation=step, bias=False, device="meta"
            )
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize(
    ("name", "resnet"),
    [
        ("epsanet18", "resnet18"),
        ("epsanet34", "resnet34"),
        ("epsanet50_small", "resnet50"),
        ("epsanet50_large", "wide_resnet50_2"),
    ],
)
def test_with_3x3_convolutions_for_psa_it_is_torchvisions_resnet(name: str, resnet: str) -> None:
    theirs = torchvision.models.get_model(resnet).eval()
    randomise_norms(theirs)
    ours = with_plain_convolutions(on_meta(name)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x) / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "resnet"),
    [
        ("epsanet50_large_g32", "wide_resnet50_2"),
        ("epsanet101_small", "resnet101"),
        ("epsanet101_large", "wide_resnet101_2"),
        ("epsanet101_large_g32", "wide_resnet101_2"),
    ],
)
def test_with_3x3_convolutions_for_psa_the_larger_ones_have_the_layers_of_torchvisions_resnet(
    name: str, resnet: str
) -> None:
    """The same class as above, so that layers, shapes and strides say it all; values would take many seconds."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(resnet)
    ours = with_plain_convolutions(on_meta(name))
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        assert {key: repr(module) for key, module in ours.named_modules() if isinstance(module, kind)} == {
            key: repr(module) for key, module in theirs.named_modules() if isinstance(module, kind)
        }


@pytest.mark.parametrize("arguments", [{"output_stride": 8}, {"stem_type": "deep", "stem_width": 32}])
def test_with_3x3_convolutions_for_psa_it_is_timms_resnet_dilated_and_with_another_stem_too(
    arguments: dict[str, Any],
) -> None:
    theirs = timm.create_model("resnet50", num_classes=5, **arguments).eval()
    randomise_norms(theirs)
    ours = with_plain_convolutions(on_meta("epsanet50_small", num_classes=5, **arguments)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        torch.testing.assert_close(ours.forward_features(x), expected, rtol=1e-5, atol=1e-5 * expected.std())


# --- initialisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsanet50_small", "epsanet18", "epsanet26_tiny_x2"])
def test_every_convolution_starts_normal_with_the_released_standard_deviation(name: str) -> None:
    model = timm.create_model(name)
    pooled: dict[str, list[Tensor]] = {}
    for where, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        kernel = module.kernel_size[0]
        expected = math.sqrt(2 / (kernel * kernel * module.out_channels))
        scaled = module.weight.detach().double().flatten() / expected
        count = scaled.numel()
        assert abs(scaled.mean()) < 6 / math.sqrt(count), where
        if count > 200:
            assert abs(scaled.std() - 1) < 6 / math.sqrt(2 * count), f"{where} starts with {scaled.std()} of the std"
        kind = next(part for part in reversed(where.split(".")) if not part.isdigit())
        pooled.setdefault(kind, []).append(scaled)
    assert {"conv1", "fc1", "fc2", "branches"} <= pooled.keys()
    for kind, parts in pooled.items():
        together = torch.cat(parts)
        count = together.numel()
        assert abs(together.std() - 1) < 6 / math.sqrt(2 * count), kind
        # normal, not uniform: a third of the values lie beyond one standard deviation, 4.55 % beyond two
        assert abs((together.abs() > 2).double().mean() - 0.0455) < 6 * math.sqrt(0.0455 / count), kind


def test_norms_start_at_one_and_zero_and_the_last_of_each_block_at_zero_on_request() -> None:
    for name, last in (("epsanet50_small", "bn3"), ("epsanet18", "bn2")):
        for arguments in ({}, {"zero_init_last": False}, {"zero_init_last": True}):
            zero = arguments.get("zero_init_last", False)
            model = timm.create_model(name, **arguments)
            norms = {key: module for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
            zeros = {key for key, module in norms.items() if (module.weight == 0).all()}
            ones = {key for key, module in norms.items() if (module.weight == 1).all()}
            expected = {key for key in norms if key.startswith("layer") and key.endswith(last)} if zero else set()
            assert zeros == expected
            assert ones == norms.keys() - expected
            assert all((module.bias == 0).all() for module in norms.values())


# --- stems, strides, features ---------------------------------------------------------------------------------------


def test_the_stem_for_small_images_is_a_3x3_convolution_of_stride_1_without_a_pool() -> None:
    model = timm.create_model("epsanet14_tiny", in_chans=2)
    randomise_norms(model)
    model.eval().double()
    x = torch.randn(1, 2, 9, 7, dtype=torch.float64)
    state = model.state_dict()
    expected = F.relu(norm(longhand.convolution(x, state["conv1.weight"], 1, 1, 1), state, "bn1"))
    with torch.no_grad():
        stem, first, *_ = model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(stem, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(first, model.layer1(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "output_stride", "strides", "channels"),
    [
        ("epsanet50_small", None, [2, 4, 8, 16, 32], [64, 256, 512, 1024, 2048]),
        ("epsanet50_small", 32, [2, 4, 8, 16, 32], [64, 256, 512, 1024, 2048]),
        ("epsanet50_small", 16, [2, 4, 8, 16, 16], [64, 256, 512, 1024, 2048]),
        ("epsanet50_large", 8, [2, 4, 8, 8, 8], [64, 256, 512, 1024, 2048]),
        ("epsanet18", 16, [2, 4, 8, 16, 16], [64, 64, 128, 256, 512]),
        ("epsanet14_tiny", None, [1, 1, 2, 4, 8], [64, 64, 128, 128, 256]),
        ("epsanet14_tiny", 4, [1, 1, 2, 4, 4], [64, 64, 128, 128, 256]),
        ("epsanet14_tiny", 2, [1, 1, 2, 2, 2], [64, 64, 128, 128, 256]),
    ],
)
def test_features_have_the_strides_that_output_stride_asks_for_and_say_so(
    name: str, output_stride: int | None, strides: list[int], channels: list[int]
) -> None:
    arguments = {} if output_stride is None else {"output_stride": output_stride}
    model = on_meta(name, features_only=True, **arguments)
    assert model.feature_info.reduction() == strides
    assert model.feature_info.channels() == channels
    features = model(torch.empty(1, 3, 64, 64, device="meta"))
    assert [64 // feature.shape[-1] for feature in features] == strides
    assert [feature.shape[1] for feature in features] == channels


@pytest.mark.parametrize(
    ("name", "output_stride", "usable"), [("epsanet50_small", 8, 32), ("epsanet18", 16, 32), ("epsanet14_tiny", 4, 8)]
)
def test_a_dilated_network_computes_the_strided_one_on_a_denser_grid(
    name: str, output_stride: int, usable: int
) -> None:
    """With attention that does not look at the image, every n-th value of the dense map is the strided map's."""
    strided = timm.create_model(name, num_classes=0)
    randomise_norms(strided)
    for module in strided.modules():
        if isinstance(module, epsanet.SEWeight):
            nn.init.zeros_(module.fc2.weight)
            nn.init.normal_(module.fc2.bias)
    dilated = timm.create_model(name, num_classes=0, output_stride=output_stride)
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 2 * usable, 3 * usable)
    step = usable // output_stride
    with torch.no_grad():
        expected = strided.eval().forward_features(x)
        dense = dilated.eval().forward_features(x)
    assert dense.shape[-2:] == (2 * step, 3 * step)
    torch.testing.assert_close(dense[..., ::step, ::step], expected, rtol=1e-4, atol=1e-5 * expected.std())


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("epsanet50_small", 4, r"output_stride=4 is impossible here; use one of \(8, 16, 32\)"),
        ("epsanet50_small", 64, r"output_stride=64 is impossible here; use one of \(8, 16, 32\)"),
        ("epsanet14_tiny", 32, r"output_stride=32 is impossible here; use one of \(2, 4, 8\)"),
    ],
)
def test_an_impossible_output_stride_raises_with_the_possible_ones(name: str, output_stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(name, output_stride=output_stride)


@pytest.mark.parametrize(
    ("name", "kernel", "stride", "channels"),
    [("epsanet14_tiny", 3, 1, [32, 64, 128, 128, 256]), ("epsanet18", 7, 2, [32, 64, 128, 256, 512])],
)
def test_a_narrow_stem_is_one_convolution_of_its_width_that_starts_as_all_do(
    name: str, kernel: int, stride: int, channels: list[int]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, stem_width=32).eval().double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    state = model.state_dict()
    expected = F.relu(norm(longhand.convolution(x, state["conv1.weight"], 1, stride, 1), state, "bn1"))
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(features[0], expected, rtol=1e-9, atol=1e-10)
    assert [feature.shape[1] for feature in features] == channels
    assert model.conv1.weight.shape == (32, 3, kernel, kernel)
    assert model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (kernel * kernel * 32)), rel=0.1)


@pytest.mark.parametrize("width", [0, 33])
def test_an_impossible_stem_width_raises(width: int) -> None:
    with pytest.raises(ValueError, match=f"stem_width={width} is impossible; use an even number of 2 or more"):
        on_meta("epsanet14_tiny", stem_width=width)


@pytest.mark.parametrize("name", ["epsanet50_small", "epsanet14_tiny", "fcanet26_tiny"])
@pytest.mark.parametrize("wrong", [(1, 1), (1, 1, 1, 1, 1), (1, 1, 0, 1), (1, 1, 1.5, 1), "1111", 4])
def test_other_than_four_stages_raise(name: str, wrong: object) -> None:
    for argument in ("layers", "channels"):
        with pytest.raises(ValueError, match=rf"^{argument}={re.escape(repr(wrong))} is impossible; .* four stages$"):
            on_meta(name, **{argument: wrong})


def test_a_deep_stem_on_the_stem_for_small_images_raises() -> None:
    with pytest.raises(ValueError, match=r"stem_type .* leave it out with small_images=True"):
        on_meta("epsanet14_tiny", stem_type="deep")


# --- arguments ------------------------------------------------------------------------------------------------------


def test_block_arguments_of_the_caller_are_merged_into_those_of_the_variant() -> None:
    model = on_meta("epsanet50_large", block_args={"softmax": "channels", "reduction": 4})
    for block in (module for module in model.modules() if isinstance(module, EPSABlock)):
        assert block.conv2.softmax == "channels"
        assert block.conv2.spc.mode == "split", "the variant's own argument got lost"
        assert [branch.groups for branch in block.conv2.spc.branches] == [4, 8, 16, 16]
        assert block.conv2.se.fc1.out_channels == block.conv2.se.fc1.in_channels // 4
    # and the caller's goes first: the same network under another name
    assert parameters(on_meta("epsanet50_large", block_args={"spc": "multiplex", "groups": (32,) * 4})) == 30_100_094
    assert parameters(on_meta("epsanet50_large_g32", block_args={"spc": "split", "groups": (4, 8, 16, 16)})) == (
        27_899_518
    )


def test_block_arguments_of_one_network_do_not_reach_the_next() -> None:
    on_meta("epsanet50_large", block_args={"spc": "multiplex", "groups": (1, 1, 1, 1)})
    assert parameters(on_meta("epsanet50_large")) == 27_899_518


def test_another_number_of_branches_is_a_block_argument() -> None:
    model = on_meta("epsanet50_small", block_args={"kernel_sizes": (3, 5), "groups": (2, 4)})
    blocks = [module for module in model.modules() if isinstance(module, EPSABlock)]
    assert len(blocks) == 16
    for block in blocks:
        width = block.conv1.out_channels
        assert [tuple(branch.weight.shape) for branch in block.conv2.spc.branches] == [
            (width // 2, width // 2, 3, 3),
            (width // 2, width // 4, 5, 5),
        ]


@pytest.mark.parametrize(
    ("block_args", "message"),
    [
        ({"kernel_sizes": (3, 5, 7)}, r"has 3 branches but groups="),
        ({"kernel_sizes": (2, 4, 6, 8)}, r"kernel size 2 .* is not odd"),
        ({"kernel_sizes": (3, 5, 7), "groups": (1, 1, 1)}, r"out_channels=64 is not divisible by 3 branches; use 63"),
        ({"groups": (0, 0, 0, 0)}, r"groups=\(0, 0, 0, 0\) is impossible"),
        ({"softmax": "both"}, r"softmax='both' is unknown"),
    ],
)
def test_impossible_block_arguments_raise_the_modules_own_message(block_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta("epsanet50_small", block_args=block_args)


def test_an_unknown_block_argument_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="kernels"):
        on_meta("epsanet50_small", block_args={"kernels": (3, 5, 7, 9)})


def test_timms_bottleneck_and_basic_block_are_what_the_blocks_extend() -> None:
    """Everything that timm does with its blocks (zero_init_last, drop path, dilation) asks for its classes."""
    for name, ours, theirs in (("epsanet50_small", EPSABlock, Bottleneck), ("epsanet18", EPSABasicBlock, BasicBlock)):
        blocks = [module for module in on_meta(name).modules() if isinstance(module, theirs)]
        assert len(blocks) == (16 if theirs is Bottleneck else 8)
        assert all(type(block) is ours for block in blocks)


# --- the registry ---------------------------------------------------------------------------------------------------


def test_timm_lists_the_variants_and_nothing_else_of_that_name() -> None:
    assert set(timm.list_models("epsanet*")) == {*PUBLISHED, *TINY, "epsanet18", "epsanet34"}


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY, "epsanet18", "epsanet34"])
def test_pretrained_without_weights_says_that_none_exist_and_what_does(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights") as raised:
        timm.create_model(name, pretrained=True)
    message = str(raised.value)
    assert "\n" not in message
    for remedy in timm.list_pretrained(f"{name}.*") or ("epsanet train", "epsanet convert", "local-dir:"):
        assert remedy in message


def test_the_data_configuration_is_that_of_the_papers_evaluation() -> None:
    config = timm.data.resolve_model_data_config(on_meta("epsanet50_small"))
    assert config["input_size"] == (3, 224, 224)
    assert 224 / config["crop_pct"] == 256  # resize to 256, centre crop of 224
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    assert timm.data.resolve_model_data_config(on_meta("epsanet14_tiny"))["input_size"] == (3, 32, 32)
