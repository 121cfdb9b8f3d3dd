"""Blocks whose norms, residual sums and 1×1 convolutions the kernels compute in training, against timm's own way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import epsanet.network.epsanet  # noqa: F401 - registers the variants
from epsanet import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")


class Operators(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if isinstance(result, Tensor) and result.dim() > 3:
            name += " of maps"
        self.counts[name] = self.counts.get(name, 0) + 1
        return result


def operators(compute: Callable[[], Any]) -> dict[str, int]:
    with Operators() as seen:
        compute()
    return seen.counts


def make(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training: not all alike
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def images(size: int, batch: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size)


def train(model: nn.Module, x: Tensor, chosen: str) -> dict[str, Tensor]:
    """Loss, all gradients and running statistics of one step of a copy."""
    model = copy.deepcopy(model)
    with kernels.use(chosen):  # type: ignore[arg-type]
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 10)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}  # type: ignore[dict-item]


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients and running statistics as one vector, by the size of the exact one."""
    parts = [(found[name].double() - value.double()).norm() / len(exact) ** 0.5 for name, value in exact.items()]
    sizes = [value.double().norm() / len(exact) ** 0.5 for value in exact.values()]
    return float(torch.stack(parts).norm() / torch.stack(sizes).norm())


NETWORKS = [
    ("epsanet14_tiny", 32, {}),
    ("epsanet14_tiny", 32, {"block_args": {"se": "branches", "softmax": "channels"}}),
    ("epsanet14_tiny", 32, {"block_args": {"se": "none"}}),
    ("epsanet14_tiny", 32, {"block_args": {"fusion": "sum"}}),
    ("epsanet26_tiny_x2", 16, {}),
    ("epsanet23_tiny_wide", 32, {}),  # shortcuts that average, a stage of 8 channels
    ("epsanet18", 64, {}),  # basic blocks
    ("epsanet50_small", 64, {}),
    ("epsanet50_large", 64, {"output_stride": 16}),  # dilated: shortcuts of stride 1 with a convolution
]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize(("name", "size", "kwargs"), NETWORKS, ids=str)
def test_a_step_agrees_with_float64(
    name: str, size: int, kwargs: dict[str, Any], memory_format: torch.memory_format
) -> None:
    model = make(name, **kwargs).to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # no ReLU's input is near zero, where it rounds to either side
            nn.init.uniform_(module.bias, 6, 7)
    x = images(size).contiguous(memory_format=memory_format)
    exact, native = train(copy.deepcopy(model).double(), x.double(), "auto"), train(model, x, "auto")
    assert all(native[name].shape == value.shape for name, value in exact.items())
    torch.testing.assert_close(native["loss"].double(), exact["loss"], rtol=1e-5, atol=0)
    assert distance(native, exact) < 1e-5


def test_a_step_with_closed_relus_agrees_with_float64() -> None:
    model = make("epsanet14_tiny").to(memory_format=torch.channels_last)
    x = images(32)
    # A single ReLU whose input rounds to the other side of zero makes 1e-3; test_normalization.py has the digits.
    assert distance(train(model, x, "auto"), train(copy.deepcopy(model).double(), x.double(), "auto")) < 5e-3


@pytest.mark.parametrize(("name", "norms"), [("epsanet14_tiny", 16), ("epsanet50_small", 53)])
def test_every_norm_of_a_training_step_is_the_kernels(name: str, norms: int) -> None:
    model = make(name).to(memory_format=torch.channels_last)
    x = images(32).contiguous(memory_format=torch.channels_last)
    counts = operators(lambda: model(x).sum().backward())
    assert counts["epsanet.batch_norm.default"] == counts["epsanet.batch_norm_gradient.default"] == norms
    assert not any("native_batch_norm" in operator for operator in counts)
    assert not any("mul" in operator and "of maps" in operator for operator in counts)  # attention is in the norms
    counts = operators(lambda: model.eval()(x))
    assert "epsanet.batch_norm.default" not in counts
    with kernels.use("reference"):
        assert "epsanet.batch_norm.default" not in operators(lambda: model.train()(x))


def test_running_statistics_follow_batch_norm_over_steps() -> None:
    model, other = (make("epsanet14_tiny").to(memory_format=torch.channels_last) for _ in range(2))
    for step in range(3):
        x = images(32) * (1 + step)
        with torch.no_grad():
            model(x)
            with kernels.use("reference"):
                other(x)
    for (name, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert found.ndim or found == 3


def set_eval(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def set_drop_path(model: Any) -> None:
    model.layer1[0].drop_path = DropPath(0.5)


def set_other_norm(model: Any) -> None:
    model.layer2[0].bn3 = nn.GroupNorm(4, 128)


def set_no_momentum(model: Any) -> None:
    model.layer2[0].bn1.momentum = None


def set_other_activation(model: Any) -> None:
    model.layer1[0].act1 = nn.GELU()


def set_biased_convolution(model: Any) -> None:
    model.layer2[0].conv3 = nn.Conv2d(32, 128, 1)


def set_wider_convolution(model: Any) -> None:
    model.layer3[0].conv1 = nn.Conv2d(128, 32, 3, padding=1, bias=False)


def set_other_shortcut(model: Any) -> None:
    model.layer2[0].downsample = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128))


@pytest.mark.parametrize(
    "change",
    [
        set_eval,
        set_drop_path,
        set_other_norm,
        set_no_momentum,
        set_other_activation,
        set_biased_convolution,
        set_wider_convolution,
        set_other_shortcut,
    ],
)
def test_a_changed_network_is_computed_as_it_was_changed(change: Callable[[nn.Module], None]) -> None:
    model, x = make("epsanet14_tiny"), images(32)
    change(model)
    found = []
    for chosen in ("auto", "reference"):
        torch.manual_seed(2)  # of drop path
        found.append(train(model, x, chosen))
    assert distance(*found) < 1e-3


@pytest.mark.parametrize(
    "place",
    [
        "bn1",
        "act1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.0.conv2.spc",
        "layer1.0.conv2.spc.branches.2",
        "layer1.0.bn2",
        "layer2.0.downsample.0",
        "layer2.0.downsample",
        "layer3.0.act3",
    ],
)
def test_a_layer_that_is_watched_is_called(place: str) -> None:
    model, x, seen = make("epsanet14_tiny").to(memory_format=torch.channels_last), images(32), []
    expected = train(model, x, "reference")
    model.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    found = train(model, x, "auto")
    assert seen == [place]
    assert distance(found, expected) < 1e-3


def test_statistics_of_a_single_number_are_refused_as_torch_does() -> None:
    model = make("epsanet14_tiny").to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(8, batch=1))


def test_a_compiled_training_step_is_one_graph_and_the_same() -> None:
    model, x = make("epsanet14_tiny").to(memory_format=torch.channels_last), images(16)
    x = x.contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for network in (compiled, other):
        F.cross_entropy(network(x), torch.arange(6)).backward()
    for (name, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    for found, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_network_in_training_mode_is_exported() -> None:
    model, x = make("epsanet14_tiny").to(memory_format=torch.channels_last), images(16)
    x = x.contiguous(memory_format=torch.channels_last)
    program = torch.export.export(model, (x,))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(program.module()(x), copied(x), rtol=1e-4, atol=1e-4)
