"""Many runs under one recipe: several at a time, each in a process, stopped and started again without loss.

A study is a folder::

    study.yaml       what all runs have in common
    configs/         the configuration of each run
    runs/            a run folder each, as epsanet train leaves it
    logs/            what each run said
    results/         a JSON each, written when a run is finished; a run that has one is not run again
    results.csv      all of them as a table
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from epsanet._files import atomic_file
from epsanet._processes import cores
from epsanet.study.config import StudyConfig
from epsanet.study.rows import Row
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import console, counted, duration, messages, progress_bar

__all__ = ["StudyInterrupted", "StudyRun", "read_results", "read_study", "run_study"]

_POLL_SECONDS = 0.5
COLUMNS = (
    *("network", "title", "seed", "split", "images", "score", "top1_at_0.5", "top1_at_1", "top1_at_1.5"),
    *("best_val_top1", "last_train_loss", "parameters", "gmacs", "milliseconds", "train_seconds", "epochs"),
    *("train_images", "attention_spread", "contribution_spread", "model", "model_args", "processor", "threads"),
    *("torch", "finished"),
)
_TEXTS = ("network", "title", "split", "model", "model_args", "processor", "torch", "finished")
_NEEDED = (*_TEXTS, "seed", "images", "score", "parameters", "threads")


class StudyInterrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """The study stopped on request; what was running is saved."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One network with one seed."""

    folder: Path
    """Of the study."""
    row: Row
    """The network."""
    seed: int
    """Of weights, order and augmentation."""

    @property
    def name(self) -> str:
        """Of its files and its run folder."""
        return f"{self.row.name}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """Written when it is finished."""
        return self.folder / "results" / f"{self.name}.json"

    def config(self, train: TrainConfig) -> TrainConfig:
        """What differs from run to run, set in the common configuration."""
        return replace(
            train,
            init_from=self.row.start(train.init_from),
            model=self.row.model,
            model_args=self.row.model_args,
            seed=self.seed,
            output=str(self.folder / "runs" / self.name),
        )


def run_study(kind: str, study: StudyConfig, train: TrainConfig, rows: Sequence[Row]) -> Path:
    """Train every row with every seed, but for what is finished already.

    All runs with the first seed come first, so that a study that is stopped has all networks equally often.

    Args:
        kind: compare or ablation.
        study: how often, and how many at a time.
        train: what all runs have in common; ``output`` is the folder of the study.
        rows: the networks.

    Returns:
        The table of results.

    Raises:
        ValueError: when the folder holds another study, another process is at it, or a run failed.
        StudyInterrupted: on Ctrl-C or SIGTERM, after all runs have saved.
    """
    if train.output is None:
        raise ValueError("a study needs --output, its folder; the same command goes on with it")
    if study.at_once * study.threads > len(cores()):
        raise ValueError(
            f"at_once={study.at_once} with threads={study.threads} is more than the {counted(len(cores()), 'core')} of "
            "this process; use a smaller at_once"
        )
    folder = Path(train.output).resolve()
    with _alone(folder):
        _write_study(folder, kind, study, train)
        runs = [StudyRun(folder=folder, row=row, seed=seed) for seed in range(study.seeds) for row in rows]
        for run in runs:
            _write_config(run, train)
        failed = _Crew(runs, train.schedule.epochs, study, cores()).work()
        table = _write_table(folder)
    if failed:
        raise ValueError(
            f"{counted(len(failed), 'run')} failed: {', '.join(failed)}; {folder / 'logs'} says why; the same command "
            "tries them again"
        )
    return table


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """All finished runs of a study, in the order of their names.

    Args:
        folder: of the study.

    Raises:
        ValueError: when there is none.
    """
    found = _result_files(Path(folder))
    if not found:
        raise ValueError(f"{folder} has no finished run of a study (results/*.json)")
    return [_read_result(path) for path in found]


def _result_files(folder: Path) -> list[Path]:
    """Without what a run is just writing, or has left half written when it was killed."""
    return sorted((folder / "results").glob("[!.]*.json"))


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reason = _result_error(found)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{path} is damaged ({reason}); take it out, and the study does its run again")
    return dict(found)


def _result_error(found: Any) -> str:
    """What keeps it from being the result of a run."""
    if not isinstance(found, dict):
        return "it is no object"
    for name in COLUMNS:
        value, wanted = found.get(name), str if name in _TEXTS else int | float
        if name not in found and name not in _NEEDED:
            continue
        if not isinstance(value, wanted) or (isinstance(value, float) and not math.isfinite(value)):
            return f"{name!r} is {str(value)[:40]!r}"
    if not isinstance(found["seed"], int):
        return f"'seed' is {found['seed']!r}"
    return "" if isinstance(json.loads(found["model_args"]), dict) else "'model_args' is no object"


def read_study(folder: str | Path) -> dict[str, Any]:
    """What all runs of a study have in common, its ``study.yaml``.

    Args:
        folder: of the study.

    Raises:
        ValueError: when it is lacking or damaged.
    """
    path = Path(folder) / "study.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no study.yaml: it is no study, or not all of it was copied") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}; copy it again") from error
    for name, part in (("schedule", "epochs"), ("data", "source")):
        if not isinstance(found, dict) or not isinstance(found.get(name), dict) or part not in found[name]:
            raise ValueError(f"{path} is damaged: it has no {name}.{part}; copy it again")
    return dict(found)


def _write_table(folder: Path) -> Path:
    path = folder / "results.csv"
    done = _result_files(folder)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(read_results(folder) if done else [])
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is running the study in {folder}; wait for it, or stop it") from error
        yield


def _write_study(folder: Path, kind: str, study: StudyConfig, train: TrainConfig) -> None:
    """What all runs rest on, refused where the folder has another; more seeds and networks may be added."""
    own = {
        key: value for key, value in dataclasses.asdict(study).items() if key not in ("networks", "seeds", "at_once")
    }
    common = {key: value for key, value in dataclasses.asdict(train).items() if key not in ("output", "seed")}
    wanted = yaml.safe_load(yaml.safe_dump({"study": kind, **own, **common}))
    path = folder / "study.yaml"
    if path.is_file():
        other = _difference(read_study(folder), wanted)
        if other:
            raise ValueError(f"{folder} was begun with {other}; use the same, or another --output")
        return
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is no study; choose another --output")
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _difference(before: Any, now: Any, name: str = "") -> str:
    """The first setting that differs, empty when none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        parts = (_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return next((part for part in parts if part), "")
    return "" if before == now else f"{name}={before!r}, not {now!r}"


def _write_config(run: StudyRun, train: TrainConfig) -> None:
    """What the worker reads; a finished run of the same name must have been of the same network."""
    if run.result.is_file():
        before = _read_result(run.result)
        other = _difference(json.loads(before["model_args"]), run.row.model_args, "model_args")
        if other or before["model"] != run.row.model:
            raise ValueError(f"{run.result} is of another network ({other or before['model']}); use another --output")
        return
    config = dataclasses.asdict(run.config(train))
    recipe = run.folder / "configs" / f"{run.name}.train.yaml"
    about = {
        "network": run.row.name,
        "title": run.row.title,
        "seed": run.seed,
        "model": run.row.model,
        "model_args": json.dumps(run.row.model_args),
    }
    for path, values in ((recipe, config), (_worker_file(run), {"train": str(recipe), "about": about})):
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _worker_file(run: StudyRun) -> Path:
    return run.folder / "configs" / f"{run.name}.yaml"


@dataclass(kw_only=True)
class _Working:
    """A run in its process."""

    run: StudyRun
    process: subprocess.Popen[bytes]
    place: int
    """Which share of the cores it has."""


class _Crew:
    """Keeps so many runs going until none is left.

    Args:
        runs: all of the study, finished ones too.
        epochs: of each.
        study: how many at a time, and their threads.
        numbers: of the cores that they share.
    """

    def __init__(self, runs: list[StudyRun], epochs: int, study: StudyConfig, numbers: list[int]) -> None:
        self.runs, self.epochs, self.threads = runs, epochs, study.threads
        self.shares = [numbers[place :: study.at_once] for place in range(study.at_once)]
        self.waiting = [run for run in runs if not run.result.is_file()]
        self.working: list[_Working] = []
        self.failed: list[str] = []
        self.signals = 0

    def work(self) -> list[str]:
        """Names of the runs that failed."""
        before = len(self.runs) - len(self.waiting)
        total = counted(len(self.runs), "run")
        console.print(f"{total}, {before} finished before; {counted(len(self.shares), 'run')} at a time")
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start, self.epochs_before = time.monotonic(), self._epochs_done()
        try:
            with progress_bar() as bar:
                task = bar.add_task("study", total=len(self.runs) * (self.epochs + 1), completed=self.epochs_before)
                while (self.waiting and not self.signals) or self.working:
                    self._fill()
                    time.sleep(_POLL_SECONDS)
                    self._collect()
                    text = ", ".join(working.run.name for working in self.working)
                    bar.update(task, completed=self._epochs_done(), description=text)
        finally:
            for working in self.working:
                working.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.signals:
            left = sum(not run.result.is_file() for run in self.runs)
            raise StudyInterrupted(f"stopped and saved; {left} of {total} are left, and the same command goes on")
        return self.failed

    def _ask(self, number: int, _: Any) -> None:
        self.signals += 1
        if self.signals > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        messages.print("stopping as soon as all runs have saved; Ctrl-C again stops at once")
        for working in self.working:
            working.process.terminate()

    def _fill(self) -> None:
        taken = {working.place for working in self.working}
        for place in range(len(self.shares)):
            if place not in taken and self.waiting and not self.signals:
                self.working.append(self._begin(self.waiting.pop(0), place))
                if self.signals:  # asked to stop while it was started
                    self.working[-1].process.terminate()

    def _begin(self, run: StudyRun, place: int) -> _Working:
        share = self.shares[place]
        log = run.folder / "logs" / f"{run.name}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "epsanet.study.worker", str(_worker_file(run)), str(run.result)]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the run that the study is gone
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # Ctrl-C comes here alone
            )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, share)
        return _Working(run=run, process=process, place=place)

    def _collect(self) -> None:
        for working in [working for working in self.working if working.process.poll() is not None]:
            self.working.remove(working)
            run = working.run
            assert working.process.stdin is not None
            working.process.stdin.close()
            if run.result.is_file():
                _write_table(run.folder)
                self._say_finished(run)
            elif not self.signals:
                self.failed.append(run.name)
                log = run.folder / "logs" / f"{run.name}.log"
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                messages.print(f"{run.name} failed: {''.join(last)} ({shlex.quote(str(log))})", style="red")

    def _say_finished(self, run: StudyRun) -> None:
        found = _read_result(run.result)
        done, epochs = sum(run.result.is_file() for run in self.runs), self._epochs_done()
        left = (len(self.runs) - len(self.failed)) * (self.epochs + 1) - epochs
        pace = (time.monotonic() - self.start) / max(epochs - self.epochs_before, 1)
        console.print(
            f"{done} of {len(self.runs)}  {run.name}  {found['score']:.2f} %  remaining {duration(pace * max(left, 0))}"
        )

    def _epochs_done(self) -> int:
        """The measurement after the last epoch counts for one more."""
        return sum(self.epochs + 1 if run.result.is_file() else self._epochs_of(run) for run in self.runs)

    def _epochs_of(self, run: StudyRun) -> int:
        try:
            lines = (run.folder / "runs" / run.name / "metrics.csv").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return 0
        return min(max(len(lines) - 1, 0), self.epochs)
