"""Which implementation runs: the native one, torch's, or whichever serves."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Literal, get_args

import torch

try:
    import epsanet.kernels._native as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    _missing = str(error)

__all__ = ["Choice", "available", "instruction_set", "instruction_sets", "native", "set_instruction_set", "use"]

Choice = Literal["auto", "native", "reference"]

_CHOICE_VARIABLE = "EPSANET_KERNELS"
_ISA_VARIABLE = "EPSANET_KERNELS_ISA"


def available() -> bool:
    """Whether the native library was built for this installation."""
    return native is not None


def _checked(choice: str) -> Choice:
    for known in get_args(Choice):
        if choice == known:
            return known
    raise ValueError(f"kernels {choice!r} are unknown; use {' or '.join(map(repr, get_args(Choice)))}")


_choice: Choice = _checked(os.environ.get(_CHOICE_VARIABLE, "auto"))
_said_missing = False


class use:  # noqa: N801 - called like a function, and entered where the choice is to end
    """Choose the implementation of PSA's convolutions, for good or for a ``with`` block.

    The environment variable ``EPSANET_KERNELS`` sets the choice that a process starts with.

    Args:
        choice: ``"auto"`` takes the native kernels where they serve; ``"native"`` insists on them; ``"reference"``
            takes ``torch.nn.functional.conv2d``.

    Raises:
        ValueError: for an unknown choice, and for ``"native"`` where the library is missing. A layer that the native
            kernels cannot serve raises when it is called.
    """

    def __init__(self, choice: Choice) -> None:
        global _choice
        chosen = _checked(choice)
        if chosen == "native" and native is None:
            raise ValueError(f"the native kernels are not in this installation ({_missing}); use 'auto'")
        self._before = _choice
        _choice = chosen

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._before


def chosen() -> Choice:
    """The choice in force."""
    return _choice


def say_missing() -> None:
    """Warn, once a process, that the native library is missing."""
    global _said_missing
    if not _said_missing and not torch.compiler.is_compiling():
        _said_missing = True
        warnings.warn(
            f"epsanet's native kernels are not in this installation ({_missing}); PSA uses torch's convolutions, "
            "several times slower on CPUs. Reinstall epsanet where a C++ compiler is found.",
            stacklevel=3,
        )


def instruction_sets() -> list[str]:
    """The instruction sets that library and processor share, fastest first."""
    return [] if native is None else native.instruction_sets()


def instruction_set() -> str | None:
    """The instruction set in use, None without the library."""
    return None if native is None else native.instruction_set()


def set_instruction_set(name: str) -> None:
    """Use another instruction set; the environment variable ``EPSANET_KERNELS_ISA`` does it for a process.

    Args:
        name: ``"avx512"``, ``"avx2"`` or ``"portable"``.

    Raises:
        ValueError: when this processor or installation has no such one.
    """
    if native is None:
        raise ValueError("the native kernels are not in this installation")
    native.set_instruction_set(name)


if native is not None and _ISA_VARIABLE in os.environ:
    native.set_instruction_set(os.environ[_ISA_VARIABLE])
