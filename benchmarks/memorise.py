"""Whether a small Mask R-CNN can learn eight photographs of COCO by heart: boxes, masks and labels line up end to end.

The images are the first eight of the training split with one to four objects, none of them small or a crowd region.
They are trained on without augmentation, and evaluated as COCO does.

Usage: python benchmarks/memorise.py COCO [--steps N]
    COCO  a folder as ``epsanet train coco-mask-rcnn --data`` takes it
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import torch

from epsanet.data.coco import CocoSamples, find_coco_splits
from epsanet.data.detection import DetectionDataset
from epsanet.network.detector_config import DetectorConfig
from epsanet.network.detectors import create_detector
from epsanet.tasks.detection.scores import DetectionScore
from epsanet.tasks.devices import processor_name

IMAGES, BATCH, RATE, SMALL = 8, 4, 1e-3, 0.04
BACKBONE, BACKBONE_ARGS = "epsanet50_small", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_width": 32}
DETECTOR = DetectorConfig(
    architecture="mask_rcnn",
    min_size=160,
    max_size=240,
    out_indices=[1, 2, 3],
    frozen_stages=-1,
    norm_eval=False,
    fpn_channels=64,
    representation_size=256,
    mask_channels=64,
    group_norm=True,
    anchor_sizes=[32, 64, 96, 160],
    detector_args={
        "rpn_pre_nms_top_n_train": 120,
        "rpn_post_nms_top_n_train": 60,
        "rpn_pre_nms_top_n_test": 120,
        "rpn_post_nms_top_n_test": 40,
        "box_batch_size_per_image": 32,
        "box_positive_fraction": 0.5,
    },
)


def chosen(samples: CocoSamples) -> list[int]:
    """Positions of the first images of the kind described above."""
    found = []
    for position, image in enumerate(samples.images):
        entries, pixels = samples.annotations(position), image["width"] * image["height"]
        large = all(entry["area"] > SMALL * pixels and not entry["iscrowd"] for entry in entries)
        if 1 <= len(entries) <= 4 and large:
            found.append(position)
    return found[:IMAGES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    samples = CocoSamples(*find_coco_splits(arguments.coco)["train"])
    samples.keep(chosen(samples))
    dataset = DetectionDataset(samples, masks=True)
    items = [dataset[position] for position in range(len(dataset))]
    torch.manual_seed(0)
    model = create_detector(BACKBONE, len(samples.class_names), DETECTOR, backbone_args=BACKBONE_ARGS)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=arguments.steps)
    print("| steps | loss | box AP | box AP50 | mask AP | mask AP50 | processor seconds |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    start = time.process_time()
    for step in range(1, arguments.steps + 1):
        model.train()
        batch = [items[place] for place in torch.randperm(len(items))[:BATCH].tolist()]
        loss = sum(model([image for image, _, _ in batch], [target for _, target, _ in batch]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 and step != arguments.steps:
            continue
        score = DetectionScore(len(samples.class_names), masks=True)
        with torch.inference_mode():
            for image, target, position in items:
                score.update(model.eval()([image]), [target], torch.tensor([position]))
        box, mask = (result := score.result(samples.class_names)).box, result.mask
        assert mask is not None
        print(
            f"| {step} | {loss.item():.3f} | {box.ap:.3f} | {box.ap50:.3f} | {mask.ap:.3f} | {mask.ap50:.3f} "
            f"| {time.process_time() - start:.0f} |",
            flush=True,
        )
    print(
        f"\n{datetime.date.today()} · {processor_name()} · {torch.get_num_threads()} threads · "
        f"torch {torch.__version__}\n{result.objects} objects in {result.images} images"
    )


if __name__ == "__main__":
    main()
