"""What an EPSANet gains from a pretrained ResNet: epochs to a given accuracy, on classes that the ResNet has not seen.

A dense ResNet with the widths of ``epsanet14_tiny`` learns the first five classes of CIFAR-10 (half of its images).
EPSANets then learn the other five from 1,000 images, tested on 1,000 others after every epoch, from three starts:

    random         the network's own initialisation
    equal layers   the ResNet's 1×1 convolutions, norms and stem; PSA modules random
    inherited      the same, and PSA modules from its 3×3 filters: what ``init_from`` does

Everything else is the same: order, crops, schedule. What is finished is kept in OUTPUT and not done again.

Usage: python benchmarks/inherit.py DATA [--output FOLDER] [--seeds N]
    DATA  CIFAR-10's training split, as ``epsanet train --data`` takes it
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.resnet import Bottleneck
from torch import Tensor
from torch.nn import functional as F

from epsanet._files import atomic_file
from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.sources import open_data
from epsanet.network.epsanet import EPSANet
from epsanet.network.inherit import start_from
from epsanet.network.psa import PSA
from epsanet.network.weights import LoadedModel
from epsanet.tasks.devices import processor_name

NETWORK = "epsanet14_tiny"
STARTS = ("random", "equal layers", "inherited")
GOALS = (50, 60, 65, 70)
PRETRAINING_EPOCHS, EPOCHS = 4, 10
TRAIN_IMAGES, TEST_IMAGES = 1000, 1000
BATCH, RATE, WEIGHT_DECAY, PADDING = 32, 0.05, 5e-4, 4
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])

Images = tuple[Tensor, Tensor]


def read(data: str) -> tuple[Images, Images, Images]:
    """To pretrain on, to learn from, to test on; images normalised, shape ``N, 3, 32, 32``."""
    samples: Any = open_data(DataConfig(source=data)).train
    labels = torch.as_tensor(samples.labels)

    def take(positions: list[int], first: int) -> Images:
        pixels = np.stack([np.asarray(read_image(samples.open(place))) for place in positions])
        images = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
        return images.movedim(3, 1).contiguous(memory_format=torch.channels_last), labels[positions] - first

    others = torch.where(labels >= 5)[0].tolist()
    return (
        take(torch.where(labels < 5)[0].tolist(), 0),
        take(others[:TRAIN_IMAGES], 5),
        take(others[TRAIN_IMAGES : TRAIN_IMAGES + TEST_IMAGES], 5),
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of the image with a reflected border, flipped or not; each image its own."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, [PADDING] * 4, mode="reflect")
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    crop = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crop.movedim(3, 1).contiguous(memory_format=torch.channels_last)


def learn(model: Any, train: Images, test: Images | None, epochs: int, seed: int) -> list[float]:
    """SGD with Nesterov momentum and a cosine; the accuracy after each epoch, percent."""
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(train[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(train[0]), generator=generator)
        for chosen in order.split(BATCH)[: len(order) // BATCH]:
            loss = F.cross_entropy(model(augment(train[0][chosen], generator)), train[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if test is not None:
            accuracies.append(accuracy(model, test))
        print(f"  epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  {accuracies[-1:] or ''}", flush=True)
    return accuracies


@torch.no_grad()
def accuracy(model: Any, test: Images) -> float:
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(*(part.split(250) for part in test), strict=True)
    )
    return 100 * right / len(test[1])


def pretrained(images: Images, output: Path) -> LoadedModel:
    """The dense ResNet: the same trunk over timm's own bottleneck."""
    variant = timm.create_model(NETWORK)
    torch.manual_seed(0)
    widths = tuple(
        stage[0].conv2.spc.branches[0].in_channels
        for stage in (variant.layer1, variant.layer2, variant.layer3, variant.layer4)
    )
    blocks = [len(stage) for stage in (variant.layer1, variant.layer2, variant.layer3, variant.layer4)]
    model: Any = EPSANet(Bottleneck, blocks, small_images=True, channels=widths, num_classes=5)  # type: ignore[arg-type]
    model.pretrained_cfg = {"architecture": "the dense ResNet"}
    path = output / "resnet.pt"
    if not path.is_file():
        print("pretraining the dense ResNet")
        start = time.process_time()
        learn(model, images, None, PRETRAINING_EPOCHS, seed=0)
        seconds = time.process_time() - start
        print(f"  {seconds:.0f} s of processor time, {accuracy(model, images):.1f} % of the images it learned from")
        with atomic_file(path) as temporary:
            torch.save(model.state_dict(), temporary)
    model.load_state_dict(torch.load(path, weights_only=True))
    return LoadedModel(model=model.eval(), class_names=[f"first {index}" for index in range(5)])


def started(start: str, seed: int, source: LoadedModel) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(NETWORK, num_classes=5)
    if start == "random":
        return model
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from(model, [f"other {index}" for index in range(5)], source)
    if start == "equal layers":
        for name, module in model.named_modules():
            if isinstance(module, PSA):
                module.load_state_dict({key: own[f"{name}.{key}"] for key in module.state_dict()})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--output", type=Path, default=Path("runs/inherit"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    first, train, test = read(arguments.data)
    source = pretrained(first, arguments.output)
    curves: dict[str, list[list[float]]] = {start: [] for start in STARTS}
    for seed in range(1, arguments.seeds + 1):
        for start in STARTS:
            path = arguments.output / f"{start.replace(' ', '-')}-{seed}.json"
            if not path.is_file():
                print(f"{start}, seed {seed}", flush=True)
                began = time.process_time()
                accuracies = learn(started(start, seed, source), train, test, EPOCHS, seed)
                with atomic_file(path) as temporary:
                    temporary.write_text(json.dumps({"top1": accuracies, "seconds": time.process_time() - began}))
            curves[start].append(json.loads(path.read_text())["top1"])
    print(
        f"\n{datetime.date.today()} · {processor_name()} · {torch.get_num_threads()} threads · "
        f"torch {torch.__version__}\n"
        f"{NETWORK}, {TRAIN_IMAGES:,} images of 5 classes, {EPOCHS} epochs, {arguments.seeds} seeds\n"
    )
    print(f"| start | {' | '.join(f'epochs to {goal} %' for goal in GOALS)} | top-1 after 1 epoch | after the last |")
    print(f"|---|{'---:|' * (len(GOALS) + 2)}")
    for start, runs in curves.items():
        cells = [", ".join(reached(run, goal) for run in runs) for goal in GOALS]
        ends = [
            f"{statistics.mean(run[place] for run in runs):.1f} ({', '.join(f'{run[place]:.1f}' for run in runs)})"
            for place in (0, -1)
        ]
        print(f"| {start} | {' | '.join([*cells, *ends])} |")


def reached(accuracies: list[float], goal: float) -> str:
    """The first epoch of at least so much, or a dash."""
    return next((str(epoch) for epoch, value in enumerate(accuracies, 1) if value >= goal), "–")


if __name__ == "__main__":
    main()
