"""A budget that grows a core between the factors by a border of triangular blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.site import Site
from polytask.forms.lora import LoRA

from ..budget import Controller, Room, RoomPatch, budgets
from .increlora import Growth, Rounds


@dataclass(frozen=True)
class Core(Room):
    """Room with a core between the factors, in blocks: the first of one rank, the others of ``by``."""

    by: int = 1

    def patch(self, site: Site) -> CorePatch:
        return CorePatch(self, site)


class CorePatch(RoomPatch):
    """``c(x) = s B (L + U) A x``: L lower and U upper block-triangular, both with the diagonal blocks.

    A starts Kaiming-uniform, B zero, L and U at half the identity; L has noise below its diagonal blocks. What a border of
    new ranks meets is zero on one side at least (B's new columns, U's new columns), so growing changes nothing at once, and
    every entry gets a gradient.
    """

    form: Core

    def __init__(self, form: Core, site: Site) -> None:
        super().__init__(form, site)
        self.L = nn.Parameter(torch.zeros(form.rank, form.rank))
        self.U = nn.Parameter(torch.zeros(form.rank, form.rank))

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        block = self._blocks()
        with torch.no_grad():
            bound = self.A.shape[1] ** -0.5
            self.A.uniform_(-bound, bound, generator=generator)
            self.B.zero_()
            self.L.normal_(std=0.02, generator=generator).mul_(block[:, None] > block)
            for core in (self.L, self.U):
                core.diagonal().fill_(0.5)

    def _blocks(self) -> Tensor:
        """The block of each rank."""
        return (torch.arange(len(self.live), device=self.live.device) + self.form.by - 1) // self.form.by

    @property
    def blocks(self) -> int:
        """How many blocks the live ranks fill, the last one perhaps in part."""
        return int(self._blocks()[self.count - 1]) + 1

    def core(self) -> Tensor:
        """L + U among the live ranks, zero elsewhere, [r, r]."""
        block = self._blocks()
        lower = block[:, None] >= block
        return (self.L * lower + self.U * lower.T) * torch.outer(self.live, self.live)

    def factors(self) -> tuple[Tensor, Tensor, LoRA]:
        return self.core() @ self.A, self.B, self.form


@budgets.register("triangular")
@dataclass(frozen=True)
class Triangular(Growth):
    """Grows ``B (L + U) A`` by borders of ``by`` ranks where the core's norm per block has grown most since the last round.

    The threshold says how many sites grow in a round: ``linear`` as many as the share of the run that is over, of the ranks
    that are left; ``exponential`` that number's power; ``constant`` the same in every round.

    Args:
        threshold: ``linear``, ``exponential`` or ``constant``.

    The others are those of `Growth`.

    Reference: Liang et al., TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
    Fine-Tuning, arXiv 2501.08008. The code that goes with it starts at B = L = U = 0, where every gradient is zero, divides
    by the current rank, and may give too many; here the core starts at the identity, the scale is fixed, the last round
    gives exactly what is left. What is saved is ``(L + U) A`` and B.
    """

    threshold: Literal["linear", "exponential", "constant"] = "linear"

    paper: ClassVar[str] = "arXiv 2501.08008"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("linear", "exponential", "constant")
        self.require(threshold=(self.threshold in kinds, ", ".join(kinds)))

    def form(self, form: LoRA) -> LoRA:
        rank, by = self.room(self.takes(form))
        return Core.around(form, rank, 1, by=by, apart=self.apart)

    def control(self, adapter: Adapter, steps: int, seed: int) -> Controller:
        return Borders(self, adapter, steps, seed)


class Borders(Rounds):
    """Scores sites by the growth of their core."""

    def growing(self, step: int) -> int:
        """How many sites grow in a round."""
        left = self.total - sum(self.ranks().values())
        over = (step - self.warm) / (self.last - self.warm)
        if self.budget.threshold == "constant":
            many = math.ceil((self.total - self.first) / (self.by * len(self.at)))
        elif self.budget.threshold == "linear":
            many = int(left * over)
        else:
            many = int(math.exp(over * math.log(max(1, left))))
        return max(1, min(many, len(self.patches)))

    def allowed(self, step: int) -> int:
        """The total rank that a round may not pass: what the threshold gives, and all in the last round."""
        now = sum(self.ranks().values())
        return self.total if step >= self.at[-1] else min(self.total, now + self.by * self.growing(step))

    def decide(self, step: int) -> None:
        scores: dict[str, float] = {}
        for site, patch in self.patches.items():
            norm = patch.core().norm() / patch.blocks
            scores[site] = float(norm - self.memory.get(f"{site}:norm", torch.zeros_like(norm)))
            self.memory[f"{site}:norm"] = norm
        self.give(scores, self.allowed(step) - sum(self.ranks().values()))
