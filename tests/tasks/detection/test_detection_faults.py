"""A detector that was killed and went on is the one that was not, and two processes find what one finds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detecting import BACKBONE, BACKBONE_ARGS, coco_folder, detector_config
from forking import Forks, Kill, together
from test_faults import rows, run_to_the_end, same

from epsanet.data import coco
from epsanet.data.config import DataConfig
from epsanet.network.detectors import load_detector
from epsanet.tasks.checkpoints import read
from epsanet.tasks.config import OptimizerConfig, ScheduleConfig, TrainConfig

MODULE = "epsanet.tasks.detection.module:DetectorModule."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_folder(tmp_path_factory.mktemp("objects"), images=6)


@pytest.fixture(scope="module")
def words(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run of two epochs of three steps."""
    config = TrainConfig(
        model=BACKBONE,
        model_args=BACKBONE_ARGS,
        detector=detector_config(min_size=48, max_size=64, score_thresh=0.01),
        data=DataConfig(source=str(folder), batch_size=2, workers=0, scale_jitter=(0.9, 1.1)),
        optimizer=OptimizerConfig(opt="adamw", lr=1e-3),
        schedule=ScheduleConfig(epochs=2),
        device="cpu",
    )
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return ["train", str(recipe)]


@pytest.fixture(scope="module")
def whole(forks: Forks, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_to_the_end(forks, words, run, [])
    assert [row["step"] for row in rows(run)] == ["3", "6"]
    return run


@pytest.fixture(scope="module")
def pair(forks: Forks, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, the second of which would die if it looked at the data set by itself."""
    run = tmp_path_factory.mktemp("pair") / "run"
    command = [*words, "--data.batch_size=1", "--output", str(run)]
    alone = {1: Kill(function="epsanet.data.coco:check_coco")}
    codes = forks.run(together(command, run.with_suffix(".txt"), 2, alone))
    assert codes == [0, 0], run.with_suffix(".txt").read_text()
    return run


def same_detector(found: Path, wanted: Path) -> None:
    """Weights, optimiser, schedule, random states, history and the model folder, to the last bit."""
    mine, theirs = (read(run / "checkpoints" / "last.ckpt") for run in (found, wanted))
    for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "images_per_step"):
        same(mine[key], theirs[key], key)
    for key in ("RandomStates", "History"):
        same(mine["callbacks"][key], theirs["callbacks"][key], key)
    assert rows(found) == rows(wanted)
    for name in ("model.safetensors", "config.json"):
        assert (found / "model" / name).read_bytes() == (wanted / "model" / name).read_bytes()


def test_a_detector_that_is_killed_and_goes_on_ends_as_if_it_had_not_been(
    whole: Path, forks: Forks, words: list[str], tmp_path: Path
) -> None:
    points = [
        Kill(function=MODULE + "training_step", call=2),
        Kill(function=MODULE + "validation_step", call=2),
        Kill(function=MODULE + "lr_scheduler_step", call=2),
    ]
    command = [*words, "--train_time_interval=0"]
    codes = run_to_the_end(forks, command, tmp_path / "run", [{0: point} for point in points])
    assert codes == [[-9]] * len(points) + [[0]]
    same_detector(tmp_path / "run", whole)


def test_two_processes_of_which_one_is_killed_go_on_to_the_same_detector(
    pair: Path, forks: Forks, words: list[str], tmp_path: Path
) -> None:
    command = [*words, "--data.batch_size=1", "--train_time_interval=0"]
    kill = {1: Kill(function=MODULE + "training_step", call=2)}
    codes = run_to_the_end(forks, command, tmp_path / "run", [kill], size=2)
    assert codes[0][1] == -9
    same_detector(tmp_path / "run", pair)


def test_two_processes_train_on_the_images_of_one_and_learn_from_all(whole: Path, pair: Path) -> None:
    """The same steps and rates; losses are close, since each process draws its own anchors and regions."""
    for mine, theirs in zip(rows(pair), rows(whole), strict=True):
        assert (mine["step"], mine["lr"]) == (theirs["step"], theirs["lr"])
        assert float(mine["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=0.25)
    assert read(pair / "checkpoints" / "last.ckpt")["images_per_step"] == 2


def test_evaluation_by_one_two_and_three_processes_is_the_same_to_the_last_bit(
    whole: Path, folder: Path, forks: Forks, tmp_path: Path
) -> None:
    words = ["evaluate", str(whole), f"--data={folder}", "--data.workers=0", "--data.batch_size=1", "--device=cpu"]
    found, results = [], []
    for size in (1, 2, 3):
        said, output = tmp_path / "said", tmp_path / f"{size}.json"
        assert forks.run(together([*words, "--json", f"--output={output}"], said, size)) == [0] * size, said.read_text()
        text = said.read_text()
        found.append(json.loads(text[text.index("{\n") : text.rindex("}") + 1]))
        results.append(output.read_bytes())
    assert found[0]["images"] == 6
    assert found[0]["objects"] == 10
    assert found[1:] == [found[0]] * 2
    assert results[1:] == [results[0]] * 2


def test_the_validation_loss_is_that_of_the_weights_of_the_epoch(whole: Path, folder: Path) -> None:
    """Longhand over the validation images, batch by batch, drawn from (seed, first position)."""
    from epsanet.data.loaders import seeded

    names = [
        category["name"]
        for category in json.loads((folder / "annotations/instances_val.json").read_text())["categories"]
    ]
    model = load_detector(whole).model
    state = read(whole / "checkpoints" / "last.ckpt")["state_dict"]
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    )
    samples = coco.CocoSamples(folder / "annotations" / "instances_val.json", folder / "val", names)
    total = 0.0
    for images, targets, start in batches(samples):
        with seeded(42, start):
            total += float(sum(model.losses(images, targets).values())) * len(images)
    assert float(rows(whole)[-1]["val_loss"]) == pytest.approx(total / len(samples), rel=1e-5)


def batches(samples: Any) -> Iterator[tuple[list[torch.Tensor], list[dict[str, torch.Tensor]], int]]:
    from torchvision.transforms.v2.functional import pil_to_tensor

    for start in range(0, len(samples), 2):
        pairs = [samples.read(place) for place in range(start, start + 2)]
        yield [pil_to_tensor(image) / 255 for image, _ in pairs], [one.as_target() for _, one in pairs], start
