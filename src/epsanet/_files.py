"""Files and folders that are either whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _permissions(mode: int) -> int:
    """What the umask leaves of a mode, as for a plain ``open``; temporary files start readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk does not say what it had no room for."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it is synced and renamed to ``path`` unless the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _named(path):
            yield temporary
            temporary.chmod(_permissions(0o666))
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the place of ``path`` unless the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _named(path):
            yield temporary
            temporary.chmod(_permissions(0o777))
            for file in temporary.rglob("*"):
                file.chmod(_permissions(0o777 if file.is_dir() else 0o666))
                _sync(file)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            try:
                path.rename(old / path.name)
                temporary.rename(path)
            except OSError:
                if not path.exists() and (old / path.name).exists():
                    (old / path.name).rename(path)
                raise
            finally:
                if path.exists():
                    shutil.rmtree(old)
        else:
            temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
