"""A run that was killed and went on is the run that was not, to the last bit; so are two processes."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import Forks, Kill, together

from epsanet.tasks.checkpoints import read

CLASSIFIER, CHECKPOINTS, CALLBACKS = (
    "epsanet.tasks.classification:Classifier.",
    "epsanet.tasks.checkpoints:",
    "epsanet.tasks.callbacks:",
)
EVERY_STEP = ["--train_time_interval=0"]

POINTS = {
    "in the first step": Kill(function=CLASSIFIER + "training_step"),
    "in a step, before its loss": Kill(function=CLASSIFIER + "training_step", call=2),
    "in a step, before its gradients are used": Kill(function=CLASSIFIER + "on_before_optimizer_step", call=2),
    "in a step, after its gradients were used": Kill(function=CLASSIFIER + "lr_scheduler_step", call=2),
    "between two steps": Kill(function=CLASSIFIER + "on_train_batch_end", call=2, after=True),
    "in validation": Kill(function=CLASSIFIER + "validation_step"),
    "after validation": Kill(function=CLASSIFIER + "on_validation_epoch_end", after=True),
    "while saving, with nothing written": Kill(function=CHECKPOINTS + "_write", call=2, path="last.ckpt"),
    "while saving, with the file written and not renamed": Kill(function=CHECKPOINTS + "_seal", call=4, after=True),
    "while saving, with the previous one renamed": Kill(
        function="pathlib:Path.replace", call=2, path="last.ckpt", after=True
    ),
    "while saving, after both were renamed": Kill(
        function=CHECKPOINTS + "_write", call=2, path="last.ckpt", after=True
    ),
    "between the best and the last checkpoint": Kill(function=CHECKPOINTS + "_write", path="best.ckpt", after=True),
    "while the result is written": Kill(function="epsanet.tasks.run:save_model"),
}
"""Twelve in training, and one after."""

CHAINS = [
    (["in the first step", "in a step, before its loss", "between two steps"], 0),
    (["in a step, before its gradients are used", "in a step, after its gradients were used"], 2),
    (["in validation", "after validation", "between the best and the last checkpoint"], 0),
    (["while saving, with nothing written", "while saving, with the file written and not renamed"], 0),
    (["while saving, with the previous one renamed", "while saving, after both were renamed"], 0),
    (["while the result is written"], 0),
]
"""Where a run is killed and goes on, one after the other, and with how many loader processes."""


def same(found: Any, wanted: Any, place: str = "") -> None:
    """Nested values, tensors to the last bit; but for times and paths."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), place
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), place
        for key in wanted.keys() - {"seconds", "data_wait", "dirpath"}:
            same(found[key], wanted[key], f"{place}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), place
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{place}[{number}]")
    elif not (isinstance(wanted, str) and wanted.endswith(".ckpt")):
        assert found == wanted, place


def same_run(found: Path, wanted: Path) -> None:
    """Weights and norms' statistics, optimiser, schedule, random states, history, best score; and the result."""
    for name in ("last.ckpt", "best.ckpt"):
        mine, theirs = read(found / "checkpoints" / name), read(wanted / "checkpoints" / name)
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "images_per_step"):
            same(mine[key], theirs[key], key)
        for key in ("RandomStates", "History"):
            same(mine["callbacks"][key], theirs["callbacks"][key], key)
        (best,) = (state for key, state in mine["callbacks"].items() if "val_top1" in key)
        (wish,) = (state for key, state in theirs["callbacks"].items() if "val_top1" in key)
        assert best["best_model_score"] == wish["best_model_score"]
    assert rows(found) == rows(wanted)
    for path in (wanted / "model").iterdir():
        if path.name != "README.md":
            assert (found / "model" / path.name).read_bytes() == path.read_bytes()


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if key not in ("seconds", "data_wait")}
            for row in csv.DictReader(file)
        ]


def run_to_the_end(
    forks: Forks, words: list[str], folder: Path, kills: list[dict[int, Kill]], size: int = 1
) -> list[list[int]]:
    """Start a run and kill it, go on and kill it again, and so on; exit codes of each piece."""
    said = folder.with_suffix(".txt")
    codes = []
    for kill in [*kills, {}]:
        processes = together([*words, "--output", str(folder), "--resume=auto"], said, size, kill)
        codes.append(forks.run(processes))
        if not kill:
            assert codes[-1] == [0] * size, said.read_text()
    return codes


@pytest.fixture(scope="module")
def whole(forks: Forks, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, and that saved only at the end of each epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_to_the_end(forks, tiny_run, folder, [])
    assert [row["step"] for row in rows(folder)] == ["3", "6"]
    return folder


@pytest.mark.parametrize(("points", "workers"), CHAINS, ids=[", then ".join(points) for points, _ in CHAINS])
def test_a_run_that_is_killed_and_goes_on_ends_as_if_it_had_not_been(
    points: list[str], workers: int, whole: Path, forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, *EVERY_STEP, f"--data.workers={workers}"]
    codes = run_to_the_end(forks, words, tmp_path / "run", [{0: POINTS[point]} for point in points])
    assert codes == [[-9]] * len(points) + [[0]]
    same_run(tmp_path / "run", whole)
    assert [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_every_point_is_tried() -> None:
    assert sorted(point for points, _ in CHAINS for point in points) == sorted(POINTS)


# Two processes


@pytest.fixture(scope="module")
def pair(forks: Forks, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes, with half of each step's images each."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    run_to_the_end(forks, [*tiny_run, "--data.batch_size=8"], folder, [], size=2)
    return folder


def test_two_processes_that_are_killed_and_go_on_end_as_if_they_had_not_been(
    pair: Path, forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, *EVERY_STEP, "--data.batch_size=8"]
    kills = [
        {1: POINTS["in a step, before its loss"]},
        {0: POINTS["in a step, after its gradients were used"]},
        {0: dataclasses.replace(POINTS["while saving, with the previous one renamed"], call=1)},
        {1: POINTS["in validation"]},
    ]
    codes = run_to_the_end(forks, words, tmp_path / "run", kills, size=2)
    for kill, found in zip(kills, codes, strict=False):
        (killed,) = kill
        assert found[killed] == -9
        assert found[1 - killed] in (1, 2), "the other one ends by itself, with an error"
    same_run(tmp_path / "run", pair)


def test_two_processes_have_the_loss_curve_of_one_with_the_same_images_a_step(
    pair: Path, whole: Path, forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    # Layer norms see one image at a time, so that the share of a process makes no difference but rounding; the
    # activation is smooth, since a ReLU that turns on the last bit makes more of it.
    layer_norms = "--model_args={norm_layer: groupnorm1, act_layer: silu}"
    run_to_the_end(forks, [*tiny_run, layer_norms], tmp_path / "one", [])
    run_to_the_end(forks, [*tiny_run, layer_norms, "--data.batch_size=8"], tmp_path / "two", [], size=2)
    for mine, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert {**mine, "train_loss": 0, "val_loss": 0} == {**theirs, "train_loss": 0, "val_loss": 0}
        for name in ("train_loss", "val_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-5)
    # Batch norms see the images of their process: close, not equal.
    assert [row["lr"] for row in rows(pair)] == [row["lr"] for row in rows(whole)]
    mine, theirs = (float(rows(run)[0]["train_loss"]) for run in (pair, whole))
    assert mine != theirs
    assert mine == pytest.approx(theirs, rel=0.2)


def test_two_and_three_processes_count_every_image_once_and_find_what_one_finds(
    whole: Path, forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    data = next(word for word in tiny_run if word.startswith("--data="))
    flags = ["--split=train", "--device=cpu", "--data.workers=0", "--json"]
    for batch in (7, 16):  # 48 images: batches that are not full, and one for each of three processes
        said = []
        for size in (1, 2, 3):
            words = ["evaluate", str(whole / "model"), data, *flags, f"--data.batch_size={batch}"]
            assert forks.run(together(words, tmp_path / "said", size)) == [0] * size
            said.append((tmp_path / "said").read_text())
        assert '"images": 48' in said[0]
        assert said[1] == said[0]
        assert said[2] == said[0]


def test_only_the_first_process_speaks_and_a_stop_asked_of_one_stops_all(
    pair: Path, forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    import signal

    words, run = [*tiny_run, "--data.batch_size=8"], tmp_path / "run"
    stop = Kill(function=CLASSIFIER + "training_step", call=2, number=signal.SIGTERM)
    said = tmp_path / "said"
    codes = forks.run(together([*words, "--output", str(run)], said, 2, {1: stop}))
    assert codes == [130, 130], said.read_text()
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert f"stopped at epoch 1, step 2 and saved; go on with: epsanet train --resume {run}" in said.read_text()
    assert (tmp_path / "said.1").read_text() == ""
    assert forks.run(together(["train", "--resume", str(run)], said, 2)) == [0, 0], said.read_text()
    same_run(run, pair)
    assert "2 on 1 node" in said.read_text()


def test_an_error_of_one_process_ends_all_and_is_said_once(forks: Forks, tiny_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    said = tmp_path / "said"
    words = [*tiny_run, "--output", str(tmp_path / "run")]
    assert forks.run(together(words, said, 2)) == [2, 2]
    assert said.read_text().count("is there already; choose another --output") == 1
    assert (tmp_path / "said.1").read_text() == ""


def test_a_run_goes_on_only_with_as_many_images_a_step(pair: Path, forks: Forks, tmp_path: Path) -> None:
    said = tmp_path / "said"
    words = ["train", "--resume", str(pair)]
    assert forks.run(together(words, said)) == [2]
    assert "was trained with 16 images a step" in said.read_text()
    assert "this would be 8 (1 × --data.batch_size 8)" in said.read_text()
    assert "use --data.batch_size 16" in said.read_text()
