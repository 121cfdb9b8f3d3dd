"""What a folder holds, told from its ``config.json`` or ``bundle.json`` alone. Importable without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["BUNDLE_NAME", "DETECTION", "NETWORK_NAMES", "find_bundle", "find_detector", "is_detector"]

BUNDLE_NAME = "bundle.json"
"""What makes a folder a bundle of ``epsanet export``."""
NETWORK_NAMES = {"onnx": "network.onnx", "openvino": "network.xml", "pt2": "network.pt2"}
"""Formats of a bundle, and the file that holds the network in each."""

DETECTION = "object-detection"
"""The ``task`` in the ``config.json`` or ``bundle.json`` of a detector."""
_MAX_BYTES = 2**24


def find_detector(source: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Model folder and content of its ``config.json``, if a model or run folder holds a detector."""
    for folder in (Path(source), Path(source) / "model"):
        config = _content(folder / "config.json")
        if config.get("task") == DETECTION:
            return folder, config
    return None


def _content(file: Path) -> dict[str, Any]:
    """What a JSON file maps, nothing when it is not there or something else."""
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def find_bundle(source: str | Path) -> Path | None:
    """The folder of a bundle, which may be named by its network's file, if it is one."""
    path = Path(source)
    folder = path.parent if path.name in NETWORK_NAMES.values() else path
    return folder if (folder / BUNDLE_NAME).is_file() else None


def is_detector(source: Any) -> bool:
    """Whether a model or run folder, or a bundle or its network's file, holds a detector."""
    if not isinstance(source, str | Path):
        return False
    bundle = find_bundle(source)
    return find_detector(source) is not None or (
        bundle is not None and _content(bundle / BUNDLE_NAME).get("task") == DETECTION
    )
