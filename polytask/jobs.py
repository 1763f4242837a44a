"""The main job from end to end: tasks to adapters to a table to a report. A door: it joins verbs and holds no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.errors import MemoryLimitError
from polytask.core.model import Model
from polytask.core.task import Task, read_tasks
from polytask.evaluate import compare as _compare
from polytask.learn import search as _search
from polytask.learn.learner import learn


class Table(_compare.Table):
    """What `compare` found; see `polytask.evaluate.compare.Table`."""

    def to_html(self, path: str | Path) -> Path:
        """Writes the report: one page with its pictures inside, readable without a network."""
        from polytask.report import render

        return _compare.save_text(path, render(self.as_dict()))


def compare(
    model: Model | str,
    adapters: Mapping[str, Adapter] | Sequence[Adapter] | str | Path,
    tasks: Sequence[Task] | Task | str | Path,
    *,
    joint: Adapter | bool = True,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Table:
    """Puts the ways to serve several tasks from one base side by side, on the tasks' test splits.

    Majority baseline, the bare base, each task's own adapter, joint training, the average of all adapters; every adapter on
    every task; what each adapter forgot; parameters, bytes, seconds, peak memory.

    Args:
        model: the base, or what `Model.load` takes.
        adapters: by name, or a list, or a folder with a folder per adapter.
        tasks: what to score on, or a path that `read_tasks` takes.
        joint: an adapter learned on all tasks, True to learn one with the settings on the first adapter's card, or False.
        seed: of the bootstraps and of the joint training.
        say: is told what goes on.
        options: of `polytask.evaluate.compare.compare`: cross, general, batch_size, resamples.

    Returns:
        A table with ``.rows``, ``.methods``, ``.to_json(path)``, ``.to_html(path)``.

    Raises:
        ConfigError: no adapters, or none belongs to any of the tasks.
    """
    base = Model.load(model) if isinstance(model, str) else model
    chosen = [tasks] if isinstance(tasks, Task) else read_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
    found = _compare.load_all(adapters)

    def train() -> Adapter:
        first = next(iter(found.values()))
        stage = first.card.training.get("stage", {})
        try:
            made: Adapter = learn(
                base, chosen, form=first.form, sites=stage.get("sites"), joint=True, seed=seed, progress=False,
                budget=stage.get("budget"),
                **stage.get("schedule", {}),
            )  # fmt: skip
        except MemoryLimitError as error:
            raise MemoryLimitError(
                f"joint training with the settings of the adapter {first.name!r}: {error}. Learn that adapter again with "
                "such settings, or leave joint training out with joint=False (--no-joint)"
            ) from error
        return made

    wanted = joint if isinstance(joint, Adapter) else train if joint and len(chosen) > 1 else None
    table = _compare.compare(base, found, chosen, joint=wanted, seed=seed, say=say, **options)
    return Table(**vars(table))


def learn_each(
    model: Model,
    tasks: Sequence[Task],
    *,
    out: str | Path,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Adapter]:
    """One adapter per task, one run after another; those that the folder already has from the same call are not made again.

    Args:
        model: the base.
        tasks: what to learn from.
        out: folder for a folder per adapter.
        say: is told what goes on.
        options: of `polytask.learn`.
    """
    made = []
    for task in tasks:
        say(f"learning {task.name} ({len(task.train)} examples)")
        made.append(learn(model, task, out=Path(out) / task.name, **options))
    return made


class Search(_search.Search):
    """What `search` found; see `polytask.learn.search.Search`."""

    def to_png(self, path: str | Path) -> Path:
        """Draws score against parameters, the front marked."""
        from polytask.core.files import write, writing
        from polytask.report.search import picture

        with writing(Path(path)):
            write(Path(path), picture(self.as_dict()))
        return Path(path)

    def save(self, folder: str | Path) -> Path:
        """Writes ``search.json``, ``pareto.png``, and a YAML file for each point of the front, ``points/NNN.yaml``."""
        self.to_png(super().save(folder) / "pareto.png")
        return Path(folder)


def search(model: Model | str, task: Task | str | Path, *, out: str | Path | None = None, **options: Any) -> Search:
    """Tries configurations of an adapter on a task: which score best for how few parameters.

    Args:
        model: the base, or what `Model.load` takes.
        task: with a dev split.
        out: folder for the trials, the results and the picture; repeating the call goes on from there.
        options: of `polytask.learn.search.search`: space, trials, seed, startup, reference, say, and any setting of
            `polytask.core.recipe.Schedule`.

    Returns:
        All ``.trials``, the ``.front`` of those that none beats (each with ``form`` and ``sites`` for `polytask.learn`), the
        ``.hypervolume`` after each, ``.save(folder)``, ``.to_png(path)``.

    Raises:
        ConfigError: a wrong setting, or ``out`` has the trials of another search.
        DataError: the task has no dev split to score on.
        Interrupted: it was asked to stop; the trials that are done are in ``out``.
    """
    found = Search(**vars(_search.search(model, task, out=out, **options)))
    if out is not None:
        found.save(out)
    return found
