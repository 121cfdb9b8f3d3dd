"""Data sets by name: what ``--data`` takes, as splits of images with labels and class names.

Reading is torchvision's, Hugging Face's and timm's; here is what makes them look alike. A class is its *name*: index
and order are whatever the training split (or the network) says, and other splits are matched to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from epsanet.data.config import DataConfig
from epsanet.data.images import IMAGE_SUFFIXES, read_image

__all__ = ["DataSplits", "Samples", "Stream", "Subset", "match_classes", "open_data", "require"]

TRAIN_NAMES, VAL_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test",)
SPLIT_SEED = 42
"""Of every split that is made here, so that a data set splits the same way in every run."""


class Samples(ABC):
    """Images with labels, by position."""

    class_names: list[str]
    """In the order of the labels."""
    labels: np.ndarray
    """One index into ``class_names`` an image, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, position: int) -> Path | BinaryIO | Image.Image:
        """What ``read_image`` takes."""

    @abstractmethod
    def name(self, position: int) -> str:
        """A file name or the like, for messages and tables."""


class Subset(Samples):
    """Some positions of other samples, possibly under other class names."""

    def __init__(
        self,
        base: Samples,
        positions: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.base, self.positions = base, np.asarray(positions, dtype=np.int64)
        self.labels = base.labels[self.positions] if labels is None else labels
        self.class_names = base.class_names if class_names is None else class_names

    def open(self, position: int) -> Path | BinaryIO | Image.Image:
        return self.base.open(int(self.positions[position]))

    def name(self, position: int) -> str:
        return self.base.name(int(self.positions[position]))


class DigitsSamples(Samples):
    """The 1,797 handwritten digits of scikit-learn (8×8, UCI), enlarged to 32×32."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        self.labels = digits.target.astype(np.int64)
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)

    def open(self, position: int) -> Image.Image:
        return Image.fromarray(self._images[position]).resize((32, 32), Image.Resampling.BICUBIC)

    def name(self, position: int) -> str:
        return f"digits[{position}]"


class FolderSamples(Samples):
    """torchvision's ImageFolder: a folder a class."""

    def __init__(self, folder: Path) -> None:
        try:
            dataset = ImageFolder(
                str(folder), allow_empty=True, is_valid_file=lambda name: Path(name).suffix.lower() in IMAGE_SUFFIXES
            )
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no class folders; put the images of each class in a folder") from error
        if not dataset.samples:
            raise ValueError(f"{folder} has class folders but no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._paths = [path for path, _ in dataset.samples]
        self.labels = np.array([label for _, label in dataset.samples], dtype=np.int64)
        self.class_names = dataset.classes

    def open(self, position: int) -> Path:
        return Path(self._paths[position])

    def name(self, position: int) -> str:
        return self._paths[position]


class TorchvisionSamples(Samples):
    """A data set of ``torchvision.datasets`` that timm knows as ``torch/NAME``."""

    def __init__(self, name: str, dataset: Any, class_names: list[str] | None) -> None:
        self._name, self._dataset = name, dataset
        labels = next(
            (getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None
        )
        if labels is None:
            labels = [dataset[position][1] for position in range(len(dataset))]
        self.labels = np.asarray(labels, dtype=np.int64)
        names = class_names or getattr(dataset, "classes", None) or range(int(self.labels.max()) + 1)
        self.class_names = [str(name) for name in names]

    def open(self, position: int) -> Image.Image:
        image: Image.Image = self._dataset[position][0]
        return image

    def name(self, position: int) -> str:
        return f"{self._name}[{position}]"


class HuggingFaceSamples(Samples):
    """A split in the layout of Hugging Face ``datasets``: an image column and a label column."""

    def __init__(self, name: str, dataset: Any, config: DataConfig, class_names: list[str] | None) -> None:
        import datasets

        for key in (config.image_key, config.label_key):
            if key not in dataset.column_names:
                raise ValueError(
                    f"{name} has no column {key!r} but {', '.join(dataset.column_names)}; "
                    "name them with --data.image_key and --data.label_key"
                )
        self._name, self._key = name, config.image_key
        self._images = dataset.select_columns([config.image_key]).cast_column(
            config.image_key, datasets.Image(decode=False)
        )
        values = dataset[config.label_key][:]
        if any(value is None for value in values):
            raise ValueError(f"{name} has images without a label in column {config.label_key!r}; remove them")
        named: list[Any] | None = getattr(dataset.features[config.label_key], "names", None)
        if named is None and (class_names is None or any(isinstance(value, str) for value in values)):
            named = sorted(set(values))
            places = {value: place for place, value in enumerate(named)}
            values = [places[value] for value in values]
            if class_names is not None:  # the column has names, the file says their order
                order, _ = match_classes([str(value) for value in named], class_names)
                values, named = [order[value] for value in values], class_names
        self.class_names = [str(value) for value in (class_names or named or ())]
        self.labels = np.asarray(values, dtype=np.int64)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"{name} has labels from {self.labels.min()} to {self.labels.max()} for {len(self.class_names)} classes"
                "; a label is the place of its name, from 0 on"
            )

    def open(self, position: int) -> Path | BinaryIO:
        import io

        image = self._images[position][self._key]
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])

    def name(self, position: int) -> str:
        return f"{self._name}[{position}]"


class _ReadThen:
    """``read_image`` before a transform; a class, because loader processes may have to pickle it."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(read_image(image))


@dataclass(kw_only=True)
class Stream:
    """A split that can only be read from front to back: WebDataset shards through timm's reader."""

    folder: str
    """Where the shards are."""
    split: str
    """timm's split: a name in ``info.json``, or a pattern of shards with the number of samples."""
    class_names: list[str]
    """In the order of the labels."""

    def dataset(self, *, is_training: bool, batch_size: int, seed: int, transform: Any) -> Any:
        """timm's iterable data set; shuffled when training."""
        from timm.data import create_dataset

        dataset = create_dataset(
            "wds/" + self.folder,
            root=self.folder,
            split=self.split,
            is_training=is_training,
            batch_size=batch_size,
            seed=seed,
            input_img_mode="",  # left to read_image, as for every other data set
        )
        dataset.transform = None if transform is None else _ReadThen(transform)
        return dataset

    def __len__(self) -> int:
        return int(self.dataset(is_training=False, batch_size=1, seed=0, transform=None).reader.num_samples)


@dataclass(kw_only=True)
class DataSplits:
    """The splits of a data set under one list of class names."""

    name: str
    """As ``--data`` was given."""
    train: Samples | Stream
    """To learn from."""
    val: Samples | Stream
    """To choose by."""
    test: Samples | Stream | None = None
    """To report, if the data set has one."""
    notes: tuple[str, ...] = ()
    """What the user should know about how classes were matched and splits were made."""

    @property
    def class_names(self) -> list[str]:
        """Those of the training split."""
        return self.train.class_names


def require(module: str, extra: str) -> None:
    """Raise a ``ValueError`` with the line to install when an optional library is missing."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs {module}, which is not installed; pip install 'epsanet[{extra}]'")


def open_data(config: DataConfig) -> DataSplits:
    """Open the data set that a configuration names; labels of all splits follow the training split's names.

    Args:
        config: its ``source`` and the fields about splits.

    Raises:
        ValueError: when there is no such data set, a library for it is missing, or classes do not match.
    """
    found, notes = _open_splits(config)
    usual_train = TRAIN_NAMES if config.train_split in TRAIN_NAMES else ()
    train = _first(found, (config.train_split, *usual_train))
    val = _first(found, (config.val_split,) if config.val_split else VAL_NAMES)
    test = _first(found, (config.test_split,) if config.test_split else TEST_NAMES)
    for flag, split in (("val_split", val), ("test_split", test)):
        if split is None and getattr(config, flag) is not None:
            raise ValueError(
                f"{config.source} has no split {getattr(config, flag)!r} but {', '.join(found)}; correct --data.{flag}"
            )
    if test is val:
        test = None  # what the best epoch is chosen by is no test
    if train is None:
        if len(found) != 1 or val is not None or test is not None or not usual_train:
            raise ValueError(
                f"{config.source} has no split to train on ({config.train_split}), only {', '.join(found)}; "
                "name it with --data.train_split"
            )
        train = next(iter(found.values()))
    if val is None:
        if isinstance(train, Stream):
            raise ValueError(f"{config.source} has no validation split; name one with --data.val_split")
        train, val = _split_off(train, config.val_fraction, config.source)
        notes.append(f"no validation split: {len(val):,} images of the training split, same share of each class")
    return DataSplits(
        name=config.source,
        train=train,
        val=_matched(val, train.class_names, "validation", notes),
        test=None if test is None else _matched(test, train.class_names, "test", notes),
        notes=tuple(notes),
    )


def open_split(
    config: DataConfig, split: str | None, class_names: list[str]
) -> tuple[Samples | Stream, str, list[str]]:
    """Open one split for evaluation, its labels matched by name to the classes of a network.

    Args:
        config: its ``source`` and the fields about splits.
        split: train, val, test, or another name of the data set; test if there is one, else val, when left out.
            Where there is no validation split, val is the share of the training images that ``open_data`` sets aside.
        class_names: of the network.

    Returns:
        The split, its name, and notes for the user.

    Raises:
        ValueError: when there is no such split, or it has classes that the network does not know.
    """
    found, notes = _open_splits(config)
    if split is None:
        named = {"test": config.test_split, "val": config.val_split}
        wanted = [name for name in (named["test"], *TEST_NAMES, named["val"], *VAL_NAMES) if name in found]
        split = wanted[0] if wanted else next(iter(found)) if len(found) == 1 else ""
        if len(found) == 1 and split not in (*VAL_NAMES, *TEST_NAMES):
            notes.append(
                f"{config.source} has one split: all its images are counted, also those that a network was trained on; "
                "--split val takes those that training sets aside"
            )
    if split in VAL_NAMES and config.val_split is None and not any(name in found for name in VAL_NAMES):
        train = _first(found, (config.train_split, *TRAIN_NAMES, *(found if len(found) == 1 else ())))
        if train is not None and not isinstance(train, Stream):
            found[split] = _split_off(train, config.val_fraction, config.source)[1]
    for names in (TRAIN_NAMES, VAL_NAMES, TEST_NAMES):
        if split in names and split not in found:
            split = next((name for name in names if name in found), split)
    if split not in found:
        raise ValueError(f"{config.source} has no split {split!r} but {', '.join(found)}; choose one with --split")
    return _matched(found[split], class_names, split, notes), split, notes


def match_classes(found: Sequence[str], wanted: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where each found class stands among the wanted ones, by name.

    Returns:
        An index into ``wanted`` for each of ``found``, and the wanted classes that were not found.

    Raises:
        ValueError: when a found class is not wanted.
    """
    places = {name: place for place, name in enumerate(wanted)}
    unknown = [name for name in found if name not in places]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise ValueError(
            f"{len(unknown)} of {len(found)} classes are unknown: {shown}; known are "
            f"{', '.join(repr(name) for name in wanted[:5])}{', …' if len(wanted) > 5 else ''}; rename or remove them"
        )
    return [places[name] for name in found], [name for name in wanted if name not in set(found)]


def _matched(split: Samples | Stream, class_names: list[str], title: str, notes: list[str]) -> Samples | Stream:
    """The split with labels that follow ``class_names``; classes without images do not count as found."""
    if split.class_names == class_names:
        return split
    if isinstance(split, Stream):
        raise ValueError(f"the {title} split names other classes than expected; shards cannot be renumbered")
    present = sorted(set(split.labels.tolist()))
    try:
        places, lacking = match_classes([split.class_names[label] for label in present], class_names)
    except ValueError as error:
        raise ValueError(f"the {title} split does not fit: {error}") from error
    renumber = dict(zip(present, places, strict=True))
    if lacking:
        shown = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        notes.append(f"the {title} split lacks {len(lacking)} of {len(class_names)} classes ({shown}); matched by name")
    labels = np.array([renumber[label] for label in split.labels.tolist()], dtype=np.int64)
    return Subset(split, np.arange(len(split)), labels, class_names)


def _first(found: dict[str, Any], names: Sequence[str]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _split_off(samples: Samples, fraction: float, name: str) -> tuple[Samples, Samples]:
    """Split stratified by class: the first part to learn from, the second to validate."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(samples.labels, minlength=len(samples.class_names))
    single = [samples.class_names[label] for label in np.flatnonzero(counts == 1)]
    if single:
        raise ValueError(
            f"{name} has one image only of {', '.join(single[:5])}; a validation split needs two of each class, or "
            "make a val/ folder of your own"
        )
    try:
        kept, taken = train_test_split(
            np.arange(len(samples)), test_size=fraction, stratify=samples.labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"{name} is too small to split off a validation share of {fraction}: {error}; raise --data.val_fraction"
        ) from error
    return Subset(samples, np.sort(kept)), Subset(samples, np.sort(taken))


def _open_splits(config: DataConfig) -> tuple[dict[str, Samples | Stream], list[str]]:
    """All splits by the names that the data set gives them."""
    source = config.source
    prefix, _, rest = source.partition("/")
    path = Path(source)
    names = _read_class_names(config)
    if source == "digits":
        return _open_digits(config), []
    if prefix == "torch" and rest:
        return _open_torchvision(source, config, names), []
    if prefix == "wds" and rest:
        return _open_shards(rest, config, names), []
    if prefix == "hfds" and rest:
        return _open_hugging_face(source, {"path": rest}, config, names), []
    if path.is_file() and path.suffix == ".parquet":
        return _open_hugging_face(source, {"path": "parquet", "data_files": {"train": str(path)}}, config, names), []
    if path.is_dir():
        if not any(entry.is_dir() for entry in path.iterdir()) and any(path.glob("*.parquet")):
            return _open_hugging_face(source, {"path": str(path)}, config, names), []
        return _open_folder(path)
    if path.exists():
        raise ValueError(f"{source} is a file; --data takes a folder, a .parquet file, or a data set's name")
    raise ValueError(
        f"there is no data set {source!r}: no such folder or file; --data takes digits, a folder, a Parquet file or "
        "folder, torch/NAME, hfds/NAME or wds/FOLDER"
    )


def _read_class_names(config: DataConfig) -> list[str] | None:
    if config.class_names is None:
        return None
    try:
        names = [line.strip() for line in Path(config.class_names).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data.class_names {config.class_names} cannot be read as text: {error}") from error
    names = [name for name in names if name]
    if len(set(names)) != len(names):
        raise ValueError(f"{config.class_names} names a class twice")
    return names


def _open_digits(config: DataConfig) -> dict[str, Samples | Stream]:
    samples = DigitsSamples()
    rest, test = _split_off(samples, 0.2, "digits")
    train, val = _split_off(rest, config.val_fraction, "digits")
    return {"train": train, "val": val, "test": test}


def _open_folder(folder: Path) -> tuple[dict[str, Samples | Stream], list[str]]:
    splits = {
        entry.name: entry
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and entry.name in (*TRAIN_NAMES, *VAL_NAMES, *TEST_NAMES)
    }
    if not splits:
        return {"all": FolderSamples(folder)}, []
    return {name: FolderSamples(path) for name, path in splits.items()}, []


def _open_torchvision(source: str, config: DataConfig, names: list[str] | None) -> dict[str, Samples | Stream]:
    from timm.data import create_dataset

    if config.root is None:
        raise ValueError(f"{source} needs a folder; say where it lies, or shall be put, with --data.root FOLDER")
    found: dict[str, Samples | Stream] = {}
    for key, split in (("train", config.train_split), ("test", config.val_split or "validation")):
        try:
            dataset = create_dataset(source, root=config.root, split=split, download=config.download)
        except AssertionError as error:
            raise ValueError(f"{source} is not one of timm's torchvision data sets: {error}") from error
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{source} is not in {config.root}: {error}; add --data.download=true") from error
        found[split if key == "train" or config.val_split else key] = TorchvisionSamples(source, dataset, names)
    return found


def _open_hugging_face(
    source: str, arguments: dict[str, Any], config: DataConfig, names: list[str] | None
) -> dict[str, Samples | Stream]:
    require("datasets", "data")
    import datasets

    try:
        found = datasets.load_dataset(**arguments, cache_dir=config.root)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own errors derive from these
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} cannot be read: {first}") from error
    # Benchmarks publish test images with -1 for a label that they keep to themselves.
    return {
        split: HuggingFaceSamples(f"{source}:{split}", dataset, config, names)
        for split, dataset in found.items()
        if not (config.label_key in dataset.column_names and set(dataset[config.label_key][:]) == {-1})
    }


def _open_shards(folder: str, config: DataConfig, names: list[str] | None) -> dict[str, Samples | Stream]:
    import json

    require("webdataset", "data")
    info_path = next(
        (path for path in (Path(folder) / "_info.json", Path(folder) / "info.json") if path.is_file()), None
    )
    try:
        info = json.loads(info_path.read_text(encoding="utf-8")) if info_path else {}
    except ValueError as error:
        raise ValueError(f"{info_path} is no JSON: {error}") from error
    splits = [*info.get("splits", {}), config.train_split, config.val_split, config.test_split]
    wanted = [
        split for split in dict.fromkeys(splits) if split and (split in info.get("splits", {}) or ".tar" in split)
    ]
    if not Path(folder).is_dir() or not wanted:
        raise ValueError(
            f"wds/{folder} has no info.json with splits; write one, or give patterns of shards with their number of "
            "samples, for example --data.train_split 'train-{0000..0003}.tar|4000' --data.val_split 'val-0000.tar|500'"
        )
    for split in wanted:
        if split not in info.get("splits", {}) and not split.rpartition("|")[2].isdigit():
            raise ValueError(f"{split!r} does not say how many samples it has; for example {split.split('|')[0]}|4000")
    names = names or info.get("class_names")
    if not names:
        raise ValueError(f"wds/{folder} names no classes; list them, one a line, in a file: --data.class_names FILE")
    return {split: Stream(folder=folder, split=split, class_names=list(names)) for split in wanted}
