"""What a process does with memory that it has freed, and what it calls its processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import os, resource, sys, torch
from epsanet.tasks.devices import keep_freed_memory
for keep in (False, True):
    child = os.fork()
    if not child:
        if keep:
            keep_freed_memory()
        for step in range(15):
            tensors = [torch.zeros(1 << 24) for _ in range(3)]  # 64 MiB each
            del tensors
            if step == 11:  # where the heap runs into a mapping, glibc needs some steps until all pieces fit
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_used_again_without_asking_the_system_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True)
    as_it_is, kept = map(int, done.stdout.split())
    assert as_it_is > 100  # pages, which may be huge
    assert kept < as_it_is / 10


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="for Linux on x86")
@pytest.mark.parametrize(("asked", "instructions"), [("default", "DEFAULT"), ("avx2", "AVX2")])
def test_the_processors_name_is_followed_by_the_instructions_that_torch_uses(asked: str, instructions: str) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    if "avx2" not in flags:
        pytest.skip("needs AVX2")
    printed = subprocess.run(
        [sys.executable, "-c", "from epsanet.tasks.devices import processor_name; print(processor_name())"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": asked},
        check=True,
        capture_output=True,
        text=True,
    )
    name, _, found = printed.stdout.strip().rpartition(", ")
    assert found == instructions
    assert f"model name\t: {name}\n" in flags
