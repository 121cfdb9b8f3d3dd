"""What to read and how to augment it. Importable without torch, so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DataConfig:
    """The data set, its preprocessing and augmentation; augmentations bear timm's names."""

    source: str = "digits"
    """Data set: digits; a folder with train/ and val/ (and test/), or of class folders; a Parquet file or folder;
    torch/NAME of torchvision, hfds/NAME of the Hugging Face Hub, or wds/FOLDER of WebDataset shards. For detection:
    digits-detection, or a folder of images with a COCO JSON for train and val."""
    root: str | None = None
    """Folder in which torch/ and hfds/ data sets lie or are put."""
    download: bool = False
    """Whether a torch/ data set may be downloaded."""
    train_split: str = "train"
    """Name of the training split of torch/, hfds/ and wds/ data sets."""
    val_split: str | None = None
    """Name of the validation split; found by the usual names, or split off the training images, when left out."""
    test_split: str | None = None
    """Name of the test split; found by the usual names when left out."""
    val_fraction: float = 0.1
    """Share of the training images that becomes the validation split of a data set that has none."""
    train_fraction: float = 1.0
    """Classification: share of the training images to train on, the same of each class; validation stays the same."""
    streaming: bool = False
    """Read Parquet and hfds/ data sets front to back as they come, without keeping a copy on disk."""
    image_key: str = "image"
    """Column of the images in Parquet and hfds/ data sets."""
    label_key: str = "label"
    """Column of the labels in Parquet and hfds/ data sets, and of labels in the .json of shards."""
    class_names: str | None = None
    """Text file with a class name a line, for data sets that name none (wds/, torch/)."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """Damaged images are skipped, named and counted, or stop the run."""
    check: Literal["full", "headers"] = "full"
    """Before the first epoch, decode every image, or read headers only (quicker on millions of images)."""
    batch_size: int = 64
    """Images a step in each process."""
    workers: int | None = None
    """Processes that load images; as many as cores, at most 8, when left out (none for digits)."""
    input_size: int | None = None
    """Height and width in pixels; the network's own when left out."""
    crop_pct: float | None = None
    """Evaluation resizes to input_size / crop_pct and crops the centre; when left out, 1 with ``crop_padding``, else
    the network's own."""
    interpolation: str | None = None
    """bilinear or bicubic; the network's own when left out."""
    mean: tuple[float, float, float] | None = None
    """Of each colour, subtracted; values between 0 and 1. The network's own when left out."""
    std: tuple[float, float, float] | None = None
    """Of each colour, divided by. The network's own when left out."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area that a training crop covers."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width / height of a training crop."""
    crop_padding: int | None = None
    """Take the training crop from the image at input_size with a reflected border of this many pixels, as is usual for
    CIFAR, instead of a random resized crop of ``scale`` and ``ratio``."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: str | None = None
    """timm's RandAugment, AugMix or AutoAugment policy, for example rand-m9-mstd0.5."""
    re_prob: float = 0.0
    """Probability of random erasing."""
    aug_repeats: int = 1
    """Repeated augmentation: so many augmentations of an image follow each other, of as many fewer images an epoch."""
    mixup: float = 0.0
    """alpha of mixup, which blends pairs of images and their labels; 0 is none."""
    cutmix: float = 0.0
    """alpha of CutMix, which pastes a piece of one image into another; 0 is none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all, by one of the two."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both are wanted."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Whether a batch, a pair or an image has its own share."""
    scale_jitter: tuple[float, float] | None = None
    """Detection: smallest and largest factor of a random size, cropped or padded to the size without it; (0.8, 1.25)
    is mild, (0.1, 2.0) the large-scale jitter of Ghiasi et al., CVPR 2021."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} is impossible; use a share between 0 and 1")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"data.train_fraction={self.train_fraction} is impossible; use a share above 0, up to 1")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size={self.batch_size} is impossible; use 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers={self.workers} is impossible; use 0 or more")
        if self.input_size is not None and self.input_size < 8:
            raise ValueError(f"data.input_size={self.input_size} is too small; use 8 or more")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct={self.crop_pct} is impossible; use a share up to 1, for example 0.875")
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding} is impossible; use 0 or more pixels")
        if self.aug_repeats < 1:
            raise ValueError(f"data.aug_repeats={self.aug_repeats} is impossible; use 1 (none) or more")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} is impossible; use 0 (none) or more, such as 0.2")
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"data.batch_size={self.batch_size} is odd, but mixup and cutmix pair images; make it even"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std={self.std} is impossible; use values above 0")
        for name in ("hflip", "vflip", "re_prob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)} is no probability; use 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale={self.scale} is impossible; use two rising shares of the area up to 1")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"data.scale_jitter={self.scale_jitter} is impossible; use two rising factors above 0")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio={self.ratio} is impossible; use two rising ratios of width to height")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0
