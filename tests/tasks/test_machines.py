"""Processes on one machine, started by Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from test_faults import rows

from epsanet.tasks.checkpoints import read


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
