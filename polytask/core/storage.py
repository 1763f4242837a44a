"""Writing files so that nobody ever sees half of one. It takes nothing heavy, so that quick commands can use it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a failed write into `StorageError` with advice."""
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno == 28 else "choose a folder that you may write to"
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames, so that a reader never sees half a file."""
    part = _beside(path, "part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes several files of a folder, all or none: what can fail for lack of space comes before the first rename."""
    parts = {name: _beside(folder / name, "part") for name in files}
    olds = {name: _beside(folder / name, "old") for name in files}
    replaced: list[str] = []
    try:
        for name, data in files.items():
            parts[name].write_bytes(data)
        for name in files:
            if (folder / name).exists():
                _keep(folder / name, olds[name])
            os.replace(parts[name], folder / name)
            replaced.append(name)
    except BaseException:
        for name in replaced:
            with suppress(OSError):  # the first error is the one to tell
                if olds[name].exists():
                    os.replace(olds[name], folder / name)
                else:
                    (folder / name).unlink()
        raise
    finally:
        for path in (*parts.values(), *olds.values()):
            path.unlink(missing_ok=True)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{end}")


def _keep(path: Path, old: Path) -> None:
    """A second name for a file that is about to be replaced; a copy where the file system has no hard links."""
    old.unlink(missing_ok=True)
    try:
        os.link(path, old)
    except OSError:
        old.write_bytes(path.read_bytes())
