"""One small run, trained once and read by many tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import Forks
from making import class_folders, one_pixel
from matplotlib.figure import Figure
from tasks_reading import CLASSES

from epsanet.data.config import DataConfig
from epsanet.tasks.config import OptimizerConfig, ScheduleConfig, TrainConfig
from epsanet.tasks.scores import Score
from epsanet.tasks.train import TrainResult, train


@pytest.fixture(autouse=True)
def _pictures_of_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test draws itself; the runs of fixtures that it shares with others are there before, and really drawn."""
    monkeypatch.setattr(Figure, "savefig", one_pixel)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 45 images to train on, 15 to validate, 12 to test, of which two are damaged."""
    root = tmp_path_factory.mktemp("pictures")
    for start, (split, count) in enumerate({"train": 15, "val": 5, "test": 4}.items()):
        class_folders(root / split, dict.fromkeys(CLASSES, count), start=100 * start, size=14)
    (root / "test" / "bee" / "200.png").write_bytes(b"words")
    (root / "train" / "cow" / "003.png").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def small(pictures: Path) -> Callable[..., TrainConfig]:
    """A run of three epochs of five steps; ``section__field=value`` changes one of its fields."""

    def make(output: Path | str, **changes: Any) -> TrainConfig:
        config = TrainConfig(
            model="epsanet14_tiny",
            data=DataConfig(
                source=str(pictures), input_size=8, batch_size=8, workers=0, scale=(0.5, 1), color_jitter=0.1
            ),
            optimizer=OptimizerConfig(lr=0.02),
            schedule=ScheduleConfig(epochs=3),
            device="cpu",
            output=str(output),
        )
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            setattr(getattr(config, section) if section else config, field, value)
        return dataclasses.replace(config)

    return make


@dataclass(kw_only=True)
class Recorded:
    """A finished run, what it printed, and the logits and labels of its last pass: the test split."""

    result: TrainResult
    config: TrainConfig
    printed: str
    logits: torch.Tensor
    labels: torch.Tensor


class Recorder:
    """Listens to every score that is counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        update = Score.update

        def listen(score: Score, logits: torch.Tensor, labels: torch.Tensor) -> None:
            self.batches.append((logits.clone(), labels.clone()))
            update(score, logits, labels)

        patch.setattr(Score, "update", listen)

    def last(self, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the last so many images."""
        logits, labels = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        return logits[-images:], labels[-images:]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small: Callable[..., TrainConfig]) -> Recorded:
    """Trained once; tests read it and change nothing in it."""
    import io

    from epsanet.tasks import console

    config = small(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        recorder, text = Recorder(patch), io.StringIO()
        patch.setattr(console.console, "_file", text)  # setting file would pin the stream of this moment
        patch.setattr(console.messages, "_file", text)
        result = train(config)
    logits, labels = recorder.last(result.evaluation.images)
    return Recorded(result=result, config=config, printed=text.getvalue(), logits=logits, labels=labels)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs of the command line in processes that need not import anything."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run of two epochs of three steps of 16 images, with stochastic depth."""
    root = tmp_path_factory.mktemp("tiny")
    for start, (split, count) in enumerate({"train": 16, "val": 5, "test": 4}.items()):
        class_folders(root / split, dict.fromkeys(CLASSES, count), start=100 * start, size=10)
    flags = {
        "data": root,
        "model": "epsanet14_tiny",
        "model_args": "{drop_path_rate: 0.2}",
        "data.input_size": 8,
        "data.batch_size": 16,
        "data.workers": 0,
        "data.scale": "[0.5, 1]",
        "optimizer.lr": 0.02,
        "schedule.epochs": 2,
        "device": "cpu",
    }
    return ["train", "digits", *(f"--{key}={value}" for key, value in flags.items())]
