"""Which task each row of a batch is of, for forms and routers with parts that belong to one task."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError
from .form import Call


def check_tasks(what: str, tasks: Sequence[str]) -> None:
    """Raises `ConfigError` where the names of tasks are not a sequence of different names."""
    if isinstance(tasks, str) or not all(isinstance(t, str) and t for t in tasks) or len({*tasks}) != len(tasks):
        raise ConfigError(f"{what}: tasks must be different names, such as ('mood', 'topic'), got {tasks!r}")


def places(tasks: Sequence[str], call: Call) -> list[int] | int | None:
    """The place in ``tasks`` of each row's task (-1 for other tasks), a number where all rows have the same; None where the call
    knows no tasks."""
    if call.tasks is None:
        return None
    place = {task: i for i, task in enumerate(tasks)}
    found = [place.get(task, -1) for task in call.tasks]
    return found[0] if len(set(found)) == 1 else found
