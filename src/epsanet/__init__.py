"""EPSANet: Pyramid Squeeze Attention networks (ACCV 2022) for timm, with training, evaluation and conversion.

Importing this package is light: torch and timm are loaded by what needs them. The networks are in timm's registry
as soon as both packages are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epsanet.data.config import DataConfig
    from epsanet.network.detector_config import DetectorConfig
    from epsanet.network.detectors import create_detector, load_detector
    from epsanet.network.epsanet import EPSABasicBlock, EPSABlock, EPSANet
    from epsanet.network.optimize import optimize
    from epsanet.network.psa import PSA, SPC, SEWeight, fit_groups
    from epsanet.network.replace import psa_replace
    from epsanet.network.weights import convert, load_model, save_model
    from epsanet.tasks.config import TrainConfig, load_recipe
    from epsanet.tasks.detection.evaluate import evaluate_detector
    from epsanet.tasks.detection.predict import detect
    from epsanet.tasks.evaluate import evaluate
    from epsanet.tasks.predict import predict
    from epsanet.tasks.train import train

__version__ = "0.1.0"

_HOMES = {
    "DataConfig": "epsanet.data.config",
    "DetectorConfig": "epsanet.network.detector_config",
    "EPSABasicBlock": "epsanet.network.epsanet",
    "EPSABlock": "epsanet.network.epsanet",
    "EPSANet": "epsanet.network.epsanet",
    "PSA": "epsanet.network.psa",
    "SEWeight": "epsanet.network.psa",
    "SPC": "epsanet.network.psa",
    "TrainConfig": "epsanet.tasks.config",
    "convert": "epsanet.network.weights",
    "create_detector": "epsanet.network.detectors",
    "detect": "epsanet.tasks.detection.predict",
    "evaluate": "epsanet.tasks.evaluate",
    "evaluate_detector": "epsanet.tasks.detection.evaluate",
    "fit_groups": "epsanet.network.psa",
    "load_detector": "epsanet.network.detectors",
    "load_model": "epsanet.network.weights",
    "load_recipe": "epsanet.tasks.config",
    "optimize": "epsanet.network.optimize",
    "predict": "epsanet.tasks.predict",
    "psa_replace": "epsanet.network.replace",
    "save_model": "epsanet.network.weights",
    "train": "epsanet.tasks.train",
}

__all__ = [
    "PSA",
    "SPC",
    "DataConfig",
    "DetectorConfig",
    "EPSABasicBlock",
    "EPSABlock",
    "EPSANet",
    "SEWeight",
    "TrainConfig",
    "convert",
    "create_detector",
    "detect",
    "evaluate",
    "evaluate_detector",
    "fit_groups",
    "load_detector",
    "load_model",
    "load_recipe",
    "optimize",
    "predict",
    "psa_replace",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'epsanet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register() -> None:
    for name in ("epsanet", "rivals"):
        importlib.import_module(f"epsanet.network.{name}")


class _RegisterAfterTimm(importlib.abc.MetaPathFinder):
    """Registers the networks the moment ``timm.models`` has been imported, without importing it now."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())
