"""What takes torch seconds in an export, done once for all exports of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from epsanet.deploy import detection as detection_module
from epsanet.deploy import export as export_module
from epsanet.deploy import write as write_module
from epsanet.deploy.write import exported_program, write_onnx


@contextmanager
def made_once(made: dict[str, Any]) -> Iterator[None]:
    """Exports inside take the program of torch.export and the ONNX file from ``made``, and put them there if need be.

    Args:
        made: of one network, which all exports inside are of.
    """

    def program(*arguments: Any) -> Any:
        if "program" not in made:
            made["program"] = exported_program(*arguments)
        return made["program"]

    def write(program: Any, path: Path, *arguments: Any) -> None:
        if "onnx" not in made:
            write_onnx(program, path, *arguments)
            made["onnx"] = path.read_bytes()
        path.write_bytes(made["onnx"])

    with pytest.MonkeyPatch.context() as patch:
        for module in (export_module, detection_module):
            patch.setattr(module, "exported_program", program)
        for module in (export_module, write_module):
            patch.setattr(module, "write_onnx", write)
        yield
