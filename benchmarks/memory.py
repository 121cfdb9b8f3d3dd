"""Whether memory grows with calls of the native kernels: 100,000 of them, forward and both gradients in turn.

Usage: python benchmarks/memory.py [CALLS]
"""

from __future__ import annotations

import gc
import resource
import sys

import torch

from epsanet import kernels

GROUPS, KERNEL_SIZES, CHANNELS = (1, 4, 8, 16), (3, 5, 7, 9), 64
PARTS = 10


def main() -> None:
    """Print the largest resident memory after each tenth of the calls."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    torch.manual_seed(0)
    x = torch.randn(1, CHANNELS, 1, 1, requires_grad=True)
    weights = [
        torch.randn(CHANNELS // 4, CHANNELS // groups, size, size, requires_grad=True)
        for groups, size in zip(GROUPS, KERNEL_SIZES, strict=True)
    ]
    print("calls      largest resident memory [KiB]")
    with kernels.use("native"):
        for part in range(PARTS + 1):
            for _ in range(calls // PARTS // 3 if part else 300):  # the first few fill the caches
                kernels.pyramid_convolution(x, weights, GROUPS, 1, False)[0].sum().backward()
            gc.collect()
            print(f"{part * calls // PARTS:<9,}  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:,}", flush=True)


if __name__ == "__main__":
    main()
