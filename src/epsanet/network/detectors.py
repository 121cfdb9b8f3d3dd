"""Faster R-CNN, Mask R-CNN and RetinaNet on any backbone of timm (paper section 4.3).

The detectors are torchvision's; what is here is the feature pyramid over timm's features, what the 1x schedule keeps
frozen, and the model folder. Faster and Mask R-CNN have a pyramid of 256 channels over C2 to C5 and a max pool above,
RetinaNet one over C3 to C5 and two convolutions above, P6 and P7. "Frozen norms" are meant as in the 1x schedule: the
statistics stay, scale and shift are learnt (where their stage is), and so the published parameters are reached.

Boxes are ``x0, y0, x1, y1`` in pixels of the image as it was given; classes count from 0, without background.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from epsanet._files import atomic_folder
from epsanet.network.bundle import DETECTIONS, Run, read_detector_bundle, runtime_outputs, wrong_with_colours
from epsanet.network.detector_config import Architecture, DetectorConfig
from epsanet.network.foreign import NOT_OF_A_NETWORK, check_counts, check_tensors
from epsanet.network.model_folder import DETECTION, find_bundle, find_detector
from epsanet.network.weights import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, create_model

__all__ = [
    "Detector",
    "LoadedDetector",
    "PastedMasks",
    "RuntimeDetector",
    "create_detector",
    "load_detector",
    "loss_names",
    "save_detector",
]

Target = dict[str, Tensor]
_ROI_SIZE = 7
_MOST_DETECTIONS = 10_000
"""Of an image, from a bundle."""
_CLASSES = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet}


class _PyramidBackbone(nn.Module):
    """timm's features and torchvision's pyramid, with the attribute that torchvision's detectors ask for."""

    def __init__(self, body: Any, channels: int, norm: Any, *, p6p7: bool) -> None:
        super().__init__()
        found = body.feature_info.channels()
        above = LastLevelP6P7(found[-1], channels) if p6p7 else LastLevelMaxPool()
        self.body, self.out_channels = body, channels
        self.fpn = FeaturePyramidNetwork(found, channels, above, norm_layer=norm)
        self.levels = len(found) + (2 if p6p7 else 1)

    def forward(self, x_NCHW: Tensor) -> OrderedDict[str, Tensor]:
        features = self.body(x_NCHW.contiguous(memory_format=torch.channels_last))
        if str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC"):  # Swin and its kind
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        pyramid = self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(features)))
        if x_NCHW.device.type == "mps":  # where torchvision pools regions from features of the boxes' type only
            pyramid = OrderedDict((level, _at_least_32_bits(feature)) for level, feature in pyramid.items())
        return pyramid


def _at_least_32_bits(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Anchors(AnchorGenerator):
    """torchvision's, which makes anchors in the type of the features: 16 bits do not hold a pixel from 256 on."""

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(
            image_list, [_at_least_32_bits(feature.new_empty(())).expand(feature.shape) for feature in feature_maps]
        )


class _BoxCoder(BoxCoder):
    """torchvision's, which rounds boxes to the type of what the heads put out."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(_at_least_32_bits(rel_codes), _at_least_32_bits(boxes))


class PastedMasks:
    """Masks of an image, each drawn when it is asked for, since all of a large image may not fit into memory.

    A mask has shape ``H, W`` and is true where the probability, drawn into the box, is above a half.

    Args:
        probabilities_D1MM: of the cells of each box.
        boxes: of shape ``D, 4``.
        size: height and width of the image.
    """

    def __init__(self, probabilities_D1MM: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        self.probabilities_D1MM, self.boxes, self.size = probabilities_D1MM, boxes, size

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, place: int) -> Tensor:
        probability, box = self.probabilities_D1MM[place], self.boxes[place]
        return paste_masks_in_image(probability[None], box[None], self.size)[0, 0] > 0.5

    def together(self) -> Tensor:
        """All of them, of shape ``D, H, W``."""
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool, device=self.boxes.device)
        for place in range(len(self)):
            masks[place] = self[place]
        return masks


class _Transform(GeneralizedRCNNTransform):
    """torchvision's, which holds the masks of an image as numbers at its full size; here they are drawn later."""

    def postprocess(
        self, result: list[Any], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[Any]:
        if self.training:
            return result
        for detection, scaled, original in zip(result, image_shapes, original_image_sizes, strict=True):
            detection["boxes"] = resize_boxes(detection["boxes"], scaled, original)
            if "masks" in detection:
                detection["masks"] = PastedMasks(detection["masks"], detection["boxes"], original)
        return result


class Detector(nn.Module):
    """A torchvision detector whose classes count from 0.

    Args:
        network: torchvision's detector.
        config: what it was made from.
        backbone: name of the backbone in timm.
        backbone_args: its arguments.
        num_classes: classes without background.
    """

    def __init__(
        self, network: Any, config: DetectorConfig, backbone: str, backbone_args: dict[str, Any], num_classes: int
    ) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.backbone_name, self.backbone_args, self.num_classes = backbone, backbone_args, num_classes
        self._first = 0 if config.architecture == "retinanet" else 1  # RetinaNet has no output for the background

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """Losses by name in training, else detections.

        Args:
            images: values 0 to 1, each of shape ``3, H, W``, of any sizes.
            targets: in training, one an image: ``boxes`` of shape ``K, 4``, ``labels`` of shape ``K``, and for masks
                ``masks`` of shape ``K, H, W``, 0 or 1.

        Returns:
            In evaluation one dict an image: ``boxes`` of shape ``D, 4``, ``scores`` and ``labels`` of shape ``D``,
            best first, and from Mask R-CNN ``masks`` of shape ``D, H, W``, true where the object is.
        """
        if self.training:
            assert targets is not None
            return self.network(
                list(images), [{**target, "labels": target["labels"] + self._first} for target in targets]
            )
        detections = self.detect(images)
        for detection in detections:
            if "masks" in detection:
                detection["masks"] = detection["masks"].together()
        return detections

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Detections as ``forward`` gives them in evaluation, but the masks as ``PastedMasks``.

        Each image goes through the network alone. In a batch, all are padded to the largest, and attention that
        averages over a whole map would see the padding: what is found in an image would depend on its neighbours.

        Args:
            images: as in ``forward``.
        """
        detections: list[dict[str, Any]] = []
        for image in images:
            (detection,) = self.network([image])
            detections.append({**detection, "labels": detection["labels"] - self._first})
        return detections

    def train(self, mode: bool = True) -> Detector:
        """Switch the mode; norms of the backbone stay as they are with ``norm_eval``."""
        super().train(mode)
        if mode and self.config.norm_eval:
            _keep_statistics(self.network.backbone.body)
        return self

    @torch.no_grad()
    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses of training, of the network as it is in evaluation: norms use their running statistics.

        Which anchors and regions count is drawn from torch's generator.

        Args:
            images: as in ``forward``.
            targets: as in ``forward``.
        """
        before = self.training
        self.train()
        _keep_statistics(self)
        try:
            losses: dict[str, Tensor] = self(images, targets)
        finally:
            self.train(before)
        return losses


def _keep_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class RuntimeDetector(Detector):
    """A detector in another runtime: an image at a time, no gradients, on the CPU.

    Args:
        run: gives ``DETECTIONS`` of an image that is scaled and normalised, in its pixels.
        transform: scales and normalises.
        config: architecture and sizes.
        backbone: name of the backbone in timm.
        num_classes: classes without background.
        digest: of its files; the module's only state, by which one bundle can be told from another.
    """

    def __init__(
        self, run: Run, transform: _Transform, config: DetectorConfig, backbone: str, num_classes: int, digest: bytes
    ) -> None:
        super().__init__(nn.Module(), config, backbone, {}, num_classes)
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self.run, self.network.transform = run, transform.eval()

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Detections, as of ``Detector``.

        Raises:
            ValueError: when the runtime fails, or gives what is no detection.
        """
        return [self._detected(image) for image in images]

    def _detected(self, image: Tensor) -> dict[str, Any]:
        transform = self.network.transform
        scaled = transform.resize(transform.normalize(image))[0]
        found = dict(zip(DETECTIONS, runtime_outputs(self.run, scaled[None]), strict=False))
        self._check(found)
        size = [(height, width) for height, width in (scaled.shape[-2:], image.shape[-2:])]
        found = {name: value.to(image.device) for name, value in found.items()}
        return transform.postprocess([found], size[:1], size[1:])[0]

    def _check(self, found: Target) -> None:
        boxes, scores, labels = (found[name] for name in DETECTIONS[:3])
        count = len(scores) if scores.ndim else -1
        masks = found.get("masks", torch.zeros(max(count, 0), 1, 1, 1))
        shapes = tuple(boxes.shape), tuple(scores.shape), tuple(labels.shape), (*masks.shape[:2], masks.ndim)
        if shapes != ((count, 4), (count,), (count,), (count, 1, 4)) or labels.dtype != torch.int64:
            raise ValueError(f"the network gives {', '.join(map(str, shapes))} for {', '.join(DETECTIONS)}")
        if not all(bool(values.isfinite().all()) for values in (boxes, scores, masks)) or count > _MOST_DETECTIONS:
            raise ValueError(f"the network gives {count:,} detections, or some that are no numbers")
        if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(f"the network gives other classes than its {self.num_classes}")


def create_detector(
    backbone: str,
    num_classes: int,
    config: DetectorConfig,
    *,
    backbone_args: dict[str, Any] | None = None,
) -> Detector:
    """Build a detector; the weights of frozen stages take no gradient.

    Args:
        backbone: any network of timm with ``features_only``.
        num_classes: classes without background.
        config: architecture, sizes, what is frozen.
        backbone_args: of the backbone.

    Raises:
        ValueError: for a backbone that timm lacks or that gives no features or takes no RGB images, or sizes that do
            not fit together.
    """
    retina = config.architecture == "retinanet"
    arguments = dict(backbone_args or {})
    indices = tuple(config.out_indices or ((-3, -2, -1) if retina else (-4, -3, -2, -1)))
    try:
        body = create_model(backbone, features_only=True, out_indices=indices, **arguments)
    except (RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"{backbone} cannot be the backbone of a detector: {_first_line(error)}") from error
    if body.in_chans != 3:
        raise ValueError(f"{backbone} takes {body.in_chans}-channel images, and detectors RGB ones; leave in_chans out")
    _freeze(body, config.frozen_stages, backbone)
    pyramid = _PyramidBackbone(body, config.fpn_channels, _norm(config), p6p7=retina)
    if len(config.anchor_sizes) != pyramid.levels:
        raise ValueError(
            f"detector.anchor_sizes has {len(config.anchor_sizes)} sizes for {pyramid.levels} levels; give one each"
        )
    data_config = resolve_data_config(model=body)
    network = _CLASSES[config.architecture](
        pyramid,
        num_classes if retina else None,  # the other two take it from their heads
        **_heads(config, num_classes, levels=len(indices)),
        **_checked_args(config),
    )
    mean, std = list(data_config["mean"]), list(data_config["std"])
    network.transform = _Transform(config.min_size, config.max_size, mean, std)
    for part in (network, network.head.regression_head) if retina else (network.rpn, network.roi_heads):
        part.box_coder = _BoxCoder(part.box_coder.weights, part.box_coder.bbox_xform_clip)
    return Detector(network, config, backbone, arguments, num_classes)


def _heads(config: DetectorConfig, num_classes: int, levels: int) -> dict[str, Any]:
    """Anchors and heads in the widths of the configuration; the defaults are torchvision's own."""
    retina, channels = config.architecture == "retinanet", config.fpn_channels
    octaves = (0, 1 / 3, 2 / 3) if retina else (0,)
    sizes = tuple(tuple(int(size * 2**octave) for octave in octaves) for size in config.anchor_sizes)
    anchors = _Anchors(sizes, (tuple(config.aspect_ratios),) * len(sizes))
    if retina:
        head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=_norm(config))
        return {"anchor_generator": anchors, "score_thresh": config.score_thresh, "head": head}
    width, pooled = config.representation_size, [str(level) for level in range(levels)]
    heads: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_score_thresh": config.score_thresh,
        "box_roi_pool": MultiScaleRoIAlign(pooled, _ROI_SIZE, config.sampling_ratio),
        "box_head": TwoMLPHead(channels * _ROI_SIZE**2, width),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),
    }
    if config.has_masks:
        mask = config.mask_channels
        heads["mask_roi_pool"] = MultiScaleRoIAlign(pooled, 2 * _ROI_SIZE, config.sampling_ratio)
        heads["mask_head"] = MaskRCNNHeads(channels, (mask,) * 4, 1, norm_layer=_norm(config))
        heads["mask_predictor"] = MaskRCNNPredictor(mask, mask, num_classes + 1)
    return heads


def _norm(config: DetectorConfig) -> Callable[[int], nn.Module] | None:
    """A norm over groups of 16 channels; all channels where 16 do not divide them (Wu and He, ECCV 2018)."""
    if not config.group_norm:
        return None
    return lambda channels: nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


def _checked_args(config: DetectorConfig) -> dict[str, Any]:
    """What torchvision would swallow without a word."""
    known = set(inspect.signature(_CLASSES[config.architecture]).parameters) - {"backbone", "num_classes", "kwargs"}
    known -= {"min_size", "max_size", "image_mean", "image_std", "box_score_thresh", "score_thresh"}
    unknown = sorted(set(config.detector_args) - known)
    if unknown:
        near = ", ".join(sorted(name for name in known if name.split("_")[0] == unknown[0].split("_")[0])) or "none"
        raise ValueError(
            f"detector.detector_args has {unknown[0]!r}, which {config.architecture} lacks; near it: {near}"
        )
    return config.detector_args


def _freeze(body: Any, stages: int, name: str) -> None:
    """Keep everything from the image up to this feature of timm's list, whose first is the stem or the first stage."""
    if stages < 0:
        return
    modules = [info["module"].replace(".", "_") for info in body.feature_info.info]
    if body.feature_info.info[0]["reduction"] >= 4:  # ConvNeXt, Swin and others give no feature of the stem
        modules = ["", *modules]
    children = dict(body.named_children())
    if stages >= len(modules) or (modules[stages] or modules[1]) not in children:
        raise ValueError(f"{name} cannot freeze {stages} stages; use detector.frozen_stages=-1 to train all of it")
    for child, module in children.items():
        if child == modules[1] and not modules[stages]:
            return
        module.requires_grad_(False)
        if child == modules[stages]:
            return


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@dataclass(kw_only=True)
class LoadedDetector:
    """A detector with the names of its classes."""

    model: Detector
    """In evaluation mode; it scales and normalises images itself."""
    class_names: list[str]
    """One name a class, in the order of the labels."""


def save_detector(folder: str | Path, model: Detector, class_names: Sequence[str], card: str = "") -> None:
    """Write a model folder, whole or not at all; an existing one is replaced.

    Args:
        folder: where to.
        model: the detector.
        class_names: one name a class.
        card: text of ``README.md``.

    Raises:
        ValueError: when the number of names is not the detector's number of classes.
    """
    if len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a detector of {model.num_classes} classes; give one each")
    transform = model.network.transform
    config = {
        "task": DETECTION,
        "architecture": model.config.architecture,
        "backbone": model.backbone_name,
        "backbone_args": model.backbone_args,
        "num_classes": model.num_classes,
        "label_names": list(class_names),
        "mean": list(transform.image_mean),
        "std": list(transform.image_std),
        "detector": dataclasses.asdict(model.config),
    }
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
        # Not save_file, for which a full disk is no OSError.
        (temporary / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")


def load_detector(source: str | Path) -> LoadedDetector:
    """A detector from its model folder, from the run folder around it, or from a bundle of ``epsanet export``.

    Args:
        source: the folder.

    Raises:
        ValueError: when it holds no detector, or is damaged; one line that says what.
    """
    bundle = find_bundle(source)
    if bundle is not None:
        return _load_bundle(bundle)
    found = find_detector(source)
    if found is None:
        raise ValueError(f"{source} holds no detector; give a folder that detection training wrote")
    folder, config = found
    if not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}; copy the folder again")
    try:
        names = [str(name) for name in config["label_names"]]
        arguments = (config["backbone"], len(names), DetectorConfig(**config["detector"]))
        elsewhere = sorted(NOT_OF_A_NETWORK & config["backbone_args"].keys())
        if elsewhere:
            raise ValueError(f"it names weights that are elsewhere ({', '.join(elsewhere)})")
        tensors = load_file(folder / WEIGHTS_NAME)
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        check_counts({"backbone_args": config["backbone_args"]}, shapes, folder / CONFIG_NAME)
        reason = wrong_with_colours(config)
        if reason:
            raise ValueError(reason)
        with torch.device("meta"):  # the size that the configuration asks for is not believed before it is seen
            wanted = create_detector(*arguments, backbone_args=config["backbone_args"]).network.state_dict()
        wrong = [name for name in wanted.keys() | tensors.keys() if not _alike(wanted.get(name), tensors.get(name))]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(wanted)} tensors do not fit its configuration, first {min(wrong)}")
        model = create_detector(*arguments, backbone_args=config["backbone_args"])
        check_tensors(tensors, model.network, folder / WEIGHTS_NAME)
        model.network.load_state_dict(tensors)
        model.network.transform.image_mean, model.network.transform.image_std = config["mean"], config["std"]
    except _DAMAGE as error:
        raise ValueError(f"the model folder {folder} is damaged: {_first_line(error)}; copy it again") from error
    return LoadedDetector(model=model.eval(), class_names=names)


# What reading a folder raises that is not what save_detector wrote.
_DAMAGE = (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, SafetensorError, OSError)


def _load_bundle(folder: Path) -> LoadedDetector:
    run, digest, description = read_detector_bundle(folder)
    data, names = description["data_config"], description["label_names"]
    sizes = data["min_size"], data["max_size"]
    model = RuntimeDetector(
        run,
        _Transform(*sizes, list(data["mean"]), list(data["std"])),
        DetectorConfig(architecture=description["architecture"], min_size=sizes[0], max_size=sizes[1], norm_eval=False),
        str(description.get("backbone")),
        len(names),
        digest,
    )
    return LoadedDetector(model=model.eval(), class_names=names)


def loss_names(architecture: Architecture) -> tuple[str, ...]:
    """What torchvision calls the losses of a detector."""
    if architecture == "retinanet":
        return ("classification", "bbox_regression")
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    return (*names, "loss_mask") if architecture == "mask_rcnn" else names


def _alike(wanted: Tensor | None, found: Tensor | None) -> bool:
    return wanted is not None and found is not None and wanted.shape == found.shape
