"""Explanations of images and of data sets: numbers, and the pictures made of them."""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsanet._optional import require
from epsanet.data.config import DataConfig
from epsanet.data.images import ImageError, printable, read_image
from epsanet.data.loaders import asked_for, evaluation_loader, evaluation_transform
from epsanet.data.sources import open_split
from epsanet.insight.figures import save_explanation, save_preferences, write_preferences
from epsanet.insight.saliency import cam_layer, check_layer, grad_cam
from epsanet.insight.scales import ModuleScales, ScalePreference, record_scales, scale_preferences
from epsanet.network.bundle import RuntimeNetwork
from epsanet.network.weights import LoadedModel, load_model

__all__ = ["Explanation", "explain", "explain_data", "save_explanations"]

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a network makes of one image."""

    image: str
    """Its path."""
    classes: tuple[str, ...] = ()
    """Top classes, the most probable first."""
    probabilities: tuple[float, ...] = ()
    """Of these classes."""
    picture: np.ndarray | None = None
    """What the network saw, shape ``H, W, 3``, from 0 to 1."""
    cam: np.ndarray | None = None
    """Grad-CAM for the first class, shape ``H, W``, from 0 to 1."""
    layer: str = ""
    """That Grad-CAM looked at."""
    scales: tuple[ModuleScales, ...] = ()
    """What each PSA module did, with N = 1; none for a network without."""
    error: str = ""
    """Why the image could not be read."""


def _opened(model: str | Path | LoadedModel) -> LoadedModel:
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if isinstance(loaded.model, RuntimeNetwork):
        raise ValueError("an exported bundle hides its layers; give the model folder that it was made from")
    return replace(loaded, model=copy.deepcopy(loaded.model).cpu().eval())  # the caller's stays where it is


def explain(
    model: str | Path | LoadedModel, images: Sequence[str | Path], *, topk: int = 5, layer: str | None = None
) -> Iterator[Explanation]:
    """Explain images one after the other; an unreadable one gives an explanation with an error.

    Args:
        model: whatever ``load_model`` takes but bundles, or a loaded model.
        images: paths of files.
        topk: classes to give.
        layer: for Grad-CAM; ``cam_layer`` chooses when left out.

    Raises:
        ValueError: for a model or layer that is not there or has no map, no classes to give, or without captum.
    """
    require("captum", "insight")
    if topk < 1:
        raise ValueError(f"topk={topk} must be 1 or more")
    loaded = _opened(model)
    size = tuple(loaded.data_config["input_size"][1:])
    chosen = layer or cam_layer(loaded.model, size)
    check_layer(loaded.model, chosen)
    return _explanations(loaded, [str(path) for path in images], min(topk, len(loaded.class_names)), chosen)


def _explanations(loaded: LoadedModel, paths: list[str], topk: int, layer: str) -> Iterator[Explanation]:
    transform = evaluation_transform(loaded.data_config)
    mean, std = (np.array(loaded.data_config[key]) for key in ("mean", "std"))
    for path in paths:
        try:
            x: Tensor = transform(read_image(Path(path)))[None]
        except ImageError as error:
            yield Explanation(image=printable(path), error=str(error))
            continue
        try:
            scales = record_scales(loaded.model, x)
        except ValueError:
            scales = []
        with torch.inference_mode():
            best = loaded.model(x).float().softmax(1)[0].topk(topk)
        yield Explanation(
            image=printable(path),
            classes=tuple(loaded.class_names[index] for index in best.indices.tolist()),
            probabilities=tuple(best.values.tolist()),
            picture=np.clip(x[0].numpy().transpose(1, 2, 0) * std + mean, 0, 1),
            cam=grad_cam(loaded.model, x, best.indices[:1].clone(), layer)[0],
            layer=layer,
            scales=tuple(scales),
        )


def save_explanations(folder: str | Path, explanations: Iterable[Explanation]) -> Iterator[tuple[Explanation, Path]]:
    """Draw explanations as they come, a PNG each, named after the image; names that repeat get a number.

    Names that differ in their case only repeat too, as they do on many file systems. ``scales`` is taken:
    ``explain_data`` writes that picture.

    Args:
        folder: made when it is not there.
        explanations: without errors; those with one are passed on with the folder as path.
    """
    folder = Path(folder)
    used = {"scales"}
    for found in explanations:
        if found.picture is None or found.cam is None:
            yield found, folder
            continue
        stem = name = re.sub(r"[^\w.-]", "_", Path(found.image).stem) or "image"
        number = 1
        while (key := unicodedata.normalize("NFC", name).casefold()) in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(key)
        path = folder / f"{name}.png"
        save_explanation(
            path, found.picture, found.cam, found.classes, found.probabilities, found.scales, 0, found.layer
        )
        yield found, path


def explain_data(
    model: str | Path | LoadedModel,
    data: DataConfig,
    folder: str | Path,
    *,
    split: str | None = None,
    progress: Progress = lambda items, total, title: items,  # noqa: ARG005
) -> list[ScalePreference]:
    """Which scales the modules prefer over a data set, by its classes: ``scales.csv`` and ``scales.png``.

    Args:
        model: whatever ``load_model`` takes but bundles, or a loaded model.
        data: the data set; its classes need not be the model's. Preprocessing is the model's own unless
            ``input_size``, ``crop_pct``, ``interpolation``, ``mean`` or ``std`` say otherwise.
        folder: to write to.
        split: test where there is one, else val, when left out.
        progress: shows how far this is.

    Raises:
        ValueError: for a model or data set that is not there, or a network without PSA modules.
    """
    loaded = _opened(model)
    samples, _, _ = open_split(data, split, None)
    loader = evaluation_loader(samples, data, asked_for(loaded.data_config, data))
    batches = ((images, labels) for images, labels, _ in progress(loader, len(loader), "looking at images"))
    preferences = scale_preferences(loaded.model, batches, samples.class_names)
    folder = Path(folder)
    write_preferences(folder / "scales.csv", preferences)
    save_preferences(folder / "scales.png", preferences, f"{loaded.architecture} on {data.source}")
    return preferences
