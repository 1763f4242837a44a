"""Interrupted runs: what is needed to go on bit for bit, written beside the adapter while it learns."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.core.errors import LearnError
from polytask.core.storage import write, writing

from .course import Course

FOLDER = ".learning"


def signature(courses: Sequence[Course], fingerprint: str, precision: str) -> str:
    """What must be the same for a run to go on: base, data, form, settings, seed."""
    parts = [fingerprint, precision]
    for course in courses:
        parts += [course.name, str(course.adapter.form), *course.adapter.patches, course.stage.model_dump_json()]
        parts += [task.hash for task in course.tasks]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save(folder: Path, courses: Sequence[Course], key: str) -> None:
    """Writes the state of a run. The last file names the rest, so a crash leaves the state before it."""
    from safetensors.torch import save as encode

    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    state: dict[str, Any] = {"signature": key, "courses": []}
    for i, course in enumerate(courses):
        for name, value in course.adapter.state().items():
            tensors[f"{i}/now/{name}"] = value
        for name, value in (course.best[2] if course.best else {}).items():
            tensors[f"{i}/best/{name}"] = value
        tensors |= {f"{i}/mean/{name}": value for name, value in course.mean.items()}
        for number, moments in course.optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"{i}/optimiser/{number}/{name}"] = torch.as_tensor(value)
        if course.controller is not None:
            tensors |= {f"{i}/budget/{name}": value for name, value in course.controller.state().items()}
        state["courses"].append(
            {
                "step": course.step, "worse": course.worse, "stopped": course.stopped, "scores": course.scores,
                "best": course.best[:2] if course.best else None,
                "scheduler": {k: course.scheduler.state_dict()[k] for k in ("last_epoch", "_step_count", "_last_lr")},
            }
        )  # fmt: skip
    name = f"state-{courses[0].step}.safetensors"
    state["tensors"] = name
    with writing(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        write(folder / FOLDER / name, encode({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
        write(folder / FOLDER / "state.json", json.dumps(state).encode())
    for old in (folder / FOLDER).glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def restore(folder: Path, courses: Sequence[Course], key: str) -> bool:
    """Puts courses where an interrupted run left them. False when there is none in the folder.

    Raises:
        LearnError: the folder has an interrupted run with other data or settings.
    """
    from safetensors.torch import load_file

    file = folder / FOLDER / "state.json"
    if not file.is_file():
        return False
    state = json.loads(file.read_text(encoding="utf-8"))
    if state["signature"] != key:
        raise LearnError(
            f"{folder} holds an interrupted run with other data or settings; repeat its command to go on, choose another "
            f"folder, or remove {folder / FOLDER} to start anew"
        )
    tensors = load_file(folder / FOLDER / state["tensors"])
    for i, (course, kept) in enumerate(zip(courses, state["courses"], strict=True)):
        course.adapter.load_state(_under(tensors, f"{i}/now/"))
        course.step, course.worse, course.stopped, course.scores = (
            kept["step"], kept["worse"], kept["stopped"], kept["scores"],
        )  # fmt: skip
        course.mean = _under(tensors, f"{i}/mean/")
        if course.controller is not None:
            course.controller.load(_under(tensors, f"{i}/budget/"))
        if kept["best"]:
            course.best = (*kept["best"], _under(tensors, f"{i}/best/"))
        full = course.optimiser.state_dict()
        for name, value in _under(tensors, f"{i}/optimiser/").items():
            number, part = name.split("/")
            full["state"].setdefault(int(number), {})[part] = value
        course.optimiser.load_state_dict(full)
        course.scheduler.__dict__.update(
            kept["scheduler"]
        )  # load_state_dict would ask for the schedule's function as well
        for group, lr in zip(course.optimiser.param_groups, kept["scheduler"]["_last_lr"], strict=True):
            group["lr"] = lr
    torch.set_rng_state(tensors["rng"])
    return True


def clear(folder: Path) -> None:
    """Removes what an interrupted run would have needed."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
