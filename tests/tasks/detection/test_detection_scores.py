"""The averages are pycocotools' own, on real annotations and on made-up and real predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detecting import detector
from making import real_data

from epsanet.data.coco import CocoSamples
from epsanet.tasks.detection.figures import colours, drawn
from epsanet.tasks.detection.results import write_coco_results
from epsanet.tasks.detection.scores import DetectionEvaluation, DetectionScore, encode_masks

NUMBERS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NUMBERS += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]
IMAGES = 12
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> CocoSamples:
    """The images of coco100's validation split with the most crowd regions; the first without its objects."""
    folder = real_data("coco100")
    split = CocoSamples(folder / "annotations" / "instances_val2017.json", folder / "val2017")
    order = sorted(range(len(split)), key=lambda place: -sum(a.get("iscrowd", 0) for a in split.annotations(place)))
    split.keep(sorted(order[:IMAGES]))
    split.keep_annotations(0, [])
    split.file = tmp_path_factory.mktemp("coco") / "instances_val2017.json"
    content = {"images": split.images, "annotations": [], "categories": []}
    for place in range(IMAGES):
        content["annotations"] += split.annotations(place)
    content["categories"] = [
        {"id": split.category_id(label), "name": name} for label, name in enumerate(split.class_names)
    ]
    split.file.write_text(json.dumps(content))
    assert sum(a.get("iscrowd", 0) for place in range(len(split)) for a in split.annotations(place)) >= 3
    return split


def targets(samples: CocoSamples) -> list[dict[str, torch.Tensor]]:
    found = []
    for place, image in enumerate(samples.images):
        found.append(samples.objects(place, image["height"], image["width"], masks=True).as_target())
    return found


def made_up(kind: str, target: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Predictions in a known relation to the objects; scores have no ties."""
    random = torch.Generator().manual_seed(seed)
    boxes, labels, masks = target["boxes"].clone(), target["labels"].clone(), target["masks"].bool()
    if kind == "none":
        boxes, labels, masks = boxes[:0], labels[:0], masks[:0]
    elif kind in ("shifted", "many"):
        copies = 1 if kind == "shifted" else 1 + 110 // max(len(boxes), 1)
        boxes, labels, masks = boxes.repeat(copies, 1), labels.repeat(copies), masks.repeat(copies, 1, 1)
        moved = torch.randint(-6, 7, (len(boxes), 2), generator=random)
        boxes = boxes + moved.repeat(1, 2)
        masks = (
            torch.stack([mask.roll((int(y), int(x)), (0, 1)) for mask, (x, y) in zip(masks, moved, strict=True)])
            if len(masks)
            else masks
        )
        wrong = torch.rand(len(labels), generator=random) < 0.15
        labels = torch.where(wrong, (labels + 1) % 80, labels)
    return {
        "boxes": boxes,
        "labels": labels,
        "masks": masks,
        "scores": torch.rand(len(boxes), generator=random),
    }


def evaluated(samples: CocoSamples, kind: str) -> DetectionEvaluation:
    score = DetectionScore(len(samples.class_names), masks=True)
    mask = torch.zeros(2, samples.images[0]["height"], samples.images[0]["width"], dtype=torch.uint8)
    mask[:, 10:60, 20:70] = 1
    spare = {**objects([[20.0, 10, 70, 60]] * 2, [0, 1]), "masks": mask}
    for place, target in enumerate(targets(samples)):
        if kind != "network":  # the first image has predictions, but no objects
            score.update([made_up(kind, target if place else spare, place)], [target], torch.tensor([place]))
    if kind == "network":
        args = {"box_detections_per_img": 15, "rpn_post_nms_top_n_test": 100}
        model = detector(classes=80, score_thresh=0.0, min_size=64, max_size=96, detector_args=args).eval()
        for place, target in enumerate(targets(samples)):
            image = torch.from_numpy(np.array(samples.read(place, masks=False)[0])).permute(2, 0, 1) / 255
            with torch.no_grad():
                score.update(model([image]), [target], torch.tensor([place]))
    return score.result(samples.class_names)


def by_pycocotools(samples: CocoSamples, evaluation: DetectionEvaluation, kind: str, tmp_path: Path) -> Any:
    """The reference evaluation, fed with the file of the data set and our file of results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = write_coco_results(tmp_path / "results.json", evaluation, samples)[kind == "segm"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(samples.file))
        found = truth.loadRes(str(path)) if evaluation.results and json.loads(path.read_text()) else COCO()
        reference = COCOeval(truth, found, kind)
        reference.params.imgIds = [image["id"] for image in samples.images]
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return reference


@pytest.mark.parametrize("predictions", ["perfect", "shifted", "many", "network"])
def test_averages_of_boxes_and_masks_are_those_of_pycocotools(
    samples: CocoSamples, predictions: str, tmp_path: Path
) -> None:
    evaluation = evaluated(samples, predictions)
    for kind, averages in (("bbox", evaluation.box), ("segm", evaluation.mask)):
        reference = by_pycocotools(samples, evaluation, kind, tmp_path)
        found = [getattr(averages, name) for name in NUMBERS]
        assert found == pytest.approx(list(reference.stats), abs=1e-6), kind
        precision = reference.eval["precision"][:, :, :, 0, -1]
        for place, name in enumerate(samples.class_names):
            if precision[0, 0, place] < 0:
                assert name not in averages.per_class
                continue
            objects, ap, ap50 = averages.per_class[name]
            assert objects > 0
            assert (ap, ap50) == pytest.approx((precision[:, :, place].mean(), precision[0, :, place].mean()), abs=1e-6)
            assert averages.curves[name] == pytest.approx(precision[0, :, place], abs=1e-6)


def test_no_predictions_score_zero_and_no_objects_minus_one(samples: CocoSamples) -> None:
    evaluation = evaluated(samples, "none")
    assert [evaluation.box.ap, evaluation.box.ar100, evaluation.mask.ap] == [0, 0, 0]
    score = DetectionScore(80, masks=True)
    some = targets(samples)[1]
    score.update([made_up("perfect", some, 0)], [{key: value[:0] for key, value in some.items()}], torch.tensor([0]))
    nothing = score.result(samples.class_names)
    assert {getattr(nothing.box, name) for name in NUMBERS} == {-1}
    assert {getattr(nothing.mask, name) for name in NUMBERS} == {-1}
    assert nothing.objects == 0
    assert nothing.box.per_class == {}


def test_masks_are_encoded_as_pycocotools_encodes_them_in_the_order_asked_for(samples: CocoSamples) -> None:
    from pycocotools import mask as reference

    masks = max((target["masks"] for target in targets(samples)), key=len)[:2].bool()
    wanted = [reference.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)) for mask in masks]
    wanted = [{"size": one["size"], "counts": one["counts"].decode()} for one in wanted]
    assert list(encode_masks(masks)) == wanted
    assert list(encode_masks(masks, torch.tensor([1, 0]))) == [wanted[1], wanted[0]]
    assert encode_masks(masks[:0]) == ()


@pytest.mark.parametrize("size", [(300, 400), (50, 70)])
def test_masks_are_drawn_as_torchvision_draws_them(size: tuple[int, int]) -> None:
    """The same pixels outside of boxes and names, whether the masks come together or one by one; enlarged too."""
    from torchvision.utils import draw_segmentation_masks

    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(3, *size, dtype=torch.bool)
    masks[0, 20:40, 20:60] = masks[1, 30:48, 40:64] = masks[2, 25:35, 10:50] = True
    found = {**objects([[0.0, 0, 2, 2]] * 3, [0, 1, 1]), "masks": masks}
    names = ["x", "y"]
    factor = 1 if size[0] > 240 else 5
    plain = drawn(image, {**found, "masks": None}, names)
    colours_of_masks = [colours(names)[label] for label in (0, 1, 1)]
    large = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    pixels = (image * 255).round().to(torch.uint8).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    wanted = draw_segmentation_masks(pixels, large, alpha=0.45, colors=colours_of_masks)
    outside = (plain == pixels).all(dim=0)
    assert outside.float().mean() > 0.7

    def one_by_one() -> Iterator[torch.Tensor]:
        living: list[weakref.ref[torch.Tensor]] = []
        for mask in masks:
            assert sum(other() is not None for other in living) <= 1
            copy = mask.clone()
            living.append(weakref.ref(copy))
            yield copy
            del copy

    for given in (masks, one_by_one(), masks.to(torch.uint8)):
        assert torch.equal(drawn(image, {**found, "masks": given}, names)[:, outside], wanted[:, outside])


def test_the_order_of_the_batches_does_not_matter(samples: CocoSamples) -> None:
    whole = DetectionScore(80, masks=True)
    for place, target in enumerate(targets(samples)):
        whole.update([made_up("shifted", target, place)], [target], torch.tensor([place]))
    score = DetectionScore(80, masks=True)
    for place, target in reversed(list(enumerate(targets(samples)))):
        score.update([made_up("shifted", target, place)], [target], torch.tensor([place]))
    again = score.result(samples.class_names)
    assert again.as_dict() == whole.result(samples.class_names).as_dict()
    assert [result.position for result in again.results] == list(range(len(samples)))


def objects(boxes: list[list[float]], labels: list[int], crowd: list[int] | None = None) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.tensor(crowd or [0] * len(labels)),
        "area": torch.ones(len(labels)),
    }


def test_the_confusion_matrix_counts_what_was_missed_invented_and_mixed_up() -> None:
    a, b, c, far = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10], [80.0, 80, 90, 90]
    target = objects([a, b, c, [60.0, 60, 100, 100]], [0, 1, 1, 0], [0, 0, 0, 1])
    detection = {
        **objects([a, [21.0, 0, 30, 10], [200.0, 200, 210, 210], far, c], [0, 0, 1, 0, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.4]),  # the last is unsure: c is missed
    }
    score = DetectionScore(2, masks=False)
    score.update([detection], [target], torch.tensor([0]))
    evaluation = score.result(["x", "y"])
    assert evaluation.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    (result,) = evaluation.results
    assert (result.missed, result.invented, result.confused, result.errors) == (1, 1, 1, 3)
    assert evaluation.mask is None


def test_what_is_kept_of_an_image_does_not_grow_with_the_classes() -> None:
    """Each process keeps it for all its images, and sends it to the others."""
    score = DetectionScore(1000, masks=False)
    target = objects([[0.0, 0, 10, 10]], [999])
    for position in range(20):
        score.update([{**target, "scores": torch.tensor([0.9])}], [target], torch.tensor([position]))
    assert len(pickle.dumps(score._results)) < 100_000
    confusion = score.result([str(number) for number in range(1000)]).confusion
    assert confusion[999, 999] == confusion.sum() == 20
    score.reset()
    score.update([{**target, "scores": torch.tensor([0.9])}], [target], torch.tensor([0]))
    assert score.result([str(number) for number in range(1000)]).confusion.sum() == 1


def test_an_evaluation_prints_and_serialises_its_numbers(samples: CocoSamples) -> None:
    evaluation = evaluated(samples, "perfect")
    ap = evaluation.box.ap
    assert 0.95 < ap < 1  # two detections in the image without objects
    assert str(evaluation).startswith(f"box AP {ap:.3f}, AP50 {evaluation.box.ap50:.3f}")
    found = json.loads(json.dumps(evaluation.as_dict()))
    assert found["box"]["ap"] == ap
    assert set(found["box"]) == {*NUMBERS, "per_class"}
    assert "curves" not in found["mask"]
    assert dataclasses.is_dataclass(evaluation)
