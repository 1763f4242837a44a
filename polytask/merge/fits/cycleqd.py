"""CycleQD: models evolve by merging; each task in turn is what is wanted, and the other tasks say how a model differs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError
from polytask.core.metrics import choose_metric
from polytask.merge.changed import adapter_of
from polytask.merge.evolved import Evolved, Space, of_inputs
from polytask.merge.fit import Fit, fits
from polytask.merge.fits.twin import own_readers
from polytask.merge.pool import Pool, Reader

LARGEST = 10**6  # cells of an archive


@fits.register("cycleqd")
@dataclass(frozen=True)
class CycleQD(Fit):
    """An archive for each task, in whose cells, bins of the *other* tasks' scores, the best model on the task is kept.
    Generations take the tasks in turn: two elites of the task's archive are crossed, ``t = (w_1 t_1 + w_2 t_2) / (w_1 + w_2)``
    with ``w ~ N(1, spread)``; the child is mutated in the singular directions of the task's own expert,
    ``W + U diag(u * S) V`` with ``u ~ U[0, mutation)``; scored on all tasks and offered to all archives. At the end
    ``t = sum_k softmax(q / temperature)_k t_k`` of each archive's best, q its quality. It is a `polytask.merge.evolved.Evolved`.

    Args:
        generations: children that are made.
        bins: of each other task's scores, from the lowest of the experts' (or 0) to the highest.
        spread: the deviation of the weights of a crossing.
        mutation: the largest addition to a singular value, as a share of it. Only matrices are mutated.
        sampler: ``elite``, in proportion to the product of an elite's quality and coordinates, each brought into [.5,
            ``favour``] over the archive; or ``uniform``.
        favour: how likely the highest is; .8 as in the paper, 1.3 as in its code.
        examples: of each task that are scored at most, drawn once; 0 for all.
        temperature: of the weights at the end.

    Reference: Kuroki et al., Agent Skill Acquisition for Large Language Models via CycleQD, arXiv 2410.14735, with 15 bins and
    1200 generations; its code has no aggregation, so here it follows the paper's idea. Archives are pyribs' grids. Scores where
    less is better are turned round.

    Raises:
        ConfigError: a setting is out of range, or pyribs is not installed.
        MergeError: two models were tuned for one task, or the archives would have too many cells.
    """

    generations: int = 300
    bins: int = 15
    spread: float = 0.01
    mutation: float = 0.1
    sampler: str = "elite"
    favour: float = 0.8
    examples: int = 100
    temperature: float = 1.0

    labels: ClassVar[bool] = True
    gives: ClassVar[Literal["model", "adapter", "parts"]] = "parts"
    paper: ClassVar[str] = "arXiv 2410.14735"
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("generations", "spread", "mutation", "examples"):
            self.at_least(name, 0)
        self.at_least("bins", 1)
        self.at_least("favour", 0.5)
        if self.sampler not in ("elite", "uniform"):
            raise ConfigError(f"cycleqd: sampler must be elite or uniform, got {self.sampler!r}")
        if not self.temperature > 0:
            raise ConfigError(f"cycleqd: temperature must be above 0, got {self.temperature!r}")

    def fit(self, pool: Pool) -> Evolved:
        _ribs()
        readers = [self._drawn(reader, pool.seed) for reader in own_readers(pool)]
        if self.bins ** (len(readers) - 1) > LARGEST:
            raise MergeError(
                f"cycleqd: archives for {len(readers)} tasks with {self.bins} bins have more than {LARGEST:,} cells; take fewer "
                "bins (bins=)"
            )
        run = Run(pool, Space(pool), readers, self)
        for i in range(len(pool)):
            run.offer(run.space.seed(i), Individual(i, -1, i, (), (), None))
        for generation in range(self.generations):
            run.step(generation)
            if (generation + 1) % 20 == 0:
                best = ", ".join(f"{a.best()[1]:.3f}" for a in run.archives)
                pool.say(f"cycleqd: generation {generation + 1} of {self.generations}, the best on each task {best}")
        return self._found(pool, run)

    def _found(self, pool: Pool, run: Run) -> Evolved:
        genome, shares = aggregate([run.genomes[a.best()[0]] for a in run.archives], [a.best()[1] for a in run.archives],
                                   self.temperature)  # fmt: skip
        names = [reader.task.name for reader in run.readers]
        about = {
            "method": self.name, "paper": self.paper, **asdict(self), "seed": pool.seed, "models": list(pool.names),
            "tasks": names,
            "final": {
                "elites": {name: archive.best()[0] for name, archive in zip(names, run.archives, strict=True)},
                "weights": dict(zip(names, shares, strict=True)),
                "scores": dict(zip(names, run.scores(genome), strict=True)),
            },
        }  # fmt: skip
        heads, tasks = of_inputs(pool.inputs)
        parents = [item.hash for item in pool.inputs if isinstance(item, Adapter)]
        adapter = adapter_of(
            pool.model, run.space.patches(genome), "cycleqd", heads=heads, tasks=tasks, parents=parents, about=about
        )
        archives = [archive.as_dict(names) for archive in run.archives]
        lineage = [individual.as_dict(names) for individual in run.born]
        return Evolved(adapter, genome, dict(run.genomes), archives, lineage, about)

    def _drawn(self, reader: Reader, seed: int) -> Reader:
        """A reader of some of the examples."""
        made = copy.copy(reader)
        if self.examples and len(reader.examples) > self.examples:
            chosen = np.random.default_rng([seed, 1]).permutation(len(reader.examples))[: self.examples]
            made.examples, made._rows = [reader.examples[i] for i in sorted(chosen.tolist())], {}
        return made


@dataclass
class Individual:
    """Where a model comes from.

    Attributes:
        number: of the individual.
        generation: -1 for the experts.
        task: which was wanted; for experts their own.
        parents: their numbers.
        weights: of the parents.
        mutation: the expert along whose directions it was mutated.
        scores: on all tasks; higher is better.
    """

    number: int
    generation: int
    task: int
    parents: tuple[int, ...]
    weights: tuple[float, ...]
    mutation: int | None
    scores: tuple[float, ...] = ()

    def as_dict(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Plain values."""
        said = asdict(self)
        said |= {"parents": list(self.parents), "weights": list(self.weights), "task": tasks[self.task]}
        return said | {"scores": dict(zip(tasks, self.scores, strict=True))}


class Run:
    """An evolution that is under way.

    Attributes:
        archives: one for each task.
        genomes: of the elites, by number: others are forgotten.
        born: every individual.
    """

    def __init__(self, pool: Pool, space: Space, readers: Sequence[Reader], method: CycleQD) -> None:
        self.pool, self.space, self.readers, self.method = pool, space, list(readers), method
        self.genomes: dict[int, Tensor] = {}
        self.born: list[Individual] = []
        self.signs = [1.0 if choose_metric(r.task.kind, r.task.metric).higher_is_better else -1.0 for r in readers]
        experts = np.array([self.scores(space.seed(i)) for i in range(len(pool))])  # [N, T]
        if not np.isfinite(experts).all():
            raise MergeError(
                f"the experts score {experts.tolist()}, of which some is no finite number; look at the tasks and their metrics"
            )
        low, high = np.minimum(0.0, experts.min(0)), experts.max(0)
        high = np.where(high > low, high, low + 1.0)
        self.archives = [Archive(task, low, high, method.bins) for task in range(len(readers))]

    def scores(self, genome: Tensor) -> tuple[float, ...]:
        """Of a genome's model on all tasks."""
        with self.pool.acting(self.space.compose(genome)):
            return tuple(sign * reader.score() for sign, reader in zip(self.signs, self.readers, strict=True))

    def step(self, generation: int) -> None:
        """One child."""
        task = generation % len(self.archives)
        rng = np.random.default_rng([self.pool.seed, 2, generation])  # of a generation alone, whatever came before it
        parents = self.archives[task].draw(rng, self.method)
        weights = rng.normal(1.0, self.method.spread, len(parents))
        child = crossed([self.genomes[number] for number in parents], weights.tolist())
        own = self.space.own[task]
        child[own] += torch.from_numpy(rng.random(own.stop - own.start) * self.method.mutation).float()
        mutation = task if self.method.mutation else None
        self.offer(child, Individual(len(self.born), generation, task, parents, tuple(weights.tolist()), mutation))

    def offer(self, genome: Tensor, individual: Individual) -> None:
        """Scores a genome and offers it to every archive."""
        individual.scores = self.scores(genome)
        self.born.append(individual)
        finite = np.isfinite(individual.scores).all()  # a model that has come to nothing is not kept
        taken = [archive.add(individual) for archive in self.archives] if finite else []
        if any(taken):
            self.genomes[individual.number] = genome
            kept = {elite for archive in self.archives for elite in archive.numbers}
            self.genomes = {number: g for number, g in self.genomes.items() if number in kept}


class Archive:
    """A task's grid: pyribs' `GridArchive`, whose solutions are the individuals' numbers.

    Args:
        task: whose scores are the quality.
        low: the grid's lower ends, for all tasks.
        high: its upper ends.
        bins: of each other task.
    """

    def __init__(self, task: int, low: np.ndarray, high: np.ndarray, bins: int) -> None:
        self.task, self.others = task, [t for t in range(len(low)) if t != task]
        self.low, self.high, self.bins = low, high, bins
        ranges = [(float(low[t]), float(high[t])) for t in self.others]
        self.grid = _ribs()(solution_dim=1, dims=[bins] * len(ranges), ranges=ranges)

    def add(self, individual: Individual) -> bool:
        """Keeps an individual where its cell is empty or its quality strictly higher. Whether it was kept."""
        scores = np.array(individual.scores)
        found = self.grid.add_single([float(individual.number)], scores[self.task], scores[self.others])
        return bool(found["status"])

    @property
    def numbers(self) -> list[int]:
        """Of the elites."""
        return [int(number) for number in self.grid.data("solution")[:, 0]]

    @property
    def cells(self) -> np.ndarray:
        """Of the elites, [E, T - 1]."""
        found: np.ndarray = self.grid.int_to_grid_index(self.grid.data("index"))
        return found

    def best(self) -> tuple[int, float]:
        """The number and quality of the best elite, the first of several."""
        pairs = sorted(zip(self.numbers, self.grid.data("objective").tolist(), strict=True))
        return max(pairs, key=lambda pair: pair[1])

    def chances(self, method: CycleQD) -> np.ndarray:
        """How likely each elite is to be drawn."""
        values = np.column_stack([self.grid.data("objective"), self.cells])
        if method.sampler == "uniform":
            return np.full(len(values), 1 / len(values))
        low, span = values.min(0), np.ptp(values, 0)
        scaled = 0.5 + (method.favour - 0.5) * (values - low) / np.where(span > 0, span, 1.0)
        product = np.where(span > 0, scaled, 1.0).prod(1)
        found: np.ndarray = product / product.sum()
        return found

    def draw(self, rng: np.random.Generator, method: CycleQD) -> tuple[int, ...]:
        """Two parents, different ones where there are two."""
        numbers = self.numbers
        order = np.argsort(numbers)
        picks = rng.choice(order, 2, replace=len(numbers) < 2, p=self.chances(method)[order])
        return tuple(numbers[i] for i in picks)

    def as_dict(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Plain values: the grid, and of each cell that is filled its place, quality and individual."""
        cells, qualities = self.cells.tolist(), self.grid.data("objective").tolist()
        rows = sorted(zip(cells, qualities, self.numbers, strict=True))
        return {
            "task": tasks[self.task], "axes": [tasks[t] for t in self.others], "bins": self.bins,
            "low": self.low[self.others].tolist(), "high": self.high[self.others].tolist(),
            "cells": [{"cell": cell, "quality": quality, "individual": number} for cell, quality, number in rows],
        }  # fmt: skip


def crossed(genomes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i g_i / sum_i w_i``."""
    total = sum(weights)
    return (
        torch.stack([genome.double() * (w / total) for genome, w in zip(genomes, weights, strict=True)]).sum(0).float()
    )


def aggregate(genomes: Sequence[Tensor], qualities: Sequence[float], temperature: float) -> tuple[Tensor, list[float]]:
    """The genomes' mean with weights ``softmax(quality / temperature)``, and the weights."""
    shares = (torch.tensor(qualities, dtype=torch.float64) / temperature).softmax(0).tolist()
    return crossed(genomes, shares), shares


def _ribs() -> Any:
    try:
        from ribs.archives import GridArchive
    except ImportError:
        raise ConfigError("cycleqd keeps its archives with pyribs; install it: pip install 'polytask[merge]'") from None
    return GridArchive
