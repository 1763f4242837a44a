"""States of a run that are kept on the way: adapters of their own, which can be averaged."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from polytask.core.head import Head
from polytask.core.storage import writing

from .course import Course

FOLDER = "snapshots"


def steps(total: int, count: int) -> list[int]:
    """After which of ``total`` steps a snapshot is kept: evenly spread, the last at the end."""
    return sorted({max(1, round(total * (i + 1) / count)) for i in range(count)})


def keep(course: Course, folder: Path) -> Path | None:
    """Writes the adapter as it is now into ``folder``, where one is due at this step; else None.

    Raises:
        StorageError: the folder cannot be written.
    """
    due = steps(course.total, course.schedule.snapshots) if course.schedule.snapshots else []
    if course.step not in due:
        return None
    number = due.index(course.step) + 1
    kept = course.adapter.form.finish(course.adapter.copy(f"{course.adapter.name}-{number:03}"))
    course.describe(kept.card, course.trained, snapshot=number, of=len(due))
    return kept.save(folder / FOLDER / f"{number:03}")


def clear(course: Course, folder: Path) -> None:
    """Removes the snapshots of another run, before this one writes its own."""
    if course.schedule.snapshots and (folder / FOLDER).is_dir():
        with writing(folder / FOLDER):
            shutil.rmtree(folder / FOLDER)


def digest(head: Head) -> str:
    """sha256 of a head's values by name."""
    made = hashlib.sha256()
    for name, value in sorted(head.state_dict().items()):
        made.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
