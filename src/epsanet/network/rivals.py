"""The networks that EPSANet is compared with (paper section 4), from timm where timm has them, under one contract.

Each comes at depth 50 and 101, and as a small-image form: the trunk of ``epsanet26_tiny`` (3×3 stem of stride 1, two
bottlenecks a stage, widths 16-32-32-64) with its own block. Attention layers are timm's. What timm lacks is written
here after its paper: FcaNet (Qin et al., arXiv:2012.11879) and PyConvResNet (Duta et al., arXiv:2006.11538). timm's own
variants of some of these deviate on purpose (``ecaresnet50d`` has another stem, ``skresnet50`` splits its input), so
those that its registry lacks in the form of the paper are registered here, under names in its manner.

EMBANet (Zu et al., arXiv:2407.05418), by authors of EPSANet, has two operators, "multiplex" and "split": they are
``spc="multiplex"`` and ``spc="split"`` here, and are listed as EPSANet with these settings. Its other attention layers
and numbers of branches are not here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.layers import GlobalContext, make_divisible, register_notrace_module
from timm.layers.cbam import CbamModule
from timm.layers.non_local_attn import BatNonLocalAttn, NonLocalAttn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import Bottleneck
from timm.models.sknet import SelectiveKernelBottleneck
from torch import Tensor, nn
from torch.nn import functional as F

from epsanet.network.psa import KERNEL_SIZES, psa_like
from epsanet.network.trunk import Trunk, imagenet_cfg, small_image_cfg

__all__ = [
    "RIVALS",
    "FcaNet",
    "FrequencyAttention",
    "PyConvResNet",
    "Rival",
    "Size",
    "dct_filter",
]

Size = Literal["50", "101", "tiny"]

# --------------------------------------------------------------------------------------------------------------- FcaNet

TOP_FREQUENCIES = (
    *((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)),
    *((5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)),
)
"""The 16 frequencies (vertical, horizontal) of a 7×7 grid that the paper found best one by one on ImageNet."""
_GRID = 7
_REDUCED_MULTIPLE = 8
"""Hidden widths of attention layers are multiples of this, as timm has it for SENet's: so no rival's attention is
narrower than another's in a narrow network. At depth 50 and 101 a sixteenth of the channels is such a multiple."""


def dct_filter(frequency: tuple[int, int], size: int) -> Tensor:
    """A basis function of the orthonormal two-dimensional DCT-II, shape ``size, size``.

    Args:
        frequency: vertical and horizontal, each below ``size``.
        size: height and width.
    """

    def cosine(number: int) -> Tensor:
        places = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
        norm = math.sqrt((2 if number else 1) / size)
        return norm * torch.cos(math.pi * number * places / size)

    return torch.outer(cosine(frequency[0]), cosine(frequency[1]))


def frequencies(size: int) -> list[tuple[int, int]]:
    """The sixteen frequencies of a feature map, as the release multiplies those of the 7×7 grid.

    Args:
        size: height and width; below 7 the lowest frequencies are taken, below 4 some of them again.
    """
    if size >= _GRID:
        return [(size // _GRID * vertical, size // _GRID * horizontal) for vertical, horizontal in TOP_FREQUENCIES]
    lowest = sorted(itertools.product(range(size), range(size)), key=sum)
    return [lowest[place % len(lowest)] for place in range(len(TOP_FREQUENCIES))]


@register_notrace_module
class FrequencyAttention(nn.Module):
    """Squeeze-and-excitation whose squeeze is the DCT: each sixteenth of the channels has its own frequency.

    Frequency (0, 0) would be an average, so SENet is the special case of that one alone. Frequencies are those of a
    7×7 grid at the size of the feature map; a map of another size is averaged to it first. A map smaller than the grid
    has the sixteen lowest frequencies of its own.

    Args:
        channels: of the feature map.
        size: height and width of the feature map in training.
        reduction: divides ``channels`` to give the hidden width, which is rounded to a multiple of 8.
    """

    filters: Tensor

    def __init__(self, channels: int, size: int, reduction: int = 16, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.size = size
        filters = torch.empty(channels, size, size, device=device, dtype=dtype)
        self.register_buffer("filters", filters, persistent=False)
        self.init_non_persistent_buffers()
        hidden = make_divisible(channels / reduction, _REDUCED_MULTIPLE, round_limit=0.0)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False, device=device, dtype=dtype)

    def init_non_persistent_buffers(self) -> None:
        """Compute the filters: no checkpoint has them, and transformers builds a network without memory at first."""
        channels = len(self.filters)
        chosen = [channel * len(TOP_FREQUENCIES) // channels for channel in range(channels)]
        bases = torch.stack([dct_filter(frequency, self.size) for frequency in frequencies(self.size)])
        self.filters.copy_(bases[chosen])

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Weighted features, same shape."""
        pooled = x_NCHW
        if x_NCHW.shape[-2:] != (self.size, self.size):
            pooled = F.adaptive_avg_pool2d(x_NCHW, self.size)
        squeezed = (pooled * self.filters).sum((2, 3), keepdim=True)
        return x_NCHW * torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))


class FcaNet(Trunk):
    """A trunk whose blocks end with ``FrequencyAttention`` where SENet's end with squeeze-and-excitation.

    Args:
        *args: of ``Trunk``.
        image_size: height and width of the images, which says how large the feature maps are.
        **kwargs: of ``Trunk``.
    """

    def __init__(self, *args: Any, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stage, info in zip(self.stages, self.feature_info[1:], strict=True):
            for block in stage:
                size = math.ceil(image_size / info["reduction"])
                layer = FrequencyAttention(info["num_chs"], size, **_made_as(self))
                _initialise(layer)
                block.se = layer


# --------------------------------------------------------------------------------------------------------- PyConvResNet

# Kernels and groups of the four stages. The paper's three kernels of stage 2 make a quarter, a quarter and half of the
# channels; half in 8 groups is two quarters in 8 groups each, in another order of channels.
_PYRAMIDS = ((KERNEL_SIZES, (1, 4, 8, 16)), ((3, 5, 7, 7), (1, 4, 8, 8)), ((3, 5), (1, 4)), ((3,), (1,)))


class PyConvResNet(Trunk):
    """A trunk with pyramidal convolutions: PSA modules without attention, smaller pyramids for smaller maps.

    As in the paper's network for large images, there is no pool after the stem: the first block of each stage strides,
    and its shortcut is a 3×3 max-pool before the 1×1 convolution. With ``small_images`` the trunk is the common one.

    Args:
        *args: of ``Trunk``.
        **kwargs: of ``Trunk``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        small_images = kwargs.get("small_images", False)
        if not small_images:
            self.maxpool = nn.Identity()
            self.layer1[0].conv2.stride = (2, 2)
        for stage, (kernel_sizes, groups) in zip(self.stages, _PYRAMIDS, strict=True):
            first: Any = stage[0]
            stride = first.conv2.stride[0]
            if not small_images and stride > 1:
                match_channels = list(first.downsample or ())
                for layer in match_channels[:1]:
                    layer.stride = (1, 1)
                first.downsample = nn.Sequential(nn.MaxPool2d(3, stride, padding=1), *match_channels)
            for block in stage:
                if len(kernel_sizes) > 1:
                    block.conv2 = psa_like(block.conv2, kernel_sizes, groups, se="none")  # type: ignore
                    _initialise(block.conv2)


# ---------------------------------------------------------------------------------------------- Non-local networks, BAT


class NonLocalResNet(Trunk):
    """A trunk with a layer of self-attention after some blocks of the second and third stage.

    Args:
        *args: of ``Trunk``.
        attention: timm's ``NonLocalAttn`` or ``BatNonLocalAttn``.
        every: after which blocks of the two stages, as in the release of BAT: 2 is every other one.
        attention_args: of the layer.
        **kwargs: of ``Trunk``.
    """

    def __init__(
        self,
        *args: Any,
        attention: Callable[..., nn.Module],
        every: tuple[int, int] = (2, 2),
        attention_args: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for stage, info, count in zip(self.stages[1:3], self.feature_info[2:4], every, strict=True):
            for place in range(count - 1, len(stage), count):
                layer = attention(info["num_chs"], **attention_args, **_made_as(self))
                stage[place] = nn.Sequential(stage[place], layer)


# ----------------------------------------------------------------------------------------------------------- the others


class GCNet(Trunk):
    """A trunk with timm's global context layer in every block; the layer starts as its paper says, adding nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, GlobalContext):
                module.reset_parameters()  # timm's ResNet has drawn over it
                nn.init.zeros_(module.mlp_add.fc2.bias)


def _made_as(network: nn.Module) -> dict[str, Any]:
    """Device and type of a network's weights; its classifier has none where there are no classes."""
    weight = next(network.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def _initialise(module: nn.Module) -> None:
    """As the trunk starts its convolutions."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What the sizes of a network share."""

    prefix: str
    """Name before the depth."""
    network: type[Trunk] = Trunk
    block: Any = Bottleneck
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the network."""
    deep: dict[str, Any] = field(default_factory=dict)
    """Other ones at depth 101."""
    small: dict[str, Any] = field(default_factory=dict)
    """Other ones in the small-image form."""
    suffix: str = ""
    """Name after the depth of the large forms."""
    sizes: tuple[Size, ...] = ("50", "101", "tiny")
    """Those that timm lacks."""
    paper: str = ""


_SK = {"split_input": False, "rd_ratio": 1 / 16, "rd_divisor": 32}
_FAMILIES = (
    _Family(prefix="resnet", sizes=("tiny",), paper="arXiv:1512.03385"),
    _Family(
        prefix="seresnet", arguments={"block_args": {"attn_layer": "se"}}, sizes=("tiny",), paper="arXiv:1709.01507"
    ),
    _Family(prefix="cbamresnet", arguments={"block_args": {"attn_layer": "cbam_r16"}}, paper="arXiv:1807.06521"),
    _Family(prefix="ecaresnet", arguments={"block_args": {"attn_layer": "eca"}}, paper="arXiv:1910.03151"),
    _Family(
        prefix="gcresnet",
        network=GCNet,
        arguments={"block_args": {"attn_layer": "gc_r16"}},
        paper="arXiv:1904.11492",
    ),
    _Family(
        prefix="skresnext",
        suffix="_32x4d",
        block=SelectiveKernelBottleneck,
        arguments={"cardinality": 32, "base_width": 4, "block_args": {"sk_kwargs": _SK}},
        # As at depth 50: twice the width of the trunk, four channels a group in the first stage.
        small={"cardinality": 8, "base_width": 16},
        sizes=("101", "tiny"),
        paper="arXiv:1903.06586",
    ),
    _Family(
        prefix="nlresnet",
        network=NonLocalResNet,
        arguments={"attention": NonLocalAttn, "attention_args": {"rd_ratio": 1 / 2}},
        deep={"every": (2, 7)},
        paper="arXiv:1711.07971",
    ),
    _Family(
        prefix="batresnet",
        network=NonLocalResNet,
        arguments={"attention": BatNonLocalAttn, "attention_args": {"rd_ratio": 1 / 2, "groups": 4, "block_size": 7}},
        deep={"every": (2, 7)},
        small={"attention_args": {"rd_ratio": 1 / 2, "groups": 4, "block_size": 4}},
        paper="CVPR 2020 (Chi et al.)",
    ),
    _Family(
        prefix="resnest",
        block=ResNestBottleneck,
        arguments={"avg_down": True, "block_args": {"radix": 2, "avd": True}},
        sizes=("tiny",),
        paper="arXiv:2004.08955",
    ),
    _Family(prefix="fcanet", network=FcaNet, small={"image_size": 32}, paper="arXiv:2012.11879"),
    _Family(prefix="pyconvresnet", network=PyConvResNet, paper="arXiv:2006.11538"),
)
_LAYERS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "tiny": (2, 2, 2, 2)}
_SMALL = {"small_images": True, "channels": (16, 32, 32, 64)}

default_cfgs: dict[str, Any] = {}


def _cbam_r16(channels: int, **kwargs: Any) -> nn.Module:
    """The block of the paper: hidden width a sixteenth."""
    return CbamModule(channels, rd_ratio=1 / 16, rd_divisor=_REDUCED_MULTIPLE, **kwargs)


def _gc_r16(channels: int, **kwargs: Any) -> nn.Module:
    """The global context block of the paper: added, hidden width a sixteenth."""
    return GlobalContext(
        channels, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16, rd_divisor=_REDUCED_MULTIPLE, **kwargs
    )


_ATTENTION = {"cbam_r16": _cbam_r16, "gc_r16": _gc_r16}
"""By names, which a model folder can hold."""


def _register(family: _Family, size: Size) -> None:
    name = f"{family.prefix}26_tiny" if size == "tiny" else f"{family.prefix}{size}{family.suffix}"
    own: dict[str, Any] = {"50": {}, "101": family.deep, "tiny": {**_SMALL, **family.small}}[size]
    fixed = {"block": family.block, "layers": _LAYERS[size], **family.arguments, **own}

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and not source.has_weights:  # a model folder has them
            raise ValueError(f"{name} has no pretrained weights; train it (epsanet train --model {name})")
        block_args = {**fixed.get("block_args", {}), **kwargs.pop("block_args", {})}
        if block_args.get("attn_layer") in _ATTENTION:
            block_args["attn_layer"] = _ATTENTION[block_args["attn_layer"]]
        arguments = {**fixed, **kwargs, "block_args": block_args}
        return build_model_with_cfg(family.network, name, pretrained, **arguments)

    build.__name__ = name
    cfg = small_image_cfg if size == "tiny" else imagenet_cfg
    default_cfgs.update(generate_default_cfgs({f"{name}.*": cfg(paper_ids=family.paper)}))
    register_model(build)


for _family in _FAMILIES:
    for _size in _family.sizes:
        _register(_family, _size)


# ------------------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A network of the comparison in all its sizes."""

    title: str
    """As papers call it."""
    models: dict[Size, str]
    """timm's names."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Of all sizes."""
    width_multiple: int = 8
    """Widths of stages may be a multiple of this, when they are changed for equal cost."""


def _sizes(prefix: str, suffix: str = "") -> dict[Size, str]:
    return {"50": f"{prefix}50{suffix}", "101": f"{prefix}101{suffix}", "tiny": f"{prefix}26_tiny"}


_EPSANET: dict[Size, str] = {"50": "epsanet50_small", "101": "epsanet101_small", "tiny": "epsanet26_tiny"}

RIVALS: dict[str, Rival] = {
    "resnet": Rival(title="ResNet", models=_sizes("resnet")),
    "se": Rival(title="SENet", models=_sizes("seresnet")),
    "cbam": Rival(title="CBAM", models=_sizes("cbamresnet")),
    "eca": Rival(title="ECA-Net", models=_sizes("ecaresnet")),
    "gc": Rival(title="GCNet", models=_sizes("gcresnet")),
    "sk": Rival(title="SKNet", models=_sizes("skresnext", "_32x4d")),
    "nonlocal": Rival(title="Non-local", models=_sizes("nlresnet")),
    "bat": Rival(title="BAT", models=_sizes("batresnet")),
    "resnest": Rival(title="ResNeSt", models={"50": "resnest50d", "101": "resnest101e", "tiny": "resnest26_tiny"}),
    "fca": Rival(title="FcaNet", models=_sizes("fcanet")),
    "pyconv": Rival(title="PyConvResNet", models=_sizes("pyconvresnet"), width_multiple=16),
    "epsanet": Rival(title="EPSANet, multiplex", models=_EPSANET, width_multiple=16),
    "epsanet_split": Rival(
        title="EPSANet, split",
        models=_EPSANET,
        model_args={"block_args": {"spc": "split"}},
        width_multiple=16,
    ),
}
"""By a short name. ``epsanet`` and ``epsanet_split`` are also EMBANet's two operators."""
