"""Detection in images: what is where, how sure, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epsanet._files import atomic_file
from epsanet.data.coco import read_rle
from epsanet.data.images import ImageError, printable, read_image
from epsanet.data.sources import require
from epsanet.network.detectors import Detector, LoadedDetector, load_detector
from epsanet.tasks.console import messages
from epsanet.tasks.detection.figures import drawn
from epsanet.tasks.detection.inference import inference_detector
from epsanet.tasks.detection.scores import encode_masks
from epsanet.tasks.devices import resolve_device
from epsanet.tasks.predict import find_images
from epsanet.tasks.tables import Table, write_table

__all__ = ["Detections", "detect", "detect_with", "draw", "draw_detections", "write_detections"]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What was found in one image, best first, or why it could not be read."""

    image: str
    """Its path, printable: bytes that are no UTF-8 appear as ``\\xff``."""
    path: str
    """Its path as the system has it."""
    width: int = 0
    """In pixels, after EXIF orientation."""
    height: int = 0
    """In pixels, after EXIF orientation."""
    classes: tuple[str, ...] = ()
    """A name for each detection."""
    scores: tuple[float, ...] = ()
    """0 to 1, falling."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """``x0, y0, x1, y1`` in pixels."""
    masks: tuple[dict[str, Any], ...] | None = None
    """COCO's compressed run-length encodings, ``size`` and ``counts``, from Mask R-CNN."""
    class_names: tuple[str, ...] = ()
    """All classes of the detector."""
    error: str = ""
    """Why the image could not be read, or not once more to be drawn."""

    def at_least(self, score: float) -> Detections:
        """Those of this score or more."""
        count = sum(value >= score for value in self.scores)  # they fall
        masks = None if self.masks is None else self.masks[:count]
        return replace(
            self, classes=self.classes[:count], scores=self.scores[:count], boxes=self.boxes[:count], masks=masks
        )


class _Files(Dataset[tuple[Tensor | None, str, str]]):
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor | None, str, str]:
        path = self.paths[position]
        try:
            return _as_tensor(path), path, ""
        except ImageError as error:
            return None, path, str(error)


def _as_tensor(path: str) -> Tensor:
    return torch.from_numpy(np.array(read_image(Path(path)))).permute(2, 0, 1).float() / 255


def detect(
    model: str | Path | LoadedDetector,
    images: Sequence[str | Path],
    *,
    score_thresh: float = 0.5,
    batch_size: int = 4,
    workers: int = 0,
    device: str = "auto",
    note: Callable[[str], None] = messages.print,
) -> Iterator[Detections]:
    """Find objects in images, in order; unreadable ones give an error and do not disturb the rest.

    Args:
        model: a model or run folder of detection training, or a loaded detector.
        images: files, folders or glob patterns.
        score_thresh: the least score; what is below ``score_thresh`` of the detector itself is never found.
        batch_size: images that are read at a time; the detector looks at each alone.
        workers: processes that read images.
        device: auto, cpu, cuda, cuda:N or mps.
        note: told what the user should know: that the backbone was optimised.

    Raises:
        ValueError: for a model, device, folder or pattern that is not there.
    """
    if batch_size < 1 or workers < 0 or not 0 <= score_thresh <= 1:
        raise ValueError(
            f"batch_size={batch_size} must be 1 or more, workers={workers} 0 or more and score_thresh={score_thresh} "
            "from 0 to 1"
        )
    place = resolve_device(device)
    loaded = model if isinstance(model, LoadedDetector) else load_detector(model)
    if loaded.model.config.has_masks:
        require("faster_coco_eval", "detection")
    network = inference_detector(loaded.model, place, note=note).to(place)
    return detect_with(network, loaded.class_names, find_images(images), score_thresh, batch_size, workers, place)


def detect_with(
    network: Detector,
    class_names: list[str],
    paths: list[str],
    score_thresh: float,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Detections]:
    """What ``detect`` does, by a detector that is ready to run.

    Args:
        network: in evaluation mode, on the device.
        class_names: of its labels.
        paths: of the images.
        score_thresh: the least score.
        batch_size: images that are read at a time; the detector looks at each alone.
        workers: processes that read images.
        device: where the detector is.
    """
    loader = DataLoader(_Files(paths), batch_size=batch_size, num_workers=workers, collate_fn=list)
    for batch in loader:
        images = [image.to(device) for image, _, _ in batch if image is not None]
        with torch.inference_mode():
            found = iter(network.detect(images))
        for image, path, error in batch:
            if image is None:
                yield Detections(image=printable(path), path=path, error=error)
            else:
                yield _named(path, image, next(found), score_thresh, class_names)


def _named(path: str, image: Tensor, found: dict[str, Any], score_thresh: float, class_names: list[str]) -> Detections:
    kept = (found["scores"] >= score_thresh).nonzero()[:, 0]
    return Detections(
        image=printable(path),
        path=path,
        width=image.shape[-1],
        height=image.shape[-2],
        classes=tuple(class_names[label] for label in found["labels"][kept].tolist()),
        scores=tuple(found["scores"][kept].tolist()),
        boxes=tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in found["boxes"][kept].tolist()),
        masks=encode_masks(found["masks"], kept) if "masks" in found else None,
        class_names=tuple(class_names),
    )


def draw_detections(folder: str | Path, rows: Iterable[Detections]) -> Iterator[Detections]:
    """Draw each image with what was found into a PNG file of its name, and pass the rows on.

    One whose image has gone in the meantime has an error.

    Args:
        folder: made when it is not there.
        rows: to draw.
    """
    taken: set[str] = set()
    for row in rows:
        if not row.error:
            stem, number = Path(row.path).stem, 1
            while (name := stem if number == 1 else f"{stem}-{number}") in taken:
                number += 1
            taken.add(name)
            try:
                picture = draw(row)
            except ImageError as error:
                yield replace(row, error=f"not drawn: {error}")
                continue
            with atomic_file(Path(folder) / f"{name}.png") as temporary:
                picture.save(temporary, "PNG")
        yield row


def draw(row: Detections) -> Image.Image:
    """The image of a row, with boxes, masks, names and scores; a small one is enlarged."""
    objects: dict[str, Any] = {
        "boxes": torch.tensor(row.boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(row.scores),
        "labels": torch.tensor([row.class_names.index(name) for name in row.classes], dtype=torch.int64),
    }
    if row.masks:
        objects["masks"] = (torch.from_numpy(read_rle(mask, row.height, row.width)) for mask in row.masks)
    picture = drawn(_as_tensor(row.path), objects, row.class_names)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def write_detections(path: str | Path, rows: Iterable[Detections]) -> Iterator[Detections]:
    """Write detections as they come, whole or not at all, and pass them on.

    CSV and Parquet have a row a detection: ``image, error, class, score, x0, y0, x1, y1, mask_size, mask_counts``; an
    image that could not be read has one row with its error, one without objects has none. JSON is a list of
    ``{image, width, height, error, detections: [{class, score, box, mask}]}``. Masks are COCO's compressed run-length
    encodings, ``mask_size`` is ``HEIGHTxWIDTH``.

    Args:
        path: ends in .csv, .json or .parquet.
        rows: to write.

    Raises:
        ValueError: for another suffix, or when the library for Parquet is missing.
    """
    return write_table(path, rows, Table(columns=_COLUMNS, rows=_table_rows, entry=_entry))


_COLUMNS: dict[str, type[str] | type[float]] = {
    **dict.fromkeys(("image", "error", "class"), str),
    **dict.fromkeys(("score", "x0", "y0", "x1", "y1"), float),
    **dict.fromkeys(("mask_size", "mask_counts"), str),
}


def _table_rows(row: Detections) -> list[dict[str, Any]]:
    if row.error:
        return [{**dict.fromkeys(_COLUMNS), "image": row.image, "error": row.error}]
    masks = row.masks if row.masks is not None else (None,) * len(row.boxes)
    return [
        {
            "image": row.image,
            "error": None,
            "class": name,
            "score": score,
            **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)),
            "mask_size": f"{mask['size'][0]}x{mask['size'][1]}" if mask else None,
            "mask_counts": mask["counts"] if mask else None,
        }
        for name, score, box, mask in zip(row.classes, row.scores, row.boxes, masks, strict=True)
    ]


def _entry(row: Detections) -> dict[str, Any]:
    masks = row.masks if row.masks is not None else (None,) * len(row.boxes)
    found = [
        {"class": name, "score": score, "box": list(box), **({"mask": mask} if mask else {})}
        for name, score, box, mask in zip(row.classes, row.scores, row.boxes, masks, strict=True)
    ]
    return {
        "image": row.image,
        "width": row.width,
        "height": row.height,
        "error": row.error or None,
        "detections": found,
    }
