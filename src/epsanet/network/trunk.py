"""What EPSANet and the networks it is compared with have in common: timm's ResNet, optionally for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import ResNet
from torch import Tensor, nn

from epsanet.network.norm import norm_activation

__all__ = ["Trunk", "imagenet_cfg", "small_image_cfg"]


class Trunk(ResNet):
    """timm's ResNet, initialised as the released code does, optionally for small images.

    Every convolution starts normal with standard deviation ``sqrt(2 / (k * k * out_channels))``, norms at weight 1
    and bias 0. ``zero_init_last=True`` gives timm's zero start of each block's last norm instead.

    Args:
        block: timm's ``Bottleneck`` or ``BasicBlock``, or a class like them.
        layers: blocks of each of the four stages.
        small_images: a 3×3 stem of stride 1 and no pool; the stages then have strides 1, 2, 4, 8 and
            ``output_stride`` may be 2, 4 or 8.
        stem_width: channels of the stem; with a ``stem_type``, of its first convolutions, as timm has it. timm itself
            looks at it with a ``stem_type`` only.
        output_stride: the largest stride; later stages are dilated. 32 when left out, 8 for small images.
        zero_init_last: whether the last norm of each block starts at zero.
        **kwargs: of timm's ``ResNet``.

    Raises:
        ValueError: for an impossible stride, stem, stem width or block, and for other than four stages.
    """

    conv1: Any

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        small_images: bool = False,
        stem_width: int = 64,
        output_stride: int | None = None,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_stages("layers", layers)
        if "channels" in kwargs:
            _check_stages("channels", kwargs["channels"])
        # timm counts a stem of stride 4; a stem of stride 1 makes every stride a quarter of that.
        stem_stride = 1 if small_images else 4
        strides = tuple(stem_stride * stride for stride in (2, 4, 8))
        output_stride = strides[-1] if output_stride is None else output_stride
        if output_stride not in strides:
            raise ValueError(f"output_stride={output_stride} is impossible here; use one of {strides}")
        plain = not kwargs.get("stem_type")
        if small_images and not plain:
            raise ValueError("stem_type is for networks with a 7×7 stem; leave it out with small_images=True")
        if plain and (stem_width < 2 or stem_width % 2):
            raise ValueError(f"stem_width={stem_width} is impossible; use an even number of 2 or more")
        if plain and stem_width != 64:
            # timm's plain stem has 64 channels. Its deep one ends in twice stem_width, and is replaced below.
            kwargs = {**kwargs, "stem_type": "deep", "stem_width": stem_width // 2}
        elif not plain:
            kwargs = {**kwargs, "stem_width": stem_width}
        super().__init__(
            block,
            tuple(layers),
            output_stride=output_stride * 4 // stem_stride,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        if plain and (small_images or stem_width != 64):
            weight = next(self.conv1.parameters())
            self.conv1 = nn.Conv2d(
                weight.shape[1],
                stem_width,
                3 if small_images else 7,
                stride=1 if small_images else 2,
                padding=1 if small_images else 3,
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            )
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if small_images:
            self.maxpool = nn.Identity()
            for info in self.feature_info:
                info["reduction"] //= 2 if info["module"] == "act1" else 4

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm has it; in training on a CPU, the stem's norm and ReLU are the kernels'."""
        if not self.training or self.grad_checkpointing or not isinstance(x, Tensor):
            return super().forward_features(x)
        x = self.maxpool(norm_activation(self.bn1, self.act1, self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return x

    @property
    def stages(self) -> list[nn.Sequential]:
        """The four stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]


def _check_stages(name: str, values: object) -> None:
    """Four whole numbers: timm makes a network of any stages, and fails when an image goes through it."""
    if (
        not isinstance(values, Sequence)
        or len(values) != 4
        or any(not isinstance(value, int) or value < 1 for value in values)
    ):
        raise ValueError(
            f"{name}={values!r} is impossible; give a whole number of 1 or more for each of the four stages"
        )


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's configuration of a network for 224×224 images of ImageNet."""
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
        **kwargs,
    }


def small_image_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's configuration of a network for 32×32 images of ten classes."""
    return imagenet_cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, **kwargs)
