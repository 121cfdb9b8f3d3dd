"""Which implementation runs: blocks, plain calls, threads, compiled code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from epsanet import kernels
from epsanet.kernels import choice
from epsanet.network.psa import PSA

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _the_process_keeps_its_choice() -> Iterator[None]:
    before = choice.chosen()
    kernels.use("auto")
    yield
    kernels.use(before)


def in_another_thread(call: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_a_block_chooses_for_its_own_thread_and_a_plain_call_for_all() -> None:
    with kernels.use("reference"):
        assert choice.chosen() == "reference"
        assert in_another_thread(choice.chosen) == "auto"
    kernels.use("reference")
    assert in_another_thread(choice.chosen) == "reference"
    with kernels.use("auto"):
        assert choice.chosen() == "auto"
        assert in_another_thread(choice.chosen) == "reference"
    assert choice.chosen() == "reference"


def test_overlapping_blocks_of_two_threads_leave_the_choice_as_it_was() -> None:
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with kernels.use("reference"):
            entered.set()
            left.wait(10)
            seen.append(choice.chosen())
        seen.append(choice.chosen())

    mine, thread = kernels.use("auto"), threading.Thread(target=other)
    with mine:
        thread.start()
        entered.wait(10)
        assert choice.chosen() == "auto"
    left.set()
    thread.join()
    assert seen == ["reference", "auto"]
    assert choice.chosen() == in_another_thread(choice.chosen) == "auto"


def test_blocks_that_are_made_in_turns_and_then_entered_leave_the_choice_as_it_was() -> None:
    first, second = kernels.use("reference"), kernels.use("reference")
    with first, second:
        assert choice.chosen() == "reference"
    assert choice.chosen() == "auto"


def test_one_object_serves_any_number_of_blocks_also_inside_each_other() -> None:
    block = kernels.use("reference")
    for _ in range(2):
        with block, kernels.use("auto"):
            with block:
                assert choice.chosen() == "reference"
            assert choice.chosen() == "auto"
        assert choice.chosen() == "auto"


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_compiled_code_follows_the_choice() -> None:
    module, x = PSA(64), torch.randn(2, 64, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for chosen in ("native", "reference", "native"):
        with kernels.use(chosen):
            assert torch.equal(compiled(x), module(x))
    kernels.use("reference")
    assert torch.equal(compiled(x), module(x))
    with kernels.use("native"):
        assert not torch.equal(compiled(x), in_another_thread(lambda: module(x)))  # else the above says nothing


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_a_backward_pass_takes_what_its_forward_pass_took() -> None:
    module, x = PSA(64), torch.randn(2, 64, 8, 8)
    gradients = {}
    for chosen in ("native", "reference"):
        with kernels.use(chosen):
            loss = module(x).square().sum()
        weight = module.spc.branches[3].weight
        gradients[chosen] = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for other in ("native", "reference"):
            with kernels.use(other):
                assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], gradients[chosen])
    assert not torch.equal(gradients["native"], gradients["reference"])
