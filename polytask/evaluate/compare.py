"""Side by side: baselines, the bare base, each adapter, joint training, the average of all adapters; what each forgot."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.head import Head, TextHead
from polytask.core.measure import peak_memory
from polytask.core.metrics import METRICS, Score, default_metric, majority, score
from polytask.core.mix import Fixed, Mix
from polytask.core.model import Model
from polytask.core.predict import predict
from polytask.core.routing import Routing
from polytask.core.task import Task

from .evaluator import evaluate
from .probe import probe
from .table import Table


def compare(
    model: Model | str,
    adapters: Mapping[str, Adapter] | Sequence[Adapter] | str | Path,
    tasks: Sequence[Task],
    *,
    joint: Adapter | Callable[[], Adapter] | None = None,
    merges: Mapping[str, Callable[[], Adapter]] | None = None,
    routes: Mapping[str, Callable[[Mapping[str, Adapter]], Routing]] | None = None,
    cross: bool = True,
    general: Task | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Table:
    """Puts the ways to serve several tasks from one base side by side, on the tasks' test splits.

    Args:
        model: the base, or what `Model.load` takes. What is attached to it stays; the adapters are attached meanwhile.
        adapters: by name, or a list, or a folder with a folder per adapter. An adapter belongs to the tasks it has heads for
            (for generative bases: the tasks on its card).
        tasks: what to score on.
        joint: an adapter learned on all tasks together, or what makes one when its turn comes.
        merges: what makes one adapter of all, by the merge method's name.
        routes: what makes a mix of the adapters by the names that they are attached as, by the router's name.
        cross: measure every adapter on every task.
        general: a task of kind ``lm`` that stands for a language model's own ability; the other tasks' inputs by default.
        batch_size: sequences per forward.
        resamples: of the bootstraps.
        seed: of the bootstraps.
        say: is told what goes on.

    Raises:
        ConfigError: no adapters, or none belongs to any of the tasks.
    """
    started = time.perf_counter()
    model = Model.load(model) if isinstance(model, str) else model
    found = load_all(adapters)
    own = owners(found, tasks)
    comparison = Comparison(model, found, list(tasks), own, batch_size, resamples, seed, say)
    with comparison.attached():
        comparison.baselines()
        comparison.specialists()
        if joint is not None:
            comparison.joint(joint)
        if len(found) > 1:
            comparison.average()
        for name, made in (merges or {}).items():
            comparison.merged(name, made)
        for name, mixed in (routes or {}).items():
            comparison.routed(name, mixed)
        if cross:
            comparison.crossed(general)
    return comparison.table(time.perf_counter() - started)


def load_all(adapters: Mapping[str, Adapter] | Sequence[Adapter] | str | Path) -> dict[str, Adapter]:
    """Adapters by name, from a mapping, a list, or a folder of adapter folders (sorted by name)."""
    if isinstance(adapters, Mapping):
        return dict(adapters)
    if isinstance(adapters, str | Path):
        folder = Path(adapters)
        inside = sorted(p.parent for p in folder.glob("*/adapter_config.json"))
        if not inside:
            raise ConfigError(f"{folder} has no adapter folders; `polytask learn TASKS --out {folder}` makes some")
        return {path.name: Adapter.load(path) for path in inside}
    return {adapter.name or f"adapter{i}": adapter for i, adapter in enumerate(adapters)}


def owners(adapters: Mapping[str, Adapter], tasks: Sequence[Task]) -> dict[str, str]:
    """The name of the adapter that was learned on a task, by the task's name. Raises `ConfigError` where there is none."""
    own = {task.name: name for task in tasks for name in adapters if _belongs(adapters[name], task)}
    if not own:
        raise ConfigError(
            f"none of the adapters ({', '.join(adapters) or 'none given'}) was learned on the tasks {[t.name for t in tasks]}; "
            "give the tasks they were learned on"
        )
    return own


def _belongs(adapter: Adapter, task: Task) -> bool:
    return task.name in adapter.heads or [t.get("name") for t in adapter.card.tasks] == [task.name]


class Comparison:
    """One run of `compare`; each method adds its rows."""

    def __init__(
        self, model: Model, adapters: dict[str, Adapter], tasks: list[Task], own: dict[str, str], batch_size: int, resamples: int,
        seed: int, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.model, self.adapters, self.tasks, self.own = model, adapters, tasks, own
        self.batch_size, self.resamples, self.seed, self.say = batch_size, resamples, seed, say
        self.generative = model.kind in ("causal", "seq2seq")
        self.result = Table()

    def attached(self) -> Any:
        """The adapters present under names of their own, and gone afterwards."""
        from contextlib import ExitStack

        stack = ExitStack()
        self.names = {}
        for name, adapter in self.adapters.items():
            self.names[name] = self.model.attach(adapter, f"compare/{name}")
            stack.callback(self.model.detach, self.names[name])
        return stack

    # Methods

    def baselines(self) -> None:
        """The most frequent answer, and the bare base."""
        self.say("baselines")
        self._method(
            "majority", "always the most frequent training answer", lambda task: self._majority(task), trained=0
        )
        if self.generative:
            self._method(
                "base, zero-shot", "the bare base answers as it is", lambda task: self._score(task, None), trained=0
            )
            return
        self._method(
            "base + probe", "logistic regression on the bare base's frozen features", lambda t: self._score(t, None)
        )

    def specialists(self) -> None:
        """Each task by its own adapter."""
        self.say("adapter per task")
        used = [self.adapters[name] for name in dict.fromkeys(self.own.values())]

        def one(task: Task) -> Score | None:
            name = self.own.get(task.name)
            return None if name is None else self._score(task, self.names[name], self._head(name, task))

        self._method("adapter per task", "each task by the adapter learned on it", one, used=used)

    def joint(self, given: Adapter | Callable[[], Adapter]) -> None:
        """One adapter for all tasks."""
        self.say("joint training")
        adapter = given if isinstance(given, Adapter) else given()
        name = self.model.attach(adapter, "compare/joint adapter")
        try:
            heads = adapter.heads
            self._method(
                "joint", "one adapter learned on all tasks together",
                lambda task: self._score(task, name, heads.get(task.name)), used=[adapter],
            )  # fmt: skip
        finally:
            self.model.detach(name)

    def average(self) -> None:
        """All adapters at once, each with the same weight, read by each task's own head."""
        self.say("average of adapters")
        mix = Fixed({self.names[name]: 1.0 / len(self.adapters) for name in self.adapters})

        def one(task: Task) -> Score | None:
            name = self.own.get(task.name)
            return None if name is None else self._score(task, mix, self._head(name, task))

        used = list(self.adapters.values())
        self._method(
            "average of adapters",
            "the mean of all adapters' changes, with each task's own head",
            one,
            used=used,
            made=True,
        )

    def merged(self, method: str, make: Callable[[], Adapter]) -> None:
        """One adapter that all were merged into, read by each task's own head."""
        self.say(f"merging by {method}")
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            adapter = make()
        seconds = round(time.perf_counter() - started, 2)
        adapter.card.training |= {"seconds": seconds, "peak_mb": peak.mb, "trained_parameters": 0}
        name = self.model.attach(adapter, f"compare/merged by {method}")

        def one(task: Task) -> Score | None:
            owner = self.own.get(task.name)
            return None if owner is None else self._score(task, name, self._head(owner, task))

        try:
            what = f"one adapter that all were merged into by {method}, with each task's own head"
            self._method(f"merged: {method}", what, one, used=[adapter])
        finally:
            self.model.detach(name)

    def routed(self, method: str, make: Callable[[Mapping[str, Adapter]], Routing]) -> None:
        """All adapters behind a router, read by each task's own head, or by the one that it learned."""
        self.say(f"routing by {method}")
        before, started = self.model.attached, time.perf_counter()
        with peak_memory(self.model.device) as peak:
            mix = make({self.names[name]: adapter for name, adapter in self.adapters.items()}).attach(self.model)
        spent = {"seconds": round(time.perf_counter() - started, 2), "peak_mb": peak.mb}

        def one(task: Task) -> Score | None:
            owner = self.own.get(task.name)
            head = mix.heads.get(task.name) or (None if owner is None else self._head(owner, task))
            return None if owner is None else self._score(task, mix, head)

        try:
            what = f"all adapters at once, weighed by {method}, with each task's own head"
            self._method(f"routed: {method}", what, one, used=list(mix.adapters.values()), made=True)
            entry = self.result.methods[-1]
            entry["seconds"] = round(entry["seconds"] + spent["seconds"], 2)
            entry["peak_mb"] = max(entry["peak_mb"] or 0.0, spent["peak_mb"] or 0.0) or None
        finally:
            for name in self.model.attached:
                if name not in before:  # those that learned with their router
                    self.model.detach(name)

    # The cross matrix, and what each adapter forgot

    def crossed(self, general: Task | None) -> None:
        """Every adapter on every task, and the change of what the base could do before."""
        self.say("every adapter on every task")
        measured = self._directly if self.generative else self._probed
        bare = "base, zero-shot" if self.generative else "base + probe"
        base = [self.result.value(bare, task.name) for task in self.tasks]  # measured the same way before
        values = [[measured(task, self.names[name]) for task in self.tasks] for name in self.adapters]
        self.result.cross = {
            "measure": "the adapter's answer without training, zero-shot"
            if self.generative
            else "a linear probe on frozen features, fitted on the task's train split with the adapter acting",
            "adapters": list(self.adapters), "tasks": [t.name for t in self.tasks], "values": values, "base": base,
        }  # fmt: skip
        self._forgetting(values, base, general)

    def _probed(self, task: Task, mix: str | None) -> float | None:
        with self.model.using(mix, tasks=task.name):
            fitted = probe(self.model, task, batch_size=self.batch_size)
            found = fitted.predict(self.model, task.test, self.batch_size)
        metric = METRICS[task.metric or default_metric(task.kind)]
        return float(metric.function(found, [e.target for e in task.test], task.labels))

    def _directly(self, task: Task, mix: str | None) -> float | None:
        return evaluate(self.model, task, mix, batch_size=self.batch_size, resamples=0).value

    def _forgetting(self, values: list[list[float | None]], base: list[float | None], general: Task | None) -> None:
        rows = []
        for i, name in enumerate(self.adapters):
            mine = {t for t, owner in self.own.items() if owner == name}
            if self.generative:
                before, after = self._perplexity(None, mine, general), self._perplexity(self.names[name], mine, general)
            else:
                others = [j for j, task in enumerate(self.tasks) if task.name not in mine and base[j] is not None]
                before = float(np.mean([base[j] for j in others])) if others else None  # type: ignore[misc]
                after = float(np.mean([values[i][j] for j in others])) if others else None  # type: ignore[misc]
            change = None if before is None or after is None else after - before
            rows.append({"adapter": name, "before": before, "after": after, "change": change})
        self.result.forgetting = {
            "measure": f"perplexity on {'the given text' if general else 'the inputs of the other tasks'} (lower is better)"
            if self.generative
            else "mean score of linear probes on the tasks that the adapter did not learn (higher is better)",
            "rows": rows,
        }
        changes = [row["change"] for row in rows if row["change"] is not None]
        for method in self.result.methods:
            if method["method"] == "adapter per task" and changes:
                method["forgot"] = float(np.mean(changes))

    def _perplexity(self, mix: str | None, mine: set[str], general: Task | None) -> float | None:
        if general is not None:
            texts = list(general.test or general.train)
        else:
            texts = [e for task in self.tasks if task.name not in mine for e in task.test[:50]]
        if not texts or self.model.kind != "causal":
            return None
        head = TextHead("lm")
        long_enough = [e for e in texts if len(" ".join(e.inputs).split()) > 1]
        with self.model.using(mix):
            found = predict(self.model, head, head.rows(self.model, long_enough), batch_size=self.batch_size)
        return float(np.exp(sum(nll for nll, _ in found) / max(1, sum(count for _, count in found))))

    # Shared

    def _head(self, name: str, task: Task) -> Head | None:
        return self.adapters[name].heads.get(task.name)

    def _score(self, task: Task, mix: str | Mix | None, head: Head | None = None) -> Score:
        return evaluate(
            self.model, task, mix, head=head, batch_size=self.batch_size, resamples=self.resamples, seed=self.seed
        )

    def _majority(self, task: Task) -> Score | None:
        if task.kind == "lm":
            return None
        targets = [e.target for e in task.test]
        return score(
            task.kind, majority(task), targets, metric=task.metric or None, labels=task.labels, resamples=self.resamples,
            seed=self.seed,
        )  # fmt: skip

    def _method(
        self, name: str, what: str, one: Callable[[Task], Score | None], *, used: Sequence[Adapter] = (),
        trained: int | None = None, made: bool = False,
    ) -> None:  # fmt: skip
        values: list[float] = []
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            for task in self.tasks:
                found = one(task)
                row = {"method": name, "task": task.name, "note": ""}
                if found is None:
                    empty = {"metric": task.metric, "value": None, "low": None, "high": None, "n": len(task.test)}
                    self.result.rows.append({**row, **empty, "note": "this method cannot do this task"})
                    continue
                values.append(found.value)
                self.result.rows.append(
                    {**row, "metric": found.metric, **{k: getattr(found, k) for k in ("value", "low", "high", "n")}}
                )
        seconds = time.perf_counter() - started
        higher = all(METRICS[t.metric or default_metric(t.kind)].higher_is_better for t in self.tasks)
        same = len({t.metric or default_metric(t.kind) for t in self.tasks}) == 1
        self.result.methods.append(
            {
                "method": name, "what": what,
                "average": float(np.mean(values)) if values and same else None,
                "worst": float((min if higher else max)(values)) if values and same else None,
                "trained_parameters": sum(a.card.training.get("trained_parameters", a.size) for a in used) if used else trained,
                "bytes": sum(_bytes(a) for a in used) if used else 0,
                "seconds": round(seconds if made or not used else sum(a.card.training.get("seconds", 0.0) for a in used), 2),
                "peak_mb": max([peak.mb or 0.0, *(a.card.training.get("peak_mb") or 0.0 for a in used)]) or None,
                "forgot": None, "note": "",
            }
        )  # fmt: skip

    def table(self, seconds: float) -> Table:
        """The finished table."""
        import polytask

        result = self.result
        first = next(iter(self.adapters.values()))
        result.base = {
            "name": self.model.name, "kind": self.model.kind, "fingerprint": self.model.fingerprint,
            "parameters": sum(p.numel() for p in self.model.module.parameters()),
        }  # fmt: skip
        result.tasks = [
            {
                "name": t.name, "kind": t.kind, "metric": t.metric or default_metric(t.kind), "labels": list(t.labels),
                "train": len(t.train), "dev": len(t.dev), "test": len(t.test), "description": t.description,
            }
            for t in self.tasks
        ]  # fmt: skip
        result.ranks = [
            {"adapter": name, **held, "budget": held["budget"]["name"]}
            for name, adapter in self.adapters.items()
            if (held := adapter.card.training.get("ranks"))
        ]
        result.settings = {
            "seed": self.seed, "precision": first.card.training.get("precision", ""), "form": str(first.form),
            "seconds": round(seconds, 1), "device": str(self.model.device), "created": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": {p: version(p) for p in ("torch", "transformers")} | {"polytask": polytask.__version__},
        }  # fmt: skip
        return result


def _bytes(adapter: Adapter) -> int:
    """What the adapter takes on disk, without the small text files."""
    return sum(p.numel() * p.element_size() for p in adapter.parameters())
