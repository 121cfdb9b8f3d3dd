"""Layers of an inference network that follow one another, computed in one call of the native library."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

import epsanet.kernels.choice as choice
from epsanet.kernels.operators import as_channels_last, native_layer

__all__ = ["InferenceChain", "in_large_pages"]


class InferenceChain:
    """1×1 convolutions and PSA modules of an inference network, with what lies between them in memory of its own.

    That memory, of the largest batch so far, is kept for the next call and given back with the object. Steps are added
    in the order in which they run. A step names its inputs by number: 0 is the chain's input, ``i`` the result of the
    ``i``-th step; the last result is the chain's. Weights are read where they lie, and stay there as long as the chain.

    Raises:
        ValueError: when the native library is missing; later for steps that do not fit together.
    """

    def __init__(self) -> None:
        if choice.native is None:
            raise ValueError("the native kernels are not in this installation; use epsanet.kernels.use('reference')")
        self._native = choice.native.Chain()
        _alive.add(self)

    def add_pointwise(
        self, packed: Tensor, bias: Tensor, in_channels: int, stride: int, relu: bool, source: int, residual: int | None
    ) -> None:
        """Add a dense 1×1 convolution; arguments as for ``pointwise_convolution``, ``residual`` by its number."""
        layer = native_layer(in_channels, bias.shape[0], (1,), (1,), stride, False, False)
        self._native.add_pointwise(layer, packed, bias, relu, source, -1 if residual is None else residual)

    def add_attention(
        self,
        packed: Tensor,
        squeeze_excite: Sequence[Tensor],
        scale: Tensor,
        shift: Tensor,
        kernel_sizes: Sequence[int],
        groups: Sequence[int],
        stride: int,
        split: bool,
        softmax_over_scales: bool,
        relu: bool,
        ordered: bool,
        in_channels: int,
        source: int,
    ) -> None:
        """Add a PSA module, the norm and the activation after it; arguments as for ``pyramid_attention``."""
        layer = native_layer(in_channels, scale.shape[0], tuple(kernel_sizes), tuple(groups), stride, split, False)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = squeeze_excite
        self._native.add_attention(
            layer,
            packed,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            scale,
            shift,
            softmax_over_scales,
            relu,
            ordered,
            source,
        )

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The last step's result, ``N, K, H', W'``, channels-last, of float32 on a CPU of shape ``N, C, H, W``."""
        x_NHWC = as_channels_last(x_NCHW)
        batch, height, width, _ = x_NHWC.shape
        y_NHWK = x_NHWC.new_empty(batch, *self._native.result_size(height, width))
        self._native.run(x_NHWC, y_NHWK, torch.get_num_threads())
        return y_NHWK.permute(0, 3, 1, 2)


_alive: weakref.WeakSet[InferenceChain] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A network that something still holds when the interpreter ends would have nanobind report a leak."""
    for chain in _alive:
        del chain._native


def in_large_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that lie one after another, where the system has large pages in those; each a multiple of 16 float32."""
    together = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.float32, device="cpu")
    if choice.native is not None:
        choice.native.prefer_large_pages(together)
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]
