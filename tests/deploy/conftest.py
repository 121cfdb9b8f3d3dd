"""The network of the digits that comes with the package, and its bundles."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import made_once

from epsanet.deploy.config import ExportConfig
from epsanet.deploy.export import Exported, export
from epsanet.network.shipped import shipped_folders


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    return shipped_folders()["epsanet14_tiny.digits"]


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Iterator[None]:
    """Torch reads the content of a ``.pt2`` once: it needs seconds for it."""
    load = torch.export.load
    read = functools.cache(lambda content: load(io.BytesIO(content)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", lambda path: read(Path(path).read_bytes()))
        yield


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """What exports of the network share; see ``made_once``."""
    return {}


@pytest.fixture(scope="session")
def bundles(digits_folder: Path, made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The network in each format, by the name of the format."""
    folder = tmp_path_factory.mktemp("bundles")
    said: list[str] = []
    with contextlib.chdir(folder), made_once(made):
        return {
            kind: export(digits_folder, folder / kind, ExportConfig(format=kind), note=said.append)
            for kind in ("onnx", "openvino", "pt2")
        }
