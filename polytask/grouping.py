"""Tasks that help each other, from end to end: what each gains from each other, groups that learn together or apart, merged
and scored. A door, as `polytask.jobs`: it holds no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.config import read_yaml
from polytask.core.errors import ConfigError, DataError, MergeError
from polytask.core.metrics import Score
from polytask.core.model import Model
from polytask.core.task import Task
from polytask.evaluate.evaluator import evaluate
from polytask.evaluate.transferability import Transferability as _Transferability
from polytask.jobs import drawn, folder_for, learn_each, tasks_of
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
    chosen = tasks_of(tasks)
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

    def scored(adapter: Adapter, task: Task, split: str) -> tuple[float, str, bool]:
        got = _score(base, adapter, task, split)
        return got.value, got.metric, got.higher_is_better

    run = Groups(named, found, directions, learned, merged, scored, fixed, trial is not None, say)
    result = run.run()
    result.settings = {
        "base": base.name, "groups": found, "plan": plan, "pivot": pivot, "merge": None if trial is None else trial.name,
        "rank": rank, "seed": seed, "learn": {name: str(value) for name, value in settings.items()},
    }  # fmt: skip
    if folder is not None:
        result.save(folder)
    return result


def _score(base: Model, adapter: Adapter, task: Task, split: str) -> Score:
    """Of an adapter by itself."""
    name = base.attach(adapter, f"grouping/{adapter.name}")
    try:
        return evaluate(base, task, name, split=split, resamples=0)
    finally:
        base.detach(name)


class Transferability(_Transferability):
    """What `transferability` measured; see `polytask.evaluate.transferability.Transferability`."""

    def save(self, folder: str | Path) -> Path:
        """Writes ``transferability.json``, ``.csv``, ``.png``, and ``groups.yaml`` for `groupwise`."""
        target = super().save(folder)
        drawn(target)
        return target


def transferability(
    model: Model | str,
    tasks: Sequence[Task] | Task | str | Path,
    *,
    split: str = "dev",
    out: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Transferability:
    """How much each task gains when its adapter starts from each other task's instead of anew.

    Learns n adapters from the start and n (n - 1) from those.

    Args:
        model: the base, or what `Model.load` takes.
        tasks: two or more, or a path that `read_tasks` takes.
        split: that is scored.
        out: folder for the adapters, the matrix as JSON, CSV and picture, and the groups; repeating the call goes on from there.
        seed: of everything random.
        say: is told what goes on.
        options: of `polytask.learn`: form, sites, epochs, lr, ...

    Returns:
        ``.alone``, ``.scores``, ``.gains``, ``.best()``, ``.groups(count)``, ``.save(folder)``.

    Reference: Vu et al., SPoT, arXiv 2110.07904, and Shen et al., Multitask Vision-Language Prompt Tuning, arXiv 2211.11720,
    for prompts; here for any form. Groups by average linkage are ours.

    Raises:
        ConfigError: fewer than two tasks, or a wrong setting.
        DataError: a task has no such split.
    """
    base = Model.load(model) if isinstance(model, str) else model
    chosen = tasks_of(tasks)
    if len(chosen) < 2:
        raise ConfigError(f"what tasks gain from each other needs two or more of them, got {len(chosen)}")
    lacking = [task.name for task in chosen if not task.splits.get(split)]
    if lacking:
        raise DataError(
            f"the task {lacking[0]!r} has no split {split!r} to score on; add one, or choose another (split=, --split)"
        )
    settings = {"progress": False, **options, "seed": seed}

    with folder_for(out) as folder:
        own = learn_each(base, chosen, out=folder / "alone", say=say, **settings)
        alone = [_score(base, adapter, task, split) for adapter, task in zip(own, chosen, strict=True)]
        scores: list[list[float | None]] = []
        for source, adapter in zip(chosen, own, strict=True):
            scores.append([])
            for target in chosen:
                if target is source:
                    scores[-1].append(None)
                    continue
                say(f"learning {target.name} from {source.name}")
                where = folder / "from" / source.name / target.name
                made: Adapter = learn(base, target, start=adapter, out=where, **settings)
                scores[-1].append(_score(base, made, target, split).value)
        found = Transferability(
            [task.name for task in chosen],
            [{"name": s.metric, "higher_is_better": s.higher_is_better} for s in alone],
            [s.value for s in alone],
            scores,
            {"base": base.name, "split": split, "seed": seed, "learn": {k: str(v) for k, v in options.items()}},
        )
        if out is not None:
            found.save(folder)
    return found
