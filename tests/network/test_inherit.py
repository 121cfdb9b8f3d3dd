"""First weights from another network: a ResNet's filters dealt to the branches, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import epsanet
from epsanet.network.epsanet import EPSABasicBlock, EPSABlock, EPSANet
from epsanet.network.inherit import branch_filters, inherit, start_from
from epsanet.network.weights import LoadedModel

assert epsanet  # registers the variants


def small(block: Any, **block_args: Any) -> Any:
    """A network of four blocks; of timm's own blocks it is a ResNet."""
    arguments = {"block_args": block_args} if block_args else {}
    return EPSANet(block, (1, 1, 1, 1), channels=(16, 16, 32, 32), num_classes=3, **arguments)


def lived_in(model: Any) -> Any:
    """Norms as they are after training: no weight is 1, no statistic 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.double().eval()


@pytest.mark.parametrize("spc", ["multiplex", "split"])
def test_a_branch_takes_the_filters_of_its_outputs_centred_and_for_the_inputs_of_its_groups(spc: Any) -> None:
    outputs, inputs, kernel_sizes, groups = 8, 16, (3, 5, 1, 9), (1, 2, 1, 2)
    filters = torch.randn(outputs, inputs, 3, 3)
    found = branch_filters(filters, kernel_sizes, groups, spc)
    for branch, (kernel, count) in enumerate(zip(kernel_sizes, groups, strict=True)):
        seen = inputs if spc == "multiplex" else inputs // 4
        first = 0 if spc == "multiplex" else branch * inputs // 4
        wanted = torch.zeros(2, seen // count, kernel, kernel)
        for output in range(2):
            group = output // (2 // count)
            for place in range(seen // count):
                for row in range(kernel):
                    for column in range(kernel):
                        y, x = row - kernel // 2, column - kernel // 2
                        if abs(y) <= 1 and abs(x) <= 1:
                            source = first + group * (seen // count) + place
                            wanted[output, place, row, column] = filters[2 * branch + output, source, y + 1, x + 1]
        torch.testing.assert_close(found[branch], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("softmax", ["scales", "channels"])
@pytest.mark.parametrize(("block", "dense"), [(EPSABlock, Bottleneck), (EPSABasicBlock, BasicBlock)])
def test_without_groups_an_inherited_network_gives_the_logits_of_its_resnet(
    block: Any, dense: Any, softmax: str
) -> None:
    torch.manual_seed(0)
    resnet = lived_in(small(dense))
    model = small(block, groups=(1, 1, 1, 1), softmax=softmax).double().eval()
    model.load_state_dict(inherit(resnet.state_dict(), model))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(images), resnet(images), rtol=1e-8, atol=1e-8)


def test_with_groups_the_outputs_of_the_3x3_branch_are_those_of_the_resnet() -> None:
    torch.manual_seed(0)
    whole = lived_in(small(Bottleneck))
    model = small(EPSABlock, groups=(1, 4, 4, 4)).double().eval()
    model.load_state_dict(inherit(whole.state_dict(), model))
    resnet, block = whole.layer1[0], model.layer1[0]
    features = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    mine, theirs = block.bn2(block.conv2(features)), resnet.bn2(resnet.conv2(features))
    torch.testing.assert_close(mine[:, :4], theirs[:, :4], rtol=1e-8, atol=1e-8)
    assert not torch.allclose(mine[:, 4:], theirs[:, 4:], atol=0.1), "other branches see fewer channels"


def test_inheriting_changes_neither_network_and_leaves_attention_to_learn() -> None:
    resnet, model = small(Bottleneck), small(EPSABlock)
    before = {name: tensor.clone() for name, tensor in {**resnet.state_dict(), **model.state_dict()}.items()}
    model_state = inherit(resnet.state_dict(), model)
    for name, tensor in {**resnet.state_dict(), **model.state_dict()}.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    model.load_state_dict(model_state)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(
        block.conv2.se.fc2.weight.grad.abs().sum() > 0 for stage in (model.layer1, model.layer4) for block in stage
    )


def test_the_published_networks_inherit_from_the_resnets_of_their_widths() -> None:
    pairs = {
        "epsanet50_small": ("resnet50", 16),
        "epsanet50_large": ("wide_resnet50_2", 16),
        "epsanet18": ("resnet18", 16),
    }
    with torch.device("meta"):
        for name, (resnet, modules) in pairs.items():
            source = timm.create_model(resnet)
            model = timm.create_model(name, num_classes=10)
            found = inherit(source.state_dict(), model)
            wanted = model.state_dict()
            different = [
                key for key in {*found, *wanted} if found.get(key, source.fc.weight).shape != wanted[key].shape
            ]
            assert sorted(different) == ["fc.bias", "fc.weight"], name
            assert sum(key.endswith("se.fc2.weight") for key in found) == modules


# start_from


def loaded(model: Any, names: list[str]) -> LoadedModel:
    return LoadedModel(model=model, class_names=names)


def tiny(classes: int, **arguments: Any) -> Any:
    return timm.create_model("epsanet14_tiny", num_classes=classes, **arguments)


def test_the_classifier_comes_along_by_the_names_of_its_classes() -> None:
    source, model = tiny(3), tiny(2)
    nn.init.normal_(source.fc.bias)
    start = start_from(model, ["cow", "ant"], loaded(source, ["ant", "bee", "cow"]))
    torch.testing.assert_close(model.fc.weight, source.fc.weight[[2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(model.fc.bias, source.fc.bias[[2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(
        model.layer3[0].conv2.spc.branches[3].weight, source.layer3[0].conv2.spc.branches[3].weight
    )
    assert start.head
    assert str(start) == f"{len(source.state_dict())} tensors, its classifier"


def test_a_class_that_is_unknown_makes_the_classifier_new() -> None:
    source, model = tiny(3), tiny(2)
    before = model.fc.weight.clone()
    start = start_from(model, ["cow", "dog"], loaded(source, ["ant", "bee", "cow"]))
    torch.testing.assert_close(model.fc.weight, before, rtol=0, atol=0)
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight, rtol=0, atol=0)
    assert str(start) == f"{len(source.state_dict()) - 2} tensors, a new classifier"


def test_what_came_from_a_resnet_is_counted() -> None:
    source, model = small(Bottleneck), small(EPSABlock)
    source.pretrained_cfg = model.pretrained_cfg = {"classifier": "fc"}
    start = start_from(model, ["x", "y", "z"], loaded(source, ["a", "b", "c"]))
    same = len(source.state_dict()) - 4 - 2  # without the four convolutions and the classifier
    assert (start.copied, start.inherited, start.head) == (same, 4, False)
    assert "4 PSA modules from 3×3 convolutions" in str(start)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("epsanet26_tiny", {}), r"epsanet26_tiny does not fit: its layer1\.1\.conv1\.weight has no place"),
        (
            ("epsanet14_tiny", {"block_args": {"reduction": 2}}),
            r"layer1\.0\.conv2\.se\.fc1\.weight has shape \(2, 4, 1, 1\)",
        ),
        (("resnet18", {}), r"resnet18 does not fit: .* take one of the same depth, stem and widths"),
        (("mobilenetv3_small_100", {}), r"mobilenetv3_small_100 does not fit: it has no conv1\.weight"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_and_nothing_is_changed(source: Any, message: str) -> None:
    model = tiny(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = timm.create_model(source[0], num_classes=2, **source[1])
    with pytest.raises(ValueError, match=message) as raised:
        start_from(model, ["a", "b"], loaded(other, ["a", "b"]))
    assert "\n" not in str(raised.value)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("spc", ["multiplex", "split"])
def test_filters_of_a_grouped_convolution_are_refused(spc: Any) -> None:
    source = EPSANet(Bottleneck, (1, 1, 1, 1), channels=(16, 16, 32, 32), cardinality=4, base_width=16, num_classes=3)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 cannot inherit filters of shape .* grouped, or of another"):
        inherit(source.state_dict(), small(EPSABlock, spc=spc))
