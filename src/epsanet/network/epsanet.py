"""EPSANet: timm's ResNet with the k×k convolutions of its blocks replaced by PSA modules.

Paper section 3.3 and tables 1 and 2. The trunk (stems, dilation, drop path, feature extraction, classifier) is
timm's; what is here is the two blocks, the stem for small images, and the variants. Importing this module
registers the variants in timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from epsanet.network.psa import GROUPS, KERNEL_SIZES, REDUCTION, SoftmaxMode, SPCMode, psa_like
from epsanet.network.shipped import pretrained_cfgs, shipped_folders

__all__ = ["EPSABasicBlock", "EPSABlock", "EPSANet"]  # register_model adds the variants


class EPSABlock(Bottleneck):
    """ResNet's bottleneck with a PSA module in the place of its 3×3 convolution (paper section 3.3).

    1×1 → BN → ReLU → PSA (stride here) → BN → ReLU → 1×1 → BN → + shortcut → ReLU.

    Args:
        *args: of timm's ``Bottleneck``.
        kernel_sizes: odd kernel of each branch.
        groups: groups of each branch; ``fit_groups`` reduces what a narrow stage cannot hold.
        spc: ``"multiplex"`` or ``"split"``.
        softmax: ``"scales"`` or ``"channels"``.
        reduction: of the SEWeight.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conv2 = psa_like(self.conv2, kernel_sizes, groups, spc, softmax, reduction)


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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conv1 = psa_like(self.conv1, kernel_sizes, groups, spc, softmax, reduction)
        self.conv2 = psa_like(self.conv2, kernel_sizes, groups, spc, softmax, reduction)


class EPSANet(ResNet):
    """timm's ResNet over EPSA blocks, initialised as the released code does, optionally for small images.

    Every convolution starts normal with standard deviation ``sqrt(2 / (k * k * out_channels))``, norms at weight 1
    and bias 0. ``zero_init_last=True`` gives timm's zero start of each block's last norm instead.

    Args:
        block: ``EPSABlock`` or ``EPSABasicBlock``.
        layers: blocks of each of the four stages.
        small_images: a 3×3 stem of stride 1 and no pool; the stages then have strides 1, 2, 4, 8 and
            ``output_stride`` may be 2, 4 or 8.
        output_stride: the largest stride; later stages are dilated. 32 when left out, 8 for small images.
        zero_init_last: whether the last norm of each block starts at zero.
        **kwargs: of timm's ``ResNet``.

    Raises:
        ValueError: for an impossible stride, stem or PSA module.
    """

    conv1: Any

    def __init__(
        self,
        block: type[EPSABlock] | type[EPSABasicBlock],
        layers: Sequence[int],
        small_images: bool = False,
        output_stride: int | None = None,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        # timm counts a stem of stride 4; a stem of stride 1 makes every stride a quarter of that.
        stem_stride = 1 if small_images else 4
        strides = tuple(stem_stride * stride for stride in (2, 4, 8))
        output_stride = strides[-1] if output_stride is None else output_stride
        if output_stride not in strides:
            raise ValueError(f"output_stride={output_stride} is impossible here; use one of {strides}")
        super().__init__(
            block,
            tuple(layers),
            output_stride=output_stride * 4 // stem_stride,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        if small_images:
            if isinstance(self.conv1, nn.Sequential):
                raise ValueError("stem_type is for networks with a 7×7 stem; leave it out with small_images=True")
            stem = self.conv1
            self.conv1 = nn.Conv2d(
                stem.in_channels,
                stem.out_channels,
                3,
                padding=1,
                bias=False,
                device=stem.weight.device,
                dtype=stem.weight.dtype,
            )
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
            for info in self.feature_info:
                info["reduction"] //= 2 if info["module"] == "act1" else 4


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2105.14447",
        **kwargs,
    }


def _tiny_cfg() -> dict[str, Any]:
    return _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0)


_CFGS = {
    "epsanet18": _cfg(),
    "epsanet34": _cfg(),
    "epsanet50_small": _cfg(),
    "epsanet101_small": _cfg(),
    "epsanet50_large": _cfg(),
    "epsanet101_large": _cfg(),
    "epsanet50_large_g32": _cfg(),
    "epsanet101_large_g32": _cfg(),
    "epsanet14_tiny": _tiny_cfg(),
    "epsanet23_tiny_wide": _tiny_cfg(),
    "epsanet26_tiny": _tiny_cfg(),
    "epsanet38_tiny": _tiny_cfg(),
    "epsanet26_tiny_x2": _tiny_cfg(),
    "epsanet50_tiny_x2": _tiny_cfg(),
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
_TINY_WIDE = {"small_images": True, "channels": (16, 32, 64, 128)}
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
    """For images of about 32×32, widths 16-32-64-128: twice as wide at each halving, so that no stage costs most."""
    return _create_epsanet(
        "epsanet23_tiny_wide", pretrained, kwargs, block=EPSABlock, layers=(1, 2, 2, 2), **_TINY_WIDE
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
