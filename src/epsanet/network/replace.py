"""PSA in other networks: swap the k×k convolutions of any CNN for PSA modules of the same shape.

The paper (section 3.3) does so for the 3×3 convolution of ResNet's bottleneck; the same works elsewhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from epsanet.network.psa import GROUPS, KERNEL_SIZES, PSA, REDUCTION, SoftmaxMode, SPCMode, psa_like

__all__ = ["ReplacementReport", "ReplacementRow", "psa_replace"]


@dataclass(frozen=True, kw_only=True)
class ReplacementRow:
    """What became of one k×k convolution."""

    name: str
    """Its dotted name in the network."""
    replaced: bool
    """Whether a PSA module stands there now."""
    note: str
    """The shape of the module that came in, or why the convolution was left."""
    parameters_before: int
    """Parameters of the convolution."""
    parameters_after: int
    """Parameters of what stands there now."""


@dataclass(frozen=True, kw_only=True)
class ReplacementReport:
    """All k×k convolutions of a network, in order; ``str`` gives a table."""

    rows: tuple[ReplacementRow, ...]
    """One row a convolution."""

    @property
    def replaced(self) -> list[str]:
        """Names that are PSA modules now."""
        return [row.name for row in self.rows if row.replaced]

    @property
    def left(self) -> dict[str, str]:
        """Names that were left, and why."""
        return {row.name: row.note for row in self.rows if not row.replaced}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"{'replaced' if row.replaced else 'left':8}  {row.name:{width}}  "
            f"{row.parameters_before:>9,} → {row.parameters_after:>9,}  {row.note}"
            for row in self.rows
        ]
        before = sum(row.parameters_before for row in self.rows)
        after = sum(row.parameters_after for row in self.rows)
        lines.append(
            f"{len(self.replaced)} of {len(self.rows)} k×k convolutions replaced; parameters {before:,} → {after:,}"
        )
        return "\n".join(lines)


def psa_replace(
    model: nn.Module,
    select: str | Sequence[str] | Callable[[str, nn.Conv2d], bool] = "*",
    *,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    groups: Sequence[int] = GROUPS,
    spc: SPCMode = "multiplex",
    softmax: SoftmaxMode = "scales",
    reduction: int = REDUCTION,
) -> ReplacementReport:
    """Replace k×k convolutions (k > 1) of ``model``, in place, by new PSA modules of the same shape.

    Stride, dilation, device and type are kept. Branches take at least the groups of the convolution they replace,
    reduced by ``fit_groups``, so that ResNeXt and depthwise networks stay light. A convolution is left where the PSA
    module could not stand for it: it reads fewer channels than there are branches (the image), has a bias, pads in
    its own way, has a kernel, stride or dilation that differs between height and width, or channels that do not divide.
    Those inside of PSA modules are left too.

    Args:
        model: any network of ``torch.nn.Conv2d``; new modules start from random weights.
        select: shell-style patterns of names (``"layer3.*.conv2"``), or a function of name and module.
        kernel_sizes: odd kernel of each branch.
        groups: wanted groups of each branch.
        spc: ``"multiplex"`` or ``"split"``.
        softmax: ``"scales"`` or ``"channels"``.
        reduction: of the SEWeight.

    Returns:
        What was replaced, what was left, and why.

    Raises:
        ValueError: when ``select`` matches no k×k convolution at all, or no PSA module can have these options.
    """
    chosen = _as_predicate(select)
    # A wrong option raises here, on the smallest layer; what is caught below is then a matter of one layer's channels.
    narrowest = max(1, len(kernel_sizes))
    psa_like(nn.Conv2d(narrowest, narrowest, 1, device="meta"), kernel_sizes, groups, spc, softmax, reduction)
    rows = []
    places: dict[nn.Conv2d, list[str]] = {}  # a layer may have several names, and be called by any of them
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            places.setdefault(module, []).append(name)
    inside = {conv for psa in model.modules() if isinstance(psa, PSA) for conv in psa.modules()}
    for conv, (name, *others) in places.items():
        if max(conv.kernel_size) == 1:
            continue
        before = sum(parameter.numel() for parameter in conv.parameters())
        new, note = None, _why_left(conv, len(kernel_sizes))
        if conv in inside:
            note = "is a part of a PSA module"
        if not chosen(name, conv):
            note = "not selected"
        elif not note:
            try:
                new = psa_like(conv, kernel_sizes, groups, spc, softmax, reduction)
                _initialise(new)
                new.train(conv.training)
                for place in (name, *others):
                    model.set_submodule(place, new)
                counts = "-".join(str(branch.groups) for branch in new.spc.branches)
                note = f"{conv.in_channels} → {conv.out_channels}, stride {conv.stride[0]}, groups {counts}"
            except ValueError as error:
                new, note = None, str(error)
        after = sum(parameter.numel() for parameter in (new or conv).parameters())
        rows.append(
            ReplacementRow(
                name=name, replaced=new is not None, note=note, parameters_before=before, parameters_after=after
            )
        )
    if rows and all(row.note == "not selected" for row in rows):
        examples = ", ".join(row.name for row in rows[:3])
        raise ValueError(f"select={select!r} matches no k×k convolution; this network has {examples}, …")
    return ReplacementReport(rows=tuple(rows))


def _as_predicate(select: str | Sequence[str] | Callable[[str, nn.Conv2d], bool]) -> Callable[[str, nn.Conv2d], bool]:
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) else list(select)
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _why_left(conv: nn.Conv2d, branches: int) -> str:
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    if conv.in_channels < branches:
        return f"reads {conv.in_channels} channels, fewer than the {branches} branches"
    if conv.bias is not None:
        return "has a bias, which PSA has not"
    if stride[0] != stride[1] or dilation[0] != dilation[1]:
        return f"stride {stride} or dilation {dilation} differs between height and width"
    if kernel[0] != kernel[1]:
        return f"kernel {kernel} is not square"
    if any(size % 2 == 0 for size in kernel):
        return f"kernel {kernel} is even"
    keeps_size = tuple(step * (size - 1) // 2 for size, step in zip(kernel, dilation, strict=True))
    if type(conv) is not nn.Conv2d or tuple(conv.padding) != keeps_size or conv.padding_mode != "zeros":
        return f"pads by {conv.padding} ({conv.padding_mode}) in a {type(conv).__name__}, not by {keeps_size} (zeros)"
    return ""


def _initialise(module: nn.Module) -> None:
    """Start as the released code does, whatever network the module comes into."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
