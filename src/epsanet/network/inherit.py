"""First weights from a trained network: of the same kind, or of the ResNet whose 3×3 convolutions PSA stands for.

Not in the paper. An EPSANet is a ResNet but for its PSA modules (section 3.3), so a pretrained ResNet of the same
depth, widths and stem says how nearly all of it may start; and a 3×3 filter is also a k×k one with a border of zeros.

Shape suffixes::

    K  output channels       D  output channels of one branch, K / S
    C  input channels        H, W  height and width of a filter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from epsanet.network.psa import PSA, SPCMode
from epsanet.network.weights import LoadedModel

__all__ = ["Start", "branch_filters", "inherit", "start_from"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a network took from another; ``str`` says it in a line."""

    copied: int
    """Tensors that were taken as they are."""
    inherited: int
    """PSA modules that began as the 3×3 convolutions of a ResNet."""
    head: bool
    """Whether the classifier came along too."""

    def __str__(self) -> str:
        psa = f", {self.inherited} PSA modules from 3×3 convolutions" if self.inherited else ""
        return f"{self.copied} tensors{psa}, {'its classifier' if self.head else 'a new classifier'}"


def branch_filters(
    filters_KCHW: Tensor, kernel_sizes: Sequence[int], groups: Sequence[int], spc: SPCMode = "multiplex"
) -> list[Tensor]:
    """The filters of a convolution dealt out to the branches of a PSA module.

    Branch ``i`` makes output channels ``i * D`` to ``(i + 1) * D``, so it takes these filters. Each is centred in the
    branch's k×k, zeros around it, and keeps only the input channels that its group sees (``spc="split"``: of the
    branch's own slice). A branch of the same kernel and one group takes its filters exactly.

    Args:
        filters_KCHW: weight of the convolution, shape ``K, C, H, W``.
        kernel_sizes: odd kernel of each branch.
        groups: groups of each branch.
        spc: whether a branch sees the whole input or its own slice.

    Returns:
        A weight a branch, shape ``D, C / G, k, k`` (``D, C / S / G, k, k`` with ``spc="split"``).
    """
    result = []
    branches = len(kernel_sizes)
    for place, (rows_DCHW, kernel_size, count) in enumerate(
        zip(filters_KCHW.chunk(branches), kernel_sizes, groups, strict=True)
    ):
        seen_DCHW = rows_DCHW.chunk(branches, dim=1)[place] if spc == "split" else rows_DCHW
        own = [part.chunk(count, dim=1)[group] for group, part in enumerate(seen_DCHW.chunk(count))]
        border = (kernel_size - filters_KCHW.shape[-1]) // 2  # negative crops
        result.append(F.pad(torch.cat(own), [border] * 4))
    return result


def inherit(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The state of a ResNet as one of an EPSANet that has the same layers but for its PSA modules.

    Each ``….convN`` that is a PSA module in ``model`` takes the filters of the ResNet's ``….convN`` by
    ``branch_filters``. Its SEWeight starts with a second map of zeros, so that attention is first the same for all
    scales, 1/S (1/D for ``softmax="channels"``, 1/2 for ``"none"``), and learns from there; the running statistics
    of the norm that follows, ``….bnN``, are scaled by as much. A branch that took its filters exactly then gives what
    the ResNet gave. A branch of several groups sums over fewer inputs; its statistics are right only after some steps
    of training.

    Args:
        state_dict: of a ResNet of timm or torchvision.
        model: an EPSANet, or any network with PSA modules in the place of convolutions; it is not changed.

    Returns:
        All tensors of ``state_dict``, those of convolutions exchanged for those of PSA modules.

    Raises:
        ValueError: for modules that add their branches up, and for convolutions that are grouped or of another width.
    """
    result = dict(state_dict)
    modules = dict(model.named_modules())
    own = model.state_dict()
    for name, psa in modules.items():
        if not isinstance(psa, PSA) or f"{name}.weight" not in result:
            continue
        if psa.fusion == "sum":
            raise ValueError(f"{name} adds its branches up (fusion='sum') and cannot inherit from one convolution")
        convs: list[Any] = list(psa.spc.branches)
        kernel_sizes = [conv.kernel_size[0] for conv in convs]
        weight = result.pop(f"{name}.weight")
        seen = convs[0].in_channels * (len(convs) if psa.spc.mode == "split" else 1)
        wanted = (sum(conv.out_channels for conv in convs), seen)
        if weight.ndim != 4 or weight.shape[:2] != wanted:
            raise ValueError(
                f"{name} cannot inherit filters of shape {tuple(weight.shape)}: they are grouped, or of another width "
                f"than {wanted[1]} → {wanted[0]}"
            )
        filters = branch_filters(weight, kernel_sizes, [conv.groups for conv in convs], psa.spc.mode)
        result |= {f"{name}.spc.branches.{place}.weight": weight for place, weight in enumerate(filters)}
        se = {key: value for key, value in own.items() if key.startswith(f"{name}.se.")}
        result |= {key: torch.zeros_like(value) if ".fc2." in key else value for key, value in se.items()}
        shares = {"scales": 1 / len(convs), "channels": 1 / convs[0].out_channels, "none": 1 / 2}
        share = shares[psa.softmax] if se else 1.0
        norm = ".bn".join(name.rsplit(".conv", 1))
        if f"{norm}.running_var" in result:
            eps = modules[norm].eps
            result[f"{norm}.running_mean"] = result[f"{norm}.running_mean"] * share
            # So that variance + eps, which is what the norm divides by, is scaled.
            result[f"{norm}.running_var"] = ((result[f"{norm}.running_var"] + eps) * share**2 - eps).clamp(min=0)
    return result


def start_from(model: Any, class_names: Sequence[str], source: LoadedModel) -> Start:
    """Load the weights of another network into a new one.

    The classifier comes along row by row where the other network knows all classes by name, and stays as new as it is
    otherwise. PSA modules inherit from convolutions of the same name.

    Args:
        model: a network of timm, changed in place.
        class_names: of its outputs, in order.
        source: the other network.

    Raises:
        ValueError: when their layers differ; the first that does is named.
    """
    given, wanted = source.model.state_dict(), model.state_dict()
    modules = [name for name, module in model.named_modules() if isinstance(module, PSA) and f"{name}.weight" in given]
    try:
        found = inherit(given, model)
    except ValueError as error:
        raise _misfit(source, str(error)) from error
    rows = {name: row for row, name in enumerate(source.class_names)}
    known = all(name in rows for name in class_names)
    head = [name for name in wanted if name.startswith(tuple(f"{layer}." for layer in classifier_names(model)))]
    known = known and all(name in found for name in head)
    for name in head:
        found[name] = found[name][[rows[label] for label in class_names]] if known else wanted[name]
    _check_same(found, wanted, source)
    model.load_state_dict(found)
    as_it_was = [name for name in found if name in given and (known or name not in head)]
    return Start(copied=len(as_it_was), inherited=len(modules), head=known)


def classifier_names(model: Any) -> list[str]:
    """Names of the layers that give the classes, as timm knows them."""
    names = model.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names)


def _misfit(source: LoadedModel, reason: str) -> ValueError:
    other = source.model.pretrained_cfg.get("architecture", "the other network")
    hint = "take one of the same depth, stem and widths (for EPSANet-50 Small resnet50, for Large wide_resnet50_2)"
    return ValueError(f"{other} does not fit: {reason}; {hint}")


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: LoadedModel) -> None:
    for name in (*wanted, *found):
        if name not in found:
            raise _misfit(source, f"it has no {name}")
        if name not in wanted:
            raise _misfit(source, f"its {name} has no place in the new network")
        if found[name].shape != wanted[name].shape:
            shapes = f"shape {tuple(found[name].shape)} there and {tuple(wanted[name].shape)} here"
            raise _misfit(source, f"{name} has {shapes}")
