"""The rows of a study: networks of a comparison, settings of an ablation, at equal cost where that is wanted."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet

from epsanet.network.psa import GROUPS, KERNEL_SIZES, PSA, SEWeight, fit_groups
from epsanet.network.rivals import RIVALS
from epsanet.network.weights import create_model
from epsanet.study.config import CompareConfig, StudyConfig
from epsanet.study.cost import count

__all__ = ["ABLATION", "ABLATION_PAIRS", "ABLATION_REFERENCE", "Row", "ablation_rows", "compare_rows", "match_widths"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network of a study; it is trained once a seed."""

    name: str
    """Names its run folders."""
    title: str
    """For tables."""
    model: str
    """timm's name."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Of the network."""
    width_multiple: int = 8
    """Widths of stages may be a multiple of this."""

    def start(self, init_from: str | None) -> str | None:
        """Where its weights start: ``{network}``, which gives each detector its trained backbone, is the row's name."""
        return None if init_from is None else init_from.replace("{network}", self.name)


_TOLERANCE = 0.03
"""Costs that differ by less are equal; the differences in accuracy that are looked for are larger."""

ABLATION_REFERENCE = "paper"
"""The row that all others of an ablation are matched to and tested against."""

# With three kernels the last has half of the channels, as in PyConvResNet: two branches of a quarter.
_SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("kernels 3-5-7-9, groups 1-4-8-16, multiplex, shared SEWeight, softmax across scales, concatenation", {}),
    "groups_2_4_8_16": ("groups 2-4-8-16", {"groups": [2, 4, 8, 16]}),
    "groups_4_8_16_16": ("groups 4-8-16-16", {"groups": [4, 8, 16, 16]}),
    "groups_16_16_16_16": ("groups 16-16-16-16", {"groups": [16, 16, 16, 16]}),
    "groups_1_1_1_1": ("groups 1-1-1-1", {"groups": [1, 1, 1, 1]}),
    "kernels_3_3_3_3": ("kernels 3-3-3-3", {"kernel_sizes": [3, 3, 3, 3]}),
    "kernels_3_5": ("kernels 3-5, groups 1-4", {"kernel_sizes": [3, 5], "groups": [1, 4]}),
    "kernels_3_5_7": ("kernels 3-5-7 (7 twice), groups 1-4-8", {"kernel_sizes": [3, 5, 7, 7], "groups": [1, 4, 8, 8]}),
    "kernels_9_7_5_3": ("kernels 9-7-5-3, groups 1-4-8-16", {"kernel_sizes": [9, 7, 5, 3]}),
    "split": ("split", {"spc": "split"}),
    "se_branches": ("a SEWeight for each branch", {"se": "branches"}),
    "se_none": ("no attention (pyramidal convolution)", {"se": "none"}),
    "softmax_channels": ("softmax within channels", {"softmax": "channels"}),
    "softmax_none": ("no softmax, sigmoid only", {"softmax": "none"}),
    "fusion_sum": ("sum instead of concatenation", {"fusion": "sum"}),
}
ABLATION_PAIRS: dict[str, tuple[str, str]] = {
    "split+se_none": ("split", "se_none"),
    "split+softmax_channels": ("split", "softmax_channels"),
    "se_branches+softmax_channels": ("se_branches", "softmax_channels"),
    "kernels_3_3_3_3+groups_1_1_1_1": ("kernels_3_3_3_3", "groups_1_1_1_1"),
}
"""Settings that are changed together, because one may matter only with the other."""
ABLATION: dict[str, tuple[str, dict[str, Any]]] = _SINGLE | {
    name: (f"{_SINGLE[one][0]}; {_SINGLE[other][0]}", _SINGLE[one][1] | _SINGLE[other][1])
    for name, (one, other) in ABLATION_PAIRS.items()
}
"""Title and ``block_args`` by name: one factor at a time, then the pairs."""


def compare_rows(config: CompareConfig, model_args: dict[str, Any], num_classes: int, input_size: int) -> list[Row]:
    """The networks of a comparison, the reference first.

    Args:
        config: which, and whether at equal cost.
        model_args: of all networks, for example ``layers`` and ``channels``.
        num_classes: outputs.
        input_size: height and width, at which multiply-accumulates are counted.

    Raises:
        ValueError: for an unknown network, or one that cannot be matched.
    """
    names = config.networks or list(RIVALS)
    rows = [_rival(name, config.size, model_args) for name in dict.fromkeys((config.reference, *names))]
    return _matched(rows, config.match, num_classes, input_size)


def ablation_rows(
    config: StudyConfig, model: str, model_args: dict[str, Any], num_classes: int, input_size: int
) -> list[Row]:
    """The settings of an ablation over a network, the paper's first.

    Args:
        config: which, and whether at equal cost.
        model: an EPSANet.
        model_args: of all rows; its ``block_args`` go below those of the ablation.
        num_classes: outputs.
        input_size: height and width, at which multiply-accumulates are counted.

    Raises:
        ValueError: for an unknown setting, or a network without PSA modules or with other settings than the paper's.
    """
    if not model.startswith("epsanet"):
        raise ValueError(f"--model {model} has no PSA modules; an ablation is of an EPSANet, such as epsanet14_tiny")
    _check_settings(model, model_args)
    rows = []
    for name in dict.fromkeys((ABLATION_REFERENCE, *(config.networks or ABLATION))):
        if name not in ABLATION:
            raise ValueError(f"there is no setting {name!r} of the ablation; there are {', '.join(ABLATION)}")
        title, block_args = ABLATION[name]
        merged = {**model_args, "block_args": {**model_args.get("block_args", {}), **block_args}}
        rows.append(Row(name=name, title=title, model=model, model_args=merged, width_multiple=16))
    return _matched(rows, config.match, num_classes, input_size)


def _check_settings(model: str, model_args: dict[str, Any]) -> None:
    """The rows say what differs from the paper's settings, so a variant with others cannot be their start."""
    with torch.device("meta"):
        psa = [module for module in create_model(model, **model_args).modules() if isinstance(module, PSA)][-1]
    convs: list[Any] = list(psa.spc.branches)
    published = fit_groups(GROUPS, convs[0].in_channels, sum(conv.out_channels for conv in convs))
    found = (psa.spc.mode, psa.softmax, psa.fusion, type(psa.se), tuple(conv.kernel_size[0] for conv in convs))
    if (
        found != ("multiplex", "scales", "concat", SEWeight, KERNEL_SIZES)
        or tuple(conv.groups for conv in convs) != published
    ):
        raise ValueError(
            f"--model {model} has PSA settings of its own, or --model_args gives it some; an ablation starts from the "
            "paper's, which epsanet50_small, epsanet26_tiny and others have"
        )


def _rival(name: str, size: Any, model_args: dict[str, Any]) -> Row:
    if name not in RIVALS:
        raise ValueError(f"there is no network {name!r} in the comparison; there are {', '.join(RIVALS)}")
    rival = RIVALS[name]
    block_args = {**model_args.get("block_args", {}), **rival.model_args.get("block_args", {})}
    merged = {**model_args, **rival.model_args, **({"block_args": block_args} if block_args else {})}
    return Row(
        name=name,
        title=rival.title,
        model=rival.models[size],
        model_args=merged,
        width_multiple=rival.width_multiple,
    )


def _matched(
    rows: list[Row], match: Literal["none", "parameters", "macs"], num_classes: int, input_size: int
) -> list[Row]:
    if match == "none":
        for row in rows:
            _count(row, "parameters", num_classes, input_size)  # raises for arguments that cannot be
        return rows
    target = _count(rows[0], match, num_classes, input_size)
    return [rows[0], *(match_widths(row, target, match, num_classes, input_size) for row in rows[1:])]


def _count(row: Row, by: Literal["parameters", "macs"], num_classes: int, input_size: int) -> int:
    if by == "macs":
        return count(row.model, input_size, num_classes=num_classes, **row.model_args)[1]
    with torch.device("meta"):
        model = create_model(row.model, num_classes=num_classes, **row.model_args)
    return sum(parameter.numel() for parameter in model.parameters())


def match_widths(row: Row, target: int, by: Literal["parameters", "macs"], num_classes: int, input_size: int) -> Row:
    """The row with the widths of its stages changed so that it costs what ``target`` says.

    All widths are scaled by one factor, and each is rounded up or down. Of the mixtures within 3 % of the target, the
    one nearest to the network's own proportions is taken; where there is none, the one nearest in cost.

    Args:
        row: a network with the argument ``channels``.
        target: parameters or multiply-accumulates.
        by: which of the two.
        num_classes: outputs.
        input_size: height and width.

    Raises:
        ValueError: for a network without stages of a width.
    """
    with torch.device("meta"):
        model = create_model(row.model, num_classes=num_classes, **row.model_args)
    if not isinstance(model, ResNet):
        raise ValueError(f"the widths of {row.model} cannot be changed for equal cost; use --match none")
    expansion = next(module.expansion for module in model.layer1.modules() if hasattr(module, "expansion"))
    widths = tuple(info["num_chs"] // expansion for info in model.feature_info[1:])
    multiple = row.width_multiple

    def wider(channels: Iterable[int]) -> Row:
        return replace(row, model_args={**row.model_args, "channels": list(channels)})

    def cost(channels: Iterable[int]) -> int:
        return _count(wider(channels), by, num_classes, input_size)

    low, high = 1 / 4, 4.0
    for _ in range(8):  # the factor to a hundredth
        middle = math.sqrt(low * high)
        rounded = [max(1, round(width * middle / multiple)) * multiple for width in widths]
        low, high = (low, middle) if cost(rounded) > target else (middle, high)
    choices = [
        [n * multiple for n in range(max(1, int(width * low / multiple)), math.ceil(width * high / multiple) + 1)]
        for width in widths
    ]
    errors: dict[Iterable[int], float] = {
        mixture: abs(cost(mixture) / target - 1) for mixture in {widths, *itertools.product(*choices)}
    }
    ranked = sorted(errors, key=lambda mixture: errors[mixture])
    near = [mixture for mixture in ranked if errors[mixture] <= _TOLERANCE]
    return wider(min(near, key=lambda mixture: _distortion(mixture, widths)) if near else ranked[0])


def _distortion(mixture: Iterable[int], widths: Iterable[int]) -> float:
    """How unequally the stages are scaled."""
    scales = [math.log(new / own) for new, own in zip(mixture, widths, strict=True)]
    return round(statistics.pstdev(scales), 6)
