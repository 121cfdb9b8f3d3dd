"""The paper's detectors: their size, what is frozen, how classes are counted, and their model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detecting import BACKBONE, BACKBONE_ARGS, detector, detector_config, scene
from safetensors.torch import load_file, save_file
from torchvision.models.detection.roi_heads import paste_masks_in_image

from epsanet.network.detector_config import Architecture, DetectorConfig
from epsanet.network.detector_start import start_detector_from
from epsanet.network.detectors import LoadedDetector, create_detector, load_detector, save_detector
from epsanet.network.model_folder import is_detector
from epsanet.network.weights import LoadedModel, create_model, load_model, save_model

ARCHITECTURES: tuple[Architecture, ...] = ("faster_rcnn", "mask_rcnn", "retinanet")


@pytest.mark.parametrize(
    ("architecture", "backbone", "measured", "published"),
    [
        ("faster_rcnn", "epsanet50_small", "38.57", 38.56),
        ("faster_rcnn", "epsanet50_large", "43.86", 43.85),
        ("mask_rcnn", "epsanet50_small", "41.21", 41.20),
        ("mask_rcnn", "epsanet50_large", "46.50", 46.50),
        ("retinanet", "epsanet50_small", "34.78", 34.78),
        ("retinanet", "epsanet50_large", "40.07", 40.07),
    ],
)
def test_trained_parameters_are_those_of_the_paper(
    architecture: Architecture, backbone: str, measured: str, published: float
) -> None:
    with torch.device("meta"):
        model = create_detector(backbone, 80, DetectorConfig(architecture=architecture))
    millions = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    assert f"{millions:.2f}" == measured
    assert millions == pytest.approx(published, abs=0.011)


SE_BIASES = sum(blocks * (width + width // 16) for blocks, width in ((4, 512), (6, 1024), (3, 2048)))


@pytest.mark.parametrize(("backbone", "millions", "biases"), [("resnet50", 41.53, 0), ("seresnet50", 44.02, SE_BIASES)])
def test_the_rivals_fit_the_same_detector(backbone: str, millions: float, biases: int) -> None:
    """The figures that papers give of Faster R-CNN on ResNet-50 and SENet-50, whose SE there has no biases."""
    with torch.device("meta"):
        model = create_detector(backbone, 80, DetectorConfig())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (trained - biases) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_1x_schedule_freezes_stem_stage_and_statistics_and_trains_the_rest() -> None:
    model = detector("faster_rcnn", frozen_stages=1, norm_eval=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = zip(*(scene(number) for number in range(2)), strict=True)
    sum(model(images, targets).values()).backward()
    body = "network.backbone.body."
    for name, parameter in model.named_parameters():
        frozen = name.startswith((body + "conv1", body + "bn1", body + "layer1"))
        assert (parameter.grad is None) == frozen, name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed without an optimiser"


def test_without_norm_eval_the_statistics_follow_the_images() -> None:
    model = detector("faster_rcnn", norm_eval=False).train()
    norm = model.network.backbone.body.bn1
    images, targets = zip(*(scene(number) for number in range(2)), strict=True)
    model(images, targets)
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.abs().max() > 0


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet18"])
def test_frozen_stages_are_counted_from_the_first_with_or_without_a_feature_of_the_stem(backbone: str) -> None:
    for stages in (0, 1, 2):
        with torch.device("meta"):
            body = create_detector(backbone, 2, DetectorConfig(frozen_stages=stages)).network.backbone.body
        prefix = "stages_" if backbone == "convnext_atto" else "layer"
        first = 0 if backbone == "convnext_atto" else 1
        for name, parameter in body.named_parameters():
            stage = int(name.removeprefix(prefix)[0]) - first + 1 if name.startswith(prefix) else 0
            assert parameter.requires_grad == (stage > stages), (stages, name)


def test_a_transformer_with_channels_last_features_learns_and_finds() -> None:
    arguments = {"strict_img_size": False, "img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1)}
    model = create_detector(
        "swin_tiny_patch4_window7_224",
        3,
        detector_config("faster_rcnn", out_indices=[0, 1]),
        backbone_args={**arguments, "num_heads": (1, 1, 1, 1)},
    )
    images, targets = zip(*(scene(number, size=64) for number in range(2)), strict=True)
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert model.network.backbone.body.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_boxes_are_of_32_bits_under_mixed_precision(architecture: Architecture) -> None:
    """16 bits hold whole pixels up to 256 only; torchvision's anchors and boxes are of the type of the features."""
    model = detector(architecture, min_size=640, max_size=640, score_thresh=0.0).eval()
    image, seen = torch.rand(3, 640, 600), []
    generator = model.network.anchor_generator if architecture == "retinanet" else model.network.rpn.anchor_generator
    generator.register_forward_hook(lambda _, __, anchors: seen.append(anchors[0]))
    with torch.no_grad():
        model.detect([image])
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model.detect([image])
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert found["boxes"].dtype == torch.float32
    assert len(found["boxes"]) > 50
    rounded = found["boxes"].bfloat16().float()
    assert (rounded - found["boxes"]).abs().max() > 0.5, "they would have been moved by half a pixel and more"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classes_that_a_detector_knows_by_name_come_along_in_any_order(architecture: Architecture) -> None:
    source = LoadedDetector(model=detector(architecture).eval(), class_names=["a", "b", "c"])
    torch.manual_seed(2)
    model = create_detector(BACKBONE, 3, detector_config(architecture), backbone_args=BACKBONE_ARGS).eval()
    if architecture == "retinanet":  # whose scores start all alike
        for each in (source.model, model):
            torch.nn.init.normal_(each.network.head.classification_head.cls_logits.weight)
    said = start_detector_from(model, ["c", "new", "a"], source)
    assert "2 of its classes" in said
    one, other = source.model.network, model.network
    with torch.no_grad():
        if architecture == "retinanet":
            features = [torch.randn(1, 16, 8, 8)]
            logits = [net.head.classification_head(features) for net in (one, other)]
            torch.testing.assert_close(logits[1][..., [0, 2]], logits[0][..., [2, 0]])
            assert not torch.allclose(logits[1][..., 1], logits[0][..., 1])
            return
        features = torch.randn(5, 16)
        scores, deltas = zip(*(net.roi_heads.box_predictor(features) for net in (one, other)), strict=True)
        torch.testing.assert_close(scores[1][:, [0, 1, 3]], scores[0][:, [0, 3, 1]])
        boxes = [each.reshape(5, 4, 4) for each in deltas]
        torch.testing.assert_close(boxes[1][:, [0, 1, 3]], boxes[0][:, [0, 3, 1]])
        if architecture == "mask_rcnn":
            maps = torch.randn(2, 8, 4, 4)
            masks = [net.roi_heads.mask_predictor(maps) for net in (one, other)]
            torch.testing.assert_close(masks[1][:, [0, 1, 3]], masks[0][:, [0, 3, 1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classes_count_from_zero_in_and_out(architecture: Architecture) -> None:
    """A detector whose class scores say one thing for every box gives that class; its loss is least for that label."""
    model = detector(architecture, classes=4, score_thresh=0.0)
    head = (
        model.network.head.classification_head.cls_logits
        if architecture == "retinanet"
        else model.network.roi_heads.box_predictor.cls_score
    )
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(
            torch.tensor([-9.0, -9, 9, -9] * 9) if architecture == "retinanet" else torch.tensor([0.0, 0, 0, 9, 0])
        )
    image, target = scene(0)
    detection = model.eval()([image])[0]
    best = detection["labels"][detection["scores"] > 0.5]
    assert len(best) > 0
    assert set(best.tolist()) == {2}
    model.train()
    losses = []
    for label in range(4):
        torch.manual_seed(0)
        found = model([image], [{**target, "labels": torch.full_like(target["labels"], label)}])
        losses.append(found["classification" if architecture == "retinanet" else "loss_classifier"].item())
    assert min(range(4), key=losses.__getitem__) == 2


def test_masks_are_true_where_the_probability_is_above_a_half() -> None:
    model = detector("mask_rcnn", score_thresh=0.0).eval()
    image = scene(0)[0]
    with torch.no_grad():
        model.network.roi_heads.mask_predictor.mask_fcn_logits.weight.zero_()
        model.network.roi_heads.mask_predictor.mask_fcn_logits.bias.fill_(5.0)
    detection = model([image])[0]
    large = (detection["boxes"][:, 2:] - detection["boxes"][:, :2]).amin(dim=1) > 12
    assert large.sum() > 3
    for box, mask in zip(detection["boxes"][large], detection["masks"][large], strict=True):
        x0, y0, x1, y1 = box.tolist()
        inside = mask[round(y0) : round(y1), round(x0) : round(x1)]
        assert mask.sum() == pytest.approx((x1 - x0) * (y1 - y0), rel=0.3)
        assert inside.float().mean() > 0.85


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_is_seen_alone_whatever_is_in_its_batch(architecture: Architecture) -> None:
    """Padded to another's size, the averages of the attention would be those of image and padding; to the last bit."""
    model = detector(architecture, score_thresh=0.0).eval()
    images = [scene(0)[0], torch.rand(3, 40, 90), scene(1)[0], torch.rand(3, 96, 30), torch.rand(3, 40, 90)]
    with torch.no_grad():
        together = model(images)
        for image, found in zip(images, together, strict=True):
            (alone,) = model([image])
            assert len(alone["scores"]) > 0
            assert all(torch.equal(found[key], alone[key]) for key in alone)
            (by_torchvision,) = model.network([image])
            assert torch.equal(found["scores"], by_torchvision["scores"])
            if "masks" in found:
                drawn = paste_masks_in_image(
                    by_torchvision["masks"].probabilities_D1MM, found["boxes"], tuple(image.shape[-2:])
                )
                assert torch.equal(found["masks"], drawn[:, 0] > 0.5)
                assert found["masks"].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_gives_the_same_detections(architecture: Architecture, tmp_path: Path) -> None:
    model = detector(architecture, score_thresh=0.01).eval()
    save_detector(tmp_path / "model", model, ["a", "b", "c"], card="words")
    loaded = load_detector(tmp_path / "model")
    assert loaded.class_names == ["a", "b", "c"]
    assert is_detector(tmp_path)
    images = [scene(3)[0], torch.rand(3, 40, 90)]
    with torch.no_grad():
        for found, wanted in zip(loaded.model(images), model(images), strict=True):
            assert found.keys() == wanted.keys()
            assert len(wanted["scores"]) > 0
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_disk_without_room_for_a_detector_is_named_and_keeps_nothing_of_it(small_disk: Path) -> None:
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk / 'model'}'"):
        save_detector(small_disk / "model", detector(fpn_channels=64), ["a", "b", "c"])
    assert list(small_disk.iterdir()) == []


def test_a_folder_of_a_classifier_is_no_detector(tmp_path: Path) -> None:
    save_model(tmp_path, create_model("epsanet14_tiny", num_classes=2), ["a", "b"])
    assert not is_detector(tmp_path)
    with pytest.raises(ValueError, match="holds no detector"):
        load_detector(tmp_path)


def test_a_folder_of_a_detector_is_no_classifier(tmp_path: Path) -> None:
    save_detector(tmp_path / "run" / "model", detector(), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"holds a detector; epsanet.load_detector reads it"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("damage", ["short", "renamed", "names", "key", "weights", "elsewhere", "huge"])
def test_a_damaged_folder_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    save_detector(tmp_path, detector(), ["a", "b", "c"])
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    if damage == "short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "renamed":
        tensors = load_file(weights)
        tensors["other"] = tensors.pop(next(iter(tensors)))
        save_file(tensors, weights)
    elif damage == "weights":
        weights.unlink()
    elif damage == "elsewhere":
        config["backbone_args"]["pretrained_cfg"] = {"url": "http://localhost:1/weights"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif damage == "huge":
        config["detector"]["representation_size"] = 10**12
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        config["label_names" if damage == "names" else "detector"] = ["a"] if damage == "names" else {"size": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="copy") as caught:
        load_detector(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("backbone_args", "layers"), [10**9] * 4, "layers=1000000000, more than anything"),
        (("detector", "min_size"), 10**9, "min_size=1000000000"),
        (("detector", "max_size"), 10**9, "max_size=1000000000"),
        (("detector", "anchor_sizes", 0), float("inf"), r"anchor_sizes=\[inf"),
        (("std",), [0.2, 0, 0.2], "is not positive"),
        (("mean",), [float("nan")] * 3, "not three numbers"),
        (("mean",), 0.5, "not three numbers"),
    ],
)
def test_a_configuration_that_asks_for_too_much_or_for_nonsense_is_refused(
    place: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    save_detector(tmp_path, detector(), ["a", "b", "c"])
    config = json.loads((tmp_path / "config.json").read_text())
    inner: Any = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is damaged: .*{message}.*copy it again") as caught:
        load_detector(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_group_norms_are_where_the_configuration_puts_them(architecture: Architecture) -> None:
    """16 channels a group in the pyramid and the heads' convolutions, and none without."""

    def norms(model: Any) -> dict[str, tuple[int, int]]:
        modules = model.network.named_modules()
        return {name: (m.num_groups, m.num_channels) for name, m in modules if isinstance(m, torch.nn.GroupNorm)}

    assert norms(detector(architecture)) == {}
    found = norms(detector(architecture, group_norm=True, fpn_channels=32, mask_channels=20))
    pyramid = {shape for name, shape in found.items() if "fpn" in name}
    heads = {shape for name, shape in found.items() if "head" in name}
    assert pyramid == {(2, 32)}
    assert heads == {"faster_rcnn": set(), "mask_rcnn": {(1, 20)}, "retinanet": {(2, 32)}}[architecture]


def test_regions_are_pooled_from_as_many_points_as_asked_for() -> None:
    """Of a ramp, one point a cell is its middle; torchvision's own default is two points a side."""
    assert detector("mask_rcnn").network.roi_heads.box_roi_pool.sampling_ratio == 2
    for ratio, seen in ((1, [2.0]), (2, [1.0, 3.0])):
        heads = detector("mask_rcnn", sampling_ratio=ratio).network.roi_heads
        for pool, side in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
            ramp = (torch.arange(64.0) ** 2).expand(1, 1, 64, 64)
            found = pool({"0": ramp, "1": ramp[..., ::2, ::2]}, [torch.tensor([[0.0, 0, 4 * side, 4]])], [(64, 64)])
            longhand = [  # cells 4 pixels wide; values between pixels on a line
                sum(_between(4 * cell + place) for place in seen) / len(seen) for cell in range(side)
            ]
            assert found[0, 0, 0].tolist() == pytest.approx(longhand, rel=1e-5)


def _between(x: float) -> float:
    left = int(x)
    return left**2 + (x - left) * ((left + 1) ** 2 - left**2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_in_evaluation_are_those_of_training_without_any_trace(architecture: Architecture) -> None:
    """Equal to the training losses of a network whose norms keep their statistics; mode and weights stay."""
    model = detector(architecture, norm_eval=True)
    images, targets = zip(*(scene(number) for number in range(2)), strict=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = model.train()(images, targets)
    model.config.norm_eval = False
    model.eval()
    torch.manual_seed(3)
    found = model.losses(images, targets)
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=1e-6)
        assert not found[name].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_backbone_starts_from_a_classifier_of_the_same_kind_and_sees_images_as_it_did() -> None:
    source = create_model(BACKBONE, num_classes=5, **BACKBONE_ARGS)
    loaded = LoadedModel(model=source, class_names=list("abcde"), data_config={"mean": (0.1,) * 3, "std": (0.3,) * 3})
    model = detector()
    heads = {name: value.clone() for name, value in model.network.state_dict().items() if "backbone.body" not in name}
    text = start_detector_from(model, ["x", "y", "z"], loaded)
    body = model.network.backbone.body.state_dict()
    assert text == f"{len(body)} tensors of the backbone; pyramid and heads are new"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in body.items())
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in heads.items())
    assert (model.network.transform.image_mean, model.network.transform.image_std) == ([0.1] * 3, [0.3] * 3)
    other = create_model("epsanet14_tiny", num_classes=5)
    with pytest.raises(ValueError, match=r"another network than epsanet50_small: .* first conv1.weight"):
        start_detector_from(model, ["x"], LoadedModel(model=other, class_names=["x"], data_config=loaded.data_config))


def test_an_epsanet_backbone_inherits_the_filters_of_a_resnet() -> None:
    """EPSANet's first branch of 3×3 and one group has a quarter of the ResNet's filters as they are."""
    resnet = create_model("resnet50", num_classes=5)
    source = LoadedModel(model=resnet, class_names=list("abcde"), data_config={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    model = create_detector("epsanet50_small", 3, detector_config(frozen_stages=-1))
    text = start_detector_from(model, ["x", "y", "z"], source)
    assert ", 7 PSA modules from 3×3 convolutions;" in text  # features 1 and 2 need two stages of 3 and 4 blocks
    weights = resnet.state_dict()["layer1.0.conv2.weight"]
    branch = model.network.backbone.body.layer1[0].conv2.spc.branches[0]
    assert torch.equal(branch.weight, weights[: len(branch.weight)])
    frozen = create_detector("epsanet50_small", 3, detector_config(frozen_stages=1))
    with pytest.raises(ValueError, match=r"layer1.0.conv2 and 2 other PSA modules .*--detector.frozen_stages -1"):
        start_detector_from(frozen, ["x", "y", "z"], source)


OF_THE_CLASSES = {
    "faster_rcnn": {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"},
    "retinanet": {"head.classification_head.cls_logits"},
}
OF_THE_CLASSES["mask_rcnn"] = OF_THE_CLASSES["faster_rcnn"] | {"roi_heads.mask_predictor.mask_fcn_logits"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_detector_starts_from_another_whose_classes_come_along_if_they_are_the_same(
    architecture: Architecture,
) -> None:
    source = LoadedDetector(model=detector(architecture), class_names=["a", "b", "c"])
    for names in (["a", "b", "c"], ["a", "b", "c", "d"]):
        torch.manual_seed(2)
        model = create_detector(BACKBONE, len(names), detector_config(architecture), backbone_args=BACKBONE_ARGS)
        start_detector_from(model, names, source)
        given = source.model.network.state_dict()
        new = {name for name, value in model.network.state_dict().items() if not torch.equal(value, given[name])}
        if len(names) == 3:
            assert new == set()
            continue
        assert {name.rpartition(".")[0] for name in new} == OF_THE_CLASSES[architecture]
    with pytest.raises(ValueError, match=r"another network than .*"):
        start_detector_from(detector(architecture, fpn_channels=24), ["a", "b", "c"], source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "yolo"}, "faster_rcnn, mask_rcnn, retinanet"),
        ({"min_size": 900, "max_size": 800}, "do not fit"),
        ({"frozen_stages": -2}, "-1 or more"),
        ({"frozen_stages": 7}, "frozen_stages=-1"),
        ({"fpn_channels": 0}, "1 or more"),
        ({"sampling_ratio": 0}, "1 or more"),
        ({"anchor_sizes": [32, 64]}, "2 sizes for 3 levels"),
        ({"aspect_ratios": []}, "above 0"),
        ({"score_thresh": 1.0}, "below 1"),
        ({"detector_args": {"box_nms": 0.5}}, "box_nms_thresh"),
    ],
)
def test_an_impossible_detector_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_detector(BACKBONE, 3, detector_config(**changes), backbone_args=BACKBONE_ARGS)


def test_features_that_a_network_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="epsanet50_small cannot be"):
        create_detector(BACKBONE, 3, DetectorConfig(out_indices=[3, 4, 5, 6]))
