"""How long a study takes here, and how small a difference it can tell: to choose its budget before its results.

Each network of the study is trained for some steps of one thread on random images; the rest is arithmetic. The standard
deviation over seeds comes from a few runs of the reference alone, which say nothing about who is better:

    epsanet study compare cifar10-compare --networks '[epsanet]' --seeds 3 --data PATH --output pilot
    epsanet study report pilot

Usage: python benchmarks/study_pilot.py STUDY [--deviation POINTS] [flags of epsanet study, such as --data PATH]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from scipy.special import stdtrit
from torch import nn

from epsanet.data.sources import open_data
from epsanet.network.weights import create_model
from epsanet.study.config import CompareConfig, StudyConfig, split_values, study_parser, study_recipe_path
from epsanet.study.cost import count
from epsanet.study.plan import plan
from epsanet.study.rows import Row
from epsanet.tasks.devices import processor_name

WARM_UP, OVERHEAD = 2, 1.15
"""An assumption: reading, augmentation and validation take 15 % more than the steps."""


def seconds_per_image(row: Row, classes: int, size: int, batch: int, steps: int) -> float:
    """Median over steps of forward, backward and update; processor time, which other processes do not lengthen much."""
    model = create_model(row.model, num_classes=classes, **row.model_args).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch) % classes
    times = []
    for _ in range(WARM_UP + steps):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return statistics.median(times[WARM_UP:]) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a shipped study, or a YAML file")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each network")
    parser.add_argument("--deviation", type=float, help="of a run over seeds, in points")
    own, flags = parser.parse_known_args()
    kind = CompareConfig if "compare" in own.study else StudyConfig
    flags = ["--data.source" + flag[6:] if flag.split("=")[0] == "--data" else flag for flag in flags]
    read = study_parser(kind)
    values = read.instantiate(read.parse_args([f"--config={study_recipe_path(own.study)}", *flags]))
    study, train = split_values(vars(values), kind)
    torch.set_num_threads(1)
    splits = open_data(train.data)
    images, classes = len(splits.train), len(splits.class_names)
    size = train.data.input_size or 32
    print(
        f"{processor_name()}, 1 thread; {images:,} images a epoch, {train.schedule.epochs} epochs, {study.seeds} seeds"
    )
    print(f"{'row':32} {'parameters':>10} {'MMACs':>7} {'images/s':>9} {'run [min]':>10}")
    total = 0.0
    for row in plan(study, train):
        parameters, macs = count(row.model, size, num_classes=classes, **row.model_args)
        second = seconds_per_image(row, classes, size, train.data.batch_size, own.steps)
        run = OVERHEAD * second * images * train.schedule.epochs
        total += run * study.seeds
        print(f"{row.name:32} {parameters:>10,} {macs / 1e6:>7.1f} {1 / second:>9.0f} {run / 60:>10.1f}", flush=True)
    print(f"together {total / 3600:.1f} core-hours")
    if own.deviation is not None:
        half = stdtrit(study.seeds - 1, 0.975) * own.deviation * math.sqrt(2 / study.seeds)
        print(
            f"a difference of two networks is known to ± {half:.2f} points (95 %, {study.seeds} seeds; less where a "
            "seed helps both alike)"
        )


if __name__ == "__main__":
    main()
