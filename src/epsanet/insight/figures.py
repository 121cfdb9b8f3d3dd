"""Pictures of what a network looks at, for people who would rather look than read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image

from epsanet._files import atomic_file
from epsanet.insight.scales import ModuleScales, ScalePreference, same_scales

__all__ = ["cam_overlay", "save_explanation", "save_preferences", "share_norm", "write_preferences"]

_SCALE_MAPS = 4
"""Modules whose maps are shown, spread over the depth of the network."""
_OPACITY = 0.55
"""Of Grad-CAM over the picture."""


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def share_norm(shares: np.ndarray) -> TwoSlopeNorm:
    """Shares to places on a map of colours whose middle is an equal share, as far to both sides as the shares reach.

    Args:
        shares: of scales, shape ``B, S``; each row sums to one.
    """
    equal = 1 / shares.shape[1]
    reach = max(float(np.abs(shares - equal).max()), 0.005)
    return TwoSlopeNorm(equal, max(0, equal - reach), equal + reach)


def cam_overlay(picture: np.ndarray, cam: np.ndarray, side: int = 448) -> Image.Image:
    """Grad-CAM in colours over the picture in grey, enlarged to so many pixels at least.

    Args:
        picture: what the network saw, shape ``H, W, 3``, from 0 to 1.
        cam: shape ``H, W``, from 0 to 1.
        side: of the shorter side in pixels.
    """
    factor = max(1, -(-side // min(cam.shape)))
    size = (factor * cam.shape[1], factor * cam.shape[0])
    grey = Image.fromarray((255 * picture.mean(2)).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    colours = Image.fromarray((255 * colormaps["inferno"](cam)[..., :3]).astype(np.uint8))
    return Image.blend(grey.convert("RGB"), colours.resize(size, Image.Resampling.BILINEAR), _OPACITY)


def _share_heat_map(axes: Any, shares: np.ndarray, modules: Sequence[ModuleScales], title: str) -> None:
    """Modules down, scales across; white is an equal share, and the colours reach as far as the shares do."""
    norm = share_norm(shares)
    picture = axes.imshow(shares, cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set_xticks(range(shares.shape[1]), [f"{size}×{size}" for size in modules[0].kernel_sizes])
    axes.set_yticks(range(len(modules)), [module.name.removesuffix(".conv2") for module in modules], fontsize=7)
    axes.set_title(title, fontsize=9)
    if len(modules) <= 20:
        for (row, column), share in np.ndenumerate(shares):
            dark = abs(norm(share) - 0.5) > 0.3
            axes.text(column, row, f"{share:.1%}", ha="center", va="center", fontsize=6.5, color="wk"[not dark])
    axes.figure.colorbar(picture, ax=axes, format=lambda value, _: f"{value:.0%}", fraction=0.05)


def save_explanation(
    path: Path,
    picture: np.ndarray,
    cam: np.ndarray,
    names: Sequence[str],
    probabilities: Sequence[float],
    modules: Sequence[ModuleScales],
    position: int,
    layer: str,
) -> None:
    """One figure of one image.

    Args:
        path: of the PNG file.
        picture: what the network saw, shape ``H, W, 3``, from 0 to 1.
        cam: Grad-CAM for the first class, shape ``H, W``, from 0 to 1.
        names: of the top classes, the most probable first.
        probabilities: of these.
        modules: what the PSA modules did with the batch.
        position: of the image in the batch.
        layer: that Grad-CAM looked at.
    """
    figure = Figure(figsize=(14, 8 if modules else 4), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[1, 1.15]) if modules else [figure.subfigures()]
    upper, *lower = rows
    image_axes, cam_axes, bar_axes = upper.subplots(1, 3, width_ratios=[1, 1, 1.3])
    image_axes.imshow(picture, interpolation="nearest")
    image_axes.set_title("what the network sees", fontsize=9)
    cam_axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    overlay = cam_axes.imshow(cam, cmap="inferno", alpha=_OPACITY, vmin=0, vmax=1)
    figure.colorbar(overlay, ax=cam_axes, fraction=0.05, label="evidence, largest = 1")
    cam_axes.set_title(f"where it sees {_short(names[0])} (Grad-CAM, {layer})", fontsize=9, parse_math=False)
    for axes in (image_axes, cam_axes):
        axes.set_axis_off()
    colors = ["tab:orange", *["tab:blue"] * (len(names) - 1)]
    places = range(len(names))  # names that are shortened may be the same
    bars = bar_axes.barh(places, probabilities, color=colors)
    bar_axes.set_yticks(places, [_short(name) for name in names], parse_math=False)
    bar_axes.bar_label(bars, [f"{value:.1%}" for value in probabilities], padding=3, fontsize=8)
    bar_axes.invert_yaxis()
    bar_axes.set(xlim=(0, 1.15), xticks=[0, 0.5, 1], xlabel="probability")
    bar_axes.set_title("top classes", fontsize=9)
    if lower:
        _draw_scales(lower[0], modules, position)
    _save(figure, path)


def _draw_scales(figure: Any, modules: Sequence[ModuleScales], position: int) -> None:
    count, modules = len(modules), same_scales(modules)
    of_how_many = "each block listens" if len(modules) == count else f"{len(modules)} of {count} blocks listen"
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    attention, contribution = left.subplots(1, 2, sharey=True)
    one = slice(position, position + 1)
    _share_heat_map(attention, np.concatenate([m.attention_NS[one] for m in modules]), modules, "attention by scale")
    _share_heat_map(
        contribution, np.concatenate([m.contribution_NS[one] for m in modules]), modules, "share of the output's energy"
    )
    left.suptitle(f"which scale {of_how_many} to (white: all alike)", fontsize=9)
    _strength_maps(right, modules, position)


def _strength_maps(figure: Any, modules: Sequence[ModuleScales], position: int) -> None:
    """Some modules down, scales across; one brightness a module, so that scales can be compared."""
    places = np.linspace(0, len(modules) - 1, min(_SCALE_MAPS, len(modules))).round().astype(int)
    scales = len(modules[0].kernel_sizes)
    grid = np.asarray(figure.subplots(len(places), scales)).reshape(len(places), scales)
    for row, place in enumerate(places):
        strength_SHW = modules[place].strength_NSHW[position]
        for column in range(scales):
            axes = grid[row, column]
            axes.imshow(strength_SHW[column], cmap="magma", vmin=0, vmax=max(float(strength_SHW.max()), 1e-12))
            axes.set(xticks=[], yticks=[])
            if row == 0:
                size = modules[place].kernel_sizes[column]
                axes.set_title(f"{size}×{size}", fontsize=8)
        grid[row, 0].set_ylabel(modules[place].name.removesuffix(".conv2"), fontsize=7)
    figure.suptitle("where each scale's features are strong (one brightness a row)", fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def write_preferences(path: Path, preferences: Sequence[ScalePreference]) -> None:
    """Preferences as CSV, one row for each class, module and scale.

    Args:
        path: of the file.
        preferences: of ``scale_preferences``.
    """
    rows = [preference.as_row() for preference in preferences]
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def save_preferences(path: Path, preferences: Sequence[ScalePreference], title: str) -> None:
    """Share of each scale by class, a panel for each module and measure, with 95 % intervals.

    Args:
        path: of the PNG file.
        preferences: of ``scale_preferences``; of many modules, some spread over the depth are shown.
        title: says of what.
    """
    blocks = list(dict.fromkeys(preference.block for preference in preferences))
    shown = [blocks[place] for place in np.linspace(0, len(blocks) - 1, min(8, len(blocks))).round().astype(int)]
    groups = [group for group in dict.fromkeys(preference.group for preference in preferences) if group != "all"]
    groups = groups[:30] or ["all"]
    figure = Figure(figsize=(1.5 + 2.9 * len(shown), 6.6), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False, sharex=True)
    for column, block in enumerate(shown):
        for row, measure in enumerate(("attention", "contribution")):
            axes = grid[row, column]
            sizes = {p.scale: p.kernel_size for p in preferences if p.block == block}
            for place, size in sizes.items():
                found = {p.group: getattr(p, measure) for p in preferences if (p.block, p.scale) == (block, place)}
                mean, low, high = np.array([found[group] for group in groups]).T
                x = np.arange(len(groups)) + 0.08 * (place - (len(sizes) - 1) / 2)
                axes.errorbar(x, mean, (mean - low, high - mean), marker="o", ms=3, lw=1, label=f"{size}×{size}")
            equal, (low, high) = 1 / len(sizes), axes.get_ylim()
            axes.set_ylim(min(low, equal - 0.01), max(high, equal + 0.01))  # rounding shall not look like a preference
            axes.axhline(equal, color="black", lw=0.6, ls=":")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
            axes.tick_params(labelsize=7)
            if row == 0:
                axes.set_title(block.removesuffix(".conv2"), fontsize=9)
            else:
                axes.set_xticks(
                    range(len(groups)),
                    [_short(group) for group in groups],
                    rotation=90 if len(groups) > 8 else 30,
                    fontsize=7,
                    parse_math=False,
                )
    grid[0, 0].set_ylabel("share of the attention")
    grid[1, 0].set_ylabel("share of the output's energy")
    grid[0, -1].legend(title="kernel", fontsize=7, title_fontsize=7)
    figure.suptitle(f"{title}: mean and 95 % interval; dotted: all alike", fontsize=10, parse_math=False)
    _save(figure, path)
