"""A detector in operators that other runtimes have, from one image to its boxes, scores, labels and masks.

What torchvision's detectors compute after their layers (anchors, decoding, the choice of boxes, the pyramid's levels)
branches on values, which no exported program can. Here it is said again without branches: what may be absent is padded
to a fixed number and left out by its score. The layers are the detector's own.

Shapes: ``R`` regions, ``D`` detections, ``C`` classes, ``L`` levels of the pyramid, ``A`` anchors of a level.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, box_area, clip_boxes_to_image, nms, roi_align

from epsanet.deploy.portable import portable
from epsanet.network.detectors import Detector

__all__ = ["PortableDetector"]

Size = tuple[int, int]
Found = tuple[Tensor, Tensor, Tensor]
"""Boxes, scores and groups: classes, or levels of the pyramid."""
_STRIDE = 32
"""Heights and widths are padded to a multiple of it, as torchvision does."""
_LEVEL_EPS = 1e-6
"""torchvision's, so that a box of just the canonical scale has the canonical level."""
_BOARD = 16
"""Groups a row of the board: about the root of the number of classes, which is 3 to 1,000."""
_SMALLEST_BOX = 1e-2
"""torchvision's least side of a detection in pixels."""


class PortableDetector(nn.Module):
    """A copy of a detector for one image, whose program has no branches.

    Args:
        detector: in float32 on the CPU; it stays as it is.
    """

    off_board: Tensor
    off_scores: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        backbone = detector.network.backbone
        self.body, self.strides = portable(backbone.body), backbone.body.feature_info.reduction()
        self.network = copy.deepcopy(detector.network).eval().requires_grad_(False)
        self.network.backbone.body = None
        self.retina = detector.config.architecture == "retinanet"
        self.register_buffer("off_board", torch.tensor([[-2.0, -2, -1, -1], [-4, -4, -3, -3]]))
        self.register_buffer("off_scores", torch.tensor([3.0, 2]))

    def forward(self, image_1CHW: Tensor) -> tuple[Tensor, ...]:
        """What is found in an image that is scaled and normalised, best first.

        Returns:
            Boxes of shape ``D, 4`` in the image's pixels, scores and labels of shape ``D``, and from Mask R-CNN masks
            of shape ``D, 1, M, M``, the probability of each cell of a box.
        """
        height, width = size = (image_1CHW.shape[2], image_1CHW.shape[3])
        x = F.pad(image_1CHW, (0, _up(width) - width, 0, _up(height) - height))
        features = OrderedDict((str(level), feature) for level, feature in enumerate(self.body(x)))
        maps = list(self.network.backbone.fpn(features).values())
        generator = self.network.anchor_generator if self.retina else self.network.rpn.anchor_generator
        strides = [[_up(side) // cells for side, cells in zip(size, one.shape[2:], strict=True)] for one in maps]
        anchors = generator.grid_anchors([one.shape[2:] for one in maps], strides)
        if self.retina:
            return self._of_anchors(maps, anchors, size)
        boxes, scores, labels = self._of_regions(maps, self._regions(maps, anchors, size), size)
        heads = self.network.roi_heads
        if not heads.has_mask():
            return boxes, scores, labels - 1
        logits = heads.mask_predictor(heads.mask_head(self._pooled(heads.mask_roi_pool, maps, boxes)))
        (masks,) = maskrcnn_inference(logits, [labels])
        return boxes, scores, labels - 1, masks

    def _of_anchors(self, maps: list[Tensor], anchors: list[Tensor], size: Size) -> Found:
        """RetinaNet: of each level the best pairs of anchor and class, without those that overlap."""
        network, found = self.network, []
        head, most = network.head, network.topk_candidates
        for one, anchors_A4 in zip(maps, anchors, strict=True):
            logits_AC = head.classification_head([one])[0]
            deltas_A4 = head.regression_head([one])[0]
            classes = logits_AC.shape[1]
            scores = logits_AC.sigmoid().flatten()
            index = torch.where(scores > network.score_thresh)[0]
            scores, best = _padded(scores[index], most).topk(most)
            index = _padded(index, most)[best]
            anchor = index // classes
            boxes = network.box_coder.decode_single(deltas_A4[anchor], anchors_A4[anchor])
            found.append((boxes, scores, index % classes))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes = clip_boxes_to_image(boxes, size)
        kept = self._without_overlaps(
            (boxes, scores, labels), scores > network.score_thresh, network.nms_thresh, network.detections_per_img, size
        )
        return boxes[kept], scores[kept], labels[kept]

    def _regions(self, maps: list[Tensor], anchors: list[Tensor], size: Size) -> Tensor:
        """Boxes of shape ``R, 4`` that are likely to hold an object."""
        rpn, found = self.network.rpn, []
        most = rpn.pre_nms_top_n()
        for level, (logits, deltas, anchors_A4) in enumerate(zip(*rpn.head(maps), anchors, strict=True)):
            logits_A = logits.permute(0, 2, 3, 1).flatten()
            deltas_A4 = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
            best, index = _padded(logits_A, most, -math.inf).topk(most)
            deltas_A4, anchors_A4 = (_padded(one, most)[index] for one in (deltas_A4, anchors_A4))
            boxes = rpn.box_coder.decode_single(deltas_A4, anchors_A4)
            found.append((boxes, best.sigmoid(), torch.full((most,), level)))
        boxes, scores, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes = clip_boxes_to_image(boxes, size)
        valid = _sides_of(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        return boxes[self._without_overlaps((boxes, scores, levels), valid, rpn.nms_thresh, rpn.post_nms_top_n(), size)]

    def _of_regions(self, maps: list[Tensor], regions_R4: Tensor, size: Size) -> Found:
        """Faster R-CNN: the classes of regions, without boxes that overlap; labels count from 1."""
        heads = self.network.roi_heads
        logits_RC, deltas = heads.box_predictor(heads.box_head(self._pooled(heads.box_roi_pool, maps, regions_R4)))
        classes = logits_RC.shape[1]
        boxes_RC4 = heads.box_coder.decode_single(deltas, regions_R4).reshape(-1, classes, 4)
        boxes = clip_boxes_to_image(boxes_RC4[:, 1:].reshape(-1, 4), size)
        scores = logits_RC.softmax(1)[:, 1:].flatten()
        labels = torch.arange(1, classes).expand(regions_R4.shape[0], classes - 1).flatten()
        valid = (scores > heads.score_thresh) & _sides_of(boxes, _SMALLEST_BOX)
        kept = self._without_overlaps((boxes, scores, labels), valid, heads.nms_thresh, heads.detections_per_img, size)
        return boxes[kept], scores[kept], labels[kept]

    def _without_overlaps(self, found: Found, valid: Tensor, iou: float, most: int, size: Size) -> Tensor:
        """Indices of the best boxes, of those that overlap in a group only the best.

        Groups are laid side by side on a square board, where they cannot overlap: far fewer pixels from one end to the
        other than in a row, and so less is lost to rounding. Two boxes off the board, best of all, keep the result of
        ``nms`` from being empty, which torch.export does not allow.

        Args:
            found: boxes, scores up to 1, and the group of each.
            valid: which of them count.
            iou: boxes of a group that overlap by more are the same.
            most: indices at most.
            size: height and width of the image, which boxes are in.
        """
        boxes, scores, groups = found
        index = torch.where(valid)[0]
        group = groups[index]
        place = torch.stack((group % _BOARD, group // _BOARD), 1) * (size[0] + size[1] + 1)
        boxes = torch.cat((self.off_board, boxes[index] + place.repeat(1, 2)))
        kept = nms(boxes, torch.cat((self.off_scores, scores[index])), iou) - len(self.off_board)
        return index[kept[kept >= 0][:most]]

    def _pooled(self, pool: MultiScaleRoIAlign, maps: Sequence[Tensor], boxes_R4: Tensor) -> Tensor:
        """Features of each box, from the level of the pyramid that suits its size."""
        first, last = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        octaves = (box_area(boxes_R4).sqrt() / pool.canonical_scale).log2()
        levels = (pool.canonical_level + octaves + _LEVEL_EPS).floor().clamp(first, last) - first
        rois_R5 = torch.cat((torch.zeros_like(boxes_R4[:, :1]), boxes_R4), 1)  # with the number of the image
        pooled = boxes_R4.new_zeros(boxes_R4.shape[0], maps[0].shape[1], *pool.output_size)
        for level, stride in enumerate(self.strides):
            index = torch.where(levels == level)[0]
            part = roi_align(maps[level], rois_R5[index], pool.output_size, 1 / stride, pool.sampling_ratio)
            pooled = pooled.index_put((index,), part)
        return pooled


def _up(side: Any) -> Any:
    return (side + _STRIDE - 1) // _STRIDE * _STRIDE


def _padded(x: Tensor, count: int, value: float = 0) -> Tensor:
    """With so many rows more, so that there are enough to choose as many from."""
    return torch.cat((x, x.new_full((count, *x.shape[1:]), value)))


def _sides_of(boxes: Tensor, least: float) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) >= least).all(1)
