"""Figures of the paper, to stand beside ours (tables 2 and 3; ``arXiv:2105.14447``)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper says of a network on ImageNet."""

    parameters: float
    """Millions."""
    gmacs: float
    """10⁹ multiply-accumulates at 224×224, norms, activations and pools included."""
    top1: float
    """Percent."""
    top5: float
    """Percent."""


PUBLISHED = {
    "epsanet50_small": Published(parameters=22.56, gmacs=3.62, top1=77.49, top5=93.54),
    "epsanet101_small": Published(parameters=38.90, gmacs=6.82, top1=78.43, top5=94.11),
    "epsanet50_large": Published(parameters=27.90, gmacs=4.72, top1=78.64, top5=94.18),
    "epsanet101_large": Published(parameters=49.59, gmacs=8.97, top1=79.38, top5=94.58),
    "epsanet50_large_g32": Published(parameters=27.90, gmacs=4.72, top1=78.64, top5=94.18),
    "epsanet101_large_g32": Published(parameters=49.59, gmacs=8.97, top1=79.38, top5=94.58),
}
"""By the name of the variant; the paper has one Large, of which both readings are registered."""
