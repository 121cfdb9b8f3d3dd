"""Processes that Lightning starts on one machine, and torchrun on two: hosts of their own in network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tasks_reading import same_state
from test_faults import rows

from epsanet.tasks.checkpoints import read

EPOCHS = 6


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace with an address and a name of its own."""

    name: str

    def start(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a program there, as a session of its own; the process is the program itself."""
        enter = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0" && exec "$@"',
            self.name,
        ]
        with log.open("wb") as file:
            return subprocess.Popen(
                [*enter, *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(word) for word in found.stdout.split()]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them, which know each other's names; gone afterwards with all that runs there."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    pair = Host(name=f"first-{os.getpid()}"), Host(name=f"second-{os.getpid()}")
    settings = [Path("/etc/netns") / host.name for host in pair]
    try:
        for place, host in enumerate(pair):
            made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
            settings[place].mkdir(parents=True)
            names = [f"10.77.0.{number} {other.name}" for number, other in enumerate(pair, start=1)]
            (settings[place] / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            (settings[place] / "resolv.conf").write_text("")
        cable = ["ip", "link", "add", "eth0", "netns", pair[0].name, "type", "veth"]
        subprocess.run([*cable, "peer", "name", "eth0", "netns", pair[1].name], check=True)
        for number, host in enumerate(pair, start=1):
            inside = ["ip", "-n", host.name]
            subprocess.run([*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0"], check=True)
            for device in ("lo", "eth0"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield pair
    finally:
        for log in sorted(tmp_path.glob("*.log")):
            print(log.read_text())  # pytest shows it where a test fails
        for place, host in enumerate(pair):
            if Path("/run/netns", host.name).exists():
                for process in host.processes():
                    os.kill(process, signal.SIGKILL)
                subprocess.run(["ip", "netns", "delete", host.name], check=True)
            shutil.rmtree(settings[place], ignore_errors=True)


def start_on(hosts: tuple[Host, Host], words: list[str], folder: Path, restarts: int) -> list[subprocess.Popen[bytes]]:
    """What docs/tutorials/scale.md says to type on each machine."""
    torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    torchrun += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].name}:29400", "--rdzv-id=mine"]
    torchrun += [f"--max-restarts={restarts}", "-m", "epsanet", *words, "--output", str(folder), "--resume=auto"]
    return [host.start(torchrun, folder.with_name(f"{host.name}.log")) for host in hosts]


def kill_a_worker(torchrun: subprocess.Popen[bytes], run: Path) -> None:
    """Kill what torchrun started, once there is an epoch to go on from."""
    limit = time.monotonic() + 300
    while not (run / "metrics.csv").exists() or len(rows(run)) < 2:
        assert torchrun.poll() is None, "it has ended before"
        assert time.monotonic() < limit, "it never trained"
        time.sleep(0.05)
    (worker,) = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run on one machine that nothing interrupts, in processes that Lightning starts."""

    words: list[str]
    folder: Path
    said: str


@pytest.fixture(scope="module")
def whole(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = [*tiny_run, "--data.batch_size=8", f"--schedule.epochs={EPOCHS}"]
    done = subprocess.run(
        [sys.executable, "-m", "epsanet", *words, "--devices=2", "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return Whole(words=words, folder=folder, said=done.stdout)


@pytest.mark.timeout(1200)
def test_a_worker_that_is_killed_on_one_of_two_hosts_is_restarted_and_nothing_is_lost(
    hosts: tuple[Host, Host], whole: Whole, tmp_path: Path
) -> None:
    torchruns = start_on(hosts, whole.words, tmp_path / "killed", restarts=1)
    kill_a_worker(torchruns[1], tmp_path / "killed")
    assert [torchrun.wait(timeout=300) for torchrun in torchruns] == [0, 0]
    said = (tmp_path / f"{hosts[0].name}.log").read_text()
    assert said.count("2 on 2 nodes") == 2, "started, and started again"
    assert "(resumed)" in said
    assert rows(tmp_path / "killed") == rows(whole.folder)
    killed, uninterrupted = (
        load_file(run / "model" / "model.safetensors") for run in (tmp_path / "killed", whole.folder)
    )
    same_state(killed, uninterrupted)


def test_without_restarts_a_killed_worker_ends_the_job_on_both_hosts_and_leaves_no_process(
    hosts: tuple[Host, Host], tiny_run: list[str], tmp_path: Path
) -> None:
    torchruns = start_on(hosts, [*tiny_run, "--data.batch_size=8", "--schedule.epochs=1000"], tmp_path / "run", 0)
    kill_a_worker(torchruns[1], tmp_path / "run")
    ended = time.monotonic() + 90
    assert all(torchrun.wait(timeout=max(ended - time.monotonic(), 1)) > 0 for torchrun in torchruns)
    assert [host.processes() for host in hosts] == [[], []]
    assert "another process has ended" in (tmp_path / f"{hosts[0].name}.log").read_text()


@pytest.mark.timeout(600)
def test_lightning_starts_the_processes_itself(whole: Whole) -> None:
    assert "2 on 1 node" in whole.said
    assert whole.said.count(f"epoch {EPOCHS}/{EPOCHS}") == 1, "one process speaks"
    assert [int(row["step"]) for row in rows(whole.folder)] == [3 * epoch for epoch in range(1, EPOCHS + 1)]
    assert len(read(whole.folder / "checkpoints" / "last.ckpt")["callbacks"]["RandomStates"]["processes"]) == 2
