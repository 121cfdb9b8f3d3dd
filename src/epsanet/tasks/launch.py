"""Processes of a run: those that torchrun or SLURM started, or that Lightning starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from epsanet._processes import rank
from epsanet.tasks.console import console, messages, quiet_lightning

__all__ = ["Processes", "environment", "launch"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many there are, and where this one computes."""

    device: torch.device
    """Of this process."""
    devices: int = 1
    """Processes of a node; one has one device."""
    nodes: int = 1
    """Machines."""

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.devices * self.nodes

    @property
    def pins_memory(self) -> bool:
        """Whether batches are to lie where a GPU can fetch them while it computes."""
        return self.device.type == "cuda"

    def trainer_arguments(self, *, frozen: bool = False) -> dict[str, Any]:
        """What Lightning's ``Trainer`` is to be told.

        Args:
            frozen: whether some weights have no gradient at times; processes do not wait for it then.
        """
        if self.world_size > 1:
            return {
                "accelerator": self.device.type,
                "devices": self.devices,
                "num_nodes": self.nodes,
                "strategy": "ddp_find_unused_parameters_true" if frozen else "ddp",
                "use_distributed_sampler": False,  # our loaders take their share themselves, each image once
            }
        one: Any = [self.device.index or 0] if self.device.type == "cuda" else 1
        return {"accelerator": self.device.type, "devices": one, "use_distributed_sampler": False}


def launch(device: torch.device, devices: int = 1, nodes: int = 1) -> Processes:
    """Join the processes that torchrun or SLURM started, or start them as Lightning does, and connect them.

    Args:
        device: kind of device; with several processes, each takes the one of its own number.
        devices: processes on each node; torchrun says it itself.
        nodes: machines; torchrun says it itself.

    Raises:
        ValueError: when there are not so many devices here, or srun has started several processes that would all do
            the same.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices, nodes = _as_torchrun_says(devices, nodes)
    if devices * nodes == 1:
        if any(isinstance(one, SLURMEnvironment) for one in environment()):
            raise ValueError(
                "srun has started several processes, which would all do the same; say how many with --devices (of a "
                "node) and --nodes, or let srun start one"
            )
        return Processes(device=device)
    if device.type == "mps" or device.index is not None:
        raise ValueError(f"device {str(device)!r} is for one process; with several, use cpu or cuda")
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"{devices} processes need as many CUDA devices; here are {torch.cuda.device_count()}")
    with quiet_lightning():
        fabric = lightning.Fabric(
            accelerator=device.type, devices=devices, num_nodes=nodes, strategy="ddp", plugins=environment()
        )
        fabric.launch()
    console.quiet = messages.quiet = rank() > 0
    return Processes(device=fabric.device, devices=devices, nodes=nodes)


def environment() -> list[Any]:
    """What Lightning is to be told about a SLURM job, as plugins.

    It takes each for one whose processes srun has started. Where srun has started no other, as in a plain line of a
    batch script, Lightning is to start them itself. It is never to requeue the job with a checkpoint of its own.

    Raises:
        ValueError: for processes that srun has not started by their number on each node.
    """
    if (
        torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    ) or not SLURMEnvironment.detect():
        return []
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return [LightningEnvironment()]
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:  # --ntasks in the place of --ntasks-per-node
        raise ValueError(" ".join(str(error).split())) from error


def _as_torchrun_says(devices: int, nodes: int) -> tuple[int, int]:
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % local:
        raise ValueError(f"torchrun started {world} processes, not equally many on each node; use one --nproc-per-node")
    found = local, world // local
    if devices * nodes > 1 and (devices, nodes) != found:
        raise ValueError(
            f"torchrun started {found[0]} processes on {found[1]} nodes; leave --devices and --nodes out, or make "
            f"them the same"
        )
    return found
