"""A run that was stopped, and resumed, is the run that was not: weights, history and best score."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml
from forking import Forks, Kill, together
from making import parquet
from safetensors.torch import load_file
from tasks_reading import same_state
from test_train import checkpoint, metrics

from epsanet.tasks.callbacks import RandomStates
from epsanet.tasks.checkpoints import AtomicCheckpointIO, read
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.scores import Score
from epsanet.tasks.train import TrainingInterrupted, train

Small = Callable[..., TrainConfig]


def same_run(found: Path, wanted: Path) -> None:
    """Weights, optimiser, best weights, model folder and history; but for the clock."""
    for name in ("last", "best"):
        mine, theirs = checkpoint(found, name), checkpoint(wanted, name)
        assert (mine["epoch"], mine["global_step"]) == (theirs["epoch"], theirs["global_step"])
        same_state(mine["state_dict"], theirs["state_dict"])
        for one, other in zip(mine["optimizer_states"], theirs["optimizer_states"], strict=True):
            same_state(
                {str(key): value["momentum_buffer"] for key, value in one["state"].items()},
                {str(key): value["momentum_buffer"] for key, value in other["state"].items()},
            )
    same_state(load_file(found / "model" / "model.safetensors"), load_file(wanted / "model" / "model.safetensors"))
    rows = [[{**row, "data_wait": 0, "seconds": 0} for row in metrics(run)] for run in (found, wanted)]
    assert rows[0] == rows[1]


def finished_copy(trained: Any, folder: Path) -> Path:
    shutil.copytree(trained.result.run, folder)
    return folder


def stop_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal while it computes a step, once."""
    original, done = Classifier.training_step, []

    def training_step(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.global_step == step and not done:
            done.append(step)
            os.kill(os.getpid(), number)
        return original(self, batch, index)

    patch.setattr(Classifier, "training_step", training_step)


def begin_and_stop(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    """A run that is stopped in its second epoch."""
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(TrainingInterrupted):
            train(config)


@pytest.mark.parametrize(
    ("step", "number", "saved"),
    [(7, signal.SIGINT, 8), (0, signal.SIGTERM, 1), (9, signal.SIGINT, 10), (14, signal.SIGTERM, 15)],
    ids=["within an epoch", "at the first step", "at the end of an epoch", "at the last step"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    step: int, number: int, saved: int, trained: Any, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    stop_after(monkeypatch, step, number)
    with pytest.raises(TrainingInterrupted, match=rf"saved; go on with: epsanet train --resume {run}"):
        train(small(run))
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint(run)["global_step"] == saved
    assert not (run / "model").exists()
    torch.rand(3)  # the states of the generators are restored, whatever they are now
    train(resume=run)
    same_run(run, trained.result.run)


def test_a_run_can_be_stopped_more_than_once(
    trained: Any, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config: TrainConfig | None = small(run, data__workers=2)
    for step in (2, 3, 11):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(TrainingInterrupted):
                train(config, resume=None if config else run)
        config = None
        assert checkpoint(run)["global_step"] == step + 1
    train(resume=run)
    same_run(run, trained.result.run)


@pytest.mark.parametrize("epochs", [3, 6])
def test_a_run_that_goes_on_with_fewer_or_more_epochs_has_their_schedule(
    epochs: int, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begin_and_stop(monkeypatch, small(run, schedule__epochs=4))
    train(small(run, schedule__epochs=epochs), resume=run)

    def cosine(step: int, epochs: int) -> float:
        return 0.01 * (1 + math.cos(math.pi * step / (5 * epochs)))

    wanted = [cosine(5, 4), *(cosine(5 * epoch, epochs) for epoch in range(2, epochs + 1))]
    assert [row["lr"] for row in metrics(run)] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "epsanet26_tiny"},
            r"another network or other classes: 100 weights differ, first model\.layer1\.1\.",
        ),
        ({"model_args": {"block_args": {"se": "none"}}}, r"first model\.layer1\.0\.conv2\.se\."),
        ({"optimizer__opt": "adamw"}, r"was trained with optimizer\.opt=sgd, not adamw; .*another --output"),
        ({"optimizer__weight_decay": 0.5}, r"was trained with optimizer\.weight_decay=0\.0001, not 0\.5"),
        ({"optimizer__opt_args": {"foreach": True}}, r"with optimizer\.opt_args=None, not \{'foreach': True\}"),
        ({"accumulate_grad_batches": 2}, r"was trained with accumulate_grad_batches=1, not 2"),
        ({"ema_decay": 0.9}, r"was trained with ema_decay=None, not 0\.9"),
        ({"seed": 43}, r"was trained with seed=42, not 43"),
        ({"data__aug_repeats": 2}, r"was trained with data\.aug_repeats=1, not 2"),
        ({"schedule__epochs": 2}, r"has 3 epochs behind it, and schedule\.epochs=2 is fewer; use 3 or more"),
    ],
)
def test_another_run_cannot_go_on_and_leaves_the_run_as_it_is(
    changes: dict[str, Any], message: str, trained: Any, small: Small, tmp_path: Path
) -> None:
    """What its checkpoint holds would not fit, or would silently be used instead of the flag."""
    run = finished_copy(trained, tmp_path / "run")
    before = contents(run)
    with pytest.raises(ValueError, match=message) as raised:
        train(small(run, **{"schedule__epochs": 4, **changes}), resume=run)
    assert "\n" not in str(raised.value)
    assert contents(run) == before


def test_a_run_goes_on_in_its_own_folder_with_its_own_weights(trained: Any, small: Small, tmp_path: Path) -> None:
    run = finished_copy(trained, tmp_path / "run")
    before = contents(run)
    with pytest.raises(ValueError, match=r"goes on in .*run; leave --output out, or copy the folder"):
        train(small(tmp_path / "other", schedule__epochs=4), resume=run)
    with pytest.raises(ValueError, match=r"--init_from is for new runs"):
        train(small(run, schedule__epochs=4, init_from="epsanet14_tiny.digits"), resume=run)
    assert contents(run) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("changes", [{"schedule__epochs": 6}, {"optimizer__lr": 0.05}])
def test_the_first_step_has_the_rate_that_the_flags_ask_for(
    changes: dict[str, Any], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begin_and_stop(monkeypatch, small(run, schedule__epochs=4))
    original, rates = Classifier.training_step, []

    def training_step(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        rates.append((self.global_step, self.learning_rate))
        return original(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    train(small(run, **{"schedule__epochs": 4, **changes}), resume=run)
    lr, epochs = changes.get("optimizer__lr", 0.02), changes.get("schedule__epochs", 4)
    wanted = [(step, lr / 2 * (1 + math.cos(math.pi * step / (5 * epochs)))) for step in range(7, 5 * epochs)]
    assert [step for step, _ in rates] == [step for step, _ in wanted]
    assert [rate for _, rate in rates] == pytest.approx([rate for _, rate in wanted], rel=1e-9)


@pytest.mark.parametrize("together", [2, 3, 8])
def test_a_step_of_several_batches_has_the_mean_of_their_gradients_the_last_of_an_epoch_too(
    together: int, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches an epoch; 8 are more than there are."""
    parts: list[list[torch.Tensor]] = []
    sizes: list[int] = []
    as_part = Classifier.as_part

    def watched(self: Classifier, loss: torch.Tensor, index: int) -> torch.Tensor:
        parts.append(list(torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)))
        return as_part(self, loss, index)

    def compared(self: Classifier, *_: Any) -> None:
        sizes.append(len(parts))
        for place, parameter in enumerate(self.parameters()):
            wanted = torch.stack([gradients[place] for gradients in parts]).mean(0)
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
        parts.clear()

    monkeypatch.setattr(Classifier, "as_part", watched)
    monkeypatch.setattr(Classifier, "on_before_optimizer_step", compared)
    train(small(tmp_path / "run", schedule__epochs=1, accumulate_grad_batches=together))
    assert sizes == {2: [2, 2, 1], 3: [3, 2], 8: [5]}[together]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_classes_cannot_go_on(trained: Any, small: Small, pictures: Path, tmp_path: Path) -> None:
    run, data = finished_copy(trained, tmp_path / "run"), tmp_path / "pictures"
    shutil.copytree(pictures, data)
    for folder in data.glob("*/ant"):
        folder.rename(folder.with_name("zebra"))
    before = contents(run)
    config = small(run, data__source=str(data), schedule__epochs=4)
    with pytest.raises(ValueError, match=r"was trained with 'ant' as class 0, not 'bee'; go on with the same, or"):
        train(config, resume=run)
    shutil.copytree(data / "train" / "zebra", data / "train" / "ant")
    with pytest.raises(ValueError, match=r"was trained with 3 classes, not 4"):
        train(config, resume=run)
    assert contents(run) == before


def test_an_epoch_does_not_go_on_with_another_number_of_images_but_the_next_begins(
    trained: Any, small: Small, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tmp_path / "run", tmp_path / "pictures"
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(TrainingInterrupted):
            train(small(run))
    shutil.copytree(pictures, data)
    (data / "train" / "ant" / "001.png").unlink()
    before = contents(run)
    with pytest.raises(ValueError, match=r"stopped within an epoch of 44 training images, and here are 43") as raised:
        train(small(run, data__source=str(data)), resume=run)
    assert "\n" not in str(raised.value)
    assert contents(run) == before
    finished = finished_copy(trained, tmp_path / "finished")
    train(small(finished, data__source=str(data), schedule__epochs=4), resume=finished)
    assert [row["step"] for row in metrics(finished)] == [5, 10, 15, 20]


def test_a_stream_goes_on_within_an_epoch_with_as_many_workers_only(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads a range of its own; others would repeat images and leave others out."""
    for split, count in {"train": 18, "validation": 5}.items():
        labels: list[object] = [n % 2 for n in range(count)]
        parquet(tmp_path / "data" / f"{split}.parquet", labels, names=["even", "odd"], row_group_size=4)
    options = {"source": str(tmp_path / "data"), "root": str(tmp_path / "cache"), "streaming": True, "batch_size": 4}
    changes = {f"data__{name}": value for name, value in options.items()} | {"schedule__epochs": 1}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(TrainingInterrupted):
            train(small(run, **changes))
    before = contents(run)
    with pytest.raises(ValueError, match=r"a stream that 1 × 0 workers read: use --data\.workers 0 and as many"):
        train(small(run, **changes, data__workers=2), resume=run)
    assert contents(run) == before


def test_a_checkpoint_that_notes_only_the_optimiser_goes_on(trained: Any, small: Small, tmp_path: Path) -> None:
    run = finished_copy(trained, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    content = read(last)
    noted = {name: content.pop(name) for name in ("settings", "class_names", "train_images")}
    content["optimizer"] = {key: value for key, value in noted["settings"].items() if key.startswith("optimizer.")}
    content["callbacks"]["RandomStates"]["processes"][0]["cuda"] = []
    AtomicCheckpointIO().save_checkpoint(content, last)
    with pytest.raises(ValueError, match=r"was trained with optimizer\.momentum=0\.9, not 0\.8"):
        train(small(run, schedule__epochs=4, optimizer__momentum=0.8), resume=run)
    train(small(run, schedule__epochs=4, seed=43), resume=run)
    assert len(metrics(run)) == 4


def test_the_generator_of_a_gpu_goes_on_whatever_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the generators of the GPUs, by their numbers; asking for one that is not there fails."""
    gpus: dict[int | None, torch.Tensor] = {}

    def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
        assert device.index in gpus
        gpus[device.index] = state

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpus[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)

    def begun(device: str, states: dict[str, Any] | None = None) -> RandomStates:
        callback, root = RandomStates(), torch.device(device)
        if states is not None:
            callback.load_state_dict(states)
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=root))
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
        return callback

    first, second, third = (torch.tensor([number], dtype=torch.uint8) for number in range(3))
    gpus.update({0: first, 1: second})
    saved = begun("cuda:1").state_dict()
    gpus.clear()
    gpus[0] = third
    begun("cuda:0", saved)
    assert gpus == {0: second}
    of_all = {"processes": [{**saved["processes"][0], "cuda": [first, second]}]}
    begun("cuda:0", of_all)
    assert gpus == {0: first}
    gpus[2] = third
    begun("cuda:2", of_all)
    begun("cpu", of_all)
    begun("cuda:0", begun("cpu").state_dict())
    assert gpus == {0: first, 2: third}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: gpus[None])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: gpus.update({None: state}))
    gpus[None] = second
    of_a_mac = begun("mps").state_dict()
    gpus[None] = third
    begun("cpu", of_a_mac)
    begun("mps", begun("cpu").state_dict())
    assert gpus[None] is third
    begun("mps", of_a_mac)
    assert gpus[None] is second


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[float]], None]]:
    """Validation results as a list says."""
    result = Score.result

    def set_scores(values: list[float]) -> None:
        left = iter(values)
        monkeypatch.setattr(
            Score, "result", lambda self, names: dataclasses.replace(result(self, names), top1=next(left))
        )

    return set_scores


def test_the_best_score_outlives_the_stop(
    preset: Callable[[list[float]], None], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    preset([90.0])
    begin_and_stop(monkeypatch, small(run))
    preset([50.0, 60.0, 0.0])
    train(resume=run)
    assert [row["val_top1"] for row in metrics(run)] == [90, 50, 60]
    best = checkpoint(run, "best")
    assert (best["epoch"], best["global_step"]) == (0, 5)
    assert checkpoint(run)["epoch"] == 2


def test_without_the_best_checkpoint_the_best_of_the_epochs_to_come_is_kept(
    preset: Callable[[list[float]], None], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = tmp_path / "run"
    preset([90.0])
    begin_and_stop(monkeypatch, small(run))
    (run / "checkpoints" / "best.ckpt").unlink()
    preset([60.0, 50.0, 0.0])
    train(resume=run)
    assert "the best of the epochs to come is kept" in " ".join(capfd.readouterr().err.split())
    assert checkpoint(run, "best")["epoch"] == 1


def test_a_finished_run_without_its_best_checkpoint_takes_the_last(trained: Any, tmp_path: Path, capfd: Any) -> None:
    run = finished_copy(trained, tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
    train(resume=run)
    assert "the last epoch is taken for the best" in " ".join(capfd.readouterr().err.split())
    weights = load_file(run / "model" / "model.safetensors")
    last = checkpoint(run)["state_dict"]
    same_state(weights, {name: last[f"model.{name}"] for name in weights})


def test_a_finished_run_that_is_resumed_trains_no_further(trained: Any, tmp_path: Path) -> None:
    run = finished_copy(trained, tmp_path / "run")
    shutil.rmtree(run / "model")
    before = checkpoint(run)["state_dict"]
    result = train(resume=run)
    assert result.evaluation.top1 == trained.result.evaluation.top1
    same_state(checkpoint(run)["state_dict"], before)
    assert len(metrics(run)) == 3


def test_the_best_score_goes_along_when_a_run_folder_is_moved(
    preset: Callable[[list[float]], None], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    preset([90.0])
    begin_and_stop(monkeypatch, small(run))
    moved.parent.mkdir()
    run.rename(moved)
    preset([50.0, 60.0, 0.0])
    train(resume=moved)
    assert checkpoint(moved, "best")["epoch"] == 0
    assert checkpoint(moved)["epoch"] == 2
    assert not run.exists()


# What cannot be resumed


@pytest.mark.parametrize("damage", ["cut", "emptied", "words", "other"])
def test_a_damaged_checkpoint_is_named_and_the_newest_sound_one_is_used(
    damage: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_copy(trained, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    if damage == "other":
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(2)}, last.with_name("else.ckpt"))
        last.with_name("else.ckpt").replace(last)
    else:
        last.write_bytes({"cut": whole[: len(whole) // 2], "emptied": b"", "words": b"no checkpoint"}[damage])
    if checkpoint(run, "best")["global_step"] > 10:  # by rounding, which differs from processor to processor
        last.with_name("best.ckpt").unlink()  # or it were the newest
    train(resume=run)
    assert re.search(r"last\.ckpt is damaged: .*going on from previous\.ckpt, of step 10", capsys.readouterr().err)
    same_run(run, trained.result.run)


def test_a_run_without_a_sound_checkpoint_is_left_as_it_is(trained: Any, tmp_path: Path) -> None:
    run = finished_copy(trained, tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for resume, output in ((run, None), ("auto", str(run))):
        config = dataclasses.replace(trained.config, output=output)
        with pytest.raises(ValueError, match=r"last.*previous.*best\.ckpt is damaged.*nothing to resume") as raised:
            train(config, resume=resume)
        assert "\n" not in str(raised.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_checkpoint_that_would_run_code_is_refused(trained: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    run = finished_copy(trained, tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        AtomicCheckpointIO().save_checkpoint({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match=r"\.ckpt is damaged: torch cannot load it"):
        train(resume=run)
    assert not (tmp_path / "ran").exists()


def test_auto_starts_a_run_goes_on_in_it_and_asks_for_its_folder(
    trained: Any, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run")
    stop_after(monkeypatch, 7)
    with pytest.raises(TrainingInterrupted):
        train(config, resume="auto")
    assert checkpoint(tmp_path / "run")["global_step"] == 8
    train(config, resume="auto")
    same_run(tmp_path / "run", trained.result.run)
    with pytest.raises(ValueError, match=r"--resume auto needs --output"):
        train(dataclasses.replace(config, output=None), resume="auto")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(ValueError, match=r"torchrun --max-restarts needs --output"):
        train(dataclasses.replace(config, output=None))


def test_checkpoints_within_an_epoch_follow_the_clock(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], []
    step, save = Classifier.training_step, lightning.Trainer.save_checkpoint

    def a_minute_later(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        now[0] += 60
        return step(self, batch, index)

    def listen(self: lightning.Trainer, path: Any, *rest: Any, **options: Any) -> None:
        if Path(path).name == "last.ckpt":
            saved.append(self.global_step)
        save(self, path, *rest, **options)

    monkeypatch.setattr("epsanet.tasks.callbacks.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Classifier, "training_step", a_minute_later)
    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", listen)
    train(small(tmp_path / "run", train_time_interval=2.0))
    # Every two minutes, and at the end of each epoch of five steps.
    assert saved == [2, 4, 5, 7, 9, 10, 12, 14, 15]


def test_a_folder_that_is_no_run_or_has_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.yaml"):
        train(resume=tmp_path)
    (tmp_path / "config.yaml").write_text("model: epsanet14_tiny\n")
    with pytest.raises(ValueError, match=r"nothing to resume; begin in it with --resume auto --output .*, or remove"):
        train(resume=tmp_path)
    with pytest.raises(
        ValueError, match=r"there already; choose another --output, or begin in it again with --resume auto"
    ):
        train(TrainConfig(output=str(tmp_path)))


# The same by the command line, with processes that are really stopped


def recipe(config: TrainConfig, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**dataclasses.asdict(config), "output": None}))
    return str(path)


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Until a file has so many lines."""
    limit = time.monotonic() + 120
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "nothing was written"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def eight(forks: Forks, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight epochs that nothing happened to; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("eight")
    words = ["train", recipe(small("unused", schedule__epochs=8), folder), "--output", str(folder / "run")]
    assert forks.run(together(words, folder / "said")) == [0], (folder / "said").read_text()
    return folder / "run"


def test_a_process_that_is_interrupted_resumes_to_the_same_weights(forks: Forks, eight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "epsanet", "train", str(eight.with_name("recipe.yaml")), "--output", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(run / "metrics.csv", 3, process)  # a head and two epochs
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"go on with: epsanet train --resume {run}" in output
    assert "Traceback" not in output
    goes_on_as(eight, run, forks)


def test_a_process_that_is_killed_resumes_to_the_same_weights(forks: Forks, eight: Path, tmp_path: Path) -> None:
    """In the third epoch, of which nothing is saved yet."""
    kill = Kill(function="epsanet.tasks.classification:Classifier.training_step", call=13)
    words = ["train", str(eight.with_name("recipe.yaml")), "--output", str(tmp_path / "run")]
    assert forks.run(together(words, tmp_path / "said", 1, {0: kill})) == [-signal.SIGKILL]
    assert checkpoint(tmp_path / "run")["global_step"] == 10
    goes_on_as(eight, tmp_path / "run", forks)


def goes_on_as(whole: Path, run: Path, forks: Forks) -> None:
    assert 5 <= checkpoint(run)["global_step"] < 40, "it was stopped on the way"
    said = run.with_name("said")
    assert forks.run(together(["train", "--resume", str(run)], said)) == [0], said.read_text()
    assert "(resumed)" in said.read_text()
    same_run(run, whole)
