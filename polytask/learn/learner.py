"""Learning adapters: one, several in one run, or one for several tasks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.core import attach as _attach
from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError, LearnError
from polytask.core.files import CONFIG
from polytask.core.form import Form
from polytask.core.head import Head, LinearHead, Out, Seen, collate, head_for, split
from polytask.core.measure import peak_memory
from polytask.core.memory import memory_advice
from polytask.core.mix import PerRow, Single
from polytask.core.model import Model
from polytask.core.recipe import Schedule, Stage
from polytask.core.rows import Row
from polytask.core.select import Selector
from polytask.core.task import Task, read_tasks

from . import checkpoint, precision, snapshots
from .budget import Budget, ranks
from .course import Course
from .objectives import Objective, objectives
from .snapshots import digest
from .warm import warm
from .watch import Stop, Watch, stoppable


class Interrupted(LearnError):
    """A run that was asked to stop. It goes on when the same command is repeated."""


def learn(
    model: Model | str,
    tasks: Task | str | Path | Sequence[Task],
    form: Form | str | Mapping[str, Any] = "lora",
    sites: Selector | None = None,
    objective: str | Objective | None = None,
    *,
    budget: Budget | str | Mapping[str, Any] | None = None,
    together: bool = False,
    joint: bool = False,
    seed: int = 0,
    name: str | None = None,
    out: str | Path | None = None,
    start: Adapter | str | Path | None = None,
    sampling: str = "proportional",
    temperature: float = 2.0,
    tracker: str | None = None,
    progress: bool = True,
    **schedule: Any,
) -> Any:
    """Learns one adapter from a task; with several tasks one each (``together``) or one for all (``joint``).

    The base stays bit for bit as it was, and so do adapters that were attached before. The result is not attached.

    Args:
        model: the base, or what `Model.load` takes.
        tasks: a task, several, or a path that `read_tasks` takes.
        form: what learns: a form, its name, or a mapping with its settings.
        sites: where; the form's own choice when None.
        objective: the loss, by name or as an `Objective`; each head's own when None.
        budget: how the ranks of the form ``lora`` are dealt out among its sites: a budget, its name (``adalora``,
            ``increlora``, ``triangular``, ``sample``, ``eva``), or a mapping with its settings. The total is the form's rank
            times its sites; evenly when None.
        together: one adapter per task in one run and one base in memory, each step with a batch of every task. It gives
            what separate runs give; returns a list in the order of the tasks.
        joint: one adapter that all tasks share, with a head for each.
        seed: the same seed gives the same adapter, bit for bit on a CPU.
        name: of the adapter; the task's by default.
        out: a folder (for ``together``, one with a folder per task). The adapter is saved there, with a log; an interrupted
            run goes on when the same call is repeated.
        start: an adapter (or its folder) to go on from instead of a fresh one.
        sampling: of the tasks of ``joint``: ``proportional``, ``equal`` or ``temperature``.
        temperature: of ``sampling="temperature"``.
        tracker: ``tensorboard`` or ``wandb``, through accelerate.
        progress: draw a progress bar when standard error is a terminal.
        schedule: any setting of `polytask.core.recipe.Schedule`: epochs, batch_size, lr, precision, patience, ...

    Returns:
        An adapter with its heads and a card; a list of them with ``together``.

    Raises:
        ConfigError: an unknown or contradictory setting.
        DataError: there is nothing to learn from.
        LearnError: the loss is not a number (the last good adapter is saved and the batch named).
        MemoryLimitError: a batch does not fit into memory.
        Interrupted: it was asked to stop; the state is saved when ``out`` is given.
    """
    model = Model.load(model) if isinstance(model, str) else model
    given = [tasks] if isinstance(tasks, Task) else read_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
    mixture = _mixture(given, together, joint)
    dealt = None if budget is None else Budget.of(budget)
    if dealt is not None and start is not None:
        raise ConfigError(
            f"the budget {dealt.name!r} deals out the ranks of a fresh adapter; leave start or budget out"
        )
    stage = Stage.of(
        {
            "form": {"name": Form.of(form).name, **Form.of(form).settings()},
            "mixture": mixture, "sampling": sampling, "temperature": temperature, "seed": seed,
            "sites": sites if isinstance(sites, str) or sites is None else tuple(sites) if not callable(sites) else None,
            "objective": objective if isinstance(objective, str) else None,
            "budget": None if dealt is None else dealt.settings(),
            "schedule": Schedule.of(schedule, "learn"),
        }
    )  # fmt: skip
    if stage.schedule.snapshots and out is None:
        raise ConfigError("snapshots are written into a folder; say which (out=, --out)")
    groups = [[task] for task in given] if mixture == "together" else [given]
    courses = []
    for group in groups:
        called = name if name and len(groups) == 1 else "joint" if mixture == "joint" else group[0].name
        told = Form.of(form).told(group)
        learns = dealt.form(dealt.takes(told)) if dealt is not None else told
        adapter, fresh = _fresh(model, group, learns, sites, stage, called, start)
        courses.append(Course(called, adapter, group, stage, fresh, begun=start is not None, budget=dealt))
    loss = objective if isinstance(objective, Objective) else objectives[objective]() if objective else Objective()
    run = Run(model, courses, loss, Path(out) if out is not None else None, tracker, progress)
    run.go()
    adapters = [course.adapter for course in courses]
    return adapters if mixture == "together" else adapters[0]


def _mixture(tasks: Sequence[Task], together: bool, joint: bool) -> str:
    if together and joint:
        raise ConfigError("together (an adapter per task) and joint (one for all) exclude each other; choose one")
    if not tasks:
        raise ConfigError("there is no task to learn from; give at least one")
    if len(tasks) > 1 and not (together or joint):
        raise ConfigError(
            f"{len(tasks)} tasks were given: say together=True for an adapter per task, or joint=True for one that all share"
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"two tasks have the same name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    return "together" if together else "joint" if joint else "single"


def _fresh(
    model: Model, tasks: Sequence[Task], form: Form, sites: Selector | None, stage: Stage, name: str,
    start: Adapter | str | Path | None,
) -> tuple[Adapter, frozenset[str]]:  # fmt: skip
    """An adapter to learn with, and the tasks whose heads are new."""
    new = set()
    if start is not None:
        adapter = start.copy() if isinstance(start, Adapter) else Adapter.load(start)
        adapter.card.parents = [adapter.hash]
    else:
        adapter = Adapter.new(model, form, sites, stage.seed)
    adapter.name = name
    adapter.to(model.device)
    for task in tasks:
        kept = adapter.heads.get(task.name)
        fresh = head_for(model, task, stage.seed, adapter.form, stage.schedule.head)
        same = kept is not None and kept.settings() == fresh.settings()
        adapter.heads[task.name] = kept if same and kept is not None else fresh.to(model.device)
        if not same:
            new.add(task.name)
    return adapter.trainable(), frozenset(new)


@dataclass
class Run:
    """One training run over one base: a forward shared by the courses, everything else their own."""

    model: Model
    courses: list[Course]
    objective: Objective
    out: Path | None
    tracker: str | None
    progress: bool

    def go(self) -> None:
        """Learns until every course is done, keeps each one's best state, writes cards and files.

        A folder that has the result already (the same base, data, form, settings and seed) is read instead.
        """
        from accelerate import Accelerator

        started = time.perf_counter()
        # accelerate takes several processes for one each, on a machine that has nothing but processors, unless it is told
        plain = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
        try:
            self.accelerator = Accelerator(
                cpu=plain, log_with=self.tracker, project_dir=str(self.out) if self.out else None
            )
        except ValueError as error:
            raise ConfigError(f"the tracker {self.tracker!r} cannot be used: {error}") from error
        if self.tracker and not self.accelerator.log_with:  # accelerate leaves out in silence what is not installed
            raise ConfigError(f"the tracker {self.tracker!r} is not installed; install its package, or leave it out")
        if self.accelerator.device.type != "cpu" and self.model.device.type == "cpu":
            self.model.to(self.accelerator.device)
            for course in self.courses:
                course.adapter.to(self.accelerator.device)
        if self.tracker:
            self.accelerator.init_trackers("polytask")
        for course in self.courses:
            course.read(self.model)
        with torch.random.fork_rng(), peak_memory(self.model.device) as peak, self._borrowed():
            torch.manual_seed(self.courses[0].stage.seed)
            schedule = self.courses[0].schedule
            self._begin()
            self._warm()
            self._agree()
            for course in self.courses:
                course.starts = {task: digest(head) for task, head in course.adapter.heads.items()}
                course.prepare()
            chosen, why = precision.choose(schedule.precision, self.model.module, self.model.device, self._one_loss)
            self.key = checkpoint.signature(self.courses, self.model.fingerprint, chosen)
            if self._learned():
                return
            resumed = self.out is not None and checkpoint.restore(self.out, self.courses, self.key)
            with (
                precision.lowered(self.model.module, torch.bfloat16 if chosen == "bf16" else None),
                stoppable() as stop,
            ):
                self._loop(stop, resumed)
                for course in self.courses:
                    course.settle(self.model)
        self._finish(
            {
                "precision": chosen,
                "precision_because": why,
                "seconds": round(time.perf_counter() - started, 2),
                "peak_mb": round(peak.mb, 1) if peak.mb else None,
            }
        )

    def _learned(self) -> bool:
        """Whether the folder already has what this run would give; then that is taken."""
        if self.out is None:
            return False
        found = []
        for course in self.courses:
            folder = self._folder(course)
            if not (folder / CONFIG).is_file():
                return False
            try:
                found.append(Adapter.load(folder))
            except AdapterError:
                return False  # something else, or a damaged one: it is learned anew and replaced
        if any(adapter.card.training.get("signature") != self.key for adapter in found):
            return False
        for course, adapter in zip(self.courses, found, strict=True):
            course.adapter = adapter
        return True

    def _begin(self) -> None:
        """Starts of fresh adapters that look at data."""
        for course in self.courses:
            if course.begun:
                continue
            drawn = course.batches(0)
            if size := course.adapter.form.begin_rows:
                rows = [item for items in drawn for item in items]
                drawn = [rows[at : at + size] for at in range(0, len(rows), size)]
            batches = [
                lambda items=items, course=course: self._losses([(course, items)], whole=True)[0]  # type: ignore[misc]
                for items in drawn
            ]
            with self.model.using(course.name):
                course.adapter.form.begin(self.model, course.adapter, batches)
            self.model.rebind(course.name)

    def _warm(self) -> None:
        """Heads that are fresh start from a probe of the base with their adapter as it is now."""
        for course in self.courses:
            for task, rows in zip(course.tasks, course.rows, strict=True):
                head = course.adapter.heads[task.name]
                if isinstance(head, LinearHead) and course.schedule.head_start == "probe" and task.name in course.fresh:
                    with self.model.using(course.name):
                        # a forward alone takes less memory than a step, so its batches may be larger, up to a point
                        warm(self.model, head, rows, min(64, 4 * course.schedule.batch_size))

    def _agree(self) -> None:
        """Gives several processes the first one's start: what each computes of the same data may be rounded differently."""
        if self.accelerator.num_processes == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for course in self.courses:
                for parameter in course.adapter.parameters():
                    parameter.copy_(broadcast(parameter.detach().clone()))  # type: ignore[no-untyped-call]

    # The loop

    def _loop(self, stop: Stop, resumed: bool) -> None:
        title = self.courses[0].name if len(self.courses) == 1 else f"{len(self.courses)} adapters"
        total = max(course.total for course in self.courses)
        step = max(course.step for course in self.courses)
        main = self.accelerator.is_main_process
        watch = Watch(
            total, done=step if resumed else 0, folder=self.out if main else None, show=self.progress and main,
            title=title, tracker=self.accelerator if self.tracker else None,
        )  # fmt: skip
        if self.out is not None and main and not resumed:
            for course in self.courses:
                snapshots.clear(course, self._folder(course))
        try:
            while not all(course.done for course in self.courses):
                active = [course for course in self.courses if not course.done]
                loss, examples = self._step(active)
                step = max(course.step for course in active)
                watch.step(step, loss, examples, lr=active[0].scheduler.get_last_lr()[0])
                if self.out is not None and main:
                    for course in active:
                        snapshots.keep(course, self._folder(course))
                checked = [c for c in active if c.step in c.checks or c.done]
                for course in checked:
                    record = course.evaluate(self.model)
                    if record is not None:
                        watch.evaluated(course.step, course.name, record["dev"])
                if checked and self.out is not None and main:
                    checkpoint.save(self.out, self.courses, self.key)
                if stop.asked:
                    raise Interrupted(self._interrupted(step, total))
        finally:
            watch.close()

    def _interrupted(self, step: int, total: int) -> str:
        if self.out is None:
            return f"stopped at step {step} of {total}; nothing was saved, because no folder was given (out=)"
        if self.accelerator.is_main_process:
            checkpoint.save(self.out, self.courses, self.key)
        return f"stopped at step {step} of {total} and saved in {self.out}; repeat the same command to go on"

    def _step(self, courses: Sequence[Course]) -> tuple[float, int]:
        """One optimiser step of each course. The mean loss and the number of examples."""
        total, examples = 0.0, 0
        for micro in range(max(len(course.micros()) for course in courses)):
            taking = [c for c in courses if micro < len(c.micros())]
            drawn = [(c, c.batch(c.micros()[micro]), len(c.micros())) for c in taking]
            with self._memory(sum(len(items) for _, items, _ in drawn)):
                losses = self._losses([(course, items) for course, items, _ in drawn])
                losses = [self._penalised(loss, course) for loss, (course, _, _) in zip(losses, drawn, strict=True)]
                scaled = [loss / count for loss, (_, _, count) in zip(losses, drawn, strict=True)]
                whole = torch.stack(scaled).sum()
                self._finite(whole, drawn)
                whole.backward()
            total += float(whole.detach())
            examples += sum(len(items) for _, items, _ in drawn)
        for course in courses:
            self._reduce(course)
            try:
                course.advance()
            except LearnError as error:
                raise self._saved(str(error), [(course, course.batch(course.micros()[0]), 1)]) from error
        return total / len(courses), examples

    def _penalised(self, loss: Tensor, course: Course) -> Tensor:
        penalty = course.adapter.form.penalty(course.adapter)
        return loss if penalty is None else loss + penalty / self.accelerator.num_processes  # which are added up

    def _losses(self, drawn: Sequence[tuple[Course, Sequence[tuple[int, int]]]], whole: bool = False) -> list[Tensor]:
        """The loss of each course's batch, from one forward for all that need the same of the base.

        Each process takes its share of the rows, or the ``whole``: a start that looks at data must be the same in all.
        """
        rank, world = (0, 1) if whole else (self.accelerator.process_index, self.accelerator.num_processes)
        parts: list[tuple[int, Head, list[Row]]] = []  # (course, head, its rows here)
        divisors = [0.0] * len(drawn)
        for number, (course, items) in enumerate(drawn):
            for head, positions in course.heads(items):
                rows = [course.rows[items[p][0]][items[p][1]] for p in positions]
                divisors[number] += sum(_weight(head, row) for row in rows)
                mine = rows[rank::world]
                if mine:
                    parts.append((number, head, mine))
        sums: list[Tensor] = [torch.zeros((), device=self.model.device, requires_grad=True) for _ in drawn]
        for kind in dict.fromkeys(head.group for _, head, _ in parts):
            group = [part for part in parts if part[1].group == kind]
            for (number, head, rows), out in zip(group, self._forward(group, drawn), strict=True):
                values, _ = self.objective(head, out, rows)
                course = drawn[number][0]
                seen = Seen(self.model, course.name, course.adapter, course.task_of(head), rows, out)
                values = course.adapter.form.loss(seen, values)
                sums[number] = sums[number] + values.sum()
        return [total / divisor for total, divisor in zip(sums, divisors, strict=True)]

    def _forward(self, group: Sequence[tuple[int, Head, list[Row]]], drawn: Sequence[tuple[Course, Any]]) -> list[Out]:
        rows = [row for _, _, part in group for row in part]
        head = group[0][1]
        names = [drawn[number][0].name for number, _, part in group for row in part for _ in range(row.count)]
        mix = Single(names[0]) if len(set(names)) == 1 else PerRow(names)
        batch = collate(self.model, head, rows)
        tasks = [
            drawn[number][0].task_of(head) for number, head, part in group for row in part for _ in range(row.count)
        ]
        with self.model.using(mix, tasks=tasks):
            out = head.run(self.model, batch)
        return split(out, [sum(row.count for row in part) for _, _, part in group])

    def _one_loss(self) -> float:
        items = self.courses[0].batch(0)
        with torch.no_grad(), self._memory(len(items)):
            return float(self._losses([(self.courses[0], items)])[0])

    def _reduce(self, course: Course) -> None:
        """Adds up the gradients of several processes; each has its share of every batch."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in course.adapter.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, "sum")

    # What can go wrong

    def _finite(self, loss: Tensor, drawn: Sequence[tuple[Course, Sequence[tuple[int, int]], int]]) -> None:
        if not math.isfinite(float(loss.detach())):
            raise self._saved("the loss is not a number", drawn)

    def _saved(self, what: str, drawn: Sequence[tuple[Course, Sequence[tuple[int, int]], int]]) -> LearnError:
        """The error to raise, with the batch that did it; the adapters as they were before it are saved."""
        places = [
            course.tasks[task].train[row].where or f"row {row} of {course.tasks[task].name}"
            for course, items, _ in drawn
            for task, row in items
            if row < len(course.tasks[task].train)
        ]
        where = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        kept = ""
        if self.out is not None and self.accelerator.is_main_process:
            for course in self.courses:
                if course.best is not None:
                    course.adapter.load_state(course.best[2])
                course.adapter.form.finish(course.adapter).save(self._folder(course))
            checkpoint.clear(self.out)
            kept = f" The last good adapter is in {self.out}."
        step = max(course.step for course, _, _ in drawn)
        return LearnError(
            f"{what} at step {step + 1}, in the batch with {where}.{kept} Try a lower lr, or look at these rows"
        )

    def _memory(self, rows: int) -> AbstractContextManager[None]:
        more = (
            " and raise accumulate (--accumulate) to keep the effective size, shorten texts with longest (--longest), "
            "use precision='bf16' (--precision bf16)"
        )
        return memory_advice(self.model.device, rows, more)

    # Before and after

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """The base with the learning adapters attached and nothing else trainable; everything is put back afterwards."""
        module = self.model.module
        gradients = [(p, p.requires_grad) for p in module.parameters()]
        modes = [(m, m.training) for m in module.modules()]
        taken = set(self.model.attached)
        with ExitStack() as stack:
            stack.callback(lambda: [m.__dict__.__setitem__("training", mode) for m, mode in modes])
            stack.callback(lambda: [p.requires_grad_(flag) for p, flag in gradients])
            for parameter, _ in gradients:
                parameter.requires_grad_(False)
            for adapter in self.model.adapters.values():
                stack.callback(_flags(adapter))
                adapter.trainable(False)
            for course in self.courses:
                if course.name in taken:
                    course.name = f"{course.name}+learning"
                self.model.attach(course.adapter, course.name)
                stack.callback(self.model.detach, course.name)
                stack.enter_context(course.adapter.form.beside(self.model, course.adapter))
            module.train(self.courses[0].schedule.base_dropout)
            _attach.train_sites(self.model._hub, [course.name for course in self.courses])
            yield

    def _folder(self, course: Course) -> Path:
        assert self.out is not None
        return self.out / course.adapter.name if len(self.courses) > 1 else self.out

    def _finish(self, facts: Mapping[str, Any]) -> None:
        for course in self.courses:
            trained = course.trained
            measured = course.adapter.form.measured(self.model, course.adapter)
            course.adapter = course.adapter.form.finish(course.adapter)
            card = course.adapter.card
            card.metrics = {
                f"dev/{k}": v
                for s in course.scores
                if course.best and s["step"] == course.best[1]
                for k, v in s["dev"].items()
            }
            course.describe(
                card, trained, **facts, signature=self.key, dev=course.scores,
                best_step=course.best[1] if course.best else course.step,
            )  # fmt: skip
            if measured:
                card.training["measured"] = measured
            if course.budget is not None:
                card.training["ranks"] = ranks(course.adapter, course.budget, course.sites, course.controller)
            course.adapter.trainable(False)
            if self.out is not None and self.accelerator.is_main_process:
                course.adapter.save(self._folder(course))
        if self.out is not None and self.accelerator.is_main_process:
            checkpoint.clear(self.out)
        if self.tracker:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()


def _flags(adapter: Adapter) -> Any:
    kept = [(p, p.requires_grad) for p in adapter.parameters()]
    return lambda: [p.requires_grad_(flag) for p, flag in kept]


def _weight(head: Head, row: Row) -> float:
    """What a row counts in the divisor of its batch's loss: 1, or its scored tokens."""
    if head.trunk != "likelihood":
        return 1.0
    return float(sum(len(s) - at for s, at in zip(row.sequences, row.starts, strict=True)))
