"""An evaluation that meets a damaged image counts the others; one that is interrupted says so and leaves no result."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import Forks, Kill, together
from making import class_folders
from safetensors.torch import load_file
from tasks_reading import CLASSES, same_state

from epsanet.cli import main
from epsanet.data.config import DataConfig
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.evaluate import evaluate
from epsanet.tasks.train import train

Small = Callable[..., TrainConfig]
HEADERS = ["--data.check=headers", "--device=cpu", "--data.workers=1", "--json"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images, which are the validation split."""
    root = tmp_path_factory.mktemp("sound")
    class_folders(root / "train", dict.fromkeys(CLASSES, 3))
    class_folders(root / "val", dict.fromkeys(CLASSES, 3), start=50)
    return root


@pytest.fixture(scope="module")
def mixed(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and as the third and fourth validation image two that are cut off: a whole batch of two."""
    root = tmp_path_factory.mktemp("mixed") / "data"
    shutil.copytree(sound, root)
    folder = root / "val" / CLASSES[0]
    for name in ("051a.png", "051b.png"):
        (folder / name).write_bytes((folder / "050.png").read_bytes()[:-80])
    return root


# Damaged images that a look at headers does not find


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_cut_off_is_left_out_of_the_numbers_and_counted(
    workers: int, sound: Path, mixed: Path, trained: Any
) -> None:
    """One by one the others are the same batches, so that they give the same numbers to the last bit."""
    notes: list[str] = []
    found, wanted = (
        evaluate(
            trained.result.model,
            DataConfig(source=str(source), check="headers", batch_size=1, workers=workers),
            device="cpu",
            note=notes.append,
        ).as_dict()
        for source in (mixed, sound)
    )
    assert found == wanted
    assert [note for note in notes if "images" in note] == ["2 of 11 images cannot be read and are left out"]


def test_where_damaged_images_are_not_to_be_skipped_the_first_is_one_line_and_exit_code_2(
    mixed: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(trained.result.model), "--data", str(mixed), *HEADERS, "--data.on_bad_image=raise"]
    assert main(words) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (note, error) = errors.splitlines()
    assert note.startswith("the network is optimised")
    assert error.startswith(f"epsanet: {mixed / 'val' / CLASSES[0] / '051a.png'}: damaged: ")
    assert error.endswith("mend or remove it, or use --data.on_bad_image=skip")


def test_training_goes_on_where_a_validation_image_is_cut_off(
    mixed: Path, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", schedule__epochs=2, data__source=str(mixed), data__check="headers")
    config.data.batch_size = 2
    result = train(config)
    assert (result.split, result.evaluation.images) == ("val", 9)
    assert "2 of 11 images cannot be read and are left out" in capsys.readouterr().err


def test_two_processes_leave_out_what_one_leaves_out(mixed: Path, trained: Any, forks: Forks, tmp_path: Path) -> None:
    words = ["evaluate", str(trained.result.model), "--data", str(mixed), *HEADERS, "--data.batch_size=2"]
    said = []
    for size in (1, 2):
        assert forks.run(together(words, tmp_path / "said", size)) == [0] * size
        text = (tmp_path / "said").read_text()
        assert "2 of 11 images cannot be read and are left out" in text
        said.append(json.loads(text[text.index("{\n") :]))
    assert said[0]["images"] == 9
    assert said[1] == said[0]


def test_a_damaged_image_of_one_process_ends_both(mixed: Path, trained: Any, forks: Forks, tmp_path: Path) -> None:
    words = ["evaluate", str(trained.result.model), "--data", str(mixed), *HEADERS, "--data.on_bad_image=raise"]
    assert forks.run(together([*words, "--data.batch_size=6"], tmp_path / "said", 2)) == [2, 2]
    both = "".join((tmp_path / name).read_text() for name in ("said", "said.1"))
    assert "051a.png: damaged: " in both
    assert "Traceback" not in both


# Interruptions


def send(patch: pytest.MonkeyPatch, name: str, *numbers: int, evaluating: bool = True) -> None:
    """Let this process send itself signals at one call of a method of the classifier, in an evaluation or in a fit."""
    original, left = getattr(Classifier, name), list(numbers)

    def armed(self: Classifier, *arguments: Any) -> Any:
        while left and (self.trainer.state.fn == "validate") == evaluating:
            os.kill(os.getpid(), left.pop(0))
        return original(self, *arguments)

    patch.setattr(Classifier, name, armed)


@pytest.mark.parametrize(
    ("place", "number", "batch_size"),
    [
        ("validation_step", signal.SIGINT, 12),
        ("validation_step", signal.SIGTERM, 12),
        ("on_validation_model_eval", signal.SIGTERM, 4),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM before the first batch"],
)
def test_an_interrupted_evaluation_has_exit_code_130_and_no_result(
    place: str,
    number: int,
    batch_size: int,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    send(monkeypatch, place, number)
    words = ["--data", trained.config.data.source, "--device=cpu", "--data.workers=0", "--json"]
    assert main(["evaluate", str(trained.result.model), *words, f"--data.batch_size={batch_size}"]) == 130
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.splitlines()[-1] == "epsanet: interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_in_its_last_evaluation_goes_on_to_its_end(
    number: int, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.result.run, run, ignore=shutil.ignore_patterns("model"))
    with monkeypatch.context() as patch:
        send(patch, "validation_step", number)
        assert main(["train", "--resume", str(run)]) == 130
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; go on with: epsanet train --resume {run}")
    assert not (run / "model").exists()
    torch.rand(3)
    assert main(["train", "--resume", str(run)]) == 0
    found, wanted = (load_file(path / "model" / "model.safetensors") for path in (run, trained.result.run))
    same_state(found, wanted)


def test_a_second_ctrl_c_in_training_stops_at_once_with_exit_code_130(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.result.run, run)
    send(monkeypatch, "training_step", signal.SIGINT, signal.SIGINT, evaluating=False)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert main(["train", "--resume", str(run), "--schedule.epochs=4"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "epsanet: interrupted"
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_sigterm_to_one_of_two_processes_that_evaluate_ends_both_without_a_result(
    sound: Path, trained: Any, forks: Forks, tmp_path: Path
) -> None:
    """Lightning's handler would wait for the other process, which waits for the result."""
    words = ["evaluate", str(trained.result.model), "--data", str(sound), *HEADERS, "--data.batch_size=2"]
    stop = Kill(function="epsanet.tasks.classification:Classifier.validation_step", number=signal.SIGTERM)
    codes = forks.run(together(words, tmp_path / "said", 2, {1: stop}), limit=120)
    assert codes == [2, 130]
    assert "images" not in (tmp_path / "said").read_text()
    assert "epsanet: interrupted" in (tmp_path / "said.1").read_text()
