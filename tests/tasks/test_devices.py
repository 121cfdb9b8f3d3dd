"""What a process does with memory that it has freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from epsanet.tasks.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(25):
    tensors = [torch.zeros(1 << 24) for _ in range(3)]  # 64 MiB each
    del tensors
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_used_again_without_asking_the_system_for_it() -> None:
    pages = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], check=True, capture_output=True).stdout)
        for how in ("keep", "as it is")
    }
    assert pages["as it is"] > 1000
    assert pages["keep"] < pages["as it is"] / 10
