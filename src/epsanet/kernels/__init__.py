"""Native grouped convolutions for CPUs: forward, input gradient and weight gradient of a PSA module's branches.

No engine fills its vector lanes where a group has few output channels. Here a vector's lanes are groups (``order``),
or images where even the groups are too few. ``PSA`` uses these kernels by itself where they serve; ``use`` decides
otherwise. Inference networks have their 1×1 convolutions here too, and whole blocks in one call (``chain``); in
training, norms and what stands around them are one operator (``normalization``). See ``docs/speed.md``.
"""

from epsanet.kernels.chain import InferenceChain, in_large_pages
from epsanet.kernels.choice import Choice, available, instruction_set, instruction_sets, set_instruction_set, use
from epsanet.kernels.normalization import batch_norm, batch_norm_serves, batch_norm_wanted
from epsanet.kernels.operators import (
    pack_for_inference,
    pointwise_convolution,
    pyramid_attention,
    pyramid_convolution,
    reason_against,
    serves,
)
from epsanet.kernels.order import input_order, output_order

__all__ = [
    "Choice",
    "InferenceChain",
    "available",
    "batch_norm",
    "batch_norm_serves",
    "batch_norm_wanted",
    "in_large_pages",
    "input_order",
    "instruction_set",
    "instruction_sets",
    "output_order",
    "pack_for_inference",
    "pointwise_convolution",
    "pyramid_attention",
    "pyramid_convolution",
    "reason_against",
    "serves",
    "set_instruction_set",
    "use",
]
