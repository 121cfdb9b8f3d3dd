"""A file or folder is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from epsanet._files import atomic_file, atomic_folder

STOP = RuntimeError("power cut")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_at_the_end_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
        assert temporary.parent == target.parent, "a rename is atomic only within a file system"
        assert temporary.suffix == ".txt"
    assert target.read_text() == "content"
    assert names(target.parent) == ["x.txt"]


def test_who_reads_the_old_file_goes_on_reading_it_whole(tmp_path: Path) -> None:
    """It is replaced by a rename, never written over."""
    target = tmp_path / "x.txt"
    target.write_text("old")
    with target.open() as reader:
        with atomic_file(target) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert target.read_text() == "new"


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_file(target) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise STOP
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for number in range(2):
        with atomic_folder(target) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / f"{number}.txt").write_text(str(number))
            assert not (target / "inner" / f"{number}.txt").exists()
        assert names(target / "inner") == [f"{number}.txt"]
        assert names(tmp_path) == ["model"]


def test_an_exception_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_folder(target) as temporary:  # noqa: PT012
        (temporary / "new.txt").write_text("new")
        raise STOP
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if to == target and (self / "new.txt").exists():
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"), atomic_folder(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_error_that_names_no_file_names_what_was_to_be_written(
    atomic: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    """A full disk is such an error."""
    with pytest.raises(OSError, match="No space") as raised, atomic(tmp_path / "target"):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "target")
    with pytest.raises(FileNotFoundError) as missing, atomic(tmp_path / "target"):
        (tmp_path / "other").read_bytes()
    assert missing.value.filename == str(tmp_path / "other")
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_plain_writing_gives(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain.txt").write_text("")
        with atomic_file(tmp_path / "atomic.txt") as temporary:
            temporary.write_text("")
        with atomic_folder(tmp_path / "atomic"):
            pass
        assert os.umask(mask) == mask, "the umask itself is left alone"
    finally:
        os.umask(before)
    for suffix in ("", ".txt"):
        modes = [(tmp_path / f"{name}{suffix}").stat().st_mode for name in ("plain", "atomic")]
        assert oct(modes[0]) == oct(modes[1])


# Writes 200 kB in pieces over and over, each time of another letter, until it is killed.
ENDLESS = """
import itertools, sys
from pathlib import Path
from epsanet._files import atomic_file, atomic_folder
target = Path(sys.argv[1])
for number in itertools.count():
    letter = "ab"[number % 2]
    if sys.argv[2] == "file":
        with atomic_file(target) as temporary, temporary.open("w") as file:
            for _ in range(200):
                file.write(letter * 1000)
                file.flush()
    else:
        with atomic_folder(target) as temporary:
            for part in range(20):
                (temporary / str(part)).write_text(letter * 1000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_the_old_or_the_new_content(kind: str, tmp_path: Path) -> None:
    """Of a folder also neither, for the moment between two renames; never a part."""
    for delay in (3, 4, 7):
        target = tmp_path / "target"
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(target), kind], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(delay):
            assert process.stdout.readline(), "the writer ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if kind == "file":
            contents = [target.read_text()]
            assert len(contents[0]) == 200_000
        elif target.exists():
            assert len(names(target)) == 20
            contents = [(target / name).read_text() for name in names(target)]
            assert all(len(content) == 1000 for content in contents)
        else:
            continue
        assert len(set("".join(contents))) == 1
