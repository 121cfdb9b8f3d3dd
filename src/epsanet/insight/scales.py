"""Which scale each PSA module listens to, and where (paper section 3.2), in numbers.

N images, S scales, D channels of one branch, H and W of the module's output, B modules.

Two measures say how much a scale counts in a module. Its **attention** is what the module computes, averaged over
channels. Its **contribution** is its share of the energy (sum of squares) of the module's output, which also counts
how strong the scale's features are. With the softmax inside each branch (``softmax="channels"``) the attention of
every branch sums to one over its channels, so that its average is 1/D whatever the image: only the contribution can
then tell scales apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsanet.network.psa import PSA

__all__ = ["ModuleScales", "ScalePreference", "record_scales", "same_scales", "scale_preferences"]


@dataclass(frozen=True, kw_only=True)
class ModuleScales:
    """What one PSA module did with a batch of images."""

    name: str
    """Of the module in the network, for example ``layer1.0.conv2``."""
    kernel_sizes: tuple[int, ...]
    """Of its S branches."""
    attention_NSD: np.ndarray
    """Weight of each channel of each scale."""
    strength_NSHW: np.ndarray
    """Root mean square over channels of each scale's weighted features."""

    @property
    def attention_NS(self) -> np.ndarray:
        """Share of the attention that each scale has, averaged over channels; sums to one."""
        means = self.attention_NSD.mean(2, dtype=np.float64)
        return np.asarray(means / means.sum(1, keepdims=True))

    @property
    def contribution_NS(self) -> np.ndarray:
        """Share of the output's energy that each scale has; sums to one (or is 1/S each for an output of zeros)."""
        energy = np.square(self.strength_NSHW, dtype=np.float64).sum((2, 3))
        total = energy.sum(1, keepdims=True)
        return np.where(total > 0, energy / np.where(total > 0, total, 1), 1 / energy.shape[1])


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[ModuleScales]]:
    """Records every PSA module that runs inside the block; the hooks are gone after it."""
    found: list[ModuleScales] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PSA):

            def record(psa: PSA, inputs: tuple[Tensor, ...], _: Tensor, name: str = name) -> None:
                feats_NSDHW, averages_NSD = psa.features(inputs[0])
                attention_NSD = psa.attention(feats_NSDHW, averages_NSD)
                weighted = feats_NSDHW * attention_NSD[..., None, None]
                found.append(
                    ModuleScales(
                        name=name,
                        kernel_sizes=tuple(int(branch.kernel_size[0]) for branch in psa.spc.branches),  # type: ignore
                        attention_NSD=attention_NSD.float().cpu().numpy(),
                        strength_NSHW=weighted.float().square().mean(2).sqrt().cpu().numpy(),
                    )
                )

            handles.append(module.register_forward_hook(record))
    if not handles:
        raise ValueError("this network has no PSA modules; explain shows the scales of EPSANets and of psa_replace")
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def record_scales(model: nn.Module, images: Tensor) -> list[ModuleScales]:
    """Run a network and record what its PSA modules do; the network is left as it was.

    Args:
        model: with PSA modules; run in evaluation mode.
        images: as the network takes them, shape ``N, 3, H, W``.

    Returns:
        The modules in the order in which they ran.

    Raises:
        ValueError: for a network without PSA modules.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with _listening(model.eval()) as found, torch.inference_mode():
            model(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def same_scales(modules: Sequence[ModuleScales]) -> list[ModuleScales]:
    """The modules with the kernel sizes that most of them have: only they share the columns of a table.

    In PyConvResNet, for one, deeper stages have fewer kernels.
    """
    ((sizes, _),) = Counter(module.kernel_sizes for module in modules).most_common(1)
    return [module for module in modules if module.kernel_sizes == sizes]


@dataclass(frozen=True, kw_only=True)
class ScalePreference:
    """How much one scale counts in one module, over the images of one class."""

    block: str
    """Name of the PSA module."""
    scale: int
    """Place of the scale among the module's, from 0."""
    kernel_size: int
    """Of the scale; several scales may have the same."""
    group: str
    """Class of the images; ``all`` for all of them, and ``class all`` for a class of that name."""
    images: int
    """Averaged over."""
    attention: tuple[float, float, float]
    """Mean share of the attention, and its 95 % interval."""
    contribution: tuple[float, float, float]
    """Mean share of the output's energy, and its 95 % interval."""

    def as_row(self) -> dict[str, Any]:
        """For a table."""
        row: dict[str, Any] = {
            "block": self.block,
            "scale": self.scale,
            "kernel_size": self.kernel_size,
            "class": self.group,
            "images": self.images,
        }
        for name in ("attention", "contribution"):
            row |= zip((name, f"{name}_low", f"{name}_high"), getattr(self, name), strict=True)
        return row


def _mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over images with Student's 95 % interval; no interval (the mean itself) of one image."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def scale_preferences(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], class_names: Sequence[str]
) -> list[ScalePreference]:
    """How much each scale counts in each module, over all images and over those of each class.

    Args:
        model: with PSA modules.
        batches: images of shape ``N, 3, H, W`` and their classes, shape ``N``.
        class_names: of the classes; they need not be the network's.

    Returns:
        A record for each class (and ``all``), module and scale.

    Raises:
        ValueError: for a network without PSA modules, or no images.
    """
    attention: dict[str, list[np.ndarray]] = {}
    contribution: dict[str, list[np.ndarray]] = {}
    kernel_sizes: dict[str, tuple[int, ...]] = {}
    labels: list[np.ndarray] = []
    for images, classes in batches:
        for module in record_scales(model, images):
            attention.setdefault(module.name, []).append(module.attention_NS)
            contribution.setdefault(module.name, []).append(module.contribution_NS)
            kernel_sizes[module.name] = module.kernel_sizes
        labels.append(classes.numpy())
    if not labels:
        raise ValueError("there are no images to look at")
    label_N = np.concatenate(labels)
    groups = {"all": np.ones(len(label_N), bool)}
    for place, name in enumerate(class_names):
        if (label_N == place).any():
            groups["class all" if name == "all" else name] = label_N == place
    result = []
    for group, chosen in groups.items():
        for block, sizes in kernel_sizes.items():
            attention_NS = np.concatenate(attention[block])[chosen]
            contribution_NS = np.concatenate(contribution[block])[chosen]
            for place, kernel_size in enumerate(sizes):
                result.append(
                    ScalePreference(
                        block=block,
                        scale=place,
                        kernel_size=kernel_size,
                        group=group,
                        images=int(chosen.sum()),
                        attention=_mean_and_interval(attention_NS[:, place]),
                        contribution=_mean_and_interval(contribution_NS[:, place]),
                    )
                )
    return result
