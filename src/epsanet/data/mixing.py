"""Mixup and CutMix by timm, as a function of (seed, epoch, batch, process): a resumed run mixes as a whole one."""

from __future__ import annotations

from timm.data import Mixup
from torch import Tensor

from epsanet.data.config import DataConfig
from epsanet.data.loaders import seeded

__all__ = ["Mixer"]


class Mixer:
    """Mixes the images of a batch and their labels.

    Args:
        config: its mixup and cutmix fields.
        num_classes: of the labels.
        label_smoothing: share of the target that is spread over all classes.
        seed: of the run.
    """

    def __init__(self, config: DataConfig, num_classes: int, label_smoothing: float, seed: int) -> None:
        self.seed = seed
        self.mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, *, epoch: int, batch: int, process: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Images ``N, 3, H, W`` and labels ``N`` to new images and targets ``N, classes``; N must be even.

        Raises:
            ValueError: for an odd number of images.
        """
        if len(images) % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, and it has {len(images)}; use an even --data.batch_size"
            )
        with seeded(self.seed, epoch, batch, process):
            return self.mixup(images.clone(), labels)
