"""Which device a run uses: what was asked for, or an error, never a silent other one; and memory for a CPU."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

__all__ = ["keep_freed_memory", "processor_name", "resolve_device"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""In glibc's malloc.h."""


def resolve_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` takes the first accelerator there is.

    Raises:
        ValueError: when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here: {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.type == "mps" and not torch.mps.is_available():
        raise ValueError("device 'mps' is not here; use cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def keep_freed_memory() -> None:
    """Have glibc keep for this process what it frees, so that the next batch on a CPU finds it.

    As glibc stands, each large tensor is mapped anew, and the system clears its pages: a fifth of a training step's
    time in some networks. This concerns the whole process, so it is for a program to call and not for a library.
    Elsewhere it does nothing.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def processor_name() -> str:
    """The processor's own name where the system tells it, else its kind; and the instructions that torch uses.

    Servers of several generations share a name, and differ by half in what they compute in a second.
    """
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
