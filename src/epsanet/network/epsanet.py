"""EPSANet: timm's ResNet with the k×k convolutions of its blocks replaced by PSA modules.

Paper section 3.3 and tables 1 and 2. The trunk (stems, dilation, drop path, feature extraction, classifier) is
timm's; what is here is the two blocks and the variants. Importing this module registers the variants in timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from epsanet.network.norm import ConvolutionNorm, in_parts, psa_norm_activation
from epsanet.network.psa import (
    GROUPS,
    KERNEL_SIZES,
    PSA,
    REDUCTION,
    FusionMode,
    SEMode,
    SoftmaxMode,
    SPCMode,
    psa_like,
    untouched,
)
from epsanet.network.shipped import pretrained_cfgs, shipped_folders
from epsanet.network.trunk import Trunk, imagenet_cfg, small_image_cfg

__all__ = ["EPSABasicBlock", "EPSABlock", "EPSANet"]  # register_model adds the variants

# It asks its input where and what it is, which no trace can answer. In psa.py, timm's import would come in a circle.
register_notrace_module(PSA)


class EPSABlock(Bottleneck):
    """ResNet's bottleneck with a PSA module in the place of its 3×3 convolution (paper section 3.3).

    1×1 → BN → ReLU → PSA (stride here) → BN → ReLU → 1×1 → BN → + shortcut → ReLU.

    Args:
        *args: of timm's ``Bottleneck``.
        kernel_sizes: odd kernel of each branch.
        groups: groups of each branch; ``fit_groups`` reduces what a narrow stage cannot hold.
        spc: ``"multiplex"`` or ``"split"``.
        softmax: ``"scales"``, ``"channels"`` or ``"none"``.
        reduction: of the SEWeight.
        se: ``"shared"``, ``"branches"`` or ``"none"``.
        fusion: ``"concat"`` or ``"sum"``.
        **kwargs: of timm's ``Bottleneck``.

    Raises:
        ValueError: for a PSA module that cannot be built.
    """

    conv2: Any

    def __init__(
        self,
        *args: Any,
        kernel_sizes: Sequence[int] = KERNEL_SIZES,
        groups: Sequence[int] = GROUPS,
        spc: SPCMode = "multiplex",
        softmax: SoftmaxMode = "scales",
        reduction: int = REDUCTION,
        se: SEMode = "shared",
        fusion: FusionMode = "concat",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conv2 = psa_like(self.conv2, kernel_sizes, groups, spc, softmax, reduction, se, fusion)

    def forward(self, x: Tensor) -> Tensor:
        """As timm has it; in training on a CPU, norms, residual sum and ReLU are the kernels'."""
        if not in_parts(self, x):
            return super().forward(x)
        first, last = ConvolutionNorm(self.conv1, self.bn1, self.act1), ConvolutionNorm(self.conv3, self.bn3, self.act3)
        projection = _projection(self.downsample)
        if not first.serves(x):
            shortcut = x if self.downsample is None else projection(x) if projection else self.downsample(x)
            x = first(x)
        elif projection:
            x, shortcut = first.with_shortcut(x, projection.convolution.stride[0])
            shortcut = projection.of_subsampled(shortcut)
        else:
            x, shortcut = first.with_shortcut(x, 1)
            shortcut = shortcut if self.downsample is None else self.downsample(shortcut)
        return last(psa_norm_activation(self.conv2, self.bn2, self.act2, x), shortcut)


def _projection(downsample: Any) -> ConvolutionNorm | None:
    """A shortcut's convolution and norm, if these are all of it and rows and columns can be left out before them."""
    if downsample is None or not untouched(downsample, nn.Sequential) or len(downsample) != 2:
        return None
    projection = ConvolutionNorm(*downsample)
    return projection if projection.subsamples() else None


class EPSABasicBlock(BasicBlock):
    """ResNet's basic block with PSA modules in the place of both its 3×3 convolutions.

    Not in the paper; users of the released code ask for it. Arguments and errors are those of ``EPSABlock``, over
    timm's ``BasicBlock``.
    """

    conv1: Any
    conv2: Any

    def __init__(
        self,
        *args: Any,
        kernel_sizes: Sequence[int] = KERNEL_SIZES,
        groups: Sequence[int] = GROUPS,
        spc: SPCMode = "multiplex",
        softmax: SoftmaxMode = "scales",
        reduction: int = REDUCTION,
        se: SEMode = "shared",
        fusion: FusionMode = "concat",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conv1 = psa_like(self.conv1, kernel_sizes, groups, spc, softmax, reduction, se, fusion)
        self.conv2 = psa_like(self.conv2, kernel_sizes, groups, spc, softmax, reduction, se, fusion)

    def forward(self, x: Tensor) -> Tensor:
        """As timm has it; in training on a CPU, norms, residual sum and ReLU are the kernels'."""
        if not in_parts(self, x):
            return super().forward(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = psa_norm_activation(self.conv1, self.bn1, self.act1, x)
        return psa_norm_activation(self.conv2, self.bn2, self.act2, x, shortcut)


class EPSANet(Trunk):
    """A trunk of EPSA blocks; arguments and errors are those of ``Trunk``."""


_CFGS = {
    "epsanet18": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet34": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet50_small": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet101_small": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet50_large": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet101_large": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet50_large_g32": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet101_large_g32": imagenet_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet14_tiny": small_image_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet23_tiny_wide": small_image_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet26_tiny": small_image_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet38_tiny": small_image_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet26_tiny_x2": small_image_cfg(paper_ids="arXiv:2105.14447"),
    "epsanet50_tiny_x2": small_image_cfg(paper_ids="arXiv:2105.14447"),
}
# timm builds an architecture that is named without a tag by its default entry, and takes the first that has weights
# for that. Weights for digits must not change the input size and classes of an architecture, so its own entry is
# marked "*", timm's sign of the default: shipped weights are had by their full name only.
default_cfgs = generate_default_cfgs({**pretrained_cfgs(), **{f"{name}.*": cfg for name, cfg in _CFGS.items()}})


def _create_epsanet(variant: str, pretrained: bool, kwargs: dict[str, Any], **variant_args: Any) -> EPSANet:
    """Build a variant; what the caller asks for goes before what the variant sets, also inside ``block_args``."""
    block_args = {**variant_args.pop("block_args", {}), **kwargs.pop("block_args", {})}
    model_args = {**variant_args, "block_args": block_args, **kwargs}
    if pretrained:
        source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not source.has_weights:
            tagged = [name for name in shipped_folders() if name.partition(".")[0] == variant]
            if tagged:
                raise ValueError(f"{variant} has no pretrained weights by that name alone; use {' or '.join(tagged)}")
            raise ValueError(
                f"{variant} has no pretrained weights: its authors published none. Train it (epsanet train), convert "
                "a checkpoint of the released code (epsanet convert), or name a model folder: "
                "timm.create_model('local-dir:FOLDER', pretrained=True)"
            )
    return build_model_with_cfg(EPSANet, variant, pretrained, **model_args)


# Table 2 gives the Large networks twice the width of Small and the same block outputs. Their published cost is met
# by split branches with these groups, not by the groups of 32 that the text names; hence two pairs of variants.
_LARGE = {"base_width": 128, "block_args": {"spc": "split", "groups": (4, 8, 16, 16)}}
_LARGE_G32 = {"base_width": 128, "block_args": {"groups": (32, 32, 32, 32)}}
_TINY = {"small_images": True, "channels": (16, 32, 32, 64)}
_TINY_WIDE = {
    "small_images": True,
    "stem_width": 16,
    "channels": (8, 48, 96, 128),
    "avg_down": True,
    "block_args": {"spc": "split"},
}
_TINY_X2 = {"small_images": True, "channels": (32, 64, 64, 128)}


@register_model
def epsanet18(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """Basic blocks, both 3×3 convolutions PSA; not in the paper."""
    return _create_epsanet("epsanet18", pretrained, kwargs, block=EPSABasicBlock, layers=(2, 2, 2, 2))


@register_model
def epsanet34(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """Basic blocks, both 3×3 convolutions PSA; not in the paper."""
    return _create_epsanet("epsanet34", pretrained, kwargs, block=EPSABasicBlock, layers=(3, 4, 6, 3))


@register_model
def epsanet50_small(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-50 Small of the paper: multiplex, groups 1-4-8-16."""
    return _create_epsanet("epsanet50_small", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 6, 3))


@register_model
def epsanet101_small(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-101 Small of the paper: multiplex, groups 1-4-8-16."""
    return _create_epsanet("epsanet101_small", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 23, 3))


@register_model
def epsanet50_large(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-50 Large with the published cost: split, groups 4-8-16-16."""
    return _create_epsanet("epsanet50_large", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 6, 3), **_LARGE)


@register_model
def epsanet101_large(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-101 Large with the published cost: split, groups 4-8-16-16."""
    return _create_epsanet("epsanet101_large", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 23, 3), **_LARGE)


@register_model
def epsanet50_large_g32(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-50 Large as the paper's text has it: multiplex, groups 32-32-32-32."""
    return _create_epsanet(
        "epsanet50_large_g32", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 6, 3), **_LARGE_G32
    )


@register_model
def epsanet101_large_g32(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """EPSANet-101 Large as the paper's text has it: multiplex, groups 32-32-32-32."""
    return _create_epsanet(
        "epsanet101_large_g32", pretrained, kwargs, block=EPSABlock, layers=(3, 4, 23, 3), **_LARGE_G32
    )


@register_model
def epsanet14_tiny(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 16-32-32-64."""
    return _create_epsanet("epsanet14_tiny", pretrained, kwargs, block=EPSABlock, layers=(1, 1, 1, 1), **_TINY)


@register_model
def epsanet23_tiny_wide(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 8-48-96-128, split, shortcuts that average: made for CIFAR-10."""
    return _create_epsanet(
        "epsanet23_tiny_wide", pretrained, kwargs, block=EPSABlock, layers=(1, 2, 3, 1), **_TINY_WIDE
    )


@register_model
def epsanet26_tiny(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 16-32-32-64."""
    return _create_epsanet("epsanet26_tiny", pretrained, kwargs, block=EPSABlock, layers=(2, 2, 2, 2), **_TINY)


@register_model
def epsanet38_tiny(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 16-32-32-64."""
    return _create_epsanet("epsanet38_tiny", pretrained, kwargs, block=EPSABlock, layers=(3, 3, 3, 3), **_TINY)


@register_model
def epsanet26_tiny_x2(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 32-64-64-128."""
    return _create_epsanet("epsanet26_tiny_x2", pretrained, kwargs, block=EPSABlock, layers=(2, 2, 2, 2), **_TINY_X2)


@register_model
def epsanet50_tiny_x2(pretrained: bool = False, **kwargs: Any) -> EPSANet:
    """For images of about 32×32, widths 32-64-64-128."""
    return _create_epsanet("epsanet50_tiny_x2", pretrained, kwargs, block=EPSABlock, layers=(4, 4, 4, 4), **_TINY_X2)
