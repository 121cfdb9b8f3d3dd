"""Exports of detectors: what the file finds alone, and what this package makes of it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detecting import coco_folder, detector, scene
from exporting import made_once
from PIL import Image
from torch import Tensor

from epsanet import cli, kernels
from epsanet.data.config import DataConfig
from epsanet.data.digits_scenes import open_digits_scenes
from epsanet.deploy import detection as detection_module
from epsanet.deploy.config import ExportConfig
from epsanet.deploy.detection import export_detector
from epsanet.deploy.detection_agreement import DetectionComparison
from epsanet.deploy.export import Exported
from epsanet.deploy.images import photographs
from epsanet.deploy.portable_detector import PortableDetector
from epsanet.network.detector_config import Architecture
from epsanet.network.detector_start import start_detector_from
from epsanet.network.detectors import Detector, RuntimeDetector, load_detector, save_detector
from epsanet.network.model_folder import is_detector
from epsanet.network.weights import load_model
from epsanet.tasks.detection.evaluate import evaluate_detector

ARCHITECTURES: tuple[Architecture, ...] = ("faster_rcnn", "mask_rcnn", "retinanet")
BUNDLES = [("mask_rcnn", "onnx"), ("mask_rcnn", "openvino"), ("mask_rcnn", "pt2"), ("retinanet", "onnx")]
"""Faster R-CNN's program is the first part of Mask R-CNN's."""
NAMES = ["ant", "bee", "cat"]
SIZES = ((64, 64), (47, 90), (200, 33))
"""Heights and widths: as it was trained, wide, and narrow."""


def ignore(_: str) -> None:
    """What an export says."""


def decided(architecture: Architecture) -> Detector:
    """A detector with random weights so large that it is nearly sure of what it sees, and rounding decides nothing.

    Nothing has a bias, so that an image of the mean colour has no features, and no class is likelier than another.
    """
    model = detector(architecture, score_thresh=0.1 if architecture == "retinanet" else 0.3).eval()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        if architecture == "retinanet":
            head = model.network.head
            for layer in (*head.classification_head.conv.modules(), *head.regression_head.conv.modules()):
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(head.classification_head.cls_logits.weight, std=0.7)
            head.classification_head.cls_logits.bias.fill_(-4.0)
        else:
            torch.nn.init.normal_(model.network.roi_heads.box_predictor.cls_score.weight, std=3.0)
            torch.nn.init.normal_(model.network.rpn.head.cls_logits.weight, std=0.3)
            torch.nn.init.normal_(model.network.rpn.head.bbox_pred.weight, std=0.1)
        if architecture == "mask_rcnn":
            torch.nn.init.normal_(model.network.roi_heads.mask_predictor.mask_fcn_logits.weight, std=9.0)
    return model


def pictures() -> list[Tensor]:
    """Drawn scenes of several sizes, cut or enlarged from the same kind of picture."""
    images = []
    for seed, (height, width) in enumerate(SIZES):
        picture = scene(seed, size=max(height, width))[0]
        images.append(picture[:, :height, :width].contiguous())
    return images


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    for architecture in ARCHITECTURES:
        save_detector(folder / architecture, decided(architecture), NAMES)
    images = folder / "images"
    images.mkdir()
    for number, picture in enumerate(pictures()):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(images / f"{number}.png")
    return {name: folder / name for name in (*ARCHITECTURES, "images")}


Bundles = Callable[[str, str], Exported]
"""By architecture and format; each is exported once."""


@pytest.fixture(scope="module")
def bundles(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder, images = tmp_path_factory.mktemp("bundles"), str(models["images"])
    made: dict[str, dict[str, Any]] = {name: {} for name in ARCHITECTURES}

    @functools.cache
    def exported(name: str, kind: Any) -> Exported:
        config = ExportConfig(format=kind, images=images)
        with made_once(made[name]):
            return export_detector(models[name], folder / f"{name}-{kind}", config, note=ignore)

    return exported


def same(wanted: list[dict[str, Tensor]], found: list[dict[str, Tensor]], score: float, pixels: float) -> list[int]:
    """See that two detectors agree, and how many objects they found in each image."""
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["labels"], other["labels"])
        assert (one["scores"] - other["scores"]).abs().max() < score if len(one["scores"]) else True
        assert torch.allclose(one["boxes"], other["boxes"], rtol=0, atol=pixels)
        if "masks" in one:
            assert (one["masks"] != other["masks"]).float().mean() < 1e-3 if len(one["masks"]) else True
    return [len(one["scores"]) for one in wanted]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_detection_without_branches_is_torchvisions(architecture: Architecture) -> None:
    """In one process and with the same layers, box by box, mask by mask."""
    model = decided(architecture)
    portable, transform = PortableDetector(model), model.network.transform
    found = []
    with torch.no_grad(), kernels.use("reference"):
        wanted = [model([picture])[0] for picture in pictures()]
        for picture in pictures():
            image = transform.resize(transform.normalize(picture))[0]
            outputs = dict(zip(("boxes", "scores", "labels", "masks"), portable(image[None]), strict=False))
            found += transform.postprocess([outputs], [image.shape[-2:]], [picture.shape[-2:]])
            if "masks" in found[-1]:
                found[-1]["masks"] = found[-1]["masks"].together()
    counts = same(wanted, found, 1e-5, 1e-3)
    assert min(counts[:2]) >= 3
    assert sum(counts) > 30


def test_boxes_of_each_size_are_pooled_from_torchvisions_level() -> None:
    """Sides of 112 pixels lie between the two levels of the small detector."""
    model = decided("mask_rcnn")
    maps = [torch.randn(1, 16, 512 // stride, 512 // stride) for stride in (4, 8)]
    sides = torch.tensor([10.0, 111.9, 112.0, 112.1, 224, 400])
    boxes = torch.stack((sides * 0 + 3, sides * 0 + 5, sides + 3, sides + 5), 1)
    for pool in (model.network.roi_heads.box_roi_pool, model.network.roi_heads.mask_roi_pool):
        wanted = pool({"0": maps[0], "1": maps[1]}, [boxes], [(512, 512)])
        assert torch.equal(PortableDetector(model)._pooled(pool, maps, boxes), wanted)


@pytest.mark.parametrize(("architecture", "kind"), BUNDLES)
def test_a_bundle_finds_what_the_detector_finds(
    architecture: str, kind: str, bundles: Bundles, models: dict[str, Path]
) -> None:
    """In drawn scenes and photographs of several sizes; and nothing in an image of the mean colour."""
    found = bundles(architecture, kind)
    assert found.agreement.same > 99
    ours, theirs = load_detector(found.folder), load_detector(models[architecture])
    assert isinstance(ours.model, RuntimeDetector)
    assert ours.class_names == NAMES
    photograph = torch.from_numpy(np.array(photographs()[0])).permute(2, 0, 1).float() / 255
    empty = torch.tensor(theirs.model.network.transform.image_mean)[:, None, None].expand(3, 50, 70)
    images = [*pictures(), photograph, empty]
    with torch.no_grad(), kernels.use("reference"):
        wanted = [theirs.model([image])[0] for image in images]  # one at a time: a batch is padded to its largest image
    counts = same(wanted, ours.model(images), 1e-4, 1e-2)
    assert min(counts[:2]) >= 3
    assert counts[-1] == 0


def test_an_onnx_file_of_a_detector_is_whole_plain_and_runs_alone(bundles: Bundles) -> None:
    import onnx
    import onnxruntime

    folder = bundles("mask_rcnn", "onnx").folder
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "bundle.json", "network.onnx"]
    model = onnx.load(folder / "network.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    told = {entry.key: entry.value for entry in model.metadata_props}
    described = json.loads((folder / "bundle.json").read_text())
    assert json.loads(told["label_names"]) == NAMES == described["label_names"]
    assert json.loads(told["data_config"]) == described["data_config"]
    axes = [dimension.dim_param or dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == [1, 3, "H", "W"]
    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    loaded = load_detector(folder).model
    data = described["data_config"]
    image = pictures()[0]  # of the size that the detector wants
    normalised = (image - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": normalised[None].numpy()}), strict=True))
    assert list(outputs) == ["boxes", "scores", "labels", "masks"]
    (wanted,) = loaded([image])
    for name in ("boxes", "scores", "labels"):
        assert np.allclose(outputs[name], wanted[name].numpy(), atol=1e-4)
    assert str(Path.cwd()).encode() not in (folder / "network.onnx").read_bytes()


def test_an_openvino_detector_says_what_it_is(bundles: Bundles) -> None:
    import openvino

    folder = bundles("mask_rcnn", "openvino").folder
    names = ["README.md", "bundle.json", "network.bin", "network.xml"]
    assert sorted(file.name for file in folder.iterdir()) == names
    network = openvino.Core().read_model(folder / "network.xml")
    assert json.loads(network.get_rt_info(["epsanet", "label_names"]).astype(str)) == NAMES
    assert network.get_rt_info(["epsanet", "backbone"]).astype(str) == "epsanet50_small"


def test_predict_and_evaluate_give_the_same_with_the_bundle(
    bundles: Bundles, models: dict[str, Path], tmp_path: Path
) -> None:
    """Tables, COCO results, and averages."""
    network = bundles("mask_rcnn", "onnx").folder / "network.onnx"
    assert is_detector(network)
    tables, results = [], []
    data = DataConfig(source=str(coco_folder(tmp_path / "coco", images=3)), batch_size=1, workers=0)
    for number, model in enumerate((network, models["mask_rcnn"])):
        table, result = tmp_path / f"{number}.json", tmp_path / f"coco{number}.json"
        assert cli.main(["predict", str(model), str(models["images"]), f"--output={table}", "--batch_size=1"]) == 0
        tables.append(json.loads(table.read_text()))
        evaluation = evaluate_detector(model, data, output=result, note=ignore)
        results.append((json.loads(result.read_text()), evaluation.box.ap, evaluation.images))
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["image"], ours["width"], ours["height"]) == (theirs["image"], theirs["width"], theirs["height"])
        assert len(ours["detections"]) >= 3
        for one, other in zip(ours["detections"], theirs["detections"], strict=True):
            assert one["class"] == other["class"]
            assert one["mask"]["size"] == other["mask"]["size"]
            assert [one["score"], *one["box"]] == pytest.approx([other["score"], *other["box"]], abs=1e-3)
    (ours, ap, images), (theirs, wanted, _) = results
    assert images == 3
    assert ap == pytest.approx(wanted, abs=1e-4)
    assert len(ours) >= 3
    assert [entry["category_id"] for entry in ours] == [entry["category_id"] for entry in theirs]
    assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-4)
    assert [entry["bbox"] for entry in ours] == [pytest.approx(entry["bbox"], abs=1e-2) for entry in theirs]


def detections(boxes: list[list[float]], scores: list[float], labels: list[int], **more: Tensor) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **more,
    }


def test_agreement_counts_what_is_found_again_lost_and_new() -> None:
    """Counted by hand: one is found again, one has another class, one another place, one is too weak to count."""
    a, b, c, far = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10], [40.0, 20, 50, 30]
    comparison = DetectionComparison(0.1)
    comparison.add(
        detections([a, b, c, far], [0.9, 0.8, 0.7, 0.05], [0, 1, 2, 0]),
        detections([[0.0, 0, 10, 10.5], b, far], [0.88, 0.8, 0.6], [0, 2, 2]),
    )
    comparison.add(detections([], [], []), detections([], [], []))
    found = comparison.result()
    assert (found.images, found.detections, found.found_again, found.new) == (2, 3, 1, 2)
    assert found.same == pytest.approx(100 / 5)
    assert (found.largest_score, found.largest_box) == (pytest.approx(0.02, abs=1e-6), 0.5)
    assert found.least_mask_iou is None


def test_a_box_without_area_is_found_again_where_it_was() -> None:
    flat, other = [5.0, 5, 5, 9], [50.0, 5, 50, 9]
    for place, again in ((5.0, 2), (5.5, 1)):
        comparison = DetectionComparison(0.1)
        moved = [place, 5, place, 9]
        comparison.add(detections([flat, other], [0.9, 0.8], [0, 0]), detections([other, moved], [0.9, 0.8], [0, 0]))
        assert comparison.result().found_again == again


def test_agreement_sees_masks_that_differ() -> None:
    masks = torch.zeros(1, 10, 20, dtype=torch.bool)
    masks[:, :, :10] = True
    other = masks.clone()
    other[:, 0, :10] = False  # 90 of 100 pixels
    less = masks.clone()
    less[:, :2, :10] = False  # 80 of 100
    box = [[0.0, 0, 10, 10]]
    for mask, iou, again in ((other, 0.9, 1), (less, 0.8, 0)):
        comparison = DetectionComparison(0.1)
        comparison.add(detections(box, [0.9], [0], masks=masks), detections(box, [0.9], [0], masks=mask))
        found = comparison.result()
        assert found.least_mask_iou == pytest.approx(iou)
        assert (found.found_again, found.new) == (again, 1 - again)


@pytest.fixture
def rewritten(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write the network of ``bundles``, whatever they are given: torch.export takes seconds."""

    def write(_: Any, kind: str, folder: Path, *__: Any) -> Path:
        return Path(shutil.copy(bundles("retinanet", kind).folder / "network.onnx", folder))

    monkeypatch.setattr(detection_module, "exported_program", lambda *_: None)
    monkeypatch.setattr(detection_module, "write_network", write)


@pytest.mark.usefixtures("rewritten")
def test_a_network_that_finds_other_things_is_refused_and_nothing_written(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Another shift of the last layer: the same boxes with other scores."""
    loaded = load_detector(models["retinanet"])
    config = ExportConfig(images=str(models["images"]))
    older = tmp_path / "bundle"
    export_detector(loaded, older, config, note=ignore)
    before = (older / "bundle.json").read_bytes()
    with torch.no_grad():
        loaded.model.network.head.classification_head.cls_logits.bias.add_(0.02)
    with pytest.raises(ValueError, match=r"scores differ by more than --tolerance 0.001\).*nothing is kept"):
        export_detector(loaded, older, config, note=ignore)
    with torch.no_grad():
        loaded.model.network.head.classification_head.cls_logits.bias.sub_(0.02)
        loaded.model.network.head.regression_head.bbox_reg.bias.add_(0.2)
    with pytest.raises(ValueError, match=r"less than --agreement 99 % are the same"):
        export_detector(loaded, tmp_path / "other", config, note=ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (older / "bundle.json").read_bytes() == before


@pytest.mark.usefixtures("rewritten")
def test_a_comparison_of_nothing_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_detector(models["retinanet"])
    colour = tuple(round(255 * value) for value in loaded.model.network.transform.image_mean)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / "plain.png")
    with pytest.raises(ValueError, match=r"nothing is found in 1 images.*--images FOLDER"):
        export_detector(loaded, tmp_path / "bundle", ExportConfig(images=str(tmp_path / "images")), note=ignore)


def test_a_detector_of_digits_is_checked_on_canvases_and_another_on_photographs() -> None:
    scenes = open_digits_scenes(DataConfig(source="digits-detection"))
    assert scenes.test is not None
    digits = detection_module._images(None, scenes.class_names)
    assert len(digits) == 32
    assert np.array_equal(np.array(digits[5]), np.array(scenes.test.read(5)[0]))
    others = detection_module._images(None, NAMES)
    assert [image.size for image in others[:2]] == [(640, 427), (320, 213)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--int8", "--calibrate", "digits"], "--int8 is for classifiers"),
        (["--tune"], "--tune is for classifiers"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--output", "mine"], "mine is there and no bundle"),
    ],
)
def test_impossible_exports_of_detectors_are_refused_in_one_line(
    flags: list[str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert cli.main(["export", str(models["faster_rcnn"]), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_bundle_of_a_detector_is_refused_where_layers_are_needed(bundles: Bundles, tmp_path: Path) -> None:
    folder = bundles("retinanet", "onnx").folder
    with pytest.raises(ValueError, match="an exported bundle already"):
        export_detector(folder, tmp_path / "bundle", ExportConfig(), note=ignore)
    with pytest.raises(ValueError, match=r"holds a detector; epsanet.load_detector reads it"):
        load_model(folder)
    with pytest.raises(ValueError, match="is an exported bundle, whose layers cannot be had"):
        start_detector_from(decided("retinanet"), NAMES, load_detector(folder))


def spoiled(folder: Path, change: str) -> None:
    """Change a bundle of RetinaNet in ONNX."""
    import onnx

    path, text = folder / "network.onnx", folder / "bundle.json"
    described = json.loads(text.read_text())
    if change in ("external", "absurd"):
        model = onnx.load(path)
        tensor = model.graph.initializer[0]
        if change == "absurd":
            tensor.dims[:] = [1 << 20, 1 << 18]
        else:
            tensor.ClearField("raw_data")
            tensor.data_location = 1
            tensor.external_data.add(key="location", value="../../../../etc/passwd")
        path.write_bytes(model.SerializeToString())
    elif change == "link":
        path.rename(folder / "elsewhere.onnx")
        path.symlink_to("elsewhere.onnx")
    described |= {"classes": {"label_names": ["ant"]}, "masks": {"architecture": "mask_rcnn"}}.get(change, {})
    described |= {"kind": {"architecture": "yolo"}, "word": {"format": "../../x"}}.get(change, {})
    described["data_config"] |= {"size": {"max_size": 1 << 20}, "mean": {"mean": ["a", "b", "c"]}}.get(change, {})
    text.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("external", "external data"),
        ("absurd", "absurd dimensions"),
        ("link", "it is a link"),
        ("classes", "other classes than its 1"),
        ("masks", "1 inputs and 3 outputs, not 1 and 4"),
        ("kind", "architecture 'yolo' is none of"),
        ("word", "format '../../x' is none of"),
        ("size", "are not 16 to 4096 pixels"),
        ("mean", "mean="),
    ],
)
def test_a_hostile_bundle_of_a_detector_is_refused_in_one_line(
    change: str,
    message: str,
    bundles: Bundles,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("retinanet", "onnx").folder, folder)
    spoiled(folder, change)
    assert cli.main(["predict", str(folder), str(models["images"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_is_no_detection_is_refused(bundles: Bundles) -> None:
    model: Any = load_detector(bundles("retinanet", "onnx").folder).model
    sound = model.run(torch.zeros(1, 3, 64, 64))
    box, score, label = torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    wrong = {
        "network gives": [box, score, label.float()],
        "for boxes, scores, labels": [box[:, :3], score, label],
        "some that are no numbers": [box * torch.nan, score, label],
        "20,000 detections": [box.repeat(20_000, 1), score.repeat(20_000), label.repeat(20_000)],
        "other classes than its 3": [box, score, label - 1],
    }
    assert len(sound) == 3
    for message, outputs in wrong.items():
        model.run = lambda _, outputs=outputs: outputs
        with pytest.raises(ValueError, match=message):
            model([torch.zeros(3, 64, 64)])
