"""Evaluation of a detector on any data set, each image once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from epsanet._processes import agree, first, rank
from epsanet.data.coco import open_coco_split
from epsanet.data.config import DataConfig
from epsanet.data.detection import DetectionSamples, detection_evaluation_loader
from epsanet.data.digits_scenes import DIGITS_DETECTION, open_digits_scenes
from epsanet.data.sources import require
from epsanet.network.detectors import LoadedDetector, load_detector
from epsanet.tasks.console import messages
from epsanet.tasks.detection.inference import inference_detector
from epsanet.tasks.detection.module import DetectorModule
from epsanet.tasks.detection.results import write_coco_results
from epsanet.tasks.detection.run import say_problems, tracked
from epsanet.tasks.detection.scores import DetectionEvaluation
from epsanet.tasks.devices import resolve_device
from epsanet.tasks.evaluate import evaluate_module
from epsanet.tasks.launch import launch
from epsanet.tasks.tables import check_output

__all__ = ["evaluate_detector"]


def evaluate_detector(
    model: str | Path | LoadedDetector,
    data: DataConfig,
    *,
    split: str | None = None,
    device: str = "auto",
    precision: str = "32-true",
    output: str | Path | None = None,
    note: Callable[[str], None] = messages.print,
) -> DetectionEvaluation:
    """COCO's averages of a detector on a split, each usable image counted once; processes of torchrun share them.

    Args:
        model: a model or run folder, or a loaded detector.
        data: the data set; its classes are matched to the detector's by name. Its ``batch_size`` is not used.
        split: train, val or test; test where there is one, else val, when left out.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: Lightning's name of the arithmetic.
        output: write what was found as COCO results, with the ids of the data set: boxes here, masks beside it as
            ``x.segm.json``.
        note: told what the user should know.

    Raises:
        ValueError: for a model, data set or device that is not there, or classes that do not fit.
    """
    if output is not None:
        if Path(output).suffix != ".json":
            raise ValueError(f"COCO results are JSON; {output} does not end in .json")
        check_output(output)
    processes = launch(resolve_device(device))
    require("faster_coco_eval", "detection")
    loaded = agree(lambda: model if isinstance(model, LoadedDetector) else load_detector(model))
    wanted = loaded.model.config.has_masks
    samples, masks = first(lambda: _open(data, split, loaded.class_names, masks=wanted))
    if wanted and not masks:
        note(f"{data.source} has no masks; boxes alone are compared")
    # A detector looks at one image at a time, and photographs are loaded at their full size.
    loader = detection_evaluation_loader(samples, dataclasses.replace(data, batch_size=1), masks=masks)
    network = agree(lambda: inference_detector(loaded.model, processes.device, precision, note))
    module = DetectorModule(network, loaded.class_names, masks=masks)
    evaluation: DetectionEvaluation = evaluate_module(module, loader, processes, precision)
    if output is not None and rank() == 0:
        files = write_coco_results(output, evaluation, samples)
        note(f"COCO results in {' and '.join(map(str, files))}")
    return evaluation


def _open(data: DataConfig, split: str | None, class_names: list[str], *, masks: bool) -> tuple[DetectionSamples, bool]:
    """The split, and whether masks are compared: where the detector has them and the data set too."""
    if data.source != DIGITS_DETECTION:
        samples, report, masks = open_coco_split(data, split, class_names, masks=masks, progress=tracked)
        say_problems(report)
        return samples, masks
    splits = open_digits_scenes(data)
    found: DetectionSamples | None = (
        getattr(splits, split or "test", None) if split in (None, "train", "val", "test") else None
    )
    if found is None:
        raise ValueError(f"{data.source} has no split {split!r} but train, val, test; choose one with --split")
    if splits.class_names != class_names:
        raise ValueError(f"the detector knows {', '.join(class_names[:5])}, not the classes of {data.source}")
    return found, masks
