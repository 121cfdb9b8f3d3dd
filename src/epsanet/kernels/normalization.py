"""Batch norm of a training step with what stands around it: attention or a 1×1 convolution, the residual sum, ReLU.

torch takes these one after another, and each reads its tensors from memory and writes them back, which on a CPU is
most of what they cost. Here statistics are taken of a convolution's results while they are in a cache, norm, residual
and ReLU are one pass, and the gradient between norm and convolution is never in memory as a whole. Registered with
``torch.library``, as ``operators`` is.
"""

# ruff: noqa: ARG001 - shape functions take every argument of their operator

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import epsanet.kernels.choice as choice
from epsanet.kernels.operators import as_channels_last, batched, no_second_gradient

__all__ = ["batch_norm", "batch_norm_serves", "batch_norm_wanted"]

_LANES = 16
_LARGEST_MATRIX = 64 * 1024  # numbers, since each of sixteen shares of a batch has a gradient of its own


def batch_norm_wanted(x: Tensor) -> bool:
    """Whether norms of tensors like this one may be the kernels' at all: by library, choice, device and type."""
    if choice.native is None or choice.chosen() == "reference" or torch._C._are_functorch_transforms_active():
        return False
    return _plain(x) and not torch.is_autocast_enabled("cpu")


def batch_norm_serves(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrix: Tensor | None = None,
    residual: Tensor | None = None,
    attention_NC: Tensor | None = None,
) -> bool:
    """Whether ``batch_norm`` can take these tensors, and the choice of kernels is not ``"reference"``."""
    others = [tensor for tensor in (weight, bias, matrix, residual, attention_NC) if tensor is not None]
    if not batch_norm_wanted(x_NCHW) or not all(map(_plain, others)):
        return False
    if x_NCHW.dim() != 4 or x_NCHW.numel() <= x_NCHW.shape[1]:
        return False  # wrong shapes, and statistics of a single number, are torch's to refuse
    channels = x_NCHW.shape[1]
    if attention_NC is not None and attention_NC.shape != x_NCHW.shape[:2]:
        return False
    if matrix is not None:
        if matrix.shape[1] != channels or matrix.numel() > _LARGEST_MATRIX or any(n % _LANES for n in matrix.shape[:2]):
            return False
        channels = matrix.shape[0]
    if len(weight) != channels or (
        residual is not None and residual.shape != (x_NCHW.shape[0], channels, *x_NCHW.shape[2:])
    ):
        return False
    return x_NCHW.is_contiguous(memory_format=torch.channels_last)


def _plain(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return forward_ad.unpack_dual(tensor).tangent is None


def batch_norm(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    matrix: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut_stride: int = 0,
    attention_NC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of this batch, and what stands around it; differentiable but for the statistics.

    ``z = convolution(x)`` or ``z = attention * x``, ``y = relu((z - mean) / sqrt(variance + epsilon) * weight + bias +
    residual)``. Repeated calls give the same bits, on any number of threads.

    Args:
        x_NCHW: float32 on a CPU, more than one number a channel; channels-last saves a copy.
        weight: of the norm, shape ``K`` (``C`` without a convolution).
        bias: of the norm, as ``weight``.
        epsilon: added to the variance.
        relu: whether ReLU follows.
        matrix: the weight ``K, C, 1, 1`` of a dense convolution before the norm, both multiples of 16.
        residual: shape ``N, K, H, W``; with ReLU only.
        shortcut_stride: with a convolution, hands on x for a shortcut, whose gradient is then added where that of x is
            made: all of it with 1, every second row and column with 2; 0 hands on nothing.
        attention_NC: multiplies each channel of each image, shape ``N, C``; without a convolution only.

    Returns:
        The result, channels-last; mean and variance (divided by the count) of each channel of z; the shortcut's input
        ``N, C, H / stride, W / stride``, or an empty tensor.

    Raises:
        ValueError: for shapes that do not belong together, for a residual without ReLU, for a shortcut without a
            convolution, and for attention with one.
    """
    if residual is not None and not relu:
        raise ValueError("a residual is added before ReLU only; use relu=True")
    if shortcut_stride and matrix is None:
        raise ValueError("a shortcut is handed on by a convolution only; give its matrix, or use shortcut_stride=0")
    if attention_NC is not None and matrix is not None:
        raise ValueError("attention multiplies a norm's input, not a convolution's; leave one of them out")
    y, mean, variance, shortcut = _BatchNorm.apply(
        x_NCHW, weight, bias, epsilon, relu, attention_NC, matrix, residual, shortcut_stride
    )
    return y, mean, variance, shortcut


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        relu: bool,
        attention: Tensor | None,
        matrix: Tensor | None,
        residual: Tensor | None,
        shortcut_stride: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, variance, z = torch.ops.epsanet.batch_norm(x, weight, bias, epsilon, relu, attention, matrix, residual)
        ctx.arguments = (epsilon, relu, shortcut_stride)
        kept_y = None if residual is None else y
        kept_z = None if matrix is None else z
        ctx.save_for_backward(x, weight, bias, attention, matrix, kept_z, kept_y, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        if shortcut_stride > 1:
            shortcut = x[:, :, ::shortcut_stride, ::shortcut_stride].contiguous(memory_format=torch.channels_last)
        else:
            shortcut = x.view_as(x) if shortcut_stride else x.new_empty(0)
        return y, mean, variance, shortcut

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, attention, matrix, z, y, mean, variance = ctx.saved_tensors
        epsilon, relu, shortcut_stride = ctx.arguments
        dshortcut = others[-1] if shortcut_stride else None
        dy = torch.zeros_like(x if z is None else z) if dy is None else dy
        any_batched = batched(dy) or (dshortcut is not None and batched(dshortcut))
        gradients = _torchs_gradient if any_batched else torch.ops.epsanet.batch_norm_gradient
        dx, dweight, dbias, dattention, dmatrix, dresidual = gradients(
            dy, dshortcut, shortcut_stride, x, weight, bias, epsilon, relu, attention, matrix, z, y, mean, variance
        )
        attention_gradient = None if attention is None else dattention
        matrix_gradient = None if matrix is None else dmatrix
        residual_gradient = None if y is None else dresidual
        return dx, dweight, dbias, None, None, attention_gradient, matrix_gradient, residual_gradient, None


@torch.library.custom_op("epsanet::batch_norm", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    attention: Tensor | None,
    matrix: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_NHWC, matrix_KC, z_NHWK = as_channels_last(x), None, None
    if matrix is not None:
        matrix_KC = matrix.detach().flatten(1).contiguous()
        z_NHWK = x.new_empty(*x_NHWC.shape[:3], matrix.shape[0])
    y_NHWK = torch.empty_like(x_NHWC if z_NHWK is None else z_NHWK)
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    choice.native.batch_norm(
        x_NHWC,
        None if attention is None else attention.detach().contiguous(),
        matrix_KC,
        z_NHWK,
        weight.detach().contiguous(),
        bias.detach().contiguous(),
        None if residual is None else as_channels_last(residual),
        epsilon,
        relu,
        y_NHWK,
        mean,
        variance,
        torch.get_num_threads(),
    )
    z = x.new_empty(0) if z_NHWK is None else z_NHWK.permute(0, 3, 1, 2)
    return y_NHWK.permute(0, 3, 1, 2), mean, variance, z


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    attention: Tensor | None,
    matrix: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    made = channels if matrix is None else matrix.shape[0]
    y = x.new_empty(batch, height, width, made).permute(0, 3, 1, 2)
    z = x.new_empty(0) if matrix is None else torch.empty_like(y)
    return y, torch.empty_like(weight), torch.empty_like(weight), z


@torch.library.custom_op("epsanet::batch_norm_gradient", mutates_args=(), device_types="cpu")
def _gradient(
    dy: Tensor,
    dshortcut: Tensor | None,
    shortcut_stride: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    attention: Tensor | None,
    matrix: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_NHWC, dy_NHWK = as_channels_last(x), as_channels_last(dy)
    matrix_KC = None if matrix is None else matrix.detach().flatten(1).contiguous()
    dx_NHWC, dweight, dbias = torch.empty_like(x_NHWC), torch.empty_like(weight), torch.empty_like(weight)
    attention_NC = None if attention is None else attention.detach().contiguous()
    dattention = None if attention_NC is None else torch.empty_like(attention_NC)
    dmatrix = None if matrix_KC is None else torch.empty_like(matrix_KC)
    dresidual_NHWK = None if y is None else torch.empty_like(dy_NHWK)
    choice.native.batch_norm_gradient(
        dy_NHWK,
        None if dshortcut is None else as_channels_last(dshortcut),
        shortcut_stride,
        x_NHWC,
        attention_NC,
        matrix_KC,
        None if z is None else as_channels_last(z),
        weight.detach().contiguous(),
        bias.detach().contiguous(),
        None if y is None else as_channels_last(y),
        mean,
        variance,
        epsilon,
        relu,
        dx_NHWC,
        dattention,
        dmatrix,
        dresidual_NHWK,
        dweight,
        dbias,
        torch.get_num_threads(),
    )
    return (
        dx_NHWC.permute(0, 3, 1, 2),
        dweight,
        dbias,
        x.new_empty(0) if dattention is None else dattention,
        x.new_empty(0) if dmatrix is None or matrix is None else dmatrix.view(matrix.shape),
        x.new_empty(0) if dresidual_NHWK is None else dresidual_NHWK.permute(0, 3, 1, 2),
    )


@_gradient.register_fake
def _(
    dy: Tensor,
    dshortcut: Tensor | None,
    shortcut_stride: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    attention: Tensor | None,
    matrix: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        batch, channels, height, width = tensor.shape
        return tensor.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)

    dattention = x.new_empty(0) if attention is None else attention.new_empty(attention.shape)
    dmatrix = x.new_empty(0) if matrix is None else matrix.new_empty(matrix.shape)
    dresidual = x.new_empty(0) if y is None else like(dy)
    return like(x), torch.empty_like(weight), torch.empty_like(weight), dattention, dmatrix, dresidual


_gradient.register_autograd(no_second_gradient)


def _torchs_gradient(
    dy: Tensor,
    dshortcut: Tensor | None,
    shortcut_stride: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    relu: bool,
    attention: Tensor | None,
    matrix: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """By torch's own operators, which any tensors can go through."""
    before = z if z is not None else x if attention is None else x * attention[:, :, None, None]
    deviation = (variance + epsilon).rsqrt()[:, None, None]
    normed = (before - mean[:, None, None]) * deviation
    if relu:
        after = normed * weight[:, None, None] + bias[:, None, None] if y is None else y
        dy = dy * (after > 0)
    dweight, dbias = (dy * normed).sum((0, 2, 3)), dy.sum((0, 2, 3))
    count = before.numel() // before.shape[1]
    centred = dy - (dbias[:, None, None] + normed * dweight[:, None, None]) / count
    dx, dmatrix = weight[:, None, None] * deviation * centred, None
    dattention = None
    if attention is not None:
        dx, dattention = dx * attention[:, :, None, None], (dx * x).sum((-2, -1))
    if matrix is not None:
        dx, dmatrix, _ = torch.ops.aten.convolution_backward(
            dx, x, matrix, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )
    if dshortcut is not None:
        shortcut = torch.zeros_like(dx)
        shortcut[:, :, ::shortcut_stride, ::shortcut_stride] = dshortcut
        dx = dx + shortcut
    return dx, dweight, dbias, dattention, dmatrix, dy
