"""Weights that come with the package: model folders in ``epsanet/weights``, each named ``ARCHITECTURE.TAG``.

A folder that is put there is found by its name everywhere, also by timm; nothing lists them by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["ShippedWeights", "pretrained_cfgs", "shipped_folders", "shipped_weights"]

FOLDER = Path(str(files("epsanet") / "weights"))


@dataclass(frozen=True, kw_only=True)
class ShippedWeights:
    """What is known of shipped weights from their own folder."""

    name: str
    """As ``load_model`` and timm take it."""
    classes: int
    """Outputs of the network."""
    input_size: int
    """Height and width in pixels."""
    file_bytes: int
    """Of the safetensors file."""
    measured_on: str | None
    """Data set and split of the accuracy, from the model card."""
    top1: float | None
    """Accuracy there in percent, from the model card."""

    @property
    def of(self) -> str:
        """The architecture."""
        return self.name.partition(".")[0]


def shipped_folders() -> dict[str, Path]:
    """Name and model folder of all shipped weights."""
    return {path.name: path for path in sorted(FOLDER.iterdir()) if (path / "config.json").is_file()}


def pretrained_cfgs() -> dict[str, dict[str, Any]]:
    """timm's ``pretrained_cfg`` of all shipped weights, under ``ARCHITECTURE.TAG``."""
    return {name: _pretrained_cfg(folder) for name, folder in shipped_folders().items()}


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _pretrained_cfg(folder: Path) -> dict[str, Any]:
    config = _read_config(folder)
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()
    }
    return {**values, "label_names": tuple(config["label_names"]), "file": str(folder / "model.safetensors")}


def shipped_weights() -> list[ShippedWeights]:
    """All shipped weights, with the accuracy that their model cards give."""
    from huggingface_hub import ModelCard

    found = []
    for name, folder in shipped_folders().items():
        config = _read_config(folder)
        results = ModelCard.load(folder / "README.md").data.eval_results or []
        result = next((result for result in results if result.metric_type == "accuracy"), None)
        found.append(
            ShippedWeights(
                name=name,
                classes=config["num_classes"],
                input_size=config["pretrained_cfg"]["input_size"][-1],
                file_bytes=(folder / "model.safetensors").stat().st_size,
                measured_on=f"{result.dataset_name}, {result.dataset_split}" if result else None,
                top1=100 * result.metric_value if result else None,
            )
        )
    return found
