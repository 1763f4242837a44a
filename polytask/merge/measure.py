"""Merges side by side: which method, with which settings, keeps how much of what each task's own model scores.

What scores a model on a task is given (`Contest.score`), so that this room needs no other.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError, listing, nearest
from polytask.core.head import Head
from polytask.core.measure import peak_memory
from polytask.core.metrics import Score
from polytask.core.mix import Mix
from polytask.core.model import Model
from polytask.core.storage import write, writing
from polytask.core.task import Task

from .fit import Parts, fits
from .given import source_of
from .look import Look, independent, look, look_adapters
from .rule import rules
from .run import merge
from .trials import Trial

OWN, BASE = "own model", "base"
Scorer = Callable[[Model, Task, str | Mix | None, Head | None, str], Score]  # model, task, mix, head, split


# What came out


@dataclass
class Merges:
    """What `Contest.run` found, as plain values.

    Attributes:
        rows: each task's own model, the bare base, and a merge each: method, what, rule, settings, at, scores and intervals
            by task, normalised by task, average, worst, worst_task, chosen_by, ability, bytes, seconds, peak_mb, note.
        tasks: name, kind, metric, whether higher is better, and whose score is the measure of it.
        best: the row's name whose ``chosen_by`` is highest.
        look: cosines and conflicts of the task vectors, see `look.Look`; empty without a base.
        sweep: name and values of what was swept; empty without one.
        base, inputs, settings: what was merged, and how it was scored.
        merged: the best adapter or model, not part of the table's JSON.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    best: str = ""
    look: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    merged: Any = None

    def as_dict(self) -> dict[str, Any]:
        """All of it but ``merged``, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "merged"}

    def row(self, name: str) -> dict[str, Any]:
        """The row of a merge. Raises `ConfigError` for a name that none has."""
        for row in self.rows:
            if row["method"] == name:
                return row
        names = [row["method"] for row in self.rows]
        raise ConfigError(f"there is no row {name!r}{nearest(name, names)}; there are: {listing(names)}")

    def to_json(self, path: str | Path) -> Path:
        """Writes the table as JSON."""
        with writing(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(Path(path), (json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n").encode())
        return Path(path)

    def __str__(self) -> str:
        names = [task["name"] for task in self.tasks]
        width = max(len("method"), *(len(row["method"]) + 2 for row in self.rows))
        lines = [" | ".join(["method".ljust(width), *names, "normalised", "  worst"])]
        for row in self.rows:
            mark = "* " if row["method"] == self.best else "  "
            cells = [_cell(row["scores"].get(name), len(name)) for name in names]
            sums = [_cell(row["average"], 10), _cell(row["worst"], 7)]
            lines.append(" | ".join([(mark + row["method"]).ljust(width), *cells, *sums]) + _tail(row["note"]))
        return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return ("-" if value is None else f"{value:.3f}").rjust(width)


def _tail(note: str) -> str:
    return f" | {note}" if note else ""


def normalised(value: float, own: float, higher_is_better: bool = True) -> float | None:
    """A score as a share of the task's own model's: their ratio, the other way round where lower is better.

    None where a ratio says nothing: a measure that is zero or below.
    """
    if value == own:
        return 1.0
    top, bottom = (value, own) if higher_is_better else (own, value)
    return top / bottom if bottom > 0 and math.isfinite(top) and math.isfinite(bottom) else None


# How it is done


@dataclass
class Contest:
    """One comparison of merges.

    Attributes:
        inputs: adapters by name; or models, or what `Model.load` takes, by name.
        base: of the adapters; of models what differences are taken to, or None.
        tasks: what is scored on.
        own: which input belongs to a task, by the task's name. For a task without an owner it is the best of all models.
        score: scores a model on a task.
        options: of `polytask.merge.run.merge`: weights, each, seed, as_, rank, dtype, shard.
        seen: the same for methods that look at data: data, split, longest.
        split: what the rows are scored on.
        general: a task that stands for the base's own ability, scored without any task's head.
        folder: for merged checkpoints, where the inputs are.
        say: is told what goes on.
    """

    inputs: Mapping[str, Any]
    base: Any
    tasks: Sequence[Task]
    own: Mapping[str, str]
    score: Scorer
    options: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[str, Any] = field(default_factory=dict)
    split: str = "test"
    general: Task | None = None
    folder: Path = Path("tries")
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.adapters = all(isinstance(item, Adapter) for item in self.inputs.values())
        # with several to choose from, the choice is made on examples that the rows do not report
        self.other = "dev" if self.split != "dev" and all(task.dev for task in self.tasks) else ""
        self.measures: dict[str, dict[str, Score]] = {}

    def run(self, tried: Sequence[Trial]) -> Merges:
        """Makes and scores every merge. The best one is kept, the others are dropped as soon as they are scored.

        Raises:
            MergeError: none of them could be made.
        """
        began = time.perf_counter()
        if len(tried) < 2:
            self.other = ""
        splits = [self.split, *([self.other] if self.other else [])]
        table = Merges(inputs=list(self.inputs), look=self.looked())
        self.say("what the merges are measured by")
        self.measures = self._owners(splits)
        found = {split: dict(self.measures[split]) for split in splits}
        table.rows.append(self._row(OWN, found, self._own_facts()))
        bare = self._loaded(self.base) if self.base is not None else None
        if bare is not None:
            scored = {split: self._scored(bare, None, split) for split in splits}
            table.rows.append(self._row(BASE, scored, self._base_facts(bare), self._able(bare, None)))
        self._try(tried, bare, splits, table)
        table.tasks = [self._task(task) for task in self.tasks]
        table.base = {} if bare is None else {"name": bare.name, "kind": bare.kind, "fingerprint": bare.fingerprint}
        table.settings = {
            "split": self.split, "chosen_on": self.other or self.split, "seconds": round(time.perf_counter() - began, 2),
            "normalised": "ratio to the score of each task's own model; where lower is better the other way round",
        }  # fmt: skip
        return table

    def _try(self, tried: Sequence[Trial], bare: Model | None, splits: Sequence[str], table: Merges) -> None:
        """Adds a row for each trial and keeps the best one's result."""
        errors: list[MergeError] = []
        top: tuple[float, ...] | None = None
        for trial in tried:
            self.say(f"merging by {trial.name}")
            facts = {"rule": trial.rule, "settings": dict(trial.settings), "at": trial.at}
            try:
                with peak_memory(torch.device("cpu")) as peak:
                    started = time.perf_counter()
                    made = self.made(trial)
                    seconds = time.perf_counter() - started
            except MergeError as error:  # this method may not fit these inputs where others do
                errors.append(error)
                table.rows.append(self._row(trial.name, {}, facts, note=str(error)))
                continue
            model, adapter = (bare, made) if isinstance(made, Adapter | Parts) else (self._loaded(made), None)
            assert model is not None
            scored = {split: self._scored(model, adapter, split) for split in splits}
            facts |= {"seconds": round(seconds, 3), "peak_mb": peak.mb, "bytes": _bytes(adapter or model)}
            row = self._row(trial.name, scored, facts, self._able(model, adapter))
            table.rows.append(row)
            quality = tuple(-math.inf if row[key] is None else float(row[key]) for key in ("chosen_by", "worst"))
            if top is None or quality > top:
                top, table.best, table.merged = quality, trial.name, adapter or model
                self._keep(made)
        if top is None:
            raise errors[0]

    def made(self, trial: Trial) -> Any:
        """What a trial gives: an adapter, a model, or the folder of one."""
        given = list(self.inputs.values())
        options = {**self.options, **(self.seen if trial.rule in fits else {})}
        if self.adapters:
            made: Any = merged_adapter(trial, given, self.base, **options)
        else:
            # without a base, the first model is one end of the way where a rule goes from one to another
            first = given.pop(0) if self.base is None and _between(trial.rule) else self.base
            memory = any(isinstance(item, Model) for item in (self.base, *self.inputs.values()))
            out = None if memory else self.folder / "now"
            made = merge(given, trial.rule, first, out=out, **options, **trial.settings)
        if not isinstance(made, Adapter | Model | Path | Parts):
            raise MergeError(
                f"{trial.rule} gives no single adapter or model ({type(made).__name__}), so it is not scored"
            )
        return made

    def looked(self) -> dict[str, Any]:
        """Cosines and conflicts of the task vectors; nothing where there is no base to take differences to."""
        if self.base is None or len(self.inputs) < 2:
            return {}
        self.say("looking at the task vectors")
        root = source_of(self.base.module if isinstance(self.base, Model) else self.base, None)
        given = list(self.inputs.values())
        found: Look = look_adapters(given, root) if self.adapters else look([source_of(i, root) for i in given], root)
        return {**found.as_dict(), "names": list(self.inputs)}

    # Scoring

    def _owners(self, splits: Sequence[str]) -> dict[str, dict[str, Score]]:
        """The score of each task's own model, by split and task."""
        found: dict[str, dict[str, Score]] = {split: {} for split in splits}
        for name, item in self.inputs.items():
            mine = [task for task in self.tasks if self.own.get(task.name, name) == name]
            if not mine:
                continue
            model, adapter = (self.base, item) if isinstance(item, Adapter) else (self._loaded(item), None)
            for split in splits:
                for task, score in self._scored(model, adapter, split, mine).items():
                    held = found[split].get(task)
                    sign = 1 if score.higher_is_better else -1
                    if held is None or sign * score.value > sign * held.value:
                        found[split][task] = score
        return found

    def _scored(
        self, model: Model, adapter: Adapter | Parts | None, split: str, tasks: Sequence[Task] | None = None
    ) -> dict[str, Score]:
        """Scores by task of a model, bare or with an adapter, which reads each task by the head learned for it."""
        with _present(model, adapter) as mix:
            heads = adapter.heads if adapter is not None else {}
            chosen = self.tasks if tasks is None else tasks
            return {task.name: self.score(model, task, mix, heads.get(task.name), split) for task in chosen}

    def _able(self, model: Model, adapter: Adapter | Parts | None) -> float | None:
        if self.general is None:
            return None
        with _present(model, adapter) as mix:
            return float(self.score(model, self.general, mix, None, "test").value)

    def _row(
        self, name: str, scored: Mapping[str, Mapping[str, Score]], facts: Mapping[str, Any], ability: float | None = None,
        note: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        shown = scored.get(self.split, {})
        shares = self._shares(self.split, shown)
        known = {task: share for task, share in shares.items() if share is not None}
        worst = min(known, key=lambda task: known[task], default="")
        average = float(np.mean(list(known.values()))) if known else None
        chosen = [s for s in self._shares(self.other, scored.get(self.other, {})).values() if s is not None]
        return {
            "method": name, "what": "", "rule": "", "settings": {}, "at": None,
            "scores": {task: float(score.value) for task, score in shown.items()},
            "intervals": {task: [float(score.low), float(score.high)] for task, score in shown.items()},
            "normalised": shares, "average": average, "worst": known.get(worst), "worst_task": worst,
            "chosen_by": float(np.mean(chosen)) if chosen else average,
            "ability": ability, "bytes": None, "seconds": None, "peak_mb": None, "note": note, **facts,
        }  # fmt: skip

    def _shares(self, split: str, scores: Mapping[str, Score]) -> dict[str, float | None]:
        measures = self.measures.get(split, {})
        return {
            task: normalised(float(score.value), float(measures[task].value), score.higher_is_better)
            for task, score in scores.items()
        }

    def _task(self, task: Task) -> dict[str, Any]:
        measure = self.measures[self.split][task.name]
        return {
            "name": task.name, "kind": task.kind, "metric": measure.metric, "higher_is_better": measure.higher_is_better,
            "examples": len(getattr(task, self.split)), "own": self.own.get(task.name, "the best of them"),
        }  # fmt: skip

    def _own_facts(self) -> dict[str, Any]:
        sizes = [_bytes(item) for item in self.inputs.values() if isinstance(item, Adapter | Model)]
        what = "each task by its own adapter" if self.adapters else "each task by its own model, or the best of them"
        return {"what": what, "bytes": sum(sizes) if len(sizes) == len(self.inputs) else None}

    def _base_facts(self, bare: Model) -> dict[str, Any]:
        answers = bare.kind in ("causal", "seq2seq", "dual")
        what = "the bare base's answers" if answers else "a linear probe on the bare base's features"
        return {"what": what, "bytes": 0 if self.adapters else _bytes(bare)}

    # Files

    def _loaded(self, item: Any) -> Model:
        return item if isinstance(item, Model) else Model.load(str(item))

    def _keep(self, made: Any) -> None:
        """Puts the best merged checkpoint aside."""
        if isinstance(made, Path):
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            made.rename(self.folder / "best")

    def place(self, made: Adapter | Parts | Model, folder: Path) -> None:
        """Puts the best into a folder: an adapter's files, or a checkpoint's."""
        best = self.folder / "best"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(made, Adapter | Parts):
                made.save(folder)
            elif best.is_dir():
                for file in best.iterdir():
                    file.replace(folder / file.name)
            else:
                made.module.save_pretrained(folder)  # type: ignore[operator]
                if made.processor is not None:
                    made.processor.save_pretrained(folder)


def merged_adapter(trial: Trial, adapters: Sequence[Adapter], base: Any, **options: Any) -> Adapter | Parts:
    """One adapter from several, or the parts that act for it, as a trial says.

    The first is one end of the way where a rule goes from one model to another; what looks at data runs the base. Forms whose
    changes depend on the base's weights (DoRA) become dense changes where ``as_`` says nothing else.

    Raises:
        MergeError: the adapters do not fit together, or cannot be expressed in the form.
    """
    first, rest = base, adapters
    if _between(trial.rule):
        first, rest = adapters[0], adapters[1:]
    elif trial.rule not in fits:
        if independent(adapters):
            first = None
        else:
            options = {**options, "as_": options.get("as_") or "full"}
    made: Adapter | Parts = merge(rest, trial.rule, first, **options, **trial.settings)
    return made


def _between(rule: str) -> bool:
    """Whether a method goes from one model to another, instead of adding up differences to a base."""
    return rule in rules and rules[rule].ends


@contextmanager
def _present(model: Model, adapter: Adapter | Parts | None) -> Iterator[str | Mix | None]:
    """The name of an adapter while it is attached, or the mix of several parts; None for the bare model."""
    if adapter is None:
        yield None
        return
    if not isinstance(adapter, Adapter):
        try:
            yield adapter.attach(model)
        finally:
            adapter.detach(model)
        return
    name = model.attach(adapter, f"merge/{adapter.name}")
    try:
        yield name
    finally:
        model.detach(name)


def _bytes(item: Adapter | Parts | Model) -> int:
    """What its tensors take."""
    parameters = item.module.parameters() if isinstance(item, Model) else item.parameters()
    return sum(p.numel() * p.element_size() for p in parameters)
