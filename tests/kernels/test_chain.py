"""Chains of native layers: what they refuse, and that nothing in their memory is overwritten while it is needed."""

from __future__ import annotations

import concurrent.futures
import gc
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from epsanet import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no native kernels in this installation")


def add(
    chain: kernels.InferenceChain, weight: Tensor, source: int, residual: int | None = None, relu: bool = False
) -> None:
    packed = kernels.pack_for_inference([weight], weight.shape[1], [1], False)
    chain.add_pointwise(packed, torch.zeros(weight.shape[0]), weight.shape[1], 1, relu, source, residual)


@pytest.mark.parametrize("wide", [24, 600], ids=["in the residual's place", "over several panels of channels"])
def test_residuals_of_every_step_before_agree_with_float64(wide: int) -> None:
    """Also of one that is used again later, of the chain's input, and of what is the source too."""
    torch.manual_seed(0)
    steps = [(0, None), (1, 0), (2, 1), (3, 3), (4, 1), (3, 5), (6, 0), (7, 6), (8, None)]
    weights = [torch.randn(wide, wide, 1, 1) / wide**0.5 for _ in steps]
    chain = kernels.InferenceChain()
    for weight, (source, residual) in zip(weights, steps, strict=True):
        add(chain, weight, source, residual, relu=True)
    for batch, height, width in ((1, 5, 3), (3, 7, 9), (2, 1, 1)):
        x = torch.randn(batch, wide, height, width)
        values = [x.double()]
        for weight, (source, residual) in zip(weights, steps, strict=True):
            value = F.conv2d(values[source], weight.double())
            values.append((value if residual is None else value + values[residual]).relu())
        for _ in range(2):
            torch.testing.assert_close(chain(x).double(), values[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "a chain needs steps"),
        ([(0, None, 8, 8), (2, None, 8, 8)], "step 1 uses a value that is not there yet"),
        ([(0, None, 8, 8), (1, 2, 8, 8)], "step 1 uses a value that is not there yet"),
        ([(0, None, 8, 8), (0, None, 8, 8)], "value 1 is used by no step"),
        ([(0, None, 8, 16), (1, None, 8, 8)], "step 1 takes another number of channels than its source has"),
        ([(0, None, 8, 16), (1, 0, 16, 16)], "step 1 adds a residual of another size than its result"),
    ],
)
def test_steps_that_do_not_fit_together_raise(steps: list[tuple[int, int | None, int, int]], message: str) -> None:
    chain = kernels.InferenceChain()
    for source, residual, seen, made in steps:
        add(chain, torch.zeros(made, seen, 1, 1), source, residual)
    with pytest.raises(ValueError, match=re.escape(message)):
        chain(torch.zeros(1, 8, 2, 2))


def test_other_inputs_weights_and_late_steps_raise() -> None:
    chain, weight = kernels.InferenceChain(), torch.eye(8)[:, :, None, None]
    with pytest.raises(ValueError, match="packed weights have the wrong size"):
        chain.add_pointwise(torch.zeros(16), torch.zeros(8), 8, 1, False, 0, None)
    add(chain, weight, 0)
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(chain(x), x)
    with pytest.raises(ValueError, match="the first layer's channels"):
        chain(torch.zeros(1, 9, 2, 2))
    with pytest.raises(TypeError):
        chain(x.double())
    with pytest.raises(ValueError, match="has run already"):
        add(chain, weight, 1)


def test_weights_in_large_pages_are_the_same_weights() -> None:
    tensors = [torch.randn(16), torch.randn(3, 32)]
    copies = kernels.in_large_pages(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()


def test_memory_does_not_grow_with_chains_calls_and_threads() -> None:
    weight, x = torch.eye(16)[:, :, None, None], torch.randn(2, 16, 64, 64)  # maps of half a MiB

    def run(rounds: int) -> int:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for _ in range(rounds):
                chain = kernels.InferenceChain()
                for number in range(4):
                    add(chain, weight, number)
                for result in pool.map(chain, [x] * 4):
                    assert torch.equal(result, x)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # resident

    before = run(50)
    assert run(600) - before < 128 * 2**20  # where each chain has a MiB or two, and half of all calls as much again


def test_a_chain_that_outlives_the_interpreter_leaves_no_nanobind_leak_behind() -> None:
    program = (
        "import ctypes, torch; from epsanet import kernels; chain = kernels.InferenceChain();"
        "packed = kernels.pack_for_inference([torch.eye(8)[:, :, None, None]], 8, [1], False);"
        "chain.add_pointwise(packed, torch.zeros(8), 8, 1, False, 0, None); print(chain(torch.ones(1, 8, 1, 1)).sum());"
        "ctypes.pythonapi.Py_IncRef(ctypes.py_object(chain))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "tensor(8.)"
    assert "nanobind" not in run.stderr
