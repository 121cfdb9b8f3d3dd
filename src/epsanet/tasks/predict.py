"""Prediction: images in, a row of class names and probabilities each out."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epsanet.data.images import IMAGE_SUFFIXES, ImageError, image_files, printable, read_image
from epsanet.data.loaders import evaluation_transform
from epsanet.network.weights import LoadedModel, load_model
from epsanet.tasks.console import messages
from epsanet.tasks.devices import resolve_device
from epsanet.tasks.inference import inference_network
from epsanet.tasks.scores import probabilities
from epsanet.tasks.tables import Table, write_table

__all__ = ["Prediction", "find_images", "predict", "write_predictions"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The best classes of one image, or why there are none."""

    image: str
    """Its path."""
    classes: tuple[str, ...] = ()
    """Names, the most probable first."""
    probabilities: tuple[float, ...] = ()
    """Of these classes, 0 to 1."""
    error: str = ""
    """Why the image could not be read."""


def find_images(names: Sequence[str | Path]) -> list[str]:
    """Paths of images: files as they are, folders searched to any depth, patterns expanded; each sorted.

    Args:
        names: files, folders, or glob patterns (``**`` descends).

    Raises:
        ValueError: when a folder holds no image, a pattern matches nothing or a name is empty.
    """
    found: list[str] = []
    for name in map(str, names):
        if not name:  # of a shell's variable that is not set; Path("") is the folder that one is in
            raise ValueError("an image has the empty name ''; give a file, a folder or a pattern, . for this folder")
        path = Path(name)
        if path.is_dir():
            inside = sorted(image_files(path))
            if not inside:
                raise ValueError(f"{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found.extend(inside)
        elif glob.has_magic(name) and not path.exists():
            matches = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())  # noqa: PTH207 - takes absolute patterns
            if not matches:
                raise ValueError(f"nothing matches {name!r}")
            found.extend(matches)
        else:
            found.append(name)
    return found


class _Files(Dataset[tuple[Tensor | None, str, str]]):
    def __init__(self, paths: list[str], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor | None, str, str]:
        path = self.paths[position]
        try:
            return self.transform(read_image(Path(path))), path, ""
        except ImageError as error:
            return None, path, str(error)


def _collate(items: list[tuple[Tensor | None, str, str]]) -> tuple[Tensor | None, list[tuple[str, str]]]:
    images = [image for image, _, _ in items if image is not None]
    return torch.stack(images) if images else None, [(path, error) for _, path, error in items]


def predict(
    model: str | Path | LoadedModel,
    images: Sequence[str | Path],
    *,
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    note: Callable[[str], None] = messages.print,
) -> Iterator[Prediction]:
    """Classify images, in order; unreadable ones give a prediction with an error and do not disturb the rest.

    Args:
        model: whatever ``load_model`` takes, or a loaded model.
        images: files, folders or glob patterns.
        topk: classes to give for each image.
        batch_size: images at a time.
        workers: processes that read images.
        device: auto, cpu, cuda, cuda:N or mps.
        note: told what the user should know: that the network was optimised.

    Raises:
        ValueError: for a model, device, folder or pattern that is not there.
    """
    check_numbers(topk, batch_size, workers)
    place = resolve_device(device)
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    paths = find_images(images)
    positions = range(len(paths))
    batches = [positions[first : first + batch_size] for first in range(0, len(paths), batch_size)]
    return predict_batches(loaded, paths, batches, min(topk, len(loaded.class_names)), workers, place, note)


def check_numbers(topk: int, batch_size: int, workers: int) -> None:
    """Raise a ``ValueError`` for numbers that make no sense."""
    if topk < 1 or batch_size < 1 or workers < 0:
        raise ValueError(f"topk={topk} and batch_size={batch_size} must be 1 or more, workers={workers} 0 or more")


def predict_batches(
    loaded: LoadedModel,
    paths: list[str],
    batches: list[range],
    topk: int,
    workers: int,
    device: torch.device,
    note: Callable[[str], None],
) -> Iterator[Prediction]:
    """Predictions of the images at the positions of each batch.

    Args:
        loaded: the model.
        paths: of all images.
        batches: positions in ``paths``.
        topk: classes to give, at most the model's number.
        workers: processes that read images.
        device: where.
        note: told what the user should know: that the network was optimised.
    """
    network = inference_network(loaded.model.eval(), loaded.data_config["input_size"], device, note=note)
    if network is loaded.model and any(weight.device.type != device.type for weight in network.parameters()):
        network = copy.deepcopy(network)  # the caller's stays where it is
    network = network.to(device).to(memory_format=torch.channels_last)
    loader = DataLoader(
        _Files(paths, evaluation_transform(loaded.data_config)),
        batch_sampler=batches,  # type: ignore[arg-type]  # ranges are lists enough
        num_workers=workers,
        collate_fn=_collate,
    )
    for batch, files in loader:
        rows: Iterator[tuple[list[float], list[int]]] = iter(())
        if batch is not None:
            with torch.inference_mode():
                logits = network(batch.to(device, memory_format=torch.channels_last))
            best = probabilities(logits).topk(topk)
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for path, error in files:
            if error:
                yield Prediction(image=printable(path), error=error)
                continue
            values, indices = next(rows)
            names = tuple(loaded.class_names[index] for index in indices)
            yield Prediction(image=printable(path), classes=names, probabilities=tuple(values))


def write_predictions(path: str | Path, predictions: Iterable[Prediction], topk: int) -> Iterator[Prediction]:
    """Write predictions as they come, whole or not at all, and pass them on.

    CSV and Parquet have the columns ``image, error, class_1, probability_1, class_2, …``; JSON is a list of
    ``{image, error, predictions: [{class, probability}]}``.

    Args:
        path: ends in .csv, .json or .parquet.
        predictions: to write.
        topk: classes an image.

    Raises:
        ValueError: for another suffix, or when the library for Parquet is missing.
    """
    columns: dict[str, type[str] | type[float]] = {"image": str, "error": str}
    for place in range(1, topk + 1):
        columns |= {f"class_{place}": str, f"probability_{place}": float}

    def rows(prediction: Prediction) -> list[dict[str, Any]]:
        row: dict[str, Any] = {**dict.fromkeys(columns), "image": prediction.image, "error": prediction.error or None}
        for place, (name, probability) in enumerate(_best(prediction, topk), 1):
            row |= {f"class_{place}": name, f"probability_{place}": probability}
        return [row]

    def entry(prediction: Prediction) -> dict[str, Any]:
        found = [{"class": name, "probability": probability} for name, probability in _best(prediction, topk)]
        return {"image": prediction.image, "error": prediction.error or None, "predictions": found}

    return write_table(path, predictions, Table(columns=columns, rows=rows, entry=entry))


def _best(prediction: Prediction, topk: int) -> list[tuple[str, float]]:
    return list(zip(prediction.classes, prediction.probabilities, strict=True))[:topk]
