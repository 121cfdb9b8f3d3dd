"""The Pyramid Squeeze Attention module: SEWeight, SPC, PSA.

Zhang, Zu, Lu, Zou, Meng, "EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional Neural
Network", ACCV 2022, arXiv:2105.14447, section 3. Two points where text and released code disagree are
arguments here: ``spc`` (does a branch see the whole input or its own slice?) and ``groups``. Branches keep
their natural order, smallest kernel first; the released code concatenates them the other way round
(``epsanet.network.weights`` converts).

Shape suffixes::

    N  batch                         S  branches (scales)
    C  channels of the input         D  channels of one branch, C' in the paper
    H  height    W  width            K  channels of the output, S * D
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsanet import kernels

__all__ = [
    "PSA",
    "SPC",
    "FusionMode",
    "SEMode",
    "SEWeight",
    "SPCMode",
    "SoftmaxMode",
    "branch_attention",
    "fit_groups",
    "psa_like",
    "scale_attention",
    "squeeze_excite_weight",
]

SPCMode = Literal["multiplex", "split"]
SoftmaxMode = Literal["scales", "channels", "none"]
SEMode = Literal["shared", "branches", "none"]
FusionMode = Literal["concat", "sum"]

KERNEL_SIZES = (3, 5, 7, 9)
GROUPS = (1, 4, 8, 16)
REDUCTION = 16


def squeeze_excite_weight(
    pooled: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> Tensor:
    """The excitation ``sigmoid(W2 relu(W1 g + b1) + b2)`` of a squeezed feature map (section 3.1, equation 2).

    Args:
        pooled: averages over space, shape ``..., D``.
        fc1_weight: shape ``hidden, D``.
        fc1_bias: shape ``hidden``.
        fc2_weight: shape ``D, hidden``.
        fc2_bias: shape ``D``.

    Returns:
        One weight between 0 and 1 for each channel, shape ``..., D``.
    """
    return torch.sigmoid(F.linear(F.relu(F.linear(pooled, fc1_weight, fc1_bias)), fc2_weight, fc2_bias))


def scale_attention(z_NSD: Tensor, softmax: SoftmaxMode = "scales") -> Tensor:
    """Recalibrate the weights of all branches against each other (section 3.2, equation 8).

    Args:
        z_NSD: the SEWeight of each branch, shape ``N, S, D``.
        softmax: ``"scales"`` compares the same channel of all branches, as the equation says; ``"channels"``
            compares the channels inside each branch; ``"none"`` leaves the sigmoid as it is.

    Returns:
        Attention of shape ``N, S, D`` that sums to one over the scales, or over the channels of each branch.
    """
    if softmax == "none":
        return z_NSD
    return z_NSD.softmax(dim=1 if softmax == "scales" else 2)


def branch_attention(se: nn.Module | None, averages_NSD: Tensor, softmax: SoftmaxMode) -> Tensor:
    """How much each channel of each scale counts, shape ``N, S, D``.

    Args:
        se: one ``SEWeight`` for all branches, a ``ModuleList`` of one a branch, or None: then all count 1.
        averages_NSD: of the features over space.
        softmax: as ``scale_attention`` takes it.
    """
    if se is None:
        return torch.ones_like(averages_NSD)
    if isinstance(se, nn.ModuleList):
        z_NSD = torch.stack([own.excite(averages_NSD[:, place]) for place, own in enumerate(se)], dim=1)  # type: ignore
    else:
        z_NSD = se.excite(averages_NSD)  # type: ignore[operator]
    return scale_attention(z_NSD, softmax)


def fit_groups(
    groups: Sequence[int], in_channels: int, out_channels: int, spc: SPCMode = "multiplex"
) -> tuple[int, ...]:
    """The groups that a narrow layer can hold: ``gcd(G, input channels of a branch, output channels of a branch)``.

    This one rule serves every network of this package. It changes nothing where the published groups divide.

    Args:
        groups: the wanted groups, one count a branch.
        in_channels: channels of the layer's input.
        out_channels: channels of the layer's output, all branches together.
        spc: whether a branch sees the whole input or its own slice.

    Returns:
        One count a branch, each a divisor of the wanted one.

    Raises:
        ValueError: when there is no group count, or one below 1.
    """
    _check_groups(groups)
    branches = len(groups)
    seen = in_channels if spc == "multiplex" else in_channels // branches
    return tuple(math.gcd(count, seen, out_channels // branches) for count in groups)


def hooked(layer: nn.Module) -> bool:
    """Whether someone watches a layer's calls, so that nothing may take its place."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is what it was made as; wrapped, pruned or watched by a hook, it has to be called."""
    return type(layer) is kind and not hooked(layer)


class SEWeight(nn.Module):
    """Squeeze-and-excitation weight without its final product (section 3.1).

    ``Z = sigmoid(W2 relu(W1 gap(F) + b1) + b2)``; the hidden width is ``channels / reduction``, at least 1. The
    two maps are 1×1 convolutions with a bias, named ``fc1`` and ``fc2`` as in the released code.

    Args:
        channels: D, the channels of the feature map.
        reduction: divides ``channels`` to give the hidden width.

    Raises:
        ValueError: when a count is below 1.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        _check_positive(channels=channels, reduction=reduction)
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, channels, 1, device=device, dtype=dtype)

    @property
    def plain(self) -> bool:
        """Whether the two maps are what they were made as."""
        return untouched(self.fc1, nn.Conv2d) and untouched(self.fc2, nn.Conv2d)

    def excite(self, pooled: Tensor) -> Tensor:
        """The weight of already averaged features, shape ``..., D`` to ``..., D``."""
        if not self.plain:
            maps = pooled.reshape(-1, pooled.shape[-1], 1, 1)
            return torch.sigmoid(self.fc2(F.relu(self.fc1(maps)))).reshape(pooled.shape)
        return squeeze_excite_weight(
            pooled, self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weights of shape ``N, D, 1, 1`` for features of shape ``N, D, H, W``."""
        return self.excite(x.mean((-2, -1)))[..., None, None]


class SPC(nn.Module):
    """Squeeze and Concat: one bias-free convolution a scale (section 3.2, equations 3 to 5).

    With ``spc="multiplex"`` every branch convolves the whole input and squeezes it to ``out_channels / S``; with
    ``spc="split"`` branch ``i`` sees only its own ``in_channels / S`` channels, as the first version of the paper
    has it and as the published cost of the Large networks needs.

    Args:
        in_channels: C.
        out_channels: K, divisible by the number of branches.
        kernel_sizes: odd kernel of each branch.
        groups: groups of each branch; each must divide the branch's input and output channels.
        stride: of every branch.
        dilation: of every branch; the padding keeps the size.
        spc: ``"multiplex"`` or ``"split"``.

    Raises:
        ValueError: for a layer that cannot be built; the message names the values and the nearest that work.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = KERNEL_SIZES,
        groups: Sequence[int] = GROUPS,
        stride: int = 1,
        dilation: int = 1,
        spc: SPCMode = "multiplex",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_spc(in_channels, out_channels, kernel_sizes, groups, stride, dilation, spc)
        branches = len(kernel_sizes)
        self.mode = spc
        self.branches = nn.ModuleList(
            nn.Conv2d(
                in_channels if spc == "multiplex" else in_channels // branches,
                out_channels // branches,
                kernel_size,
                stride=stride,
                padding=dilation * (kernel_size - 1) // 2,
                dilation=dilation,
                groups=group_count,
                bias=False,
                device=device,
                dtype=dtype,
            )
            for kernel_size, group_count in zip(kernel_sizes, groups, strict=True)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Multi-scale features, shape ``N, C, H, W`` to ``N, S, D, H', W'``."""
        return self.forward_and_squeeze(x_NCHW)[0]

    def forward_and_squeeze(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``N, S, D, H', W'`` and their averages over space ``N, S, D``, from native kernels if they serve."""
        branches, split = len(self.branches), self.mode == "split"
        if kernels.serves(self.reason_against_kernels(x_NCHW)):
            convs: list[Any] = list(self.branches)
            weights, groups = [conv.weight for conv in convs], [conv.groups for conv in convs]
            feats, sums = kernels.pyramid_convolution(x_NCHW, weights, groups, convs[0].stride[0], split)
            averages = sums / (feats.shape[2] * feats.shape[3])
            return feats.unflatten(1, (branches, -1)), averages.unflatten(1, (branches, -1))
        inputs = x_NCHW.chunk(branches, dim=1) if split else (x_NCHW,) * branches
        feats = torch.cat([branch(part) for branch, part in zip(self.branches, inputs, strict=True)], dim=1)
        feats_NSDHW = feats.unflatten(1, (branches, -1))
        return feats_NSDHW, feats_NSDHW.mean((-2, -1))

    def reason_against_kernels(self, x_NCHW: Tensor) -> str | None:
        """Why the native kernels cannot compute this layer, or None where they can: branches may have been changed."""
        convs: list[Any] = list(self.branches)
        if not all(untouched(conv, nn.Conv2d) for conv in convs):
            return "a branch has been wrapped or has a hook, and has to be called"
        first = convs[0]
        stride, dilation = first.stride[0], first.dilation[0]
        for conv in convs:
            size = conv.kernel_size[0]
            shape = (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
            usual = tuple((value, value) for value in (size, stride, dilation, dilation * (size - 1) // 2))
            if conv.bias is not None or conv.padding_mode != "zeros" or shape != usual:
                return f"the {size}×{size} branch has a bias, or another padding, stride or dilation than SPC gives it"
            if (conv.in_channels, conv.out_channels) != (first.in_channels, first.out_channels):
                return "the branches differ in channels"
        weights, groups = [conv.weight for conv in convs], [conv.groups for conv in convs]
        return kernels.reason_against(x_NCHW, weights, groups, stride, dilation, self.mode == "split")

    def extra_repr(self) -> str:
        return f"spc={self.mode!r}"


class PSA(nn.Module):
    """Pyramid Squeeze Attention (section 3.2): weigh each scale's features against the other scales'.

    ``F = SPC(X)``, ``Z_i = SEWeight(F_i)`` with one SEWeight for all branches, ``att = softmax(Z)`` and
    ``Y_i = F_i * att_i``; the output is the concatenation of the ``Y_i``, not their sum. It takes the place of a
    k×k convolution of the same stride. ``se`` and ``fusion`` are for ablations: the paper has their defaults.

    Args:
        in_channels: C.
        out_channels: K; ``in_channels`` when left out.
        kernel_sizes: odd kernel of each branch.
        groups: groups of each branch.
        stride: of every branch.
        dilation: of every branch.
        spc: ``"multiplex"`` (every branch sees the whole input) or ``"split"`` (its own slice).
        softmax: ``"scales"`` (the paper's equation 8), ``"channels"``, or ``"none"`` (sigmoid only).
        reduction: of the SEWeight.
        se: ``"shared"`` by all branches, one for each of the ``"branches"``, or ``"none"``: no attention, which is
            a pyramidal convolution (``softmax`` and ``reduction`` then say nothing).
        fusion: ``"concat"``; with ``"sum"`` every branch makes all K channels (D = K), and they are added up.

    Raises:
        ValueError: for a module that cannot be built; the message names the values and the nearest that work.
    """

    se: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_sizes: Sequence[int] = KERNEL_SIZES,
        groups: Sequence[int] = GROUPS,
        stride: int = 1,
        dilation: int = 1,
        spc: SPCMode = "multiplex",
        softmax: SoftmaxMode = "scales",
        reduction: int = REDUCTION,
        se: SEMode = "shared",
        fusion: FusionMode = "concat",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        _check_choice("softmax", softmax, get_args(SoftmaxMode))
        _check_choice("se", se, get_args(SEMode))
        _check_choice("fusion", fusion, get_args(FusionMode))
        self.softmax, self.fusion = softmax, fusion
        branches = len(kernel_sizes)
        made = out_channels * branches if fusion == "sum" else out_channels
        self.spc = SPC(in_channels, made, kernel_sizes, groups, stride, dilation, spc, device=device, dtype=dtype)
        weights = [
            SEWeight(made // branches, reduction, device=device, dtype=dtype)
            for _ in range({"shared": 1, "branches": branches, "none": 0}[se])
        ]
        self.se = nn.ModuleList(weights) if se == "branches" else weights[0] if weights else None

    @property
    def standard(self) -> bool:
        """One shared, plain SEWeight, a softmax, concatenation: what the fast paths of inference are written for."""
        parts = untouched(self.spc, SPC) and type(self.se) is SEWeight and self.squeezed and self.se.plain
        return parts and self.softmax != "none" and self.fusion == "concat"

    @property
    def squeezed(self) -> bool:
        """Whether averages over space are all that a SEWeight needs; wrapped or watched by a hook, it is called."""
        owns = self.se if isinstance(self.se, nn.ModuleList) else () if self.se is None else (self.se,)
        return all(untouched(own, SEWeight) for own in owns)

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the SPC, shape ``N, S, D, H', W'``, and their averages over space where they are had without a pass."""
        if untouched(self.spc, SPC):
            return self.spc.forward_and_squeeze(x_NCHW)
        return self.spc(x_NCHW), None

    def attention(self, feats_NSDHW: Tensor, averages_NSD: Tensor | None = None) -> Tensor:
        """How much each channel of each scale counts, shape ``N, S, D``; averages over space may be known already."""
        if not self.squeezed:
            owns = self.se if isinstance(self.se, nn.ModuleList) else [self.se] * feats_NSDHW.shape[1]
            z_ND = [own(feats_NSDHW[:, place]).flatten(1) for place, own in enumerate(owns)]
            return scale_attention(torch.stack(z_ND, dim=1), self.softmax)
        averages_NSD = feats_NSDHW.mean((-2, -1)) if averages_NSD is None else averages_NSD
        return branch_attention(self.se, averages_NSD, self.softmax)

    def features_and_attention(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features of all scales ``N, S, D, H', W'`` and the attention ``N, S, D`` that is to multiply them."""
        feats_NSDHW, averages_NSD = self.features(x_NCHW)
        attention_NSD = self.attention(feats_NSDHW, averages_NSD)
        # Autocast takes the softmax in float32; the features stay small.
        return feats_NSDHW, attention_NSD.to(feats_NSDHW.dtype)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shape ``N, C, H, W`` to ``N, K, H', W'``."""
        if self.se is None:
            feats_NSDHW, _ = self.features(x_NCHW)
        else:
            feats_NSDHW, attention_NSD = self.features_and_attention(x_NCHW)
            feats_NSDHW = feats_NSDHW * attention_NSD[..., None, None]
        return feats_NSDHW.flatten(1, 2) if self.fusion == "concat" else feats_NSDHW.sum(1, dtype=feats_NSDHW.dtype)

    def extra_repr(self) -> str:
        return f"softmax={self.softmax!r}, fusion={self.fusion!r}"


def psa_like(
    conv: nn.Conv2d,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    groups: Sequence[int] = GROUPS,
    spc: SPCMode = "multiplex",
    softmax: SoftmaxMode = "scales",
    reduction: int = REDUCTION,
    se: SEMode = "shared",
    fusion: FusionMode = "concat",
) -> PSA:
    """A new PSA module with the channels, stride, dilation, device and type of a convolution.

    A branch takes the larger of its own group count and the convolution's, as far as ``fit_groups`` allows, so that
    a grouped network stays about as cheap as it was.

    Args:
        conv: a convolution whose padding keeps the size; its kernel size and bias are not looked at.
        kernel_sizes: odd kernel of each branch.
        groups: wanted groups of each branch.
        spc: ``"multiplex"`` or ``"split"``.
        softmax: ``"scales"``, ``"channels"`` or ``"none"``.
        reduction: of the SEWeight.
        se: ``"shared"``, ``"branches"`` or ``"none"``.
        fusion: ``"concat"`` or ``"sum"``.

    Raises:
        ValueError: when no such module can be built.
    """
    _check_groups(groups)
    wanted = [max(count, conv.groups) for count in groups]
    made = conv.out_channels * (len(groups) if fusion == "sum" else 1)
    return PSA(
        conv.in_channels,
        conv.out_channels,
        kernel_sizes,
        fit_groups(wanted, conv.in_channels, made, spc),
        conv.stride[0],
        conv.dilation[0],
        spc,
        softmax,
        reduction,
        se,
        fusion,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} is impossible; use 1 or more")


def _check_groups(groups: Sequence[int]) -> None:
    if not groups or min(groups) < 1:
        raise ValueError(f"groups={tuple(groups)} is impossible; use 1 or more for each branch, for example {GROUPS}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, choices))}")


def _check_spc(
    in_channels: int,
    out_channels: int,
    kernel_sizes: Sequence[int],
    groups: Sequence[int],
    stride: int,
    dilation: int,
    spc: str,
) -> None:
    _check_choice("spc", spc, get_args(SPCMode))
    _check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride, dilation=dilation)
    branches = len(kernel_sizes)
    if branches == 0:
        raise ValueError(f"kernel_sizes is empty; name at least one kernel, for example {KERNEL_SIZES}")
    if len(groups) != branches:
        raise ValueError(
            f"kernel_sizes={tuple(kernel_sizes)} has {branches} branches but groups={tuple(groups)} has {len(groups)}; "
            f"give one group count a branch, for example groups={tuple((*groups, *(1,) * branches)[:branches])}"
        )
    for kernel_size in kernel_sizes:
        if kernel_size < 1 or kernel_size % 2 == 0:
            odd = f"{kernel_size - 1} or {kernel_size + 1}" if kernel_size > 1 else "1 or 3"
            raise ValueError(f"kernel size {kernel_size} in kernel_sizes={tuple(kernel_sizes)} is not odd; use {odd}")
    names = ("out_channels",) if spc == "multiplex" else ("out_channels", "in_channels")
    for name, channels in zip(names, (out_channels, in_channels), strict=False):
        if channels % branches:
            below = channels - channels % branches
            multiples = f"{below} or {below + branches}" if below else f"{branches}"
            raise ValueError(f"{name}={channels} is not divisible by {branches} branches; use {multiples}")
    seen, made = in_channels if spc == "multiplex" else in_channels // branches, out_channels // branches
    for kernel_size, count in zip(kernel_sizes, groups, strict=True):
        if count < 1 or seen % count or made % count:
            common = math.gcd(seen, made)
            divisors = [divisor for divisor in range(1, common + 1) if common % divisor == 0]
            near = sorted(
                {
                    max((d for d in divisors if d <= count), default=1),
                    min((d for d in divisors if d >= count), default=common),
                }
            )
            raise ValueError(
                f"groups={count} of the {kernel_size}×{kernel_size} branch does not divide both the {seen} channels it "
                f"sees and the {made} it makes; use {' or '.join(map(str, near))}, or fit_groups()"
            )
