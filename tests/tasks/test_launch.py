"""Processes that do not fit what is here are refused before any is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from epsanet.data.config import DataConfig
from epsanet.tasks import run
from epsanet.tasks.config import load_recipe
from epsanet.tasks.evaluate import evaluate
from epsanet.tasks.launch import Processes, environment, launch


@pytest.mark.parametrize(
    ("device", "devices", "message"),
    [
        ("cuda:1", 2, "device 'cuda:1' is for one process; with several, use cpu or cuda"),
        ("mps", 2, "device 'mps' is for one process"),
        ("cuda", 64, r"64 processes need as many CUDA devices; here are \d"),
    ],
)
def test_devices_that_are_not_there_or_not_for_several_are_refused(device: str, devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(torch.device(device), devices)


@pytest.mark.parametrize(
    ("world", "local", "asked", "message"),
    [
        (4, 2, 3, "torchrun started 2 processes on 2 nodes; leave --devices and --nodes out"),
        (3, 2, 1, "torchrun started 3 processes, not equally many on each node"),
    ],
)
def test_what_contradicts_torchrun_is_refused(
    world: int, local: int, asked: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(ValueError, match=message):
        launch(torch.device("cpu"), asked)


def test_one_process_is_left_as_it_is() -> None:
    found = launch(torch.device("cpu"))
    assert found == Processes(device=torch.device("cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_the_first_process_of_a_machine_opens_the_data_before_the_others(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have to download; torchrun and SLURM each have a name of their own for its number."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for number in ("0", "1"):
        opened: list[Any] = []
        monkeypatch.setattr(run, "agree", lambda make, opened=opened: opened.append(make()) or opened[-1])
        monkeypatch.setenv(variable, number)
        assert len(run._open_data(load_recipe()).train) == 1293
        assert [found is not None for found in opened] == [number == "0", True]


@pytest.mark.parametrize("tasks", ["1", "8"])
def test_a_slurm_job_without_srun_is_a_machine_like_any_other(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would wait for processes that srun has not started, and load a checkpoint that nobody has named."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    config = DataConfig(workers=0, batch_size=512)
    wanted = evaluate("epsanet14_tiny.digits", config, device="cpu")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another project")
    assert SLURMEnvironment.detect()
    assert evaluate("epsanet14_tiny.digits", config, device="cpu").loss == wanted.loss
    (found,) = environment()
    assert isinstance(found, LightningEnvironment)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    if tasks == "8":
        with pytest.raises(ValueError, match="--ntasks-per-node=8"):
            environment()
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    (found,) = environment()
    assert isinstance(found, SLURMEnvironment)
    assert not found.auto_requeue
    with pytest.raises(
        ValueError, match=r"srun has started several processes, which would all do the same; .*--devices"
    ):
        evaluate("epsanet14_tiny.digits", config, device="cpu")
