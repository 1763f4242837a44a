"""Groups of tasks from end to end: learned together or apart, merged, scored. A door, as `polytask.jobs`: it holds no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.config import read_yaml
from polytask.core.errors import ConfigError, MergeError
from polytask.core.model import Model
from polytask.core.task import Task, read_tasks
from polytask.evaluate.evaluator import evaluate
from polytask.learn.learner import learn
from polytask.merge.fit import fits
from polytask.merge.groups import Groups, Groupwise, by_direction, groups_of, rank_of
from polytask.merge.measure import merged_adapter
from polytask.merge.trials import trials


def groupwise(
    model: Model | str,
    tasks: Sequence[Task] | str | Path,
    *,
    groups: Mapping[str, Any] | str | Path | None = None,
    plan: str = "measured",
    pivot: str = "en",
    merge: str | Mapping[str, Any] | None = "ties",
    rank: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Groupwise:
    """Groups of tasks on one base: those that gain from learning together share an adapter of their group, the others learn
    alone and are merged into one for the group.

    Args:
        model: the base, or what `Model.load` takes.
        tasks: with a dev split each, or a path that `read_tasks` takes.
        groups: group to its tasks, a list of names or a mapping of names to directions, or a YAML file of that; the tasks' own
            ``group`` and ``direction`` when None.
        plan: ``measured`` (each task's own adapter against one of its group, on dev) or ``direction`` (translation into
            ``pivot`` alone, out of it together, and nothing is measured).
        pivot: the language that ``direction`` turns on.
        merge: what makes one adapter of those that learned alone: a method, or a mapping of one and its settings; None keeps
            each of them.
        rank: of a LoRA that is merged; the largest of its parts' when None.
        out: folder for what is learned (repeating the call goes on from there), the adapters that are stored and the table.
        seed: of everything random.
        say: is told what goes on.
        options: of `polytask.learn`: form, sites, epochs, lr, ...

    Returns:
        A table with ``.rows``, ``.adapters``, ``.totals``, ``.made`` (the adapters by name), ``.save(folder)``.

    Reference: Asymmetric Conflict and Synergy in Post-training for LLM-based Multilingual Machine Translation, arXiv
    2502.11223, where the plan is that of directions; measuring it is ours.

    Raises:
        ConfigError: a task is in no group, a setting is wrong, or a direction is none.
        DataError: a task has no dev split to measure on.
    """
    if plan not in ("measured", "direction"):
        raise ConfigError(f"plan must be measured or direction, got {plan!r}")
    base = Model.load(model) if isinstance(model, str) else model
    chosen = read_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
    named = {task.name: task for task in chosen}
    given = read_yaml(groups) if isinstance(groups, str | Path) else groups
    found, directions = groups_of(given, chosen)
    fixed = None if plan == "measured" else by_direction({name: directions.get(name, "") for name in named}, pivot)
    trial = trials([merge])[0] if merge else None
    if trial is not None and trial.rule in fits and fits[trial.rule].gives == "parts":
        raise MergeError(f"{trial.rule} does not make one adapter of several; choose another method for --merge")
    folder = None if out is None else Path(out).expanduser()
    settings = {"progress": False, **options}

    def learned(name: str, own: Sequence[Task]) -> Adapter:
        where = None if folder is None else folder / "learned" / name
        made: Adapter = learn(base, list(own), joint=len(own) > 1, name=name, seed=seed, out=where, **settings)
        return made

    def merged(name: str, parts: Sequence[Adapter], own: Sequence[Task]) -> Adapter:
        assert trial is not None
        looking = {"data": list(own)} if trial.rule in fits else {}
        own_rank = (
            {"rank": rank or rank_of(parts)} if trial.rule not in fits or fits[trial.rule].gives == "model" else {}
        )
        made = merged_adapter(trial, parts, base, seed=seed, **own_rank, **looking)
        made.name = name
        return made

    run = Groups(named, found, directions, learned, merged, partial(_score, base), fixed, trial is not None, say)
    result = run.run()
    result.settings = {
        "base": base.name, "groups": found, "plan": plan, "pivot": pivot, "merge": None if trial is None else trial.name,
        "rank": rank, "seed": seed, "learn": {name: str(value) for name, value in settings.items()},
    }  # fmt: skip
    if folder is not None:
        result.save(folder)
    return result


def _score(base: Model, adapter: Adapter, task: Task, split: str) -> tuple[float, str, bool]:
    name = base.attach(adapter, f"groupwise/{adapter.name}")
    try:
        got = evaluate(base, task, name, split=split, resamples=0)
    finally:
        base.detach(name)
    return got.value, got.metric, got.higher_is_better
