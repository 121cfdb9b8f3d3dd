"""How good a classifier is: top-1, top-5, loss, accuracy of each class, and how sure that number is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Evaluation", "Score", "accuracy_interval", "probabilities"]


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent; (0, 100) of nothing."""
    from scipy.stats import binomtest

    if total == 0:
        return 0.0, 100.0
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation; accuracies in percent."""

    images: int
    """Images counted, each once."""
    top1: float
    """Share whose first guess is right."""
    top5: float
    """Share with the right class among the first five guesses (all guesses of fewer classes)."""
    loss: float
    """Mean cross-entropy, natural logarithm, without label smoothing."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of top1."""
    class_names: list[str]
    """In the order of the outputs."""
    confusion: np.ndarray
    """Images by true class (row) and first guess (column), shape ``classes, classes``."""

    @property
    def correct(self) -> int:
        """Images whose first guess is right."""
        return int(np.trace(self.confusion))

    @property
    def per_class(self) -> dict[str, tuple[int, float]]:
        """Images and top-1 accuracy of each class that has images."""
        totals = self.confusion.sum(axis=1)
        return {
            name: (int(total), 100 * float(self.confusion[row, row]) / int(total))
            for row, (name, total) in enumerate(zip(self.class_names, totals, strict=True))
            if total
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": self.images,
            "correct": self.correct,
            "top1": self.top1,
            "top1_interval": list(self.interval),
            "top5": self.top5,
            "loss": self.loss,
            "per_class": {
                name: {"images": images, "top1": accuracy} for name, (images, accuracy) in self.per_class.items()
            },
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.top1:.2f} % top-1 ({self.correct:,} of {self.images:,}; 95 % interval {low:.2f} to {high:.2f})"


class Score(nn.Module):
    """Counts over batches and processes, by torchmetrics; nothing of it is part of a checkpoint.

    The result does not depend on which process saw which image, nor in what order, to the last bit: counts are whole
    numbers, and the sum of the losses is rounded once (Shewchuk, 1997).

    Args:
        num_classes: outputs of the network.
    """

    def __init__(self, num_classes: int) -> None:
        # Not at the head: its import takes seconds, and who predicts needs it not.
        from torchmetrics import CatMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        super().__init__()
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro", validate_args=False)
        self.losses = CatMetric(nan_strategy="disable")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of shape ``N, classes``, labels of shape ``N``."""
        logits = logits.float()
        self.confusion.update(logits.argmax(1), labels)
        self.top5.update(logits, labels)
        self.losses.update(F.cross_entropy(logits, labels, reduction="none"))

    def result(self, class_names: list[str]) -> Evaluation:
        """What has been counted in all processes; each of them has to ask."""
        confusion = self.confusion.compute().cpu().numpy()
        correct, total = int(np.trace(confusion)), int(confusion.sum())
        return Evaluation(
            images=total,
            top1=100 * correct / max(total, 1),
            top5=100 * float(self.top5.compute()),
            loss=math.fsum(self.losses.compute().cpu().double().flatten().tolist()) / max(total, 1),
            interval=accuracy_interval(correct, total),
            class_names=class_names,
            confusion=confusion,
        )

    def reset(self) -> None:
        """Start anew."""
        for metric in (self.confusion, self.top5, self.losses):
            metric.reset()


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes in float32 for logits of shape ``N, classes``, whatever their type."""
    return torch.softmax(logits.float(), dim=1)
