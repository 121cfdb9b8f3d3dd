"""The C++ sources under AddressSanitizer and UBSan; ``benchmarks/fuzz.sh`` runs a million calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))),
    reason="needs cmake and a C++ compiler",
)
def test_20000_random_calls_touch_no_memory_that_is_not_theirs(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DEPSANET_FUZZ=ON"],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    run = subprocess.run([str(tmp_path / "fuzz"), "20000"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "20000 calls, no report" in run.stdout
