"""PCB-merging: parameters compete within a task and between tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError
from polytask.merge.rule import Block, Rule, rules
from polytask.merge.select import find, lower, number, upper

from .elect import within


@dataclass(frozen=True)
class Place:
    """A number of a known rank, of which the upper bits are known, or all."""

    bucket: int
    rank: int
    value: float | None = None


@rules.register("pcb")
@dataclass(frozen=True)
class Pcb(Rule):
    """Weighs each entry by how it competes, drops all but the top share of each task, and adds the weighted mean:
    ``b + scale * sum_i w_i c_i a_i / sum_i c_i``, ``c_i`` the scores ``exp(N norm(|a_i|)^2) tanh(t_i sum_j t_j)``, cut at their
    (1 - density) quantile and brought to 0 to 1, ``a_i`` the difference with sizes clamped to its quantiles, N tasks, ``norm``
    to 0 to 1.

    Args:
        density: the share of each task's entries that is kept (of the whole vector; the one at the quantile weighs nothing).
        clamp: the share of sizes at either end that is clamped.
        scale: lambda.

    Reference: Du et al., Parameter competition balancing, arXiv 2410.02396, as its code computes it. Where all of a task's kept
    scores are equal they count as 1. The products of differences make the result depend on their size.

    Raises:
        ConfigError: a share outside 0 to 1.
        MergeError: entries that are not finite numbers.
    """

    density: float = 0.1
    clamp: float = 0.0001
    scale: float = 1.0

    surveys: ClassVar[int] = 4
    paper: ClassVar[str] = "arXiv 2410.02396"
    exceptions: ClassVar[dict[str, str]] = {
        "alone": "nine tenths of a difference are dropped",
        "equal": "nine tenths of a difference are dropped",
    }

    def __post_init__(self) -> None:
        within(self.name, "density", self.density)
        within(self.name, "clamp", self.clamp)
        if self.clamp >= 0.5:
            raise ConfigError(f"clamp of {self.name} must be below 0.5, got {self.clamp}; it is cut from both ends")

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        deltas = block.deltas
        out, divisor = torch.zeros_like(block.base), torch.zeros_like(block.base)
        for model, score in enumerate(self._scores(deltas, block.facts)):
            low, high, cut, top = (place.value for place in block.facts[model])
            chosen = (score >= cut).float() if top == cut else score.sub_(cut).clamp_min_(0).div_(top - cut)
            divisor.add_(chosen)
            clamped = deltas[model].abs().clamp_(low, high).mul_(deltas[model].sign())
            out.add_(chosen.mul_(clamped), alpha=block.weights[model])
        return out.div_(divisor.clamp_min_(1e-12)).mul_(self.scale).add_(block.base)

    def _scores(self, deltas: list[Tensor], facts: Any) -> Iterable[Tensor]:
        """How each task's entries compete, one task after the other."""
        whole = torch.stack(deltas).sum(0)
        for delta, (low, high, *_) in zip(deltas, facts, strict=True):
            sizes = delta.abs().clamp_(low.value, high.value).sub_(low.value)
            inner = sizes.div_(high.value - low.value) if high.value > low.value else sizes
            yield inner.square_().mul_(len(deltas)).exp_().mul_(torch.tanh(delta * whole))

    def survey(self, step: int, block: Block) -> Any:
        deltas = block.deltas
        for delta, model in zip(deltas, block.models, strict=True) if step == 0 else ():
            if not bool(torch.isfinite(delta).all()):  # clamping would hide them
                raise MergeError(
                    f"{block.name} of {model} has entries that are not finite numbers; a merge would hide them"
                )
        numbers = [delta.abs() for delta in deltas] if step < 2 else self._scores(deltas, block.facts)
        if step % 2 == 0:
            return [[upper(x)] for x in numbers]
        asked = slice(0, 2) if step == 1 else slice(2, 4)
        return [
            [lower(x, place.bucket) for place in places[asked]] for x, places in zip(numbers, block.facts, strict=True)
        ]

    def settle(self, step: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        counts: list[list[Tensor]] = []
        for _, said in found:
            counts = counts or [[torch.zeros_like(seen) for seen in own] for own in said]
            for held, own in zip(counts, said, strict=True):
                for a, b in zip(held, own, strict=True):
                    a.add_(b)
        if step % 2 == 0:
            placed = []
            for (seen,) in counts:
                count = int(seen.sum())
                ends = (
                    (count * self.clamp, count * (1 - self.clamp) - 1)
                    if step == 0
                    else (count * (1 - self.density), count - 1)
                )
                ranks = [min(max(int(end), 0), count - 1) for end in ends]
                placed.append([Place(*find(seen, rank)) for rank in ranks])
            return placed if step == 0 else [[*old, *new] for old, new in zip(facts, placed, strict=True)]
        known = []
        for places, lows in zip(facts, counts, strict=True):
            new = [
                Place(place.bucket, place.rank, number(place.bucket, find(low, place.rank)[0]))
                for place, low in zip(places[-2:], lows, strict=True)
            ]
            known.append([*places[:-2], *new])
        return known
