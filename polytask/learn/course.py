"""One adapter's way through its tasks: data, heads, optimiser, schedule, best state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import DataError, LearnError
from polytask.core.head import Head, TextHead
from polytask.core.metrics import METRICS, default_metric
from polytask.core.model import Model
from polytask.core.predict import predict
from polytask.core.recipe import Schedule, Stage
from polytask.core.rows import Row
from polytask.core.task import Task

from . import plan
from .budget import Budget, Controller


@dataclass
class Course:
    """An adapter that learns, with all that is its own. Several courses share one forward when they learn together.

    Attributes:
        name: what the adapter is attached as while it learns.
        adapter: what learns.
        tasks: what it learns from; each has a head in the adapter.
        stage: the settings.
        fresh: the tasks whose heads are new.
        rows: training rows by task.
        step: optimiser steps taken.
        begun: whether the adapter has had its start, also the part that looks at data.
        best: (score, step, state) of the best evaluation on dev.
        budget: how its ranks are dealt out.
        mean: the weighted sum of the states at the ends of the epochs so far, where the form learns their average.
        starts: sha256 of the values that each task's head had when learning began: what may be averaged with it later has the
            same.
    """

    name: str
    adapter: Adapter
    tasks: list[Task]
    stage: Stage
    fresh: frozenset[str] = frozenset()
    rows: list[list[Row]] = field(default_factory=list)
    dev: list[list[Row]] = field(default_factory=list)
    step: int = 0
    begun: bool = False
    best: tuple[float, int, dict[str, Tensor]] | None = None
    worse: int = 0
    stopped: bool = False
    scores: list[dict[str, Any]] = field(default_factory=list)
    budget: Budget | None = None
    controller: Controller | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = list(self.adapter.patches)  # a start or a budget may take some away

    def read(self, model: Model) -> None:
        """Reads the examples and plans the batches. Raises `DataError` when there is nothing to learn from."""
        longest = self.schedule.longest
        for task in self.tasks:
            if not task.train:
                raise DataError(f"the task {task.name!r} has no training examples; give it a train split")
            head = self.adapter.heads[task.name]
            self.rows.append(head.rows(model, task.train, longest=longest))
            self.dev.append(head.rows(model, task.dev, scoring=True, longest=longest) if task.dev else [])
        self._lengths = [[row.length for row in rows] for rows in self.rows]
        self._epochs: dict[int, list[list[plan.Item]]] = {}
        self.per_epoch = len(self.batches(0))
        self.micro = math.ceil(self.per_epoch * self.schedule.epochs)
        self.total = math.ceil(self.micro / self.schedule.accumulate)
        count = self.schedule.evaluations or max(1, math.ceil(self.schedule.epochs))
        ends = range(1, math.ceil(self.schedule.epochs) + 1)
        self.ends = [min(self.total, math.ceil(k * self.per_epoch / self.schedule.accumulate)) for k in ends]
        self.averages = self.adapter.form.averages(len(self.ends))
        self.checks = {round(self.total * (i + 1) / count) for i in range(count)}

    def prepare(self) -> None:
        """Builds the optimiser, and what deals the ranks out."""
        if self.budget is not None:
            self.controller = self.budget.control(self.adapter, self.total, self.stage.seed)
        self.optimiser = self._optimiser()
        name = "constant_with_warmup" if self.schedule.schedule == "constant" else self.schedule.schedule
        self.scheduler = get_scheduler(name, self.optimiser, math.ceil(self.total * self.schedule.warmup), self.total)

    @property
    def schedule(self) -> Schedule:
        """How it is optimised."""
        return self.stage.schedule

    @property
    def lr(self) -> float:
        """The peak learning rate of the patches."""
        return self.schedule.lr or self.adapter.form.default_lr

    @property
    def trained(self) -> int:
        """How many numbers learn."""
        return sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)

    def describe(self, card: Card, trained: int, **more: Any) -> None:
        """Writes into a card what was learned from and how.

        Args:
            card: of the course's adapter, or of a snapshot of it.
            trained: how many numbers learned.
            more: what else is known of the training.
        """
        import polytask

        card.tasks = [{**task.summary(), "hash": task.hash} for task in self.tasks]
        card.training = {
            **more, "steps": self.step, "trained_parameters": trained, "lr": self.lr,
            "stage": self.stage.model_dump(mode="json"), "head_starts": self.starts,
        }  # fmt: skip
        card.versions = {p: version(p) for p in ("torch", "transformers")} | {"polytask": polytask.__version__}

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps."""
        return self.stopped or self.step >= self.total

    def batches(self, number: int) -> list[list[plan.Item]]:
        """The batches of an epoch."""
        if number not in self._epochs:
            self._epochs = {
                number: plan.epoch(
                    self._lengths,
                    self.schedule.batch_size,
                    self.stage.seed,
                    number,
                    self.stage.sampling,
                    self.stage.temperature,
                )
            }
        return self._epochs[number]

    def batch(self, micro: int) -> list[plan.Item]:
        """The ``micro``-th batch of the whole run."""
        number, at = divmod(micro, self.per_epoch)
        return self.batches(number)[at]

    def micros(self) -> range:
        """The batches whose gradients make the next step."""
        first = self.step * self.schedule.accumulate
        return range(first, min(first + self.schedule.accumulate, self.micro))

    def heads(self, items: Sequence[plan.Item]) -> list[tuple[Head, list[int]]]:
        """The heads of a batch, each with the positions of its rows."""
        found: dict[int, list[int]] = {}
        for position, (task, _) in enumerate(items):
            found.setdefault(task, []).append(position)
        return [(self.adapter.heads[self.tasks[t].name], where) for t, where in sorted(found.items())]

    def task_of(self, head: Head) -> str:
        """The task that a head belongs to."""
        return next(task.name for task in self.tasks if self.adapter.heads[task.name] is head)

    def advance(self) -> float:
        """Clips, steps, and returns the gradient's norm. Parameters of other adapters do not enter it."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        bound = self.schedule.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
        if not math.isfinite(norm):
            raise LearnError(f"the gradient of {self.name!r} is not a number")
        self.optimiser.step()
        self.adapter.form.stepped(self.adapter)
        self.scheduler.step()
        self.step += 1
        self._average()
        if self.controller is not None:
            self.controller.after(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def _average(self) -> None:
        """Adds the state at the end of an epoch to the average, where the form learns one."""
        if self.averages is None or self.step not in self.ends:
            return
        weight = self.averages[self.ends.index(self.step)]
        for name, value in self.adapter.state().items():
            if value.is_floating_point():
                self.mean[name] = self.mean.get(name, torch.zeros_like(value)) + weight * value

    def settle(self, model: Model) -> None:
        """Puts the adapter where learning ends: at the average of its epochs, the best state on dev, or where it is."""
        if self.mean:
            self.adapter.load_state({**self.adapter.state(), **self.mean})
            self.best = None
            self.evaluate(model)  # the average has a score of its own
        elif self.best is not None:
            self.adapter.load_state(self.best[2])

    def evaluate(self, model: Model) -> dict[str, Any] | None:
        """Scores the adapter on dev and keeps the best state. None without dev examples."""
        values: dict[str, float] = {}
        signs = []
        for task, rows in zip(self.tasks, self.dev, strict=True):
            if not rows:
                continue
            metric = METRICS[task.metric or default_metric(task.kind)]
            head = self.adapter.heads[task.name]
            with model.using(self.name, tasks=task.name):
                write = isinstance(head, TextHead) and task.kind == "generate"
                found = predict(model, head, rows, batch_size=2 * self.schedule.batch_size, write=write)
            values[task.name] = float(metric.function(found, [e.target for e in task.dev], task.labels))
            signs.append(1.0 if metric.higher_is_better else -1.0)
        if not values:
            return None
        mean = sum(s * v for s, v in zip(signs, values.values(), strict=True)) / len(values)
        record = {"step": self.step, "dev": values, "mean": mean}
        self.scores.append(record)
        if self.controller is not None and not self.controller.settled(self.step):
            return record  # its ranks are not those that the budget allows in the end
        if self.best is None or mean > self.best[0]:
            self.best, self.worse = (mean, self.step, self.adapter.state()), 0
        else:
            self.worse += 1
            self.stopped = bool(self.schedule.patience) and self.worse >= self.schedule.patience
        return record

    def _optimiser(self) -> torch.optim.Optimizer:
        patches: dict[float, list[torch.nn.Parameter]] = {self.lr: []}  # by their learning rate
        for part in self.adapter.parts.values():
            for name, p in part.named_parameters():
                if p.requires_grad:
                    patches.setdefault(self.lr * part.form.rate(name), []).append(p)
        heads: dict[float, list[torch.nn.Parameter]] = {}  # by their learning rate
        for head in self.adapter.heads.values():
            own = list(head.parameters())
            if own:
                heads.setdefault(self.schedule.head_lr or self.lr * head.lr_factor, []).extend(own)
        decay = self.schedule.weight_decay
        groups: list[dict[str, Any]] = [{"params": p, "lr": r, "weight_decay": decay} for r, p in patches.items()]
        groups += [{"params": some, "lr": lr, "weight_decay": 0.0} for lr, some in heads.items()]
        same = {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
        return torch.optim.AdamW(groups, fused=same)
