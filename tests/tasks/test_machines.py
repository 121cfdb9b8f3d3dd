"""Two machines, as network namespaces: they find each other by torchrun, train, and survive or report a lost worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from forking import Kill
from test_faults import CLASSIFIER, EVERY_STEP, rows

from epsanet.tasks.checkpoints import read

ADDRESSES = ("10.77.3.1", "10.77.3.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two machines need root and iproute2")
    names = tuple(f"epsanet{os.getpid()}{letter}" for letter in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(
    machine: str, words: list[str], folder: Path, kill: Kill, restarts: int, *, host: bool
) -> subprocess.Popen[bytes]:
    command = [
        *("ip", "netns", "exec", machine, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400"),
        f"--rdzv-conf=is_host={int(host)}",  # namespaces share the host name by which torchrun would know
        *(f"--max-restarts={restarts}", str(Path(__file__).with_name("armed.py"))),
    ]
    environment = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "cable",
        "EPSANET_TEST_KILL": json.dumps(asdict(kill)),
    }
    with (folder / f"{machine}.txt").open("wb") as said:
        return subprocess.Popen(
            [*command, *words, "--output", str(folder / "run")],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def inside(machine: str) -> list[str]:
    """Processes that are left in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", machine], check=True, capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.parametrize("restarts", [1, 0], ids=["with restarts", "without"])
def test_two_machines_train_and_a_killed_worker_is_restarted_or_ends_the_job(
    restarts: int, machines: tuple[str, str], tiny_run: list[str], tmp_path: Path
) -> None:
    kill = Kill(function=CLASSIFIER + "training_step", call=5)
    words = [*tiny_run, *EVERY_STEP, "--data.batch_size=8"]
    jobs = [start(name, words, tmp_path, kill, restarts, host=name == machines[0]) for name in machines]
    try:
        codes = [job.wait(timeout=900) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    said = "".join((tmp_path / f"{machine}.txt").read_text() for machine in machines)
    run = tmp_path / "run"
    if restarts:
        assert codes == [0, 0], said
        assert said.count("(resumed)") == 1
        assert [row["step"] for row in rows(run)] == ["3", "6"]
        assert (run / "model" / "model.safetensors").is_file()
        return
    assert codes == [1, 1], said
    last = run / "checkpoints" / "last.ckpt"
    assert read(last)["global_step"] == 4
    assert time.time() - last.stat().st_mtime < 90, "the job ended soon after its last checkpoint"
    assert [inside(machine) for machine in machines] == [[], []]
    assert "another process has ended, or cannot be reached" in said


def test_lightning_starts_the_processes_itself(tiny_run: list[str], tmp_path: Path) -> None:
    words = [*tiny_run, "--data.batch_size=8", "--devices=2", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "epsanet", *words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 on 1 node" in done.stdout
    assert done.stdout.count("epoch 2/2") == 1, "one process speaks"
    assert [row["step"] for row in rows(tmp_path / "run")] == ["3", "6"]
    assert len(read(tmp_path / "run" / "checkpoints" / "last.ckpt")["callbacks"]["RandomStates"]["processes"]) == 2
