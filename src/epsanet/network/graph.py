"""A traced network whose layers can be looked at and replaced; norms folded into the convolutions before them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from epsanet.network.psa import PSA, hooked

__all__ = ["Rewriter", "Tracer", "fold_norms", "foldable", "scale_and_shift"]


class Tracer(fx.Tracer):
    """Records a network; PSA modules stay whole, and so do modules that a hook watches."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PSA) or hooked(m) or super().is_leaf_module(m, module_qualified_name)

    def trace_module(self, model: nn.Module) -> fx.GraphModule:
        if hooked(model):
            raise fx.proxy.TraceError("a hook watches the whole network")
        network = fx.GraphModule(model, self.trace(model))
        for node in network.graph.nodes:
            if node.op == "call_module" and not node.args:  # bn(input=x) is bn(x)
                first = next(iter(inspect.signature(model.get_submodule(node.target).forward).parameters), None)
                node.args = tuple(value for name, value in node.kwargs.items() if name == first)
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != first}
        return network


class Rewriter:
    """Looks at a traced network and replaces its layers."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.layers: dict[str, nn.Module] = dict(network.named_modules())

    def layer(self, node: Any) -> nn.Module | None:
        return self.layers[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def replace(self, node: fx.Node, layer: nn.Module) -> None:
        parent, _, name = str(node.target).rpartition(".")
        setattr(self.layers[parent], name, layer)
        self.layers[str(node.target)] = layer

    def drop(self, node: fx.Node) -> None:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        self.network.graph.erase_node(node)

    def free(self, node: fx.Node) -> bool:
        """Whether this is the only place that uses a layer or its weights, and no hook watches it."""
        uses = [other for other in self.network.graph.nodes if other.op in ("call_module", "get_attr")]
        places = sum(f"{other.target}.".startswith(f"{node.target}.") for other in uses)
        layer = self.layer(node)
        return layer is not None and not hooked(layer) and places == 1

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The one place that uses the result of a layer that is free."""
        return next(iter(node.users)) if len(node.users) == 1 and self.free(node) else None

    def nodes(self, kind: type[nn.Module]) -> list[fx.Node]:
        return [node for node in self.network.graph.nodes if isinstance(self.layer(node), kind)]


def foldable(norm: nn.Module | None) -> bool:
    """Whether this is a batch norm with statistics, a constant scale and shift at inference, that no hook watches."""
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and not hooked(norm)


def fold_norms(rewriter: Rewriter) -> None:
    """Fold each batch norm that follows a convolution into it."""
    for node in rewriter.nodes(nn.BatchNorm2d):
        before, norm = node.args[0], rewriter.layer(node)
        conv = rewriter.layer(before)
        if type(conv) is nn.Conv2d and foldable(norm) and rewriter.only_user(before) is node:  # type: ignore[arg-type]
            rewriter.replace(before, fuse_conv_bn_eval(conv, norm))  # type: ignore[arg-type]
            rewriter.drop(node)


def scale_and_shift(norm: nn.BatchNorm2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and adds, one value a channel each; ones and zeros without a norm."""
    if norm is None:
        scale = torch.ones(channels, dtype=torch.float32, device="cpu")  # of a network in float32 on the CPU
        return scale, torch.zeros_like(scale)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None  # foldable
    assert variance is not None
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.float().detach(), shift.float().detach()
