"""The kernels as torch operators: one for all branches of a layer, and its gradients.

Registered with ``torch.library``, with shape propagation and autograd, so that ``torch.compile``, ``torch.export``
and autograd see ordinary operators. Dimensions are named as in ``epsanet.network.psa``.
"""

# ruff: noqa: ARG001 - shape functions take every argument of their operator

from __future__ import annotations

import atexit
import functools
import math
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

import epsanet.kernels.choice as choice
from epsanet.kernels.order import input_order, nests, output_order

if TYPE_CHECKING:
    from epsanet.kernels._native import Layer

__all__ = [
    "pack_for_inference",
    "pointwise_convolution",
    "pyramid_attention",
    "pyramid_convolution",
    "reason_against",
    "serves",
]

_MAX_KERNEL, _MAX_BRANCHES, _MAX_STRIDE = 31, 8, 8
_LANES = 16
_MISSING = "the native kernels are not in this installation"
# From half a vector of images on, lanes of images beat lanes that too few groups leave empty.
_IMAGES_WORTH_LANES = 8


def reason_against(
    x_NCHW: Tensor, weights: Sequence[Tensor], groups: Sequence[int], stride: int, dilation: int, split: bool
) -> str | None:
    """Why the native kernels cannot compute this layer, or None where they can."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vmap, jvp) is under way"
    for name, tensor in (("input", x_NCHW), *(("weight", weight) for weight in weights)):
        if tensor.device.type != "cpu":
            return f"the {name} is on device {tensor.device.type!r}, not 'cpu'"
        if tensor.dtype != torch.float32:
            return f"the {name} is {tensor.dtype}, not torch.float32"
        if tensor.dim() != 4:
            return f"the {name} has {tensor.dim()} dimensions, not 4"
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return f"the {name} carries a tangent (forward-mode differentiation)"
    if choice.native is None:
        return _MISSING
    seen = weights[0].shape[1] * groups[0] * (len(weights) if split else 1)
    if x_NCHW.shape[1] != seen:
        return f"the input has {x_NCHW.shape[1]} channels, not {seen}"
    if x_NCHW.numel() == 0:
        return "the input is empty"
    if torch.is_autocast_enabled("cpu"):
        return "autocast asks for another precision"
    if dilation != 1:
        return f"the dilation is {dilation}, not 1"
    return _layer_reason(tuple(weight.shape[-1] for weight in weights), tuple(groups), stride, split)


def _layer_reason(kernel_sizes: tuple[int, ...], groups: tuple[int, ...], stride: int, split: bool) -> str | None:
    if len(kernel_sizes) > _MAX_BRANCHES:
        return f"there are {len(kernel_sizes)} branches, more than {_MAX_BRANCHES}"
    if any(size % 2 == 0 or size > _MAX_KERNEL for size in kernel_sizes):
        return f"a kernel size of {kernel_sizes} is even or above {_MAX_KERNEL}"
    if stride > _MAX_STRIDE:
        return f"the stride is {stride}, more than {_MAX_STRIDE}"
    if any(count not in (1, 2, 4, 8) and count % _LANES for count in groups):
        return f"groups {groups} are not all 1, 2, 4, 8 or a multiple of {_LANES}"
    if not split and not nests(groups):
        return f"groups {groups} do not divide one another"
    return None


def serves(reason: str | None) -> bool:
    """Whether the native kernels are to compute a layer, by the choice of ``epsanet.kernels.use``.

    Args:
        reason: why they cannot, as ``reason_against`` gives it.

    Raises:
        ValueError: when ``"native"`` is chosen and the kernels cannot; the message says why.
    """
    chosen = choice.chosen()
    if chosen == "reference":
        return False
    if reason is None:
        return True
    if chosen == "native":
        raise ValueError(f"the native kernels cannot compute this layer: {reason}; use epsanet.kernels.use('auto')")
    if reason == _MISSING:
        choice.say_missing()
    return False


def pyramid_convolution(
    x_NCHW: Tensor, weights: Sequence[Tensor], groups: Sequence[int], stride: int, split: bool, ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """The branch convolutions of one PSA module and their sums over space, differentiable.

    Padding is ``(k - 1) / 2``. Repeated calls give the same bits.

    Args:
        x_NCHW: float32 on a CPU; channels-last saves a copy.
        weights: of each branch, shape ``D, C / G, k, k`` (``C / S / G`` with ``split``).
        groups: of each branch.
        stride: of all branches.
        split: whether branch ``i`` sees only its own share of the channels.
        ordered: whether channels of input and output are in the lane order (``input_order``, ``output_order``)
            instead of their natural one.

    Returns:
        Features ``N, K, H', W'``, channels-last, and their sums ``N, K``.

    Raises:
        ValueError: for shapes that do not belong together.
    """
    features, sums = torch.ops.epsanet.pyramid_convolution(x_NCHW, list(weights), list(groups), stride, split, ordered)
    return features, sums


# ------------------------------------------------------------------------------------------------- layers and weights


@functools.cache
def native_layer(
    in_channels: int,
    out_channels: int,
    kernel_sizes: tuple[int, ...],
    groups: tuple[int, ...],
    stride: int,
    split: bool,
    lanes_are_images: bool,
) -> Layer:
    """The native library's object of a layer, one for all that are alike."""
    if choice.native is None:
        raise ValueError(f"{_MISSING}; use epsanet.kernels.use('reference')")
    orders: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if not lanes_are_images:
        orders = input_order(in_channels, groups, split), output_order(out_channels, groups, split)
    return choice.native.Layer(in_channels, out_channels, kernel_sizes, groups, stride, split, *orders)


# The module's type outlives the interpreter otherwise, and nanobind reports a leak.
atexit.register(native_layer.cache_clear)


class _Call:
    """A layer and the arguments that every operator shares."""

    def __init__(
        self,
        batch: int,
        in_channels: int,
        weights: Sequence[Tensor],
        groups: Sequence[int],
        stride: int,
        split: bool,
        ordered: bool,
    ) -> None:
        branch_channels = weights[0].shape[0]
        self.out_channels = branch_channels * len(weights)
        self.ordered = ordered
        self.images = branch_channels % _LANES != 0 and batch >= _IMAGES_WORTH_LANES and not ordered
        self.weights = [weight.detach().contiguous() for weight in weights]
        self.given_weights = weights
        kernel_sizes = tuple(weight.shape[-1] for weight in weights)
        self.key = (in_channels, self.out_channels, kernel_sizes, tuple(groups), stride, split, self.images)
        self.layer = native_layer(*self.key)
        self.threads = torch.get_num_threads()

    def packed(self, backward: bool) -> Tensor:
        """The weights as the lanes want them, from the cache unless one of them has changed since."""
        # The version counter alone does not do: torch's fused optimisers leave it as it is.
        state = choice.native.fingerprint(self.weights)
        first, key = self.given_weights[0], (*self.key, backward)
        known = _packed_weights.get(first, {}).get(key)
        if known is not None and known[0] == state:
            return known[1]
        packed = torch.empty(self.layer.packed_size(backward), dtype=torch.float32, device="cpu")
        self.layer.pack(self.weights, packed, backward, self.threads)
        _packed_weights.setdefault(first, {})[key] = (state, packed)
        return packed


_Packed = dict[tuple[Any, ...], tuple[int, Tensor]]
_packed_weights: MutableMapping[Tensor, _Packed] = WeakTensorKeyDictionary()  # by a layer's first weight


def as_channels_last(x_NCHW: Tensor) -> Tensor:
    """``N, H, W, C``, contiguous, without gradient; a view where the memory lies so already."""
    return x_NCHW.detach().permute(0, 2, 3, 1).contiguous()


def _output_size(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("epsanet::pyramid_convolution", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weights: list[Tensor], groups: list[int], stride: int, split: bool, ordered: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    call = _Call(batch, channels, weights, groups, stride, split, ordered)
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), call.out_channels)
    sums = x.new_empty(batch, call.out_channels)
    call.layer.forward(as_channels_last(x), call.packed(backward=False), y_NHWK, sums, ordered, call.threads)
    return y_NHWK.permute(0, 3, 1, 2), sums


@_forward.register_fake
def _(
    x: Tensor, weights: list[Tensor], groups: list[int], stride: int, split: bool, ordered: bool
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = x.shape
    channels = weights[0].shape[0] * len(weights)
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), channels)
    return y_NHWK.permute(0, 3, 1, 2), x.new_empty(batch, channels)


@torch.library.custom_op("epsanet::pyramid_convolution_input_gradient", mutates_args=(), device_types="cpu")
def _input_gradient(
    dy: Tensor,
    dsums: Tensor,
    weights: list[Tensor],
    height: int,
    width: int,
    in_channels: int,
    groups: list[int],
    stride: int,
    split: bool,
    ordered: bool,
) -> Tensor:
    batch = dy.shape[0]
    call = _Call(batch, in_channels, weights, groups, stride, split, ordered)
    dx_NHWC = dy.new_empty(batch, height, width, in_channels)
    packed = call.packed(backward=True)
    call.layer.input_gradient(as_channels_last(dy), dsums.detach().contiguous(), packed, dx_NHWC, ordered, call.threads)
    return dx_NHWC.permute(0, 3, 1, 2)


@_input_gradient.register_fake
def _(
    dy: Tensor,
    dsums: Tensor,
    weights: list[Tensor],
    height: int,
    width: int,
    in_channels: int,
    groups: list[int],
    stride: int,
    split: bool,
    ordered: bool,
) -> Tensor:
    return dy.new_empty(dy.shape[0], height, width, in_channels).permute(0, 3, 1, 2)


@torch.library.custom_op("epsanet::pyramid_convolution_weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(
    x: Tensor,
    dy: Tensor,
    dsums: Tensor,
    weights: list[Tensor],
    groups: list[int],
    stride: int,
    split: bool,
    ordered: bool,
) -> list[Tensor]:
    call = _Call(x.shape[0], x.shape[1], weights, groups, stride, split, ordered)
    gradients = [torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for weight in weights]
    call.layer.weight_gradient(
        as_channels_last(x), as_channels_last(dy), dsums.detach().contiguous(), gradients, ordered, call.threads
    )
    return gradients


@_weight_gradient.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    dsums: Tensor,
    weights: list[Tensor],
    groups: list[int],
    stride: int,
    split: bool,
    ordered: bool,
) -> list[Tensor]:
    return [torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for weight in weights]


@torch.library.custom_op("epsanet::pyramid_attention", mutates_args=(), device_types="cpu")
def pyramid_attention(
    x: Tensor,
    packed: Tensor,
    squeeze_excite: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    kernel_sizes: list[int],
    groups: list[int],
    stride: int,
    split: bool,
    softmax_over_scales: bool,
    relu: bool,
    ordered: bool,
) -> Tensor:
    """A whole PSA module, the norm and the activation after it, for inference; arguments from ``pack_for_inference``.

    Args:
        x: N, C, H, W, float32 on a CPU.
        packed: the branches' weights as ``pack_for_inference`` lays them out.
        squeeze_excite: fc1's weight and bias, fc2's weight and bias; weights as matrices.
        scale: of the norm, K numbers in the order of the output's channels.
        shift: of the norm.
        kernel_sizes: of each branch.
        groups: of each branch.
        stride: of all branches.
        split: whether branch ``i`` sees only its own share of the channels.
        softmax_over_scales: or over the channels of each branch.
        relu: whether ReLU follows.
        ordered: whether channels of input and output are in the lane order.

    Returns:
        N, K, H', W', channels-last.
    """
    batch, channels, height, width = x.shape
    layer = native_layer(channels, scale.shape[0], tuple(kernel_sizes), tuple(groups), stride, split, False)
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), scale.shape[0])
    if not y_NHWK.numel():
        return y_NHWK.permute(0, 3, 1, 2)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = squeeze_excite
    layer.infer(
        as_channels_last(x),
        packed,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        scale,
        shift,
        y_NHWK,
        softmax_over_scales,
        relu,
        ordered,
        torch.get_num_threads(),
    )
    return y_NHWK.permute(0, 3, 1, 2)


@pyramid_attention.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    squeeze_excite: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    kernel_sizes: list[int],
    groups: list[int],
    stride: int,
    split: bool,
    softmax_over_scales: bool,
    relu: bool,
    ordered: bool,
) -> Tensor:
    batch, _, height, width = x.shape
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), scale.shape[0])
    return y_NHWK.permute(0, 3, 1, 2)


@torch.library.custom_op("epsanet::pointwise_convolution", mutates_args=(), device_types="cpu")
def pointwise_convolution(
    x: Tensor, packed: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool
) -> Tensor:
    """A dense 1×1 convolution with its bias, a residual sum and ReLU, for inference.

    Args:
        x: N, C, H, W, float32 on a CPU.
        packed: the weight as ``pack_for_inference`` lays it out for one group.
        bias: K numbers.
        residual: of the output's shape; added before the activation.
        stride: of both directions.
        relu: whether ReLU follows.

    Returns:
        N, K, H', W', channels-last.
    """
    batch, channels, height, width = x.shape
    layer = native_layer(channels, bias.shape[0], (1,), (1,), stride, False, False)
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), bias.shape[0])
    if not y_NHWK.numel():
        return y_NHWK.permute(0, 3, 1, 2)
    added = None if residual is None else as_channels_last(residual)
    layer.infer_pointwise(as_channels_last(x), packed, bias, added, y_NHWK, relu, torch.get_num_threads())
    return y_NHWK.permute(0, 3, 1, 2)


@pointwise_convolution.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool) -> Tensor:
    batch, _, height, width = x.shape
    y_NHWK = x.new_empty(batch, _output_size(height, stride), _output_size(width, stride), bias.shape[0])
    return y_NHWK.permute(0, 3, 1, 2)


def pack_for_inference(weights: Sequence[Tensor], in_channels: int, groups: Sequence[int], split: bool) -> Tensor:
    """The branches' weights as ``pyramid_attention`` wants them; the same for every stride and size of image."""
    kernel_sizes, out_channels = tuple(weight.shape[-1] for weight in weights), weights[0].shape[0] * len(weights)
    layer = native_layer(in_channels, out_channels, kernel_sizes, tuple(groups), 1, split, False)
    packed = torch.empty(layer.packed_size(backward=False), dtype=torch.float32, device="cpu")
    layer.pack([weight.detach().contiguous() for weight in weights], packed, False, torch.get_num_threads())
    return packed


@register_flop_formula([torch.ops.epsanet.pyramid_convolution])
def _flops(x: Any, weights: Sequence[torch.Size], *_: Any, out_shape: Sequence[torch.Size], **__: Any) -> int:
    """For torch's flop counter, which sees shapes and cannot look into the operator."""
    batch, _channels, height, width = out_shape[0]
    return 2 * batch * height * width * sum(math.prod(shape) for shape in weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, *ctx.layer = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, dy: Tensor, dsums: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    if batched(dy) or batched(dsums):
        return (*_torchs_gradients(dy, dsums, x, weights, *ctx.layer), None, None, None, None)
    dx: Tensor | None = None
    dweights: list[Any] = [None] * len(weights)
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, dsums, weights, x.shape[2], x.shape[3], x.shape[1], *ctx.layer)
    if any(weight.requires_grad for weight in weights):
        dweights = _weight_gradient(x, dy, dsums, weights, *ctx.layer)
    return (dx, dweights, None, None, None, None)


def batched(gradient: Tensor) -> bool:
    """Whether this stands for many gradients at once, of a vectorised backward pass (``is_grads_batched``, vmap)."""
    if torch.compiler.is_compiling():
        return False  # and torch.compile cannot look into the questions below
    kinds = torch._C._functorch
    return kinds.is_batchedtensor(gradient) or kinds.is_legacy_batchedtensor(gradient)


def _torchs_gradients(
    dy: Tensor,
    dsums: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    split: bool,
    ordered: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Of input and weights, by torch's own operators, which any tensors can go through."""
    dy = dy + dsums[..., None, None]
    orders: tuple[Sequence[int], Sequence[int]] = range(x.shape[1]), range(dy.shape[1])
    if ordered:
        orders = input_order(x.shape[1], tuple(groups), split), output_order(dy.shape[1], tuple(groups), split)
    into, out = (torch.tensor(order, device=x.device) for order in orders)
    x, dy = x[:, into.argsort()], dy[:, out.argsort()]
    dxs, dweights = [], []
    shares = x.chunk(len(weights), 1) if split else (x,) * len(weights)
    for share, dy_share, weight, count in zip(shares, dy.chunk(len(weights), 1), weights, groups, strict=True):
        padding = weight.shape[-1] // 2
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy_share, share, weight, None, [stride], [padding], [1], False, [0], count, [True, True, False]
        )
        dxs.append(dx)
        dweights.append(dweight)
    dx = torch.cat(dxs, 1) if split else sum(dxs[1:], start=dxs[0])
    return dx[:, into], dweights


def no_second_gradient(ctx: Any, *_: Any) -> Any:
    """The gradient of a gradient's operator: none, and a ``ValueError`` that names the way out."""
    raise ValueError(
        "the native kernels have no gradients of gradients; compute them under epsanet.kernels.use('reference')"
    )


_forward.register_autograd(_backward, setup_context=_setup_context)
_input_gradient.register_autograd(no_second_gradient)
_weight_gradient.register_autograd(no_second_gradient)
