"""``psa_replace`` on networks of timm and torchvision that know nothing of it."""

from __future__ import annotations

from typing import Any

import longhand
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import epsanet
from epsanet.network.replace import psa_replace


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def spatial_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }


def outputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What the modules of these names put out."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


NETWORKS: dict[str, tuple[Any, set[str]]] = {
    # the network, and the convolutions that must stay
    "resnext50_32x4d": (lambda: timm.create_model("resnext50_32x4d", num_classes=4), {"conv1"}),
    "regnety_002": (lambda: timm.create_model("regnety_002", num_classes=4), {"stem.conv"}),
    "mobilenetv3_small_100": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=4), {"conv_stem"}),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=4), {"conv1"}),
}


@pytest.mark.parametrize(("make", "stays"), NETWORKS.values(), ids=NETWORKS)
def test_every_spatial_convolution_but_the_stem_becomes_a_psa_module_of_the_same_output_size(
    make: Any, stays: set[str]
) -> None:
    model, untouched = make(), make()
    convolutions = spatial_convolutions(model)
    before = parameters(model)
    x = torch.randn(1, 3, 64, 96)
    sizes = {name: out.shape for name, out in outputs_of(model, list(convolutions), x).items()}

    report = psa_replace(model)

    assert set(report.left) == stays
    assert report.left == dict.fromkeys(stays, "reads 3 channels, fewer than the 4 branches")
    assert report.replaced == [name for name in convolutions if name not in stays]
    assert len(report.replaced) >= 8
    outputs = outputs_of(model, list(convolutions), x)
    for name in report.replaced:
        module, conv = model.get_submodule(name), convolutions[name]
        assert type(module) is epsanet.PSA
        assert outputs[name].shape == sizes[name]
        assert outputs[name].std() > 0
        for branch, wanted in zip(module.spc.branches, (1, 4, 8, 16), strict=True):
            assert branch.stride == conv.stride
            assert max(wanted, conv.groups) % branch.groups == 0
    for name in stays:
        assert model.get_submodule(name) is convolutions[name]
    # parameters add up: row by row, and in all
    assert {row.name: row.parameters_before for row in report.rows} == {
        name: parameters(module) for name, module in spatial_convolutions(untouched).items()
    }
    for row in report.rows:
        assert row.parameters_after == parameters(model.get_submodule(row.name))
    assert parameters(model) - before == sum(row.parameters_after - row.parameters_before for row in report.rows)
    last = str(report).splitlines()[-1]
    totals = [sum(getattr(row, f"parameters_{when}") for row in report.rows) for when in ("before", "after")]
    assert last.startswith(f"{len(report.replaced)} of {len(convolutions)} k×k convolutions replaced")
    assert last.endswith(f"parameters {totals[0]:,} → {totals[1]:,}")


def test_a_replaced_resnet18_is_epsanet18() -> None:
    """Two ways to one network: our own variant, and timm's ResNet with its convolutions swapped."""
    swapped = timm.create_model("resnet18", num_classes=4)
    psa_replace(swapped, "layer*")
    ours = timm.create_model("epsanet18", num_classes=4).eval()
    swapped.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(swapped.eval()(x), ours(x))


class Odd(nn.Module):
    """One convolution of every kind, for the reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.plain = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.biased = nn.Conv2d(16, 16, 3, padding=1)
        self.oblong = nn.Conv2d(16, 16, 3, stride=(2, 1), padding=1, bias=False)
        self.uneven = nn.Conv2d(16, 16, 3, dilation=(1, 2), padding=(1, 2), bias=False)
        self.long = nn.Conv2d(16, 16, (1, 7), padding=(0, 3), bias=False)
        self.even = nn.Conv2d(16, 16, 2, bias=False)
        self.valid = nn.Conv2d(16, 16, 3, bias=False)
        self.same = nn.Conv2d(16, 16, 3, padding="same", bias=False)
        self.mirror = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", bias=False)
        self.indivisible = nn.Conv2d(16, 18, 3, padding=1, bias=False)


REASONS = {
    "image": "reads 3 channels, fewer than the 4 branches",
    "biased": "has a bias",
    "oblong": "stride (2, 1)",
    "uneven": "dilation (1, 2)",
    "long": "kernel (1, 7) is not square",
    "even": "kernel (2, 2) is even",
    "valid": "pads by (0, 0)",
    "same": "pads by same",
    "mirror": "pads by (1, 1) (reflect)",
    "indivisible": "out_channels=18 is not divisible by 4 branches; use 16 or 20",
}


def test_every_convolution_that_is_left_names_its_reason_and_stays_as_it_was() -> None:
    model = Odd()
    before = dict(model.named_children())
    report = psa_replace(model)
    assert report.replaced == ["plain"]
    assert report.left.keys() == REASONS.keys(), "a 1×1 convolution is no candidate and has no row"
    for name, reason in REASONS.items():
        assert reason in report.left[name]
        assert model.get_submodule(name) is before[name]
        assert f"{name}" in str(report)
        assert reason in str(report)
    assert model.pointwise is before["pointwise"]


def test_a_convolution_of_a_class_of_its_own_that_pads_by_itself_is_left() -> None:
    model = timm.create_model("tf_mobilenetv3_small_minimal_100")  # TensorFlow's padding on stride 2
    report = psa_replace(model)
    own = {name for name, conv in spatial_convolutions(model).items() if type(conv) is not nn.Conv2d}
    assert own - {"conv_stem"}
    for name in own - {"conv_stem"}:
        assert "Conv2dSame" in report.left[name]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("layer3.*.conv2", ["layer3.0.conv2", "layer3.1.conv2"]),
        (("layer1.0.*", "layer4.1.conv1"), ["layer1.0.conv1", "layer1.0.conv2", "layer4.1.conv1"]),
        (lambda name, conv: conv.stride == (2, 2) and "layer" in name, [f"layer{i}.0.conv1" for i in (2, 3, 4)]),
    ],
    ids=["pattern", "patterns", "function"],
)
def test_only_what_is_selected_is_replaced(select: Any, expected: list[str]) -> None:
    model = timm.create_model("resnet18")
    report = psa_replace(model, select)
    assert report.replaced == expected
    assert [name for name, module in model.named_modules() if isinstance(module, epsanet.PSA)] == expected
    assert set(report.left.values()) == {"not selected"}


def test_a_selection_that_matches_nothing_raises_with_names_of_this_network() -> None:
    model = timm.create_model("resnet18")
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'stage\*' matches no k×k convolution; .* conv1, layer1.0.conv1") as raised:
        psa_replace(model, "stage*")
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax": "both"}, "softmax='both' is unknown"),
        ({"spc": "none"}, "spc='none' is unknown"),
        ({"kernel_sizes": (3, 5)}, "has 2 branches but groups="),
        ({"kernel_sizes": (2, 4, 6, 8)}, "kernel size 2"),
        ({"groups": (0, 1, 1, 1)}, "groups="),
        ({"kernel_sizes": ()}, "kernel_sizes is empty"),
        ({"reduction": 0}, "reduction=0"),
    ],
)
def test_an_option_that_no_module_can_have_raises_and_is_no_reason_to_leave_a_layer(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        psa_replace(timm.create_model("resnet18"), **options)


def test_stride_dilation_groups_type_and_mode_are_kept() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, stride=2, padding=2, dilation=2, groups=2, bias=False, dtype=torch.float64)
    ).eval()
    psa_replace(model, spc="split", softmax="channels", groups=(1, 1, 4, 8), reduction=3)
    module = model[0]
    assert not module.training
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    leaves = dict(module.state_dict())
    x = torch.randn(1, 16, 6, 5, dtype=torch.float64)
    expected = longhand.psa_of(
        leaves, x, groups=[2, 2, 4, 4], stride=2, dilation=2, mode="split", softmax="channels"
    )  # a branch of the split layer sees four channels
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_new_modules_start_as_the_released_code_does() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False))
    psa_replace(model)
    for branch in model[0].spc.branches:
        expected = (2 / (branch.kernel_size[0] ** 2 * branch.out_channels)) ** 0.5
        count = branch.weight.numel()
        assert abs(float(branch.weight.detach().std()) / expected - 1) < 6 / (2 * count) ** 0.5


@pytest.mark.parametrize("name", ["resnext26ts", "regnety_002", "mobilenetv3_small_100"])
def test_a_replaced_network_trains_and_its_new_modules_take_part(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    replaced = psa_replace(model).replaced
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    x, labels = torch.randn(6, 3, 64, 64), torch.arange(6) % 3
    before = {key: tensor.clone() for key, tensor in model.get_submodule(replaced[0]).state_dict().items()}
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.get_submodule(replaced[0]).state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if key.startswith("spc"))


def test_a_convolution_with_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.body = nn.Sequential(self.conv, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y

    model, x = Twice(), torch.randn(1, 16, 5, 5)
    before = model(x)
    assert [(row.name, row.replaced) for row in psa_replace(model).rows] == [("conv", True)]
    assert model.body[0] is model.conv
    assert not torch.allclose(model(x), before)


def test_replacing_twice_leaves_the_modules_of_the_first_time() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)))
    psa_replace(model, "0")
    first = model[0]
    report = psa_replace(model)
    assert report.replaced == ["1"]
    assert report.left == {f"0.spc.branches.{place}": "is a part of a PSA module" for place in range(4)}
    assert model[0] is first
    assert not any(isinstance(module, epsanet.PSA) for psa in model for module in list(psa.modules())[1:])


def test_a_network_that_is_a_convolution_itself_is_not_called_replaced() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    (row,) = psa_replace(conv).rows
    assert not row.replaced
    assert row.parameters_after == row.parameters_before == 16 * 16 * 9
    assert row.note
