"""One run of a study in a process of its own: ``python -m epsanet.study.worker CONFIG RESULT``.

The run is trained by the task's own ``train``, in a normal run folder, and goes on where it stopped. Its weights after
the last epoch (no epoch is chosen) are then evaluated and timed, and the result is written as JSON, whole or not.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from epsanet._files import atomic_file
from epsanet.data.check import check_images
from epsanet.data.loaders import evaluation_loader
from epsanet.data.sources import open_data
from epsanet.data.streams import Stream
from epsanet.insight.scales import record_scales
from epsanet.network.psa import PSA
from epsanet.network.weights import LoadedModel, load_model
from epsanet.study.cost import count
from epsanet.tasks.checkpoints import LAST, read
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.devices import keep_freed_memory, processor_name, resolve_device
from epsanet.tasks.inference import inference_network
from epsanet.tasks.train import TrainingInterrupted, train

__all__ = ["OBJECT_SCALES", "measure", "rescaled", "run_one"]

OBJECT_SCALES = (0.5, 1.0, 1.5)
"""Sizes at which the objects of the evaluated images are shown."""
_TIMED_BATCH, _TIMINGS = 64, 7
_RECORDED_IMAGES = 512
_RECORDED_AT_ONCE = 32


def rescaled(x_NCHW: Tensor, scale: float) -> Tensor:
    """Normalised images with their objects at another size, and the size of the images kept.

    Below 1 the image is made smaller and set into the middle of its mean colour (zero, once normalised); above 1 its
    middle is cut out and enlarged. Both are bilinear, with antialiasing.

    Args:
        x_NCHW: images, shape ``N, C, H, W``.
        scale: of the objects.
    """
    height, width = x_NCHW.shape[-2:]
    if scale == 1:
        return x_NCHW
    size = (round(height * min(scale, 1 / scale)), round(width * min(scale, 1 / scale)))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    if scale > 1:
        middle = x_NCHW[..., top : top + size[0], left : left + size[1]]
        return F.interpolate(middle, (height, width), mode="bilinear", antialias=True)
    small = F.interpolate(x_NCHW, size, mode="bilinear", antialias=True)
    return F.pad(small, (left, width - size[1] - left, top, height - size[0] - top))


def run_one(config: TrainConfig, result: Path, about: dict[str, Any]) -> None:
    """Train, measure, write the result.

    Args:
        config: of the run; its ``output`` is the run folder.
        result: where the JSON goes.
        about: what the table says of the run besides.
    """
    assert config.output is not None
    folder = Path(config.output)
    if not (folder / "model" / "model.safetensors").is_file():
        train(config, resume="auto")
    measured = measure_detector(config, folder) if config.detector is not None else measure(config, folder)
    found = {**about, **measured, "processor": processor_name(), "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    with atomic_file(result) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Accuracy after the last epoch at each object scale, cost, time, and what the PSA modules listen to.

    Images are those of the test split where the data set has one, else of the validation split.

    Args:
        config: of the run.
        folder: the finished run.
    """
    splits = open_data(config.data)
    title = "val" if splits.test is None else "test"
    samples: Any = getattr(splits, title)
    if not isinstance(samples, Stream):
        samples, _ = check_images(samples, title, on_bad_image=config.data.on_bad_image, depth=config.data.check)
    loaded = load_model(folder / "model")
    _take_last(loaded.model, folder, "model.")
    network = loaded.model.eval().to(memory_format=torch.channels_last)
    loader = evaluation_loader(samples, config.data, loaded.data_config)
    device = resolve_device(config.device)
    found = {"split": title, **_accuracies(network.to(device), loader, device), **_history(folder)}
    network.cpu()
    parameters, macs = count(
        config.model, loaded.data_config["input_size"][-1], num_classes=len(splits.class_names), **config.model_args
    )
    found |= {"parameters": parameters, "gmacs": macs / 1e9, "train_images": len(splits.train)}
    return found | {"milliseconds": _milliseconds(loaded), **_listening(network, loader)}


def measure_detector(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """COCO's box AP after the last epoch on the validation images, in percent, in the column of the score."""
    from epsanet.network.detectors import load_detector
    from epsanet.tasks.detection.evaluate import evaluate_detector

    loaded = load_detector(folder / "model")
    _take_last(loaded.model, folder, "model.")
    found = evaluate_detector(loaded, config.data, split="val", device=config.device)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {"split": "val", "score": 100 * found.box.ap, "images": found.images, "parameters": parameters}


def _take_last(model: nn.Module, folder: Path, prefix: str) -> None:
    """Weights after the last epoch in the place of the best."""
    saved = read(folder / "checkpoints" / LAST)["state_dict"]
    model.load_state_dict({name: saved[prefix + name] for name in model.state_dict()})


def _history(folder: Path) -> dict[str, Any]:
    import csv

    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "epochs": len(rows),
        "best_val_top1": max(float(row["val_top1"]) for row in rows),
        "last_train_loss": float(rows[-1]["train_loss"]),
        "train_seconds": float(rows[-1]["seconds"]),
    }


def _accuracies(network: nn.Module, loader: Any, device: torch.device) -> dict[str, Any]:
    """Percent of the images at each object scale, and how many there are."""
    right, images = dict.fromkeys(OBJECT_SCALES, 0), 0
    with torch.inference_mode():
        for batch, labels, _ in loader:
            images += len(labels)
            for scale in OBJECT_SCALES:
                x = rescaled(batch, scale).contiguous(memory_format=torch.channels_last)
                right[scale] += int((network(x.to(device)).argmax(1).cpu() == labels).sum())
    scores: dict[str, Any] = {f"top1_at_{scale:g}": 100 * right[scale] / images for scale in OBJECT_SCALES}
    return {"score": scores["top1_at_1"], "images": images, **scores}


def _milliseconds(loaded: LoadedModel) -> float:
    """Median time of an image in a batch, in the fastest network that evaluation has on a CPU."""
    size = loaded.data_config["input_size"]
    network = inference_network(loaded.model, size, torch.device("cpu"))
    x = torch.randn(_TIMED_BATCH, *size).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(2 + _TIMINGS):
            start = time.perf_counter()
            network(x)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:]) / _TIMED_BATCH


def _listening(network: nn.Module, loader: Any) -> dict[str, Any]:
    """How far the shares of the scales differ from image to image (mean standard deviation, percent), by both measures.

    Attention that says which scale matters varies with the image; within channels it cannot, its mean is 1/D.
    """
    if not any(isinstance(module, PSA) for module in network.modules()):
        return {}
    shares: dict[tuple[str, str], list[np.ndarray]] = {}
    left = _RECORDED_IMAGES
    for batch, _, _ in loader:
        for images in batch[:left].split(_RECORDED_AT_ONCE):
            for module in record_scales(network, images):
                for measure in ("attention", "contribution"):
                    shares.setdefault((measure, module.name), []).append(getattr(module, f"{measure}_NS"))
        left -= len(batch)
        if left <= 0:
            break
    return {
        f"{measure}_spread": 100
        * statistics.mean(
            float(np.concatenate(found).std(0).mean()) for (kind, _), found in shares.items() if kind == measure
        )
        for measure in ("attention", "contribution")
    }


def _end_with_parent() -> None:
    """Stop, saved, when the process that started this one is gone: its end of the pipe is then closed."""
    os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Of a child process of a study; CONFIG is a YAML file with ``train`` and ``about``."""
    keep_freed_memory()
    path, result = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A run whose study was killed may still be saving.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            run_one(load_recipe(values["train"]), result, values["about"])
        except TrainingInterrupted as stop:
            print(stop)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
