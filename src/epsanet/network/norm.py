"""A block's 1×1 convolutions, norms, residual sum and ReLU in training, by the kernels where these serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from epsanet import kernels
from epsanet.network.psa import PSA, untouched

__all__ = ["ConvolutionNorm", "in_parts", "norm_activation", "psa_norm_activation"]


def norm_activation(norm: nn.Module, activation: nn.Module | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``activation(norm(x) + residual)``, shape ``N, C, H, W``; the kernels serve plain batch norms and ReLUs.

    Args:
        norm: of C channels.
        activation: or None.
        x: the norm's input.
        residual: of its shape, or None.
    """
    if _plain(norm, activation, residual) and _serves(norm, x, None, residual):
        return _batch_norm(norm, activation, x, None, residual, 0)[0]
    x = norm(x)
    if residual is not None:
        x += residual
    return x if activation is None else activation(x)


def psa_norm_activation(
    psa: Any, norm: nn.Module, activation: nn.Module | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``activation(norm(psa(x)) + residual)``, shape ``N, C, H, W`` to ``N, K, H', W'``.

    Where the kernels serve, attention multiplies the features inside the norm.
    """
    weighs = untouched(psa, PSA) and psa.se is not None and psa.fusion == "concat"
    if not weighs or not _plain(norm, activation, residual):
        return norm_activation(norm, activation, psa(x), residual)
    feats_NSDHW, attention_NSD = psa.features_and_attention(x)
    feats, attention = feats_NSDHW.flatten(1, 2), attention_NSD.flatten(1)
    if _serves(norm, feats, None, residual, attention):
        return _batch_norm(norm, activation, feats, None, residual, 0, attention)[0]
    return norm_activation(norm, activation, feats * attention[..., None, None], residual)


class ConvolutionNorm:
    """A convolution, the norm and the activation after it.

    Args:
        convolution: from C to K channels.
        norm: of K channels.
        activation: or None.
    """

    def __init__(self, convolution: nn.Module, norm: nn.Module, activation: nn.Module | None = None) -> None:
        self.convolution: Any = convolution
        self.norm: Any = norm
        self.activation = activation

    def subsamples(self) -> bool:
        """Whether the convolution looks at every stride-th pixel alone: plain, 1×1, without bias, groups or padding."""
        layer = self.convolution
        if not untouched(layer, nn.Conv2d) or layer.bias is not None:
            return False
        return (layer.kernel_size, layer.padding, layer.groups) == ((1, 1), (0, 0), 1)

    def serves(self, x: Tensor, residual: Tensor | None = None, subsampled: bool = False) -> bool:
        """Whether convolution and norm are one operator of the kernels."""
        dense = self.subsamples() and (subsampled or self.convolution.stride == (1, 1))
        plain = _plain(self.norm, self.activation, residual)
        return dense and plain and _serves(self.norm, x, self.convolution.weight, residual)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(norm(convolution(x)) + residual)``, shape ``N, C, H, W`` to ``N, K, H', W'``."""
        if self.serves(x, residual):
            return _batch_norm(self.norm, self.activation, x, self.convolution.weight, residual, 0)[0]
        return norm_activation(self.norm, self.activation, self.convolution(x), residual)

    def with_shortcut(self, x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Where it serves: a call's result, and every ``stride``-th row and column of x.

        The shortcut's gradient is added where that of x is made.
        """
        return _batch_norm(self.norm, self.activation, x, self.convolution.weight, None, stride)

    def of_subsampled(self, x: Tensor) -> Tensor:
        """What a call gives, for x whose rows and columns are left out already."""
        if self.serves(x, subsampled=True):
            return _batch_norm(self.norm, self.activation, x, self.convolution.weight, None, 0)[0]
        return norm_activation(self.norm, self.activation, F.conv2d(x, self.convolution.weight))


def in_parts(block: Any, x: Tensor) -> bool:
    """Whether a block's norms may be the kernels': in training, and with nothing of timm's else between its layers.

    A trace is to find timm's own layers, as every other device and type does.
    """
    plain = block.se is None and block.drop_path is None
    plain = plain and isinstance(block.drop_block, nn.Identity) and isinstance(block.aa, nn.Identity)
    return block.training and plain and isinstance(x, Tensor) and kernels.batch_norm_wanted(x)


def _plain(norm: Any, activation: nn.Module | None, residual: Tensor | None) -> bool:
    if not untouched(norm, nn.BatchNorm2d) or not (activation is None or untouched(activation, nn.ReLU)):
        return False
    usual = norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None
    return usual and not (residual is not None and activation is None)


def _serves(
    norm: Any, x: Tensor, matrix: Tensor | None, residual: Tensor | None, attention: Tensor | None = None
) -> bool:
    return kernels.batch_norm_serves(x, norm.weight, norm.bias, matrix, residual, attention)


def _batch_norm(
    norm: Any,
    activation: nn.Module | None,
    x: Tensor,
    matrix: Tensor | None,
    residual: Tensor | None,
    stride: int,
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By the kernels; the running statistics follow as in ``nn.BatchNorm2d``, with the variance of one count less."""
    y, mean, variance, shortcut = kernels.batch_norm(
        x, norm.weight, norm.bias, norm.eps, activation is not None, matrix, residual, stride, attention
    )
    count = y.numel() // y.shape[1]
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return y, shortcut
