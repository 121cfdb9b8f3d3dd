"""Which implementation runs: the native one, torch's, or whichever serves."""

from __future__ import annotations

import os
import warnings
from contextvars import ContextVar
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


# What plain calls of `use` chose, by whom; the last one counts, the environment's comes first.
_defaults: list[tuple[Choice, object]] = [(_checked(os.environ.get(_CHOICE_VARIABLE, "auto")), None)]
# The choices of the with blocks that this thread (or this task) is in.
_entered: ContextVar[tuple[Choice, ...]] = ContextVar("entered", default=())
# What torch.compile looks at, and compiles anew for when it changes; not every torch sees into a ContextVar.
_when_compiling: Choice = _defaults[0][0]
_said_missing = False


class use:  # noqa: N801 - called like a function, and entered where the choice is to end
    """Choose the implementation of PSA's convolutions, for the whole process or for a ``with`` block.

    A plain call chooses for all threads that are in no ``with`` block, until the next plain call. A block chooses for
    its own thread only. A backward pass takes what its forward pass took. The environment variable ``EPSANET_KERNELS``
    sets the choice that a process starts with.

    Args:
        choice: ``"auto"`` takes the native kernels where they serve; ``"native"`` insists on them; ``"reference"``
            takes ``torch.nn.functional.conv2d``.

    Raises:
        ValueError: for an unknown choice, and for ``"native"`` where the library is missing. A layer that the native
            kernels cannot serve raises when it is called.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = _checked(choice)
        if self._choice == "native" and native is None:
            raise ValueError(f"the native kernels are not in this installation ({_missing}); use 'auto'")
        # Nothing tells a plain call from one whose block follows at once; the block takes its default back.
        self._default = (self._choice, self)
        _defaults.append(self._default)
        _tell_compiler()

    def __enter__(self) -> None:
        if self._default in _defaults:
            _defaults.remove(self._default)
        _entered.set((*_entered.get(), self._choice))
        _tell_compiler()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.set(_entered.get()[:-1])
        _tell_compiler()


def _in_force() -> Choice:
    entered = _entered.get()
    return entered[-1] if entered else _defaults[-1][0]


def _tell_compiler() -> None:
    global _when_compiling
    _when_compiling = _in_force()


def chosen() -> Choice:
    """The choice in force."""
    return _when_compiling if torch.compiler.is_compiling() else _in_force()


def say_missing() -> None:
    """Warn, once a process, that the native library is missing."""
    global _said_missing
    if not _said_missing and not torch.compiler.is_compiling():
        _said_missing = True
        warnings.warn(
            f"epsanet's native kernels are not in this installation ({_missing}); PSA uses torch's convolutions, "
            "several times slower on CPUs. Reinstall epsanet where GCC or Clang (for C++17) is found, and with "
            "--no-cache-dir: pip may have kept the package that it built without a compiler.",
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
        name: ``"amx"``, ``"avx512"``, ``"avx2"`` or ``"portable"``.

    Raises:
        ValueError: when this processor or installation has no such one.
    """
    if native is None:
        raise ValueError("the native kernels are not in this installation")
    native.set_instruction_set(name)


if native is not None and _ISA_VARIABLE in os.environ:
    native.set_instruction_set(os.environ[_ISA_VARIABLE])
