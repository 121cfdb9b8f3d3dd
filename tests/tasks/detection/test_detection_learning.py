"""Boxes, masks and labels line up from the data to the detections: what is learnt is found again, flipped too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detecting import BACKBONE, BACKBONE_ARGS, detector_config, scene
from making import real_data

from epsanet.data.coco import CocoSamples
from epsanet.data.config import DataConfig
from epsanet.data.detection import DetectionDataset, train_augmentation
from epsanet.network.detector_config import Architecture
from epsanet.network.detectors import Detector, create_detector
from epsanet.tasks.detection.scores import DetectionEvaluation, DetectionScore

SCENES = 8


def coco(split: str) -> CocoSamples:
    folder = real_data("coco100")
    return CocoSamples(folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017")


@pytest.mark.parametrize(("architecture", "every"), [("mask_rcnn", 1), ("retinanet", 4)])
def test_losses_and_gradients_are_finite_on_all_of_coco100(architecture: Architecture, every: int) -> None:
    """Both splits, augmented as in training: images without objects, crowd regions, objects that a crop cut away."""
    config = detector_config(architecture, min_size=64, max_size=96, sampling_ratio=1)
    torch.manual_seed(0)
    model = create_detector(BACKBONE, 80, config, backbone_args=BACKBONE_ARGS).train()
    augmentation = train_augmentation(DataConfig(scale_jitter=(0.3, 1.6), color_jitter=0.2), 64, 96)
    seen = empty = 0
    for split in ("train", "val"):
        dataset = DetectionDataset(coco(split), augmentation, masks=config.has_masks)
        assert len(dataset) == 100
        places = list(range(0, 100, every))
        for start in range(0, len(places), 10):
            images, targets, _ = zip(*(dataset[0, place] for place in places[start : start + 10]), strict=True)
            seen, empty = seen + len(images), empty + sum(len(target["labels"]) == 0 for target in targets)
            losses = model(images, targets)
            assert all(loss.isfinite() for loss in losses.values()), losses
            model.zero_grad()
            sum(losses.values()).backward()
            gradients = [one.grad for one in model.parameters() if one.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    assert seen == 200 // every
    assert empty > 0


def scenes(*, flipped: bool) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The same eight, flipped by hand or not."""
    found = []
    for number in range(SCENES):
        image, target = scene(number, objects=2)
        target = {**target, "iscrowd": torch.zeros(2), "area": target["masks"].flatten(1).sum(dim=1).float()}
        if flipped:
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            image = image.flip(-1)
            target |= {"boxes": torch.stack([64 - x1, y0, 64 - x0, y1], dim=1), "masks": target["masks"].flip(-1)}
        found.append((image, target))
    return found


@pytest.fixture(scope="module")
def memorised() -> Detector:
    """Trained on the eight scenes, flipped by torchvision's transform in half of the steps."""
    torch.manual_seed(0)
    args = {"box_batch_size_per_image": 32, "box_positive_fraction": 0.5, "rpn_post_nms_top_n_train": 30}
    args |= {"rpn_pre_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20}
    config = detector_config(
        group_norm=True, sampling_ratio=1, representation_size=64, mask_channels=16, detector_args=args
    )
    model = create_detector(BACKBONE, 3, config, backbone_args=BACKBONE_ARGS).train()
    augmentation = train_augmentation(DataConfig(hflip=0.5), 64, 64)
    dataset = DetectionDataset(_Scenes(), augmentation, masks=True)  # type: ignore[arg-type]
    steps = 150
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        images, targets, _ = zip(*(dataset[step, place] for place in range(SCENES)), strict=True)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class _Scenes:
    class_names = ("red", "green", "blue")

    def __len__(self) -> int:
        return SCENES

    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> Any:  # noqa: ARG002
        from torchvision.transforms.v2.functional import to_pil_image

        from epsanet.data.detection import Objects

        image, target = scenes(flipped=False)[position]
        return to_pil_image(image), Objects(**{**target, "iscrowd": target["iscrowd"].long()})


def evaluated(model: Detector, wanted: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> DetectionEvaluation:
    score = DetectionScore(3, masks=True)
    with torch.inference_mode():
        for place, (image, target) in enumerate(wanted):
            score.update(model([image]), [target], torch.tensor([place]))
    return score.result(["red", "green", "blue"])


@pytest.mark.parametrize("flipped", [False, True])
def test_what_was_learnt_is_found_again_and_flipped_where_the_image_is(memorised: Detector, flipped: bool) -> None:
    found = evaluated(memorised, scenes(flipped=flipped))
    assert found.mask is not None
    assert found.box.ap50 > 0.8, found.box
    assert found.mask.ap50 > 0.8, found.mask
    assert found.box.ap > 0.6, found.box
    other = evaluated(
        memorised,
        [(one[0], two[1]) for one, two in zip(scenes(flipped=flipped), scenes(flipped=not flipped), strict=True)],
    )
    assert other.box.ap < 0.4 * found.box.ap, "objects of the other side would do as well"
