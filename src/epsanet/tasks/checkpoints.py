"""Checkpoints on disk: whole or absent, sealed with a checksum, the last two kept, and the newest sound one found.

A checkpoint is the zip file that ``torch.save`` writes, with ``sha256:`` and the SHA-256 of all that is before it as
the comment of the archive: whatever reads torch's files reads it, and no bit of it changes unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from epsanet._files import atomic_file
from epsanet.network.foreign import reason_without_advice
from epsanet.tasks.console import messages

__all__ = ["AtomicCheckpointIO", "BestCheckpoint", "DamagedCheckpointError", "newest_sound", "read", "tidy"]

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

_MARK = b"sha256:"
_SEAL = 2 + len(_MARK) + 2 * hashlib.sha256().digest_size
"""Bytes of the seal: the length of the comment, little-endian as zip wants it, and the comment."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written, or no checkpoint of a training run."""


def _seal(content: bytes | memoryview) -> bytes:
    comment = _MARK + hashlib.sha256(content).hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()[:-2]  # torch's archive ends with the length of its comment, which is 0
    seal = _seal(content)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = temporary.read_bytes()
        if written[-_SEAL:] != seal or _seal(memoryview(written)[:-_SEAL]) != seal:
            raise OSError(f"{path} was not written as it is in memory; the disk or the memory is at fault")
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values.

    Raises:
        DamagedCheckpointError: when a bit of it is not as it was written, or it is no checkpoint of a training run.
        OSError: when it cannot be read.
    """
    content = path.read_bytes()
    seal = content[-_SEAL:]
    if not content:
        raise DamagedCheckpointError(f"{path} is damaged: it is empty")
    if seal[2 : 2 + len(_MARK)] != _MARK:
        raise DamagedCheckpointError(
            f"{path} is damaged: it has no checksum at its end, so it was cut short or is not of epsanet train"
        )
    if _seal(memoryview(content)[:-_SEAL]) != seal:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum does not fit")
    try:
        checkpoint: dict[str, Any] = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises what unpickling meets
        reason = reason_without_advice(error)
        raise DamagedCheckpointError(f"{path} is damaged: torch cannot load it: {reason}") from error
    if not (
        isinstance(checkpoint, dict) and {"state_dict", "optimizer_states", "loops", "callbacks"} <= set(checkpoint)
    ):
        raise DamagedCheckpointError(f"{path} is damaged: it is no training checkpoint")
    if any("hyper_parameters" in key for key in checkpoint):  # Lightning can be made to call what they name
        raise DamagedCheckpointError(
            f"{path} is damaged: it holds hyper-parameters, which no training of epsanet writes"
        )
    return checkpoint


def newest_sound(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint to go on from: the last one, or where it is damaged the newest that is whole.

    Args:
        folder: of the checkpoints.

    Returns:
        Its path, its content, and what the user should know: which are damaged, and which is used instead.

    Raises:
        FileNotFoundError: when there is none at all.
        DamagedCheckpointError: when none is whole.
    """
    faults: dict[str, str] = {}
    found: list[tuple[int, Path, dict[str, Any]]] = []
    for name in (LAST, PREVIOUS, BEST):
        path = folder / name
        if name == LAST and not path.is_file():
            faults[name] = f"{path} is not there"
        if not path.is_file():
            continue
        try:
            checkpoint = read(path)
        except DamagedCheckpointError as error:
            faults[name] = str(error)
            continue
        if name == LAST:
            return path, checkpoint, []
        found.append((checkpoint["global_step"], path, checkpoint))
    if found:
        step, path, checkpoint = max(found, key=lambda entry: entry[0])
        return path, checkpoint, [f"{'; '.join(faults.values())}; going on from {path.name}, of step {step:,}"]
    if not any(folder.glob("[!.]*.ckpt")):  # half-written ones begin with a dot
        raise FileNotFoundError(f"{folder / LAST} is not there, so there is nothing to resume")
    raise DamagedCheckpointError(f"{'; '.join(faults.values())}; there is no sound one beside it, so nothing to resume")


def tidy(folder: Path) -> None:
    """Remove what a process that was killed while saving has left."""
    for path in folder.glob(".*.ckpt"):
        path.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints: whole or absent, and nothing that could run when read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file in the same folder, sync, read back, rename; keep the last one as previous."""
        if storage_options is not None:
            raise TypeError("storage_options are not supported")
        _write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read tensors and plain values only."""
        del weights_only  # never less than True
        return read(Path(path), map_location)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the epoch of the highest score; of equal ones the last, which was trained longest.

    Args:
        folder: of the checkpoints.
        monitor: the score, a column of ``metrics.csv``.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(
            folder,
            filename=Path(BEST).stem,
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: Tensor | None = None) -> bool:
        """Whether this score is as good as the best."""
        equal = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return equal or super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score along when the run folder has been moved; the best epoch lies in it as before.

        Where it does not, the score is of no use: the best of the epochs to come is kept.
        """
        if state_dict["best_model_path"]:
            try:
                read(Path(self.dirpath or "") / BEST)
            except (OSError, DamagedCheckpointError) as error:
                messages.print(f"{error}; the best of the epochs to come is kept")
                return

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else ""

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": scores, "dirpath": self.dirpath})
