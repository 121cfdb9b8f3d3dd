"""The module of the paper written out with loops, as slowly and plainly as it can be said: the tests' authority.

Nothing here comes from ``epsanet``. Parameters are plain tensors; gradients come from autograd through the loops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolution(x: Tensor, weight: Tensor, groups: int, stride: int, dilation: int) -> Tensor:
    """A bias-free convolution with padding ``dilation * (k - 1) / 2``: a loop over groups and output pixels."""
    batch, channels, height, width = x.shape
    made, seen, kernel, _ = weight.shape
    assert seen == channels // groups
    border = dilation * (kernel - 1) // 2
    padded = x.new_zeros(batch, channels, height + 2 * border, width + 2 * border)
    padded[:, :, border : border + height, border : border + width] = x
    rows = []
    for y in range(0, height, stride):
        for x_ in range(0, width, stride):
            made_here = []
            for group in range(groups):
                window = torch.stack(
                    [
                        padded[:, group * seen : (group + 1) * seen, y + dilation * i, x_ + dilation * j]
                        for i in range(kernel)
                        for j in range(kernel)
                    ],
                    dim=-1,
                )
                filters = weight[group * made // groups : (group + 1) * made // groups].flatten(2)
                made_here.append((window[:, None] * filters[None]).sum((-2, -1)))
            rows.append(torch.cat(made_here, dim=1))
    size = (len(range(0, height, stride)), len(range(0, width, stride)))
    return torch.stack(rows, dim=-1).reshape(batch, made, *size)


def se_weight(feats: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Equation 2, one image and one unit at a time; shape ``N, C'``."""
    batch, channels, height, width = feats.shape
    images = []
    for n in range(batch):
        squeezed = [feats[n, c].sum() / (height * width) for c in range(channels)]
        hidden = [
            torch.clamp(sum(w1[h, c] * squeezed[c] for c in range(channels)) + b1[h], min=0) for h in range(len(b1))
        ]
        images.append(
            torch.stack(
                [
                    1 / (1 + torch.exp(-(sum(w2[c, h] * hidden[h] for h in range(len(b1))) + b2[c])))
                    for c in range(channels)
                ]
            )
        )
    return torch.stack(images)


def spc(x: Tensor, weights: list[Tensor], groups: list[int], stride: int, dilation: int, mode: str) -> list[Tensor]:
    """Equations 3 to 5: the feature map of each branch, smallest kernel first."""
    share = x.shape[1] // len(weights)
    feats = []
    for i, (weight, count) in enumerate(zip(weights, groups, strict=True)):
        seen = x if mode == "multiplex" else x[:, i * share : (i + 1) * share]
        feats.append(convolution(seen, weight, count, stride, dilation))
    return feats


def attention(zs: list[Tensor], softmax: str) -> list[Tensor]:
    """Equation 8, or the reading that takes the softmax inside each branch."""
    if softmax == "scales":
        total = sum(torch.exp(z) for z in zs)
        return [torch.exp(z) / total for z in zs]
    return [torch.exp(z) / torch.exp(z).sum(dim=1, keepdim=True) for z in zs]


def psa(
    x: Tensor,
    weights: list[Tensor],
    se: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    groups: list[int],
    stride: int = 1,
    dilation: int = 1,
    mode: str = "multiplex",
    softmax: str = "scales",
) -> Tensor:
    """The whole module: weigh each branch's channels by its attention, and concatenate."""
    feats = spc(x, weights, groups, stride, dilation, mode)
    weighted = [
        feat * att[:, :, None, None]
        for feat, att in zip(feats, attention([se_weight(feat, *se) for feat in feats], softmax), strict=True)
    ]
    return torch.cat(weighted, dim=1)


def psa_of(leaves: dict[str, Tensor], x: Tensor, **options: object) -> Tensor:
    """``psa`` with parameters under the names of the module's state dict."""
    count = sum(name.startswith("spc.branches.") for name in leaves)
    weights = [leaves[f"spc.branches.{i}.weight"] for i in range(count)]
    w1, w2 = (leaves[f"se.{name}.weight"][:, :, 0, 0] for name in ("fc1", "fc2"))  # 1×1 convolutions as matrices
    return psa(x, weights, (w1, leaves["se.fc1.bias"], w2, leaves["se.fc2.bias"]), **options)  # type: ignore[arg-type]
