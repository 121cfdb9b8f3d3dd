"""Data sets by name: what ``--data`` takes, as splits of images with labels and class names.

A class is its *name*: index and order are whatever the training split (or the network) says, and other splits are
matched to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epsanet._optional import require
from epsanet.data.config import DataConfig
from epsanet.data.samples import (
    DigitsSamples,
    FolderSamples,
    HuggingFaceSamples,
    Samples,
    ShardSamples,
    Subset,
    TorchvisionSamples,
    match_classes,
    subfolders,
)
from epsanet.data.streams import Stream

__all__ = ["DataSplits", "open_data", "open_split", "open_splits", "require"]

TRAIN_NAMES, VAL_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test", "testing")
SPLIT_SEED = 42
"""Of every split that is made here, so that a data set splits the same way in every run."""


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
            raise ValueError(
                f"{config.source} has no validation split, and none can be set aside of a stream; "
                "name one with --data.val_split, or leave out --data.streaming"
            )
        train, val = _split_off(train, config.val_fraction, config.source)
        notes.append(f"no validation split: {len(val):,} images of the training split, same share of each class")
    if config.train_fraction < 1:
        if isinstance(train, Stream):
            raise ValueError(f"{config.source} is read as a stream, which has no fraction; leave --data.streaming out")
        _, train = _split_off(train, config.train_fraction, config.source, "train_fraction")
        notes.append(f"{len(train):,} training images: a fraction of {config.train_fraction:g}")
    return DataSplits(
        name=config.source,
        train=train,
        val=_matched(val, train.class_names, "validation", notes),
        test=None if test is None else _matched(test, train.class_names, "test", notes),
        notes=tuple(notes),
    )


def open_split(
    config: DataConfig, split: str | None, class_names: list[str] | None
) -> tuple[Samples | Stream, str, list[str]]:
    """Open one split for evaluation, its labels matched by name to the classes of a network.

    Args:
        config: its ``source`` and the fields about splits.
        split: train, val, test, or another name of the data set; test if there is one, else val, when left out.
            Where there is no validation split, val is the share of the training images that ``open_data`` sets aside.
        class_names: of the network; labels stay those of the data set when None.

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
    opened = found[split]
    return opened if class_names is None else _matched(opened, class_names, split, notes), split, notes


def open_splits(config: DataConfig) -> tuple[dict[str, Samples | Stream], list[str]]:
    """Every split by its name in the data set, all under the class names of the training split; and these names.

    Args:
        config: its ``source`` and the fields about splits.

    Raises:
        ValueError: when there is no such data set, or classes do not match.
    """
    found, notes = _open_splits(config)
    train = _first(found, (config.train_split, *TRAIN_NAMES, *found))
    return {name: _matched(split, train.class_names, name, notes) for name, split in found.items()}, train.class_names


def _matched(split: Samples | Stream, class_names: list[str], title: str, notes: list[str]) -> Samples | Stream:
    """The split with labels that follow ``class_names``; classes without images do not count as found."""
    if split.class_names == class_names:
        return split
    if isinstance(split, Stream):
        try:
            return split.renamed(class_names)
        except ValueError as error:
            raise ValueError(f"the {title} split does not fit: {error}") from error
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


def _split_off(samples: Samples, fraction: float, name: str, flag: str = "val_fraction") -> tuple[Samples, Samples]:
    """Split stratified by class; the second part is the fraction that the flag names."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(samples.labels, minlength=len(samples.class_names))
    single = [samples.class_names[label] for label in np.flatnonzero(counts == 1)]
    if single:
        raise ValueError(
            f"{name} has one image only of {', '.join(single[:5])}; --data.{flag} needs two of each class"
            + (", or make a val/ folder of your own" if flag == "val_fraction" else "")
        )
    try:
        kept, taken = train_test_split(
            np.arange(len(samples)), test_size=fraction, stratify=samples.labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"{name} is too small to split off a share of {fraction:g}: {error}; raise --data.{flag}"
        ) from error
    return Subset(samples, np.sort(kept)), Subset(samples, np.sort(taken))


def _open_splits(config: DataConfig) -> tuple[dict[str, Samples | Stream], list[str]]:
    """All splits by the names that the data set gives them."""
    source = config.source
    prefix, _, rest = source.partition("/")
    path = Path(source)
    names = _read_class_names(config)
    if config.streaming and prefix != "hfds" and path.suffix != ".parquet" and not any(path.glob("*.parquet")):
        raise ValueError(f"{source} cannot be streamed, only Parquet and hfds/ can; leave out --data.streaming")
    if source == "digits":
        return _open_digits(config), []
    if prefix == "torch" and rest:
        return _open_torchvision(source, config, names), []
    if prefix == "wds" and rest:
        return _open_shards(Path(rest), config, names)
    if prefix == "hfds" and rest:
        return _open_hugging_face(source, {"path": rest}, config, names), []
    if path.is_file() and path.suffix == ".parquet":
        return _open_hugging_face(source, {"path": "parquet", "data_files": {"train": str(path)}}, config, names), []
    if path.is_dir():
        if not subfolders(path) and any(path.glob("*.parquet")):
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
        names = [line.strip() for line in Path(config.class_names).read_text(encoding="utf-8-sig").splitlines()]
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
    splits: dict[str, Path] = {}
    for entry in subfolders(folder):
        name = entry.name.lower()
        # Train may be a class, of vehicles; a split has folders of classes in it.
        if name in (*TRAIN_NAMES, *VAL_NAMES, *TEST_NAMES) and (entry.name == name or subfolders(entry)):
            if name in splits:
                raise ValueError(f"{folder} has two folders of the {name} split, {entry.name} too; leave one")
            splits[name] = entry
    if not splits:
        return {"all": FolderSamples(folder)}, []
    return {name: FolderSamples(path) for name, path in splits.items()}, []


def _open_torchvision(source: str, config: DataConfig, names: list[str] | None) -> dict[str, Samples | Stream]:
    from timm.data import create_dataset

    if config.root is None:
        raise ValueError(f"{source} needs a folder; say where it lies, or shall be put, with --data.root FOLDER")
    if config.train_split not in TRAIN_NAMES:  # timm would take the test images instead
        raise ValueError(f"{source} has no split {config.train_split!r} to train on; leave --data.train_split out")
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
        if config.streaming:
            builder = datasets.load_dataset_builder(**arguments, cache_dir=config.root)
        else:
            found = datasets.load_dataset(**arguments, cache_dir=config.root)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"{source} cannot be read: {(reason or type(error).__name__).splitlines()[0]}") from error
    # Benchmarks publish test images with -1 for a label that they keep to themselves.
    if config.streaming:
        return _open_streams(source, builder, config, names)
    return {
        split: HuggingFaceSamples(f"{source}:{split}", dataset, config, names)
        for split, dataset in found.items()
        if not _is_hidden(dataset, config.label_key)
    }


def _is_hidden(dataset: Any, label_key: str) -> bool:
    labels = dataset[label_key][:] if label_key in dataset.column_names else []
    return bool(labels) and all(label == -1 for label in labels)


def _open_streams(
    source: str, builder: Any, config: DataConfig, names: list[str] | None
) -> dict[str, Samples | Stream]:
    files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    strange = [file for split in files.values() for file in split if not file.split("?")[0].endswith(".parquet")]
    if strange or not files:
        raise ValueError(
            f"{source} holds {strange[0] if strange else 'no Parquet files'}; only Parquet is streamed, "
            "leave out --data.streaming"
        )
    names = names or getattr((builder.info.features or {}).get(config.label_key), "names", None)
    streams = {split: Stream(f"{source}:{split}", paths, config, names) for split, paths in files.items()}
    return {split: stream for split, stream in streams.items() if stream.first_label() != -1}


def _open_shards(
    folder: Path, config: DataConfig, names: list[str] | None
) -> tuple[dict[str, Samples | Stream], list[str]]:
    info = _read_shard_info(folder)
    patterns = [split for split in (config.train_split, config.val_split, config.test_split) if split]
    wanted = {split: _expand(split) for split in patterns if ".tar" in split}
    wanted |= {split: (entry["filenames"], entry["num_samples"]) for split, entry in info.get("splits", {}).items()}
    if not wanted:  # train-0000.tar, train-0001.tar, …
        for path in sorted(folder.glob("[!.]*.tar")):
            split = path.stem.rstrip("0123456789").rstrip("-_.").rpartition("-")[2]
            wanted.setdefault(split, ([], None))[0].append(path.name)
    if not wanted:
        raise ValueError(
            f"wds/{folder} has no shards like train-0000.tar; make them with epsanet shard, or name them by pattern, "
            "for example --data.train_split 'tr{00..11}.tar' --data.val_split va.tar"
        )
    found: dict[str, Samples | Stream] = {}
    notes = []
    for split, (files, expected) in wanted.items():
        found[split] = ShardSamples(
            f"wds/{folder}:{split}",
            [folder / file for file in files],
            names or info.get("class_names"),
            config.label_key,
        )
        if expected not in (None, len(found[split])):
            notes.append(f"the {split} split has {len(found[split]):,} samples, not {expected:,} as was said of it")
    return found, notes


def _read_shard_info(folder: Path) -> dict[str, Any]:
    """timm's description of shards: ``splits`` by name, with ``filenames`` and ``num_samples``; ``class_names``."""
    import json

    path = next((path for path in (folder / "_info.json", folder / "info.json") if path.is_file()), None)
    if path is None:
        return {}
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        good = all(
            _are_texts(entry["filenames"]) and isinstance(entry["num_samples"], int | None)
            for entry in info.get("splits", {}).values()
        )
        good &= info.get("class_names") is None or _are_texts(info["class_names"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no description of shards: {error!r}") from error
    if not good:
        raise ValueError(
            f"{path} is no description of shards: filenames and class_names are lists of texts, num_samples is a number"
        )
    return info


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _expand(pattern: str) -> tuple[list[str], int | None]:
    """Shards of a pattern with braces, and the number of their samples, if it is said: ``train-{0..9}.tar|5000``."""
    files, _, count = pattern.partition("|")
    if "{" not in files:
        return [files], int(count) if count.isdigit() else None
    require("webdataset", "data")
    from webdataset.shardlists import expand_urls

    return list(expand_urls(files)), int(count) if count.isdigit() else None
