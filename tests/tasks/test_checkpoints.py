"""No bit of a checkpoint changes unnoticed, the one before it is kept, and the newest sound one is found."""

from __future__ import annotations

import random
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import Forks, together

from epsanet.tasks.checkpoints import AtomicCheckpointIO, DamagedCheckpointError, newest_sound, read, tidy


def checkpoint(step: int) -> dict[str, Any]:
    """As small as one can be."""
    weights = torch.arange(300.0) + step
    return {"state_dict": {"w": weights}, "optimizer_states": [], "loops": {}, "callbacks": {}, "global_step": step}


def save(path: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(step), path)


def test_what_was_saved_is_read_by_us_by_torch_and_by_unzip(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 7)
    for found in (read(path), torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert found["global_step"] == 7
        assert torch.equal(found["state_dict"]["w"], torch.arange(300.0) + 7)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_200_truncations_and_1000_flipped_bits_are_each_noticed(tmp_path: Path) -> None:
    path, dice = tmp_path / "last.ckpt", random.Random(0)
    save(path, 1)
    whole = path.read_bytes()
    tail = range(8 * (len(whole) - 80), 8 * len(whole))  # the seal, and what is right before it
    bits = [*tail, *dice.sample(range(tail.start), 1000 - len(tail))]
    lengths = [0, 1, *(len(whole) - count for count in range(1, 100)), *dice.sample(range(2, len(whole) - 99), 99)]
    assert (len(set(lengths)), len(set(bits))) == (200, 1000)
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt is damaged: "):
            read(path)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt is damaged: "):
            read(path)
    path.write_bytes(whole)
    assert read(path)["global_step"] == 1


def test_the_last_checkpoint_is_kept_as_previous_and_others_are_replaced(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "last.ckpt", step)
        save(tmp_path / "best.ckpt", step)
    assert {path.name: read(path)["global_step"] for path in tmp_path.iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
        "best.ckpt": 3,
    }


@pytest.mark.parametrize(("best", "wanted"), [(1, "previous.ckpt"), (3, "best.ckpt")])
def test_of_the_sound_ones_the_newest_is_taken_and_the_damaged_are_named(
    best: int, wanted: str, tmp_path: Path
) -> None:
    save(tmp_path / "last.ckpt", 2)
    save(tmp_path / "last.ckpt", 3)
    save(tmp_path / "best.ckpt", best)
    path, content, notes = newest_sound(tmp_path)
    assert (path.name, content["global_step"], notes) == ("last.ckpt", 3, [])
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    path, content, (note,) = newest_sound(tmp_path)
    assert path.name == wanted
    assert f"{last} is damaged: it has no checksum" in note
    assert f"going on from {wanted}, of step {content['global_step']}" in note
    last.unlink()
    path, _, (note,) = newest_sound(tmp_path)
    assert path.name == wanted
    assert f"{last} is not there" in note


def test_where_none_is_sound_all_are_named(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.x1y2.ckpt").write_bytes(b"half")  # of a process that was killed as it saved its first
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        newest_sound(tmp_path)
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        (tmp_path / name).write_bytes(b"words" * 50)
    with pytest.raises(DamagedCheckpointError, match=r"last.*previous.*best.*is damaged.*no sound one"):
        newest_sound(tmp_path)


def test_a_disk_that_keeps_something_else_is_noticed_before_the_sound_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "last.ckpt", 1)
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: original(path).replace(b"sha256:", b"sha255:"))
    with pytest.raises(OSError, match="was not written as it is in memory"):
        save(tmp_path / "last.ckpt", 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert read(tmp_path / "last.ckpt")["global_step"] == 1


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / ".last.ckpt.x1y2.ckpt").write_bytes(b"half")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# Disks that take nothing


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A small file system of its own; called again with other options to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting needs root: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def one_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("epsanet: ")]
    assert "Traceback" not in text
    return line


def test_a_full_or_read_only_disk_is_one_line_and_the_checkpoint_before_stays_sound(
    disk: Callable[..., Path], forks: Forks, tiny_run: list[str], tmp_path: Path
) -> None:
    folder, said = disk("size=3300k"), tmp_path / "said"
    assert forks.run(together([*tiny_run, "--output", str(folder / "run")], said)) == [2]
    assert "No space left on device: '" in one_line(said.read_text())
    last = folder / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    assert read(last)["epoch"] == 0
    assert [path for path in last.parent.iterdir() if path.name.startswith(".")] == []

    disk("remount,ro")
    assert forks.run(together(["train", "--resume", str(folder / "run")], said)) == [2]
    assert "Read-only file system: '" in one_line(said.read_text())
    assert forks.run(together([*tiny_run, "--output", str(folder / "other")], said)) == [2]
    assert "Read-only file system: '" in one_line(said.read_text())
    assert last.read_bytes() == whole
