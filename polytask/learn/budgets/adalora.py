"""Budgets that prune: every site begins with more ranks than the average, and the least important ones go."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.site import Site
from polytask.forms.lora import LoRA

from ..budget import Budget, Controller, Room, RoomPatch, budgets, number


@dataclass(frozen=True)
class Gated(Room):
    """Room with a gate for each rank: ``c(x) = s B diag(E) A x``."""

    def patch(self, site: Site) -> GatedPatch:
        return GatedPatch(self, site)


class GatedPatch(RoomPatch):
    """A and B normal with deviation 0.02, E zero; the gate of a rank that is not live is zero."""

    def __init__(self, form: Room, site: Site) -> None:
        super().__init__(form, site)
        self.E = nn.Parameter(torch.zeros(form.rank))

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        with torch.no_grad():
            self.A.normal_(std=0.02, generator=generator)
            self.B.normal_(std=0.02, generator=generator)
            self.E.zero_()

    def factors(self) -> tuple[Tensor, Tensor, LoRA]:
        return self.A * self.E[:, None], self.B, self.form


@budgets.register("adalora")
@dataclass(frozen=True)
class AdaLoRA(Budget):
    """Prunes singular triplets by importance along a cubic schedule: ``B diag(E) A`` with more ranks at first.

    The importance of an entry is ``|w * gradient|``, smoothed, times its smoothed uncertainty; of a rank, that of its gate
    plus the means of its row of A and column of B.

    Args:
        over: ranks at the start over the average in the end.
        warm: fraction of the steps before the first is pruned.
        settle: fraction of the steps, at the end, in which the ranks stay.
        every: steps between two decisions.
        apart: weight of the penalty that keeps the directions orthogonal.

    Reference: Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512. Where its code
    lets pruned gates grow between two decisions, here they are zero in every forward, and exactly as many ranks live as the
    schedule says; ties go to the earlier site. A pruned rank still gets a score and may return. The scale is LoRA's own.
    """

    over: float = 1.5
    warm: float = 0.1
    settle: float = 0.4
    every: int = 1
    apart: float = 0.1

    paper: ClassVar[str] = "arXiv 2303.10512"

    def __post_init__(self) -> None:
        self.require(
            over=(number(self.over, 1), "a number of at least 1"),
            warm=(number(self.warm, 0, 1), "a fraction"),
            settle=(number(self.settle, 0, 1), "a fraction"),
            every=(number(self.every, 1, whole=True), "a whole number of at least 1"),
            apart=(number(self.apart, 0), "a number of at least 0"),
        )

    def form(self, form: LoRA) -> LoRA:
        rank = math.ceil(self.over * form.rank)
        return Gated.around(self.takes(form), rank, rank, apart=self.apart)

    def control(self, adapter: Adapter, steps: int, seed: int) -> Controller:
        return Pruner(self, adapter, steps, seed)


@budgets.register("sample")
@dataclass(frozen=True)
class Sample(AdaLoRA):
    """AdaLoRA with chance: at each decision some important ranks give way to as many pruned ones, whose gates come back.

    Args:
        over: ranks at the start over the average in the end.
        warm: fraction of the steps before the first is pruned.
        settle: fraction of the steps, at the end, in which the ranks stay.
        every: steps between two decisions.
        apart: weight of the penalty that keeps the directions orthogonal.
        chance: probability of each rank to be taken for the exchange; with 0 it is AdaLoRA, bit for bit.

    Reference: Zhan et al., Efficient and Scalable Fine-Tune of Language Models for Genome Understanding (Lingo),
    arXiv 2402.08075. Its code prunes and keeps each rank on its own, which does not hold the budget; here as many come in as
    go out. The last decision leaves nothing to chance.
    """

    chance: float = 0.1

    paper: ClassVar[str] = "arXiv 2402.08075"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(chance=(number(self.chance, 0, 1), "a probability"))


class Pruner(Controller):
    """Keeps the ranks of the highest importance over all sites."""

    def __init__(self, budget: AdaLoRA, adapter: Adapter, steps: int, seed: int) -> None:
        super().__init__(adapter, steps, seed, budget.warm, budget.settle)
        self.budget = budget
        self.first = sum(self.ranks().values())
        self.scores: dict[str, Tensor] = {}

    def allowed(self, step: int) -> int:
        """The total rank after a step."""
        if step <= self.warm:
            return self.first
        left = max(0.0, 1 - (step - self.warm) / (self.last - self.warm))
        return self.total + int((self.first - self.total) * left**3)

    def due(self, step: int) -> bool:
        return super().due(step) and (step == self.last or (step - self.warm) % self.budget.every == 0)

    def score(self) -> None:
        for site, patch in self.patches.items():
            found = {}
            for name in ("A", "B", "E"):
                value = getattr(patch, name)
                gradient = torch.zeros_like(value) if value.grad is None else value.grad
                found[name] = self.smooth(f"{site}:{name}", (value * gradient).abs())
            self.scores[site] = found["E"] + found["A"].mean(1) + found["B"].mean(0)

    def decide(self, step: int) -> None:
        order = torch.cat(list(self.scores.values())).argsort(descending=True, stable=True)
        live = torch.zeros_like(order, dtype=torch.bool)
        live[order[: self.allowed(step)]] = True
        back = self._exchange(live, step)
        for (site, patch), on, returned in zip(self.patches.items(), self._by_site(live), back, strict=True):
            kept = self.memory.setdefault(f"{site}:kept", torch.zeros_like(patch.E))
            was = patch.live.bool()
            gone = was & ~on
            kept[gone] = patch.E[gone]
            patch.E[returned & ~was] = kept[returned & ~was]
            patch.live.copy_(on)

    def resize(self) -> None:
        for patch in self.patches.values():
            patch.E.mul_(patch.live)

    def _by_site(self, values: Tensor) -> list[Tensor]:
        return list(values.split([len(patch.E) for patch in self.patches.values()]))

    def _exchange(self, live: Tensor, step: int) -> list[Tensor]:
        """Swaps some live ranks for as many others, in place; returns which came in by it, by site."""
        came = torch.zeros_like(live)
        chance = getattr(self.budget, "chance", 0.0)
        if chance and step < self.last:
            digest = hashlib.blake2b(f"{self.seed}:{step}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            drawn = (torch.rand(len(live), generator=generator) < chance).to(live.device)
            shuffled = torch.randperm(len(live), generator=generator).to(live.device)
            out, into = (shuffled[(drawn & side)[shuffled]] for side in (live, ~live))
            many = min(len(out), len(into))
            came[into[:many]] = True
            live[out[:many]] = False
            live[into[:many]] = True
        return self._by_site(came)
