"""A network in plain operators, for runtimes that know nothing of this package.

Norms are folded, and a PSA module becomes convolutions, a small matrix product, a softmax, and one multiply-add over
its features; every map keeps its four axes ``N, C, H, W``, which lets a runtime choose the layout.

Runtimes are slow at grouped convolutions with few channels a group. A branch can be computed in other **forms** with
the same result, named by the groups that its convolution then has: fewer groups, with zeros between the merged ones
(block-diagonal); or one group an input channel, a depthwise convolution whose results are summed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from epsanet import kernels
from epsanet.network.graph import Rewriter, Tracer, fold_norms, foldable, scale_and_shift
from epsanet.network.psa import PSA, SPC, branch_attention, untouched

__all__ = ["DepthwiseSum", "PortablePSA", "branch_forms", "branch_in_form", "portable"]

MOST_TIMES_MORE_WORK = 8
"""Forms that multiply more often than this many times the branch are not considered."""


def branch_forms(conv: nn.Conv2d) -> list[int]:
    """Groups of the forms that a branch can take, its own first; a bias or padding without zeros has no other.

    Args:
        conv: a branch of an SPC.
    """
    if conv.bias is not None or conv.padding_mode != "zeros":
        return [conv.groups]
    merged = [count for count in range(1, conv.groups) if conv.groups % count == 0]
    forms = [conv.groups, *(count for count in reversed(merged) if conv.groups // count <= MOST_TIMES_MORE_WORK)]
    together = conv.in_channels // conv.groups
    if 1 < together <= MOST_TIMES_MORE_WORK and conv.groups > 1:
        forms.append(conv.in_channels)
    return forms


class DepthwiseSum(nn.Module):
    """A grouped convolution as a depthwise one and a sum over the channels of each group.

    Args:
        conv: with ``J`` input channels a group, and no bias.
    """

    order: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.summands = conv.in_channels // conv.groups
        channels = torch.arange(conv.in_channels, device=conv.weight.device).reshape(conv.groups, self.summands)
        self.register_buffer("order", channels.T.flatten())  # first channel of each group, second of each, …
        self.depthwise = nn.Conv2d(
            conv.in_channels,
            conv.out_channels * self.summands,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.in_channels,
            bias=False,
        )
        weight_OJkk = conv.weight.detach()
        self.depthwise.weight = nn.Parameter(weight_OJkk.transpose(0, 1).flatten(0, 1)[:, None].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        parts = self.depthwise(x.index_select(1, self.order)).chunk(self.summands, 1)
        y: Tensor = parts[0]
        for part in parts[1:]:
            y = y + part
        return y


def _merged(conv: nn.Conv2d, groups: int) -> nn.Conv2d:
    """The same convolution with fewer groups and zeros where there was no connection."""
    together = conv.in_channels // conv.groups
    dense = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups,
        bias=False,
    )
    weight = conv.weight.new_zeros(dense.weight.shape)
    made = conv.out_channels // conv.groups
    for group in range(conv.groups):
        outputs = slice(group * made, (group + 1) * made)
        first = group % (conv.groups // groups) * together
        weight[outputs, first : first + together] = conv.weight.detach()[outputs]
    dense.weight = nn.Parameter(weight)
    return dense


def branch_in_form(conv: nn.Conv2d, groups: int) -> nn.Module:
    """A branch in one of its forms.

    Args:
        conv: the branch.
        groups: one of ``branch_forms(conv)``.

    Returns:
        A module with the same result to rounding.
    """
    if groups == conv.groups:
        return conv
    return DepthwiseSum(conv) if groups == conv.in_channels else _merged(conv, groups)


class PortablePSA(nn.Module):
    """A PSA module with the norm after it, in plain operators.

    Args:
        psa: the module; its branches are convolutions.
        norm: that takes its output, if any.
        forms: groups of each branch's form; its own when left out.
    """

    def __init__(self, psa: PSA, norm: nn.BatchNorm2d | None = None, forms: Sequence[int] | None = None) -> None:
        super().__init__()
        convs = [conv for conv in psa.spc.branches if isinstance(conv, nn.Conv2d)]
        assert len(convs) == len(psa.spc.branches)
        forms = [conv.groups for conv in convs] if forms is None else forms
        self.branches = nn.ModuleList(branch_in_form(conv, form) for conv, form in zip(convs, forms, strict=True))
        self.split, self.softmax = psa.spc.mode == "split", psa.softmax
        self.se, self.added_up = psa.se, psa.fusion == "sum"
        made = sum(conv.out_channels for conv in convs)
        scale, shift = scale_and_shift(norm, made // len(convs) if self.added_up else made)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shift = nn.Parameter(shift[None, :, None, None], requires_grad=False) if norm is not None else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shape ``N, C, H, W`` to ``N, K, H', W'``."""
        inputs = x_NCHW.chunk(len(self.branches), 1) if self.split else [x_NCHW] * len(self.branches)
        feats_NKHW = torch.cat([branch(part) for branch, part in zip(self.branches, inputs, strict=True)], 1)
        averages_NSD = feats_NKHW.mean((2, 3)).unflatten(1, (len(self.branches), -1))
        attention_NSD = branch_attention(self.se, averages_NSD, self.softmax)
        if self.added_up:
            y = (feats_NKHW.unflatten(1, attention_NSD.shape[1:]) * attention_NSD[..., None, None]).sum(1)
            y = y * self.scale[:, None, None]
        else:
            y = feats_NKHW * (attention_NSD.flatten(1) * self.scale)[:, :, None, None]
        return y if self.shift is None else y + self.shift


def _plain(psa: PSA) -> bool:
    """Whether the branches are convolutions and nothing else, and nothing around them is wrapped or has a hook."""
    return untouched(psa.spc, SPC) and psa.squeezed and all(type(branch) is nn.Conv2d for branch in psa.spc.branches)


def portable(model: nn.Module, forms: Mapping[str, Sequence[int]] | None = None) -> nn.Module:
    """A copy of a network in plain operators, for inference.

    Args:
        model: a classifier in float32 on the CPU.
        forms: groups of each branch by the name of the PSA module; a branch's own when left out.

    Returns:
        A module with the same logits to rounding. Where the network cannot be traced, norms stay; a PSA module whose
        branches are not convolutions, or whose parts are wrapped or watched by a hook, stays as it is.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    forms = forms or {}
    modules = {name: module for name, module in frozen.named_modules() if isinstance(module, PSA) and _plain(module)}
    try:
        network = Tracer().trace_module(frozen)
    except (fx.proxy.TraceError, TypeError, NotImplementedError):
        for name, module in modules.items():
            frozen.set_submodule(name, PortablePSA(module, None, forms.get(name)))
        return frozen.requires_grad_(False)
    rewriter = Rewriter(network)
    for node in [*rewriter.nodes(nn.Identity), *rewriter.nodes(nn.Dropout)]:
        rewriter.drop(node)
    fold_norms(rewriter)
    for node in rewriter.nodes(PSA):
        psa, name = rewriter.layer(node), str(node.target)
        if name not in modules or psa is not modules[name]:  # called twice, and replaced at the first call
            continue
        after = rewriter.only_user(node)
        norm = rewriter.layer(after) if after is not None and foldable(rewriter.layer(after)) else None
        if norm is not None and after is not None:
            rewriter.drop(after)
        rewriter.replace(node, PortablePSA(modules[name], norm, forms.get(name)))  # type: ignore[arg-type]
    network.graph.lint()
    network.recompile()
    network.delete_all_unused_submodules()
    return network.requires_grad_(False)


def reference_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What a network says with torch's own convolutions, shape ``N, 3, H, W`` to ``N, classes``."""
    with torch.inference_mode(), kernels.use("reference"):
        logits: Tensor = model(images)
    return logits
