"""The main job from end to end: tasks to adapters to a table to a report. A door: it joins verbs and holds no method."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MemoryLimitError
from polytask.core.gate import Router
from polytask.core.head import Head
from polytask.core.metrics import Score
from polytask.core.mix import MixLike
from polytask.core.model import Model
from polytask.core.routing import Routing
from polytask.core.task import Task, read_tasks
from polytask.evaluate import compare as _compare
from polytask.evaluate import table as _table
from polytask.evaluate.evaluator import evaluate
from polytask.evaluate.table import save_text
from polytask.learn import search as _search
from polytask.learn.learner import learn
from polytask.merge import measure as _measure
from polytask.merge.fit import fits
from polytask.merge.given import adapter_of
from polytask.merge.measure import merged_adapter
from polytask.merge.trials import Sweep, Trial, trials
from polytask.routing import route


class Table(_table.Table):
    """What `compare` found; see `polytask.evaluate.table.Table`."""

    def to_html(self, path: str | Path) -> Path:
        """Writes the report: one page with its pictures inside, readable without a network."""
        from polytask.report import render

        return save_text(path, render(self.as_dict()))


def compare(
    model: Model | str,
    adapters: Mapping[str, Adapter] | Sequence[Adapter] | str | Path,
    tasks: Sequence[Task] | Task | str | Path,
    *,
    joint: Adapter | bool = True,
    merges: Sequence[str | Mapping[str, Any]] = (),
    routes: Sequence[str | Mapping[str, Any]] = (),
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
        merges: merge methods, each a row: names, or mappings of a name and settings.
        routes: routers, each a row: the same. Those that learn do so on all tasks, with the settings on the first adapter's card.
        seed: of the bootstraps and of the joint training.
        say: is told what goes on.
        options: of `polytask.evaluate.compare.compare`: cross, general, batch_size, resamples.

    Returns:
        A table with ``.rows``, ``.methods``, ``.to_json(path)``, ``.to_html(path)``.

    Raises:
        ConfigError: no adapters, or none belongs to any of the tasks.
    """
    base = Model.load(model) if isinstance(model, str) else model
    chosen = tasks_of(tasks)
    found = _compare.load_all(adapters)

    def train() -> Adapter:
        first = next(iter(found.values()))
        stage = first.card.training.get("stage", {})
        try:
            made: Adapter = learn(
                base, chosen, form=first.form, sites=stage.get("sites"), joint=True, seed=seed, progress=False,
                budget=stage.get("budget"),
                **{**first.schedule, "snapshots": 0},
            )  # fmt: skip
        except MemoryLimitError as error:
            raise MemoryLimitError(
                f"joint training with the settings of the adapter {first.name!r}: {error}. Learn that adapter again with "
                "such settings, or leave joint training out with joint=False (--no-joint)"
            ) from error
        return made

    wanted = joint if isinstance(joint, Adapter) else train if joint and len(chosen) > 1 else None
    mergers = {trial.name: _merger(trial, found, base, chosen, seed) for trial in trials(merges)}
    mixers = {_called(spec): partial(_mixed, spec, base=base, tasks=chosen, seed=seed) for spec in routes}
    table = _compare.compare(
        base, found, chosen, joint=wanted, merges=mergers, routes=mixers, seed=seed, say=say, **options
    )
    return Table(**vars(table))


def _called(spec: str | Mapping[str, Any]) -> str:
    """``arrow top_k=1``, as merges are called."""
    said = {"name": spec} if isinstance(spec, str) else dict(spec)
    return " ".join([str(said.pop("name")), *[f"{key}={value}" for key, value in said.items()]])


def _mixed(
    spec: str | Mapping[str, Any], adapters: Mapping[str, Adapter], *, base: Model, tasks: Sequence[Task], seed: int
) -> Routing:
    learns: dict[str, Any] = {}
    trains = Router.of(spec).trains
    if "adapters" in trains:  # what comes of them stands beside them
        adapters = {f"{name}, learned on": adapter for name, adapter in adapters.items()}
    if trains != "nothing":
        learns = {**next(iter(adapters.values())).schedule, "snapshots": 0}
    return route(adapters, spec, model=base, data=tasks, seed=seed, **learns)


def _merger(
    trial: Trial, adapters: Mapping[str, Adapter], base: Model, tasks: Sequence[Task], seed: int
) -> Callable[[], Adapter]:
    seen = {"data": tasks} if trial.rule in fits else {}
    return lambda: merged_adapter(trial, list(adapters.values()), base, seed=seed, **seen)


class Merges(_measure.Merges):
    """What `compare_merges` found; see `polytask.merge.measure.Merges`."""

    def to_html(self, path: str | Path) -> Path:
        """Writes the report: one page with its pictures inside, readable without a network."""
        from polytask.report.merge import render

        return save_text(path, render(self.as_dict()))

    def save(self, folder: str | Path) -> Path:
        """Writes ``merge.json``, ``report.html`` and the pictures."""
        from polytask.report.merge import pictures

        self.to_json(Path(folder) / "merge.json")
        self.to_html(Path(folder) / "report.html")
        pictures(self.as_dict(), folder)
        return Path(folder)


def compare_merges(
    base: Model | str | None,
    inputs: Mapping[str, Any] | Sequence[Any] | str | Path,
    tasks: Sequence[Task] | Task | str | Path,
    *,
    methods: Sequence[str | Mapping[str, Any]] = ("linear",),
    sweep: str | Mapping[str, Sequence[float]] | None = None,
    out: str | Path | None = None,
    split: str = "test",
    general: Task | None = None,
    data: Sequence[Task] | Task | str | Path | None = None,
    data_split: str = "train",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Merges:
    """Merges adapters, or models, in several ways, and scores each result on the tasks: how much of what each task's own
    adapter scores is left?

    The best is the one with the highest mean of normalised scores on the tasks' dev splits, where all have one; the rows have
    those on ``split``.

    Args:
        base: what the adapters act on, or what the models' differences are taken to; models without one need none.
        inputs: adapters or models, or folders of them: by name, or a list, or a folder with a folder per adapter.
        tasks: what to score on, or a path that `read_tasks` takes. Adapters are scored on those that they were learned on;
            of models, one that is called as a task is its own, and else the best on it. Models that give no answers are
            scored by linear probes.
        methods: names, or mappings of a name and settings.
        sweep: ``lambda=0.1..1.0``, ``density=0.1..0.9:5``, or ``{"density": [0.1, 0.3]}``, for the methods that have it.
        out: folder for the best, ``merge.json``, ``report.html`` and pictures.
        split: what the rows are scored on.
        general: a task that stands for the base's own ability: a text for language models.
        data: what methods look at that look at data; the tasks themselves by default.
        data_split: of the data.
        batch_size: sequences per forward.
        resamples: of the bootstraps.
        seed: of the merges and of the bootstraps.
        say: is told what goes on.
        options: of `polytask.merge`: weights, each, as_, rank, dtype, shard.

    Returns:
        A table with ``.rows``, ``.best``, ``.look``, ``.merged`` (the best), ``.to_json(path)``, ``.to_html(path)``.

    Raises:
        ConfigError: an unknown method or setting, or no adapter was learned on any of the tasks.
        MergeError: none of the merges could be made.
    """
    swept = Sweep.of(sweep)
    tried = trials(methods, swept)
    chosen = tasks_of(tasks)
    named = _named(inputs)
    adapters = {name: item for name, item in named.items() if isinstance(item, Adapter)}
    if adapters:
        if len(adapters) < len(named):
            raise ConfigError("give adapters, or models, to be scored on tasks; not both at once")
        if base is None:
            raise ConfigError("adapters are scored on their base; say which (base=, --base)")
        base = Model.load(base) if isinstance(base, str) else base
    own = _compare.owners(adapters, chosen) if adapters else {t.name: t.name for t in chosen if t.name in named}
    for task in chosen if adapters else []:
        if task.name not in own:
            say(f"no adapter was learned on {task.name}, so it is left out")
    used = [task for task in chosen if task.name in own or not adapters]

    def score(model: Model, task: Task, mix: MixLike, head: Head | None, on: str) -> Score:
        draws = resamples if on == split else 0  # what is not shown needs no interval
        return evaluate(model, task, mix, head=head, split=on, batch_size=batch_size, resamples=draws, seed=seed)

    seen = {"data": used if data is None else data, "split": data_split}
    with folder_for(out) as folder:
        contest = _measure.Contest(
            named, base, used, own, score, {"seed": seed, **options}, seen, split, general, folder / ".tries", say
        )
        try:
            found = Merges(**vars(contest.run(tried)))
            found.sweep = {} if swept is None else {"name": swept.name, "values": list(swept.values)}
            if out is not None:
                contest.place(found.merged, folder)
                found.save(folder)
        finally:
            shutil.rmtree(contest.folder, ignore_errors=True)
    return found


def tasks_of(given: Sequence[Task] | Task | str | Path) -> list[Task]:
    if isinstance(given, Task):
        return [given]
    return read_tasks(given) if isinstance(given, str | Path) else list(given)


def _named(inputs: Mapping[str, Any] | Sequence[Any] | str | Path) -> dict[str, Any]:
    """Adapters, models and folders of models by name. Raises `ConfigError` where two have the same."""
    if isinstance(inputs, str | Path):
        return dict(_compare.load_all(inputs))
    if isinstance(inputs, Mapping):
        return {name: adapter_of(item) or item for name, item in inputs.items()}
    found: dict[str, Any] = {}
    for place, given in enumerate(inputs):
        item = adapter_of(given) or given
        name = Path(item).name if isinstance(item, str | Path) else item.name or f"input{place}"
        if name in found:
            raise ConfigError(f"two of what is merged are called {name!r}; give them by name, as a mapping")
        found[name] = item
    return found


@contextmanager
def folder_for(out: str | Path | None) -> Iterator[Path]:
    """Where results go; a folder for the time being when nobody wants them."""
    if out is not None:
        yield Path(out).expanduser()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


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


def drawn(folder: str | Path) -> list[Path]:
    """Draws what a method left as ``NAME.json``, where `polytask.report` has a module NAME, as ``NAME.png``."""
    from importlib import import_module
    from importlib.util import find_spec

    from polytask.core.storage import write, writing

    made = []
    for file in sorted(Path(folder).expanduser().glob("*.json")):
        if file.stem.isidentifier() and find_spec(f"polytask.report.{file.stem}") is not None:
            draw = getattr(import_module(f"polytask.report.{file.stem}"), "picture", None)
            if draw is not None:
                made.append(file.with_suffix(".png"))
                with writing(made[-1]):
                    write(made[-1], draw(json.loads(file.read_text(encoding="utf-8"))))
    return made


class Search(_search.Search):
    """What `search` found; see `polytask.learn.search.Search`."""

    def to_png(self, path: str | Path) -> Path:
        """Draws score against parameters, the front marked."""
        from polytask.core.storage import write, writing
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
