"""What a model folder holds, told from its ``config.json`` alone. Importable without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["DETECTION", "find_detector", "is_detector"]

DETECTION = "object-detection"
"""The ``task`` in the ``config.json`` of a detector."""
_MAX_BYTES = 2**24


def find_detector(source: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Model folder and content of its ``config.json``, if a model or run folder holds a detector."""
    for folder in (Path(source), Path(source) / "model"):
        file = folder / "config.json"
        try:
            if file.stat().st_size > _MAX_BYTES:
                continue
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.get("task") == DETECTION:
            return folder, config
    return None


def is_detector(source: Any) -> bool:
    """Whether a model or run folder holds a detector."""
    return isinstance(source, str | Path) and find_detector(source) is not None
