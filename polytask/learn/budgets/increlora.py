"""Budgets that grow: every site begins with one rank, and those that need more get more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.form import NO_CALL, Bank, Call, Patch
from polytask.core.site import Site
from polytask.forms.lora import LoRA

from ..budget import Budget, Controller, Room, budgets, number
from .adalora import GatedPatch


@dataclass(frozen=True)
class Growing(Room):
    """Room whose next ``reserve`` ranks learn their directions beforehand."""

    reserve: int = 1

    def patch(self, site: Site) -> GrowingPatch:
        return GrowingPatch(self, site)


class GrowingPatch(GatedPatch):
    """Live ranks with trained gates, then the reserve: it adds exactly nothing, but A and B get the gradients that they
    would have with a gate of one."""

    form: Growing
    bank = Bank

    def __init__(self, form: Growing, site: Site) -> None:
        super().__init__(form, site)
        # shared by its bound views: the change of the weight and the loss's gradient for it, and whether ranks still come
        self.__dict__["met"], self.__dict__["open"] = {}, [True]

    def trained(self) -> Tensor:
        if not self.__dict__["open"][0]:
            return self.live
        ahead = torch.arange(len(self.live), device=self.live.device) < self.count + self.form.reserve
        return ahead.to(self.live.dtype)

    def factors(self) -> tuple[Tensor, Tensor, LoRA]:
        return self.A * (self.E * self.live)[:, None], self.B, self.form

    def _waiting(self) -> tuple[Tensor, Tensor]:
        """Factors of the reserve: their product is zero, with the gradient of the product itself."""
        part = slice(self.count, self.count + self.form.reserve)
        A, B = self.A[part], self.B[:, part]
        return torch.cat([A - A.detach(), A.detach()]), torch.cat([B.detach(), B - B.detach()], 1)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if not (torch.is_grad_enabled() and self.A.requires_grad and self.__dict__["open"][0]):
            return super().contribute(x, y, call)
        x = self._drop(x)
        A, B, form = self.factors()
        change = (B @ A) * form.scale  # [o, i]
        seen = change.detach()
        change.register_hook(lambda gradient: self._meet(seen, gradient))
        A2, B2 = self._waiting()
        ahead = F.linear(F.linear(x, A2.to(x.dtype)), B2.to(x.dtype)) * form.scale
        return F.linear(x, change.to(x.dtype)) + ahead

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        return Patch.add(self, x, y, out, weight, call)

    def _meet(self, change: Tensor, gradient: Tensor) -> None:
        met: dict[str, Tensor] = self.__dict__["met"]
        met["change"] = change
        met["gradient"] = met["gradient"] + gradient if "gradient" in met else gradient


@dataclass(frozen=True)
class Growth(Budget):
    """What budgets that grow have in common.

    Args:
        rounds: how many times ranks are given.
        by: ranks given at once; half the average when None.
        most: ranks that a site may have, over the average.
        warm: fraction of the steps before the first round.
        settle: fraction of the steps, at the end, in which the ranks stay.
        apart: weight of the penalty that keeps the directions orthogonal.
    """

    rounds: int = 10
    by: int | None = None
    most: float = 4.0
    warm: float = 0.1
    settle: float = 0.4
    apart: float = 0.1

    def __post_init__(self) -> None:
        self.require(
            rounds=(number(self.rounds, 1, whole=True), "a whole number of at least 1"),
            by=(self.by is None or number(self.by, 1, whole=True), "a whole number of at least 1"),
            most=(number(self.most, 1), "a number of at least 1"),
            warm=(number(self.warm, 0, 1), "a fraction"),
            settle=(number(self.settle, 0, 1), "a fraction"),
            apart=(number(self.apart, 0), "a number of at least 0"),
        )

    def room(self, form: LoRA) -> tuple[int, int]:
        """How many ranks a site has room for, and how many are given at once."""
        return math.ceil(self.most * form.rank), self.by or max(1, form.rank // 2)


@budgets.register("increlora")
@dataclass(frozen=True)
class IncreLoRA(Growth):
    """Grows from one rank per site: in each round the sites whose change matters most to the loss get ``by`` ranks more.

    A site's score is ``sum |dW * dL/d(dW)| / sqrt(size)``, smoothed as in AdaLoRA. Each site has a reserve of ``by`` ranks
    whose directions learn before they count.

    The settings are those of `Growth`.

    Reference: Zhang et al., IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning,
    arXiv 2308.12043. Its code divides by the current rank, so outputs jump when ranks are added, and holds the reserve's
    gates at 1e-5; here the scale is fixed, the reserve adds exactly nothing, new gates are zero, and a round gives what the
    schedule (linear in the rounds) allows and never more. New ranks share the optimiser's step count, without a warm-up of
    their own.
    """

    paper: ClassVar[str] = "arXiv 2308.12043"

    def form(self, form: LoRA) -> LoRA:
        rank, reserve = self.room(self.takes(form))
        return Growing.around(form, rank, 1, reserve=reserve, apart=self.apart)

    def control(self, adapter: Adapter, steps: int, seed: int) -> Controller:
        return Grower(self, adapter, steps, seed)


class Rounds(Controller):
    """Gives ranks in rounds, up to the total and never beyond."""

    def __init__(self, budget: Any, adapter: Adapter, steps: int, seed: int) -> None:
        super().__init__(adapter, steps, seed, budget.warm, budget.settle)
        self.budget = budget
        self.by = budget.by or max(1, self.rank // 2)
        span = self.last - self.warm
        count = min(budget.rounds, span)
        self.at = [self.warm + round(span * (i + 1) / count) for i in range(count)]
        self.first = sum(self.ranks().values())

    def due(self, step: int) -> bool:
        return step in self.at

    def allowed(self, step: int) -> int:
        """The total rank after a step: linear in the rounds."""
        done = sum(at <= step for at in self.at)
        return int(self.first + (self.total - self.first) * done // len(self.at))

    def give(self, scores: dict[str, float], ranks: int) -> None:
        """Gives so many ranks, ``by`` to each site in the order of the scores, and again while some are left."""
        while ranks > 0:
            for site in sorted(scores, key=lambda name: -scores[name]):
                patch = self.patches[site]
                more = min(self.by, ranks, len(patch.live) - patch.count)
                patch.live[patch.count : patch.count + more] = 1.0
                ranks -= more


class Grower(Rounds):
    """Scores sites by what their change does to the loss."""

    def score(self) -> None:
        for site, patch in self.patches.items():
            met = patch.__dict__["met"]
            zero = patch.A.new_zeros(patch.B.shape[0], patch.A.shape[1])
            change, gradient = met.get("change", zero).abs(), met.get("gradient", zero)
            # each process has seen its share of the batch, or nothing
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(change, dist.ReduceOp.MAX)
                dist.all_reduce(gradient)
            value = (change * gradient.abs()).sum() / math.sqrt(change.numel())
            self.memory[f"{site}:score"] = self.smooth(site, value)
            met.clear()

    def resize(self) -> None:
        """No site waits for more once the total is reached: then it is as quick as plain LoRA again."""
        still = sum(self.ranks().values()) < self.total
        for patch in self.patches.values():
            patch.__dict__["open"][0] = still

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.resize()

    def decide(self, step: int) -> None:
        scores = {site: float(self.memory[f"{site}:score"]) for site in self.patches}
        self.give(scores, self.allowed(step) - sum(self.ranks().values()))
