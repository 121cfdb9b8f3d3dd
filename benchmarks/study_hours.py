"""What the full-scale studies would cost on GPUs, from counted arithmetic and stated assumptions; a table in Markdown.

Training is taken as three times the multiply-accumulates of the forward pass, two floating-point operations each. The
detector's are counted in a forward pass over one image of 800×1344 pixels, with random weights.

Usage: python benchmarks/study_hours.py [--teraflops 40]
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from epsanet.network.detector_config import DetectorConfig
from epsanet.network.detectors import create_detector
from epsanet.network.rivals import RIVALS
from epsanet.study.config import StudyConfig
from epsanet.study.cost import count
from epsanet.study.rows import ablation_rows

IMAGENET, COCO = 1_281_167, 118_287
IMAGENET_EPOCHS, COCO_EPOCHS = 120, 12
FORWARD_AND_BACKWARD = 3


def hours(macs: float, images: int, epochs: int, teraflops: float) -> float:
    """Of one GPU."""
    return FORWARD_AND_BACKWARD * 2 * macs * images * epochs / (teraflops * 1e12) / 3600


def detector_macs(backbone: str) -> float:
    """Of Faster R-CNN with FPN, one image."""
    detector = create_detector(backbone, 80, DetectorConfig(architecture="faster_rcnn")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector([torch.rand(3, 800, 1333)])
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, default=40.0, help="that a GPU really does a second, all told")
    speed = parser.parse_args().teraflops
    print(f"At {speed:g} × 10¹² floating-point operations a second:\n")
    print("| study | networks | 10⁹ MACs of an image | GPU hours a seed |\n|---|--:|--:|--:|")
    for size in ("50", "101"):
        macs = [count(rival.models[size], 224, **rival.model_args)[1] for rival in RIVALS.values()]
        total = sum(hours(value, IMAGENET, IMAGENET_EPOCHS, speed) for value in macs)
        span = f"{min(macs) / 1e9:.2f} to {max(macs) / 1e9:.2f}"
        print(f"| `imagenet-compare`, depth {size} | {len(macs)} | {span} | {total:,.0f} |")
    rows = ablation_rows(StudyConfig(match="none"), "epsanet50_small", {}, 1000, 224)
    macs = [count(row.model, 224, **row.model_args)[1] for row in rows]
    total = sum(hours(value, IMAGENET, IMAGENET_EPOCHS, speed) for value in macs)
    print(f"| `imagenet-ablation` | {len(macs)} | {min(macs) / 1e9:.2f} to {max(macs) / 1e9:.2f} | {total:,.0f} |")
    names = ["resnet50", "seresnet50", "ecaresnet50", "fcanet50", "epsanet50_small"]
    found = [detector_macs(name) for name in names]
    total = sum(hours(value, COCO, COCO_EPOCHS, speed) for value in found)
    print(f"| `coco-compare` | {len(found)} | {min(found) / 1e9:.0f} to {max(found) / 1e9:.0f} | {total:,.0f} |")


if __name__ == "__main__":
    main()
