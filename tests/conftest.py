"""What all tests share: reproducible randomness, their order in several processes, and the cost of the networks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from epsanet import kernels

# A failure must come back on the next run and on the next machine, and a busy machine must not make one.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("reproducible")

# A shell that starts a command in the background has it ignore Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that share a costly fixture go to one process. Those that take longest go first, so that at the end there is
# something left for each process; the rest follows in its order.
GROUPS = (
    ("test_fuzz",),
    ("test_machines",),
    ("test_export", "test_bundle_checks"),
    ("test_faults", "test_checkpoints", "test_detection_faults", "test_resume", "test_evaluate"),
    ("test_detection_export",),
    ("test_studies",),
    ("test_cli", "test_cost", "test_docs"),
    ("test_contract",),
    ("test_optimize",),
    ("test_weights",),
    ("test_api", "test_gate", "test_page"),
    ("test_detection_learning",),
    ("test_detection_runs",),
)


PLACES = {name: place for place, group in enumerate(GROUPS) for name in group}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(item.path.stem, len(GROUPS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of ``--dist loadfile``, with a group in the place of a file."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return str(PLACES.get(Path(file).stem, file))

    return Groups(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run() -> None:
    import torch  # here, so that tests of a light import can be collected without it

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def costs() -> list[Any]:
    """The table of every network's cost, which takes as long as many a test."""
    from epsanet.study.cost import cost_table

    return cost_table()


@pytest.fixture(params=kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each one of the kernels' that this processor has, in turns."""
    before = kernels.instruction_set()
    kernels.set_instruction_set(request.param)
    yield request.param
    kernels.set_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
