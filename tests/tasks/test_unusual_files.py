"""Damaged files beside good ones change no result of the good ones: in training, evaluation and prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS
from making import class_folders
from tasks_reading import CLASSES

from epsanet.data.check import check_images
from epsanet.data.config import DataConfig
from epsanet.data.images import image_files, printable
from epsanet.data.loaders import train_loader
from epsanet.data.samples import FolderSamples
from epsanet.network.weights import load_model
from epsanet.tasks.evaluate import evaluate
from epsanet.tasks.predict import predict

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
HERE = [kind for kind in KINDS if not (ROOT and kind.name == "secret.jpg")]  # root reads everything


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "good", dict.fromkeys(CLASSES, 5))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """The same, and every kind that is skipped."""
    root = class_folders(tmp_path / "mixed", dict.fromkeys(CLASSES, 5))
    for number, kind in enumerate(kind for kind in HERE if kind.pixels is None):
        kind.make(root / CLASSES[number % len(CLASSES)] / kind.name)
    return root


def test_training_sees_the_same_batches(good: Path, mixed: Path, trained: Any) -> None:
    preprocessing = load_model(trained.result.model).data_config
    seen = []
    for folder in (good, mixed):
        kept, report = check_images(FolderSamples(folder), "train")
        assert bool(report.bad) == (folder == mixed)
        loader = train_loader(kept, DataConfig(batch_size=4, workers=0), preprocessing, seed=1)
        seen.append([(images.numpy().tobytes(), labels.tolist()) for images, labels, _ in loader])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_gives_the_same_numbers_to_the_last_bit(
    batch_size: int, good: Path, mixed: Path, trained: Any
) -> None:
    results = [
        evaluate(
            trained.result.model,
            DataConfig(source=str(folder), batch_size=batch_size, workers=0),
            device="cpu",
            note=[].append,
        )
        for folder in (good, mixed)
    ]
    assert results[0].as_dict() == results[1].as_dict()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_prediction_gives_the_same_probabilities_and_a_row_with_an_error_for_each_skipped_file(
    good: Path, mixed: Path, trained: Any
) -> None:
    alone = {Path(row.image).relative_to(good): row for row in predict(trained.result.model, [good], device="cpu")}
    for kind in HERE:
        if kind.pixels is not None:
            kind.make(mixed / CLASSES[0] / kind.name)
    rows = list(predict(trained.result.model, [mixed], device="cpu"))
    assert sorted(row.image for row in rows) == sorted(map(printable, image_files(mixed)))
    failed = {Path(row.image).name for row in rows if row.error}
    assert failed == {kind.name for kind in HERE if kind.pixels is None}
    beside = {Path(row.image).relative_to(mixed): row for row in rows}
    for name, row in alone.items():
        assert beside[name].classes == row.classes
        # Batches are other ones, and the rounding of a sum depends on the size of a batch.
        assert beside[name].probabilities == pytest.approx(row.probabilities, abs=1e-6)
