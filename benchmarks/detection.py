"""The same detector on four backbones: images per second in training and inference, and the backbone's share.

EPSANet-50 Small and Large, ResNet-50 and SE-ResNet-50 under Faster R-CNN (or another) as the 1x schedule has it, with
random weights, one batch of noise images with eight objects each. The backbones take turns, a round each, and the
median counts. ``optimised`` is inference with the backbone that ``epsanet predict`` and ``evaluate`` use on CPUs. The
share is the time of the backbone alone on the same batch, without the pyramid: forward in inference, forward and
backward in training, where stem and first stage are frozen.

With one thread, times are those of the processor, so that other work on the machine does not count.

Usage: python benchmarks/detection.py [--architecture A] [--size PIXELS] [--batch N] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from epsanet.network.detector_config import Architecture, DetectorConfig
from epsanet.network.detectors import Detector, create_detector
from epsanet.tasks.detection.inference import inference_detector
from epsanet.tasks.devices import processor_name

BACKBONES = ("epsanet50_small", "epsanet50_large", "resnet50", "seresnet50")
CLASSES, OBJECTS = 80, 8

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def make_batch(count: int, size: int, *, masks: bool) -> Batch:
    """Noise of shape ``3, size, size`` with boxes anywhere."""
    random = torch.Generator().manual_seed(0)
    images = list(torch.rand(count, 3, size, size, generator=random))
    targets = []
    for _ in range(count):
        corners = torch.rand(OBJECTS, 2, generator=random) * size / 2
        sides = (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=random)) * size
        boxes = torch.cat([corners, corners + sides], dim=1)
        target = {"boxes": boxes, "labels": torch.randint(0, CLASSES, (OBJECTS,), generator=random)}
        if masks:
            target["masks"] = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
        targets.append(target)
    return images, targets


def steps(model: Detector, batch: Batch) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    images, targets = batch
    pixels = torch.stack(images).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 1e-4, momentum=0.9)
    fast = inference_detector(model, torch.device("cpu"))

    def train() -> None:
        optimizer.zero_grad()
        sum(model.train()(images, targets).values()).backward()
        optimizer.step()

    def train_backbone() -> None:
        body: Any = model.train().network.backbone.body
        torch.autograd.backward([feature.mean() for feature in body(pixels) if feature.requires_grad])

    @torch.inference_mode()
    def infer() -> Any:
        return model.eval()(images)

    @torch.inference_mode()
    def infer_backbone() -> Any:
        return model.eval().network.backbone.body(pixels)

    @torch.inference_mode()
    def infer_optimised() -> Any:
        return fast(images)

    functions = (train, train_backbone, infer, infer_backbone, infer_optimised)
    return {function.__name__: function for function in functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=get_args(Architecture), default="faster_rcnn")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    config = DetectorConfig(architecture=arguments.architecture, min_size=arguments.size, max_size=arguments.size)
    batch = make_batch(arguments.batch, arguments.size, masks=config.has_masks)
    timed: dict[str, dict[str, Callable[[], object]]] = {}
    for name in BACKBONES:
        torch.manual_seed(0)
        timed[name] = steps(create_detector(name, CLASSES, config).to(memory_format=torch.channels_last), batch)
    seconds: dict[str, dict[str, list[float]]] = {name: {step: [] for step in timed[name]} for name in BACKBONES}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name in BACKBONES:
            for step, function in timed[name].items():
                start = clock()
                function()
                if turn:
                    seconds[name][step].append(clock() - start)
    print(
        f"{datetime.date.today()} · {processor_name()} · {arguments.threads} threads · torch {torch.__version__}\n"
        f"{arguments.architecture}, {arguments.batch} images of {arguments.size}×{arguments.size}, "
        f"median of {arguments.rounds} rounds\n"
    )
    print("| backbone | training [images/s] | backbone's share | inference [images/s] | backbone's share | optimised |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in BACKBONES:
        middle = {step: statistics.median(values) for step, values in seconds[name].items()}
        rate = {step: arguments.batch / value for step, value in middle.items()}
        print(
            f"| `{name}` | {rate['train']:.2f} | {middle['train_backbone'] / middle['train']:.0%} "
            f"| {rate['infer']:.2f} | {middle['infer_backbone'] / middle['infer']:.0%} "
            f"| {rate['infer_optimised']:.2f} |"
        )


if __name__ == "__main__":
    main()
