"""The networks behind the page, one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from epsanet.data.images import ImageError, image_size, read_image
from epsanet.data.loaders import evaluation_transform
from epsanet.insight.explain import Explanation, explain
from epsanet.network.bundle import RuntimeNetwork
from epsanet.network.detectors import load_detector
from epsanet.network.model_folder import is_detector
from epsanet.network.weights import load_model
from epsanet.tasks.detection.inference import inference_detector
from epsanet.tasks.detection.predict import Detections, detect_with, draw
from epsanet.tasks.inference import inference_network
from epsanet.tasks.scores import probabilities

__all__ = ["ServedClassifier", "ServedDetector", "ServedModel", "open_models"]

_CPU = torch.device("cpu")
_LEAST_SCORE = 0.05
_KEPT = 32
"""Pictures whose objects are remembered, so that the slider answers at once."""
_LONGER_SIDE = 2048
"""Pixels, at most, of what a detector is given: a hundred masks are made at the size of the picture."""
_TURN = threading.Lock()
"""Recording hooks and the threads of torch both want one picture at a time."""


class ServedClassifier:
    """A classifier, and what it looks at.

    Args:
        name: that visitors see.
        source: whatever ``load_model`` takes.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name, self._loaded = name, load_model(source)
        self.class_names = self._loaded.class_names
        self.explains = not isinstance(self._loaded.model, RuntimeNetwork)
        """Whether Grad-CAM and scales can be had; an exported bundle hides its layers."""
        size = self._loaded.data_config["input_size"]
        self._transform = evaluation_transform(self._loaded.data_config)
        self._network = inference_network(self._loaded.model.eval(), size, _CPU)
        self.description = f"{self._loaded.architecture}: {len(self.class_names)} classes, {size[2]}×{size[1]} pixels"

    def classify(self, path: Path) -> list[tuple[str, float]]:
        """Names and probabilities of all classes, the most probable first."""
        x = self._transform(read_image(path))[None]
        with _TURN, torch.inference_mode():
            best = probabilities(self._network(x)).sort(descending=True)
        names = [self.class_names[index] for index in best.indices[0].tolist()]
        return list(zip(names, best.values[0].tolist(), strict=True))

    def explain(self, path: Path) -> Explanation | None:
        """Grad-CAM and scales; none for a network without layers to look at."""
        if not self.explains:
            return None
        with _TURN:
            try:
                (found,) = explain(self._loaded, [path], topk=1)
            except ValueError:  # timm does not know the stages of every network
                self.explains = False
                return None
        if found.error:
            raise ImageError(found.error)
        return found


class ServedDetector:
    """A detector.

    Args:
        name: that visitors see.
        source: a model or run folder.
    """

    def __init__(self, name: str, source: str) -> None:
        loaded = load_detector(source)
        self.name, self.class_names = name, loaded.class_names
        self._network = inference_detector(loaded.model, _CPU)
        self.description = f"{loaded.model.config.architecture} on {loaded.model.backbone_name}"
        self.description += f": {len(self.class_names)} classes"
        self._detect = lru_cache(_KEPT)(self._detected)

    def detect(self, path: Path, score: float) -> Detections:
        """What is found with this score or more; of a large picture, in the pixels of the reduced one."""
        with _TURN:
            return self._detect(path).at_least(score)

    def draw(self, found: Detections) -> Image.Image:
        """What was found, in the picture as the detector had it."""
        with _reduced(Path(found.path)) as path:
            return draw(replace(found, path=str(path)))

    def _detected(self, picture: Path) -> Detections:
        with _reduced(picture) as path:
            (found,) = detect_with(self._network, self.class_names, [str(path)], _LEAST_SCORE, 1, 0, _CPU)
        if found.error:
            raise ImageError(found.error)
        return replace(found, image=str(picture), path=str(picture))


@contextmanager
def _reduced(path: Path) -> Iterator[Path]:
    """A picture of bounded size: the file itself, or a smaller one that is gone after the block."""
    if max(image_size(path)) <= _LONGER_SIDE:
        yield path
        return
    image = read_image(path)
    image.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    with TemporaryDirectory() as folder:
        smaller = Path(folder, "picture.png")
        image.save(smaller, compress_level=1)
        yield smaller


ServedModel = ServedClassifier | ServedDetector


def open_models(sources: Sequence[str]) -> dict[str, ServedModel]:
    """Models by the name that visitors see: the folder's, without where it is; numbered where two are alike.

    Args:
        sources: whatever ``load_model`` and ``load_detector`` take.

    Raises:
        ValueError: for one that is not there or is damaged.
    """
    models: dict[str, ServedModel] = {}
    for source in sources:
        path = Path(source)
        stem = name = (
            (path.resolve().parent if path.name == "model" else path.resolve()).name if path.exists() else source
        )
        number = 1
        while name in models:
            number += 1
            name = f"{stem}-{number}"
        models[name] = ServedDetector(name, source) if is_detector(source) else ServedClassifier(name, source)
    return models
