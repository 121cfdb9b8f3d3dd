"""Libraries that only some commands need, and what they must not do."""

from __future__ import annotations

import importlib.util
import sys


def require(module: str, extra: str) -> None:
    """Raise a ``ValueError`` with the line to install when an optional library is missing."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs {module}, which is not installed; pip install 'epsanet[{extra}]'")


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting their use over the network; to be called before they are imported.

    Both do without the library that reports where it is missing, so it is made to look missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
