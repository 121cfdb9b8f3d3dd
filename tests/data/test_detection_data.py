"""Boxes and masks go where the pixels go, and digit scenes show what their objects say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epsanet.data import digits_scenes, loaders
from epsanet.data.config import DataConfig
from epsanet.data.detection import (
    DetectionDataset,
    DetectionSamples,
    Objects,
    detection_evaluation_loader,
    detection_train_loader,
    train_augmentation,
)
from epsanet.data.digits_scenes import DigitsScenes, open_digits_scenes
from epsanet.data.images import ImageError


class Bars(DetectionSamples):
    """A red, a green and a blue bar on black, each an object of its own class, and a crowd region."""

    class_names = ("red", "green", "blue")  # type: ignore[assignment]
    has_masks = True

    def __len__(self) -> int:
        return 5

    def name(self, position: int) -> str:
        return f"bars[{position}]"

    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:  # noqa: ARG002
        pixels, shown = np.zeros((60, 80, 3), dtype=np.uint8), np.zeros((4, 60, 80), dtype=np.uint8)
        boxes = [[5, 10, 25, 20], [40, 4 + position, 50, 34], [60, 40, 79, 60], [0, 50, 10, 60]]
        for channel, (x0, y0, x1, y1) in enumerate(boxes):
            shown[channel, y0:y1, x0:x1] = 1
            if channel < 3:
                pixels[y0:y1, x0:x1, channel] = 255
        return Image.fromarray(pixels), Objects(
            boxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor([0, 1, 2, 0]),
            iscrowd=torch.tensor([0, 0, 0, 1]),
            area=torch.ones(4),
            masks=torch.from_numpy(shown) if masks else None,
        )


def augmented(seed: int, position: int = 0, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = DataConfig(**{"hflip": 0.0, **changes})
    dataset = DetectionDataset(Bars(), train_augmentation(config, 60, 80), seed, masks=True)
    image, target, _ = dataset[0, position]
    return image, target


def check(image: torch.Tensor, target: dict[str, torch.Tensor]) -> None:
    """Each object's mask is where its colour is, and its box is as tight as the mask."""
    for label, mask, (x0, y0, x1, y1) in zip(
        target["labels"].tolist(), target["masks"].bool(), target["boxes"].tolist(), strict=True
    ):
        others = image[[channel for channel in range(3) if channel != label]].amax(dim=0)
        coloured = (image[label] > 0.5) & (others < 0.3)  # not the grey border, and not black
        assert (coloured & mask).sum() >= 0.9 * max(int(mask.sum()), int(coloured.sum())) - 20
        rows, columns = torch.nonzero(mask.any(dim=1)), torch.nonzero(mask.any(dim=0))
        assert [x0, x1] == pytest.approx([columns[0].item(), columns[-1].item() + 1], abs=1.01)
        assert [y0, y1] == pytest.approx([rows[0].item(), rows[-1].item() + 1], abs=1.01)


def test_flips_turn_image_boxes_and_masks() -> None:
    image, target = augmented(0, hflip=1.0, vflip=1.0)
    plain, objects = Bars().read(0)
    assert torch.equal(image, torch.from_numpy(np.array(plain)[::-1, ::-1].copy()).permute(2, 0, 1) / 255)
    x0, y0, x1, y1 = objects.boxes[:3].unbind(1)
    assert torch.equal(target["boxes"], torch.stack([80 - x1, 60 - y1, 80 - x0, 60 - y0], dim=1))
    assert objects.masks is not None
    assert torch.equal(target["masks"], objects.masks[:3].flip(1, 2))
    check(image, target)


def test_crowd_regions_are_not_trained_on_but_evaluated_with() -> None:
    _, target = augmented(0)
    assert target["labels"].tolist() == [0, 1, 2]
    assert target["iscrowd"].tolist() == [0, 0, 0]
    _, whole, _ = DetectionDataset(Bars(), masks=True)[0]
    assert whole["iscrowd"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("jitter", [(0.8, 1.25), (0.1, 2.0)])
def test_scale_jitter_keeps_the_size_of_the_canvas_and_everything_in_its_place(jitter: tuple[float, float]) -> None:
    sides, kept = [], []
    for seed in range(40):
        image, target = augmented(seed, scale_jitter=jitter)
        assert image.shape == (3, 60, 80)
        check(image, target)
        kept.append(len(target["boxes"]))
        sides += [
            float(box[2] - box[0]) for box, label in zip(target["boxes"], target["labels"], strict=True) if label == 0
        ]
    assert min(sides) < 20 * (0.5 if jitter[0] < 0.5 else 0.95)
    assert max(sides) > 20 * 1.04
    if jitter[1] > 1.5:
        assert min(kept) < 3, "large crops cut objects away"


def test_a_jittered_portrait_stays_a_portrait() -> None:
    class Turned(Bars):
        def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:
            image, objects = super().read(position, epoch, masks=masks)
            assert objects.masks is not None
            objects.masks = objects.masks.transpose(1, 2).contiguous()
            objects.boxes = objects.boxes[:, [1, 0, 3, 2]]
            return image.transpose(Image.Transpose.TRANSPOSE), objects

    config = DataConfig(hflip=0.0, scale_jitter=(0.99, 1.0))
    image, target, _ = DetectionDataset(Turned(), train_augmentation(config, 60, 80), 0, masks=True)[0, 0]
    assert image.shape == (3, 80, 60)
    assert len(target["boxes"]) == 3
    check(image, target)


def test_colours_change_alone() -> None:
    plain, objects = Bars().read(0)
    pixels = torch.from_numpy(np.array(plain)).permute(2, 0, 1) / 255
    found = [augmented(seed, color_jitter=0.4) for seed in range(6)]
    assert sum(not torch.equal(image, pixels) for image, _ in found) > 2
    assert all(torch.equal(target["boxes"], objects.boxes[:3]) for _, target in found)


def test_batches_are_a_function_of_seed_and_epoch_and_evaluation_takes_each_image_once() -> None:
    config = DataConfig(batch_size=2, workers=0, scale_jitter=(0.5, 1.5))
    augmentation = train_augmentation(config, 60, 80)

    def epoch(number: int) -> list[Any]:
        loader = detection_train_loader(Bars(), config, augmentation, 7, masks=True)
        loader.set_epoch(number)
        return list(loader)

    first, again, next_epoch = epoch(0), epoch(0), epoch(1)
    assert [batch[2].tolist() for batch in first] == [batch[2].tolist() for batch in again]
    for (images, targets, _), (others, wanted, _) in zip(first, again, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(images, others, strict=True))
        assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(targets, wanted, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(first[0][0], next_epoch[0][0], strict=True))
    positions = [place for batch in detection_evaluation_loader(Bars(), config, masks=False) for place in batch[2]]
    assert positions == list(range(5))


class Spoilt(Bars):
    """Sound when they were checked."""

    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:
        if position in (1, 4):
            raise ImageError("damaged: 3 bytes")
        return super().read(position, epoch, masks=masks)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_damaged_since_the_check_are_named_replaced_in_training_and_left_out_in_evaluation(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(batch_size=2, workers=workers)
    for _ in range(2):
        batches = list(detection_evaluation_loader(Spoilt(), config, masks=False))
        assert [positions.tolist() for _, _, positions in batches] == [[0], [2, 3]]
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped bars[{position}]: damaged: 3 bytes" for position in (1, 4) * 2
    ]
    dataset = DetectionDataset(Spoilt(), train_augmentation(config, 60, 80), on_bad_image="skip")
    for wanted, instead in ((1, 2), (4, 0)):
        image, target, position = dataset[0, wanted]
        assert position == instead
        assert torch.equal(image, dataset[0, instead][0])
        assert torch.equal(target["boxes"], dataset[0, instead][1]["boxes"])
    strict = DataConfig(batch_size=2, workers=workers, on_bad_image="raise")
    with pytest.raises(ValueError, match=r"^bars\[1\]: damaged: 3 bytes; mend or remove it, or use --data.on_bad_im"):
        list(detection_evaluation_loader(Spoilt(), strict, masks=False))


def test_more_processes_than_images_cannot_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "world_size", lambda: 6)
    with pytest.raises(ValueError, match="has 5 images to look at for 6 processes; start fewer"):
        detection_evaluation_loader(Bars(), DataConfig(workers=0), masks=False)


# Digit scenes


@pytest.fixture(scope="module")
def scenes() -> Any:
    return open_digits_scenes(DataConfig())


def test_scenes_of_held_out_splits_never_show_a_training_digit(scenes: Any) -> None:
    pixels = [
        {np.asarray(split.digits.open(place)).tobytes() for place in range(len(split.digits))}
        for split in (scenes.train, scenes.val, scenes.test)
    ]
    assert [len(split.digits) for split in (scenes.train, scenes.val, scenes.test)] == [1293, 144, 360]
    assert not pixels[0] & (pixels[1] | pixels[2])
    assert not pixels[1] & pixels[2]


def test_a_scene_is_a_function_of_epoch_and_position(scenes: Any) -> None:
    def read(split: DigitsScenes, position: int, epoch: int) -> tuple[bytes, list[int]]:
        image, objects = split.read(position, epoch)
        return image.tobytes(), objects.labels.tolist()

    assert read(scenes.train, 3, 1) == read(scenes.train, 3, 1)
    assert read(scenes.train, 3, 1) != read(scenes.train, 3, 2)
    assert read(scenes.train, 3, 1) != read(scenes.train, 4, 1)
    assert read(scenes.test, 3, 0) == read(scenes.test, 3, 5)
    assert read(scenes.test, 3, 0) != read(scenes.val, 3, 0)


def test_boxes_of_scenes_hold_their_masks_and_overlapping_digits_share_no_pixel(scenes: Any) -> None:
    overlaps = sides = 0
    for position in range(40):
        image, objects = scenes.train.read(position)
        assert image.size == (128, 128)
        masks = objects.masks
        assert masks.sum(dim=0).max() == 1
        assert torch.equal(objects.area, masks.flatten(1).sum(dim=1).float())
        for mask, (x0, y0, x1, y1) in zip(masks, objects.boxes.int().tolist(), strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert [x0, y0, x1, y1] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            sides += x1 - x0 > 12
        boxes = objects.boxes
        corner = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        shared = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corner).clamp(min=0).prod(dim=2)
        overlaps += int((shared.triu(1) > 0).sum())
    assert overlaps > 20
    assert sides > 40


def test_ink_of_a_digit_stands_out_where_its_mask_is(scenes: Any) -> None:
    """Pixels of a mask are near its digit's colour, those around it are not."""
    differences = []
    for position in range(20):
        image, objects = scenes.test.read(position)
        pixels = torch.from_numpy(np.array(image)).float()
        for mask, (x0, y0, x1, y1) in zip(objects.masks, objects.boxes.int().tolist(), strict=True):
            window = pixels[y0:y1, x0:x1]
            inside = mask[y0:y1, x0:x1].bool()
            differences.append(float((window[inside].median(0).values - window[~inside].median(0).values).abs().mean()))
    assert np.median(differences) > 40


def test_scenes_are_described(scenes: Any) -> None:
    assert [report.title for report in scenes.reports] == ["train", "val", "test"]
    assert "1,293 digits, made anew each epoch" in str(scenes.reports[0])
    assert len(scenes.test) == digits_scenes._IMAGES["test"]
