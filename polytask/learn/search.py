"""A search over forms, sites and sizes for one task: which adapters give most for how few parameters."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, DataError, LearnError, SiteError, listing
from polytask.core.form import Form
from polytask.core.metrics import METRICS, default_metric
from polytask.core.model import Model
from polytask.core.recipe import Schedule
from polytask.core.storage import write, writing
from polytask.core.task import Task

from .learner import Interrupted, learn
from .space import Space, space_of

STARTUP = 8  # random trials before the model of the scores says where to look
STUCK = 2  # suggestions in a row that were tried before, until one is drawn at random
EXHAUSTED = 200  # draws in a row that were tried before, until the space is said to have no more
RECORD = "polytask"  # what a trial of the study holds of ours


@dataclass(frozen=True)
class Point:
    """One configuration that was tried.

    Attributes:
        number: of the trial, from 1.
        what: it consists of, in a few words.
        values: that the space was asked for.
        form: a mapping that `polytask.learn` takes.
        sites: a selector, or None for the form's own choice.
        parameters: how many numbers its patches train; heads are not counted.
        score: on dev, at the best evaluation of its run; None where it could not be learned.
        seconds: of learning.
        problem: why it could not.
    """

    number: int
    what: str
    values: Mapping[str, Any]
    form: Mapping[str, Any]
    sites: str | None
    parameters: int
    score: float | None
    seconds: float
    problem: str = ""


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        task: its name.
        metric: what the score is.
        higher_is_better: whether more of it is better.
        base: its name, what `Model.load` takes (source), number of parameters and fingerprint.
        trials: every configuration that was tried, in their order; none twice.
        reference: the score and the parameters that a hypervolume counts from.
        seed: of everything random.
        schedule: the settings of learning that were given.
        space: what was chosen from.
        source: where the task was read from, where that is known.
    """

    task: str
    metric: str
    higher_is_better: bool
    base: Mapping[str, Any]
    trials: tuple[Point, ...]
    reference: tuple[float, int]
    seed: int
    schedule: Mapping[str, Any]
    space: Mapping[str, Any]
    source: str = ""

    def _goals(self) -> list[tuple[float, float]]:
        """Score and size of each trial, both to be large; what could not be learned is nowhere."""
        return [_goal(self, p.score, p.parameters) for p in self.trials]

    @property
    def front(self) -> list[Point]:
        """The trials that no other is better than without being larger, from small to large."""
        return sorted((self.trials[i] for i in pareto(self._goals())), key=lambda p: p.parameters)

    @property
    def best(self) -> Point:
        """The front's point with the best score. Raises `LearnError` where no trial has a score."""
        if not self.front:
            raise LearnError(f"no trial could be learned; the first says: {self.trials[0].problem}")
        return self.front[-1]

    @property
    def hypervolume(self) -> list[float]:
        """After each trial, the area between the front so far and the reference: score times the log2 of the size.

        It never falls.
        """
        goals = self._goals()
        reference = _goal(self, *self.reference)
        areas = (hypervolume(goals[: i + 1], reference) for i in range(len(goals)))
        return list(accumulate(areas, max))  # past what rounding takes away

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "front": [p.number for p in self.front], "hypervolume": self.hypervolume}

    def recipe(self, point: Point) -> str:
        """A point as YAML that ``polytask learn --config`` runs, on this task or on another."""
        settings = {
            **({"tasks": self.source} if self.source else {}), "base": self.base["source"], "form": dict(point.form),
            **({"sites": point.sites} if point.sites else {}), **self.schedule, "seed": self.seed,
        }  # fmt: skip
        head = (
            f"# Trial {point.number} of a search on {self.task}: {self.metric} {point.score:.4f} on dev with "
            f"{point.parameters:,} parameters.\n# Elsewhere: polytask learn TASK --config THIS_FILE --out LIB\n"
        )
        return head + str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def save(self, folder: str | Path) -> Path:
        """Writes ``search.json`` and a YAML file for each point of the front, ``points/NNN.yaml``."""
        folder = Path(folder)
        points = folder / "points"
        with writing(folder):
            points.mkdir(parents=True, exist_ok=True)
            written = {f"{p.number:03d}.yaml": self.recipe(p) for p in self.front}
            for name, text in written.items():
                write(points / name, text.encode())
            for old in points.glob("[0-9]*.yaml"):
                if old.name not in written:
                    old.unlink()  # of an earlier, shorter search
            write(folder / "search.json", json.dumps(self.as_dict(), indent=1, ensure_ascii=False).encode())
        return folder

    def __str__(self) -> str:
        rows = [[f"{p.number}", f"{p.score:.4f}", f"{p.parameters:,}", f"{p.seconds:.1f}", p.what] for p in self.front]
        rows.insert(0, ["trial", self.metric, "parameters", "seconds", "what"])
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(c.rjust(w) for c, w in zip(row[:4], wide, strict=True)), row[4]]).rstrip() for row in rows
        )


def _goal(search: Search, score: float | None, parameters: int) -> tuple[float, float]:
    """Both to be large. Sizes count by their logarithm, as they differ by powers."""
    sign = 1.0 if search.higher_is_better else -1.0
    return (-math.inf if score is None else sign * score, -math.log2(1 + parameters))


def pareto(goals: Sequence[tuple[float, float]]) -> list[int]:
    """The positions of what nothing dominates: nothing else is as large in both and larger in one. Equals count once."""
    order = sorted(range(len(goals)), key=lambda i: (-goals[i][1], -goals[i][0], i))
    found: list[int] = []
    best = -math.inf
    for i in order:
        if goals[i][0] > best:
            best = goals[i][0]
            found.append(i)
    return sorted(found)


def hypervolume(goals: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that is dominated by ``goals`` and dominates ``reference``; both coordinates are to be large."""
    inside = [(a - reference[0], b - reference[1]) for a, b in goals if a > reference[0] and b > reference[1]]
    area = low = 0.0
    for a, b in sorted((inside[i] for i in pareto(inside)), key=lambda goal: -goal[1]):
        area += (a - low) * b
        low = a
    return area


def search(
    model: Model | str,
    task: Task | str | Path,
    *,
    space: Space | str | Path | Mapping[str, Any] = "autopeft",
    trials: int = 32,
    seed: int = 0,
    out: str | Path | None = None,
    startup: int = STARTUP,
    reference: tuple[float, int] | None = None,
    source: str = "",
    say: Callable[[str], None] = lambda text: None,
    **schedule: Any,
) -> Search:
    """Tries configurations of an adapter on a task and returns all of them, with those that nothing else beats.

    There are two goals: a good score on dev, and few trained parameters. The first ``startup`` configurations are drawn at
    random (after ``autopeft``'s first, the head alone), the others are those from which a model of both goals, fitted to
    what was seen, expects the front to gain most. What was tried is not learned again: its sizes are known before
    learning, and equal adapters have equal scores.

    Args:
        model: the base, or what `Model.load` takes.
        task: with a dev split.
        space: ``"autopeft"``, a mapping, a YAML file with one (see `polytask.learn.space.General`), or a `Space`.
        trials: how many different configurations are learned.
        seed: the same seed gives the same trials.
        out: folder that keeps the trials (``trials.log``, a journal of optuna's); repeating the call goes on from there.
        startup: random trials before the model decides.
        reference: score and parameters from which hypervolumes are counted; by default the worst score that was seen,
            and the number of the base's own parameters.
        source: where the task is read from, for the recipes.
        say: is told what goes on.
        schedule: any setting of `polytask.core.recipe.Schedule`: the same for every trial.

    Reference: Zhou et al., AutoPEFT, arXiv 2301.12132. Its model of the goals is a Gaussian process under a sparsity prior
    that is sampled, here one whose scales are fitted (optuna's `GPSampler`, expected hypervolume improvement); its
    goals go through a normal copula, here the size goes through a logarithm. Where the form decides which settings there
    are, such a process does not apply, and optuna's multi-objective tree of Parzen estimators decides.

    Raises:
        ConfigError: a wrong setting, or ``out`` has the trials of another search.
        DataError: the task has no dev split to score on.
        Interrupted: it was asked to stop; the trials that are done are in ``out``.
    """
    if find_spec("optuna") is None:
        raise ConfigError("a search needs the package optuna, which is not installed: pip install 'polytask[search]'")
    for name, value in (("trials", trials), ("startup", startup)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"search: {name} must be a whole number of at least 1, got {value!r}")
    if Schedule.of(schedule, "search").snapshots:
        raise ConfigError("a search keeps no snapshots; leave them out, and learn what it finds with them")
    called, model = (model, Model.load(model)) if isinstance(model, str) else (model.source, model)
    if not isinstance(task, Task):
        source, task = source or str(task), Task.read(task)
    if not task.dev:
        raise DataError(f"the task {task.name!r} has no dev examples, on which a search compares; give it a dev split")
    run = _Run(model, task, space_of(space, model), seed, startup, schedule, None if out is None else Path(out), say)
    with _quiet():
        points = run.go(trials)
    scores = [p.score for p in points if p.score is not None] or [0.0]
    size = sum(p.numel() for p in model.module.parameters())
    worst = min(scores) if run.better else max(scores)
    base = {"name": model.name, "source": called, "parameters": size, "fingerprint": model.fingerprint}
    return Search(
        task.name, run.metric, run.better, base, tuple(points), reference or (worst, size), seed, schedule,
        run.space.settings(), source,
    )  # fmt: skip


@dataclass
class _Run:
    """One search: a study of optuna's, and what was learned by what it is."""

    model: Model
    task: Task
    space: Space
    seed: int
    startup: int
    schedule: Mapping[str, Any]
    out: Path | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.metric = self.task.metric or default_metric(self.task.kind)
        self.better = METRICS[self.metric].higher_is_better

    def go(self, trials: int) -> list[Point]:
        """Asks, learns and tells until there are enough."""
        study = self._study()
        records = [t.user_attrs[RECORD] for t in study.get_trials(deepcopy=False) if RECORD in t.user_attrs]
        points = {r["key"]: Point(**r["point"]) for r in records if not r["again"]}
        repeats = next((i for i, r in enumerate(reversed(records)) if not r["again"]), len(records))
        if points:
            self.say(f"{min(len(points), trials)} of {trials} trials are done already")
        asked = len(records)
        while len(points) < trials and repeats < EXHAUSTED:
            trial = self._ask(study, asked, repeats)
            values = self.space.ask(trial)
            form, sites = self.space.build(values)
            key, adapter = self._key(form, sites)
            again = key in points
            if not again:
                size = adapter.size if adapter else 0
                point = Point(len(points) + 1, self.space.describe(values), values, form, sites, size, None, 0.0)
                points[key] = self._learned(point, adapter, trials)
            trial.set_user_attr(RECORD, {"key": key, "again": again, "point": asdict(points[key])})
            self._tell(study, trial, points[key])
            asked, repeats = asked + 1, repeats + 1 if again else 0
        if len(points) < trials:
            self.say(f"the space seems to have no more than these {len(points)} configurations")
        return list(points.values())[:trials]

    def _study(self) -> Any:
        """The study, with what an earlier call left in the folder. Raises `ConfigError` for another search's."""
        import optuna
        from optuna.storages import InMemoryStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage: Any = InMemoryStorage()
        if self.out is not None:
            with writing(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                storage = JournalStorage(JournalFileBackend(str(self.out / "trials.log")))
        study = optuna.create_study(
            storage=storage, study_name="polytask", directions=["maximize", "minimize"], load_if_exists=True
        )
        mine = json.loads(
            json.dumps(
                {
                    "task": self.task.hash, "base": self.model.fingerprint, "metric": self.metric, "seed": self.seed,
                    "space": self.space.settings(), "startup": self.startup, "schedule": dict(self.schedule),
                }
            )
        )  # fmt: skip
        theirs = study.user_attrs.get("search", mine)
        if other := [name for name in mine if mine[name] != theirs.get(name)]:
            raise ConfigError(
                f"{self.out} has the trials of another search: {listing(other)} differ; choose another folder, or repeat that "
                "search as it was"
            )
        study.set_user_attr("search", mine)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if RECORD in trial.user_attrs:  # a call was stopped between learning it and telling of it
                self._tell(study, trial.number, Point(**trial.user_attrs[RECORD]["point"]))
            else:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _ask(self, study: Any, asked: int, repeats: int) -> Any:
        """The next trial: only the seed and the trials before it decide, so that an interrupted search goes on as it would."""
        import optuna

        seed = (self.seed * 1_000_003 + asked) % 2**31
        chosen: Any
        if repeats >= STUCK:
            chosen = optuna.samplers.RandomSampler(seed)
        elif self.space.conditional:
            chosen = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True, group=True)
        else:
            chosen = optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)
        study.sampler = chosen
        waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if asked == 0 and self.space.first and not waiting:
            study.enqueue_trial(dict(self.space.first))
        return study.ask()

    def _key(self, form: Mapping[str, Any], sites: str | None) -> tuple[str, Adapter | None]:
        """What tells an adapter from others, and the adapter as it starts; None where it acts nowhere."""
        chosen = Form.of(form)
        what: dict[str, Any] = {"name": chosen.name, **chosen.settings()}
        try:
            adapter = Adapter.new(self.model, chosen, sites, self.seed)
        except SiteError as error:
            return json.dumps([what, str(error)], default=str), None
        at: Any = sorted(adapter.patches)
        if chosen.name == "union":
            what.pop("sites")  # what acts at each site says it
            at = {name: patch.form.at(patch.site) for name, patch in adapter.patches.items()}
        return json.dumps([what, at], sort_keys=True, default=str), adapter

    def _learned(self, point: Point, adapter: Adapter | None, trials: int) -> Point:
        """The point with its score."""
        began = time.perf_counter()
        if adapter is None:
            done = replace(point, problem="it acts at no site")
        else:
            try:
                adapter = learn(
                    self.model, self.task, form=dict(point.form), sites=point.sites, seed=self.seed, progress=False,
                    **self.schedule,
                )  # fmt: skip
                score = float(adapter.card.metrics[f"dev/{self.task.name}"])
                done = (
                    replace(point, score=score) if math.isfinite(score) else replace(point, problem=f"scored {score}")
                )
            except (Interrupted, KeyboardInterrupt) as error:
                kept = f"the trials before it are in {self.out}; repeat the same command to go on" if self.out else ""
                kept = kept or "nothing was saved, because no folder was given (out=)"
                raise Interrupted(f"stopped in trial {point.number} of {trials}; {kept}") from error
            except LearnError as error:
                done = replace(point, problem=str(error))
        done = replace(done, seconds=round(time.perf_counter() - began, 2))
        said = done.problem or f"{self.metric} {done.score:.4f}"
        self.say(
            f"trial {done.number} of {trials}: {said}, {done.parameters:,} parameters, {done.seconds} s: {done.what}"
        )
        return done

    def _tell(self, study: Any, trial: Any, point: Point) -> None:
        import optuna

        if point.score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            sign = 1.0 if self.better else -1.0
            study.tell(trial, [sign * point.score, math.log2(1 + point.parameters)])


@contextmanager
def _quiet() -> Iterator[None]:
    """optuna tells of each trial, and that parts of it are experimental; so do we, in fewer words."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"optuna\b")
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
