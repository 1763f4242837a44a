"""LoRAMoE: LoRA experts in two groups, and a loss that lets each group take the kinds of task that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.balance import in_rows, variation
from polytask.core.errors import ConfigError, MixError, listing, nearest
from polytask.core.form import Call, Part
from polytask.core.gate import Gate, Router, routers
from polytask.core.site import Site

from .molora import BalancedGate, MoLoRA


@routers.register("loramoe")
@dataclass(frozen=True)
class LoRAMoE(MoLoRA):
    """All experts act, weighed by ``softmax(W x)`` with a W of its own at each site; a loss keeps them in use, in two groups.

    At each site ``balance Var(Z) / Mean(Z)^2`` over all experts and rows is added to a step's loss: ``Z = I * Q``, where Q is
    the weight that an expert has in a row, summed over its real tokens, and I is ``1 - delta`` where the expert's group is the
    row's, and ``1 + delta`` where it is the other one. The loss is least where Q goes as 1 / I, so that the row's own group has
    ``(1 + delta) / 2`` of it.

    Args:
        top_k: how many experts act for a token; all where 0, as in the paper.
        temperature: the scores are divided by it.
        deviation: of a normal distribution that W starts from; uniform within ``i^-1/2`` where 0.
        balance: beta.
        delta: how far the groups differ.
        groups: task to its group, 0 (the first half of the experts) or 1 (the others). Rows of other tasks have none: I = 1.

    Reference: Dou et al., LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model
    Alignment, arXiv 2312.09979. There I is ``1 + delta`` at the row's own group, which by the same loss gets the smaller share of
    it; ours is turned round, so that groups do what their names say. Its code counts padding; ours does not.

    Raises:
        ConfigError: a setting is out of range, or a group is of no task that is learned.
        MixError: groups, and an odd number of experts.
    """

    deviation: float = 0.0
    balance: float = 0.1
    delta: float = 0.1
    groups: Mapping[str, int] = field(default_factory=dict)

    paper: ClassVar[str] = "arXiv 2312.09979"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("delta", 0.0)
        if self.delta >= 1.0:
            raise ConfigError(f"{self.name}: delta must be below 1, got {self.delta!r}")
        odd = {task: group for task, group in self.groups.items() if group not in (0, 1)}
        if odd:
            raise ConfigError(f"{self.name}: groups must say 0 or 1 for each task, got {odd!r}")

    def told(self, tasks: Sequence[str]) -> Router:
        unknown = [task for task in self.groups if task not in tasks]
        if unknown:
            raise ConfigError(
                f"{self.name}: groups has {listing(unknown)}, which is not learned{nearest(unknown[0], tasks)}; the tasks are "
                f"{listing(tasks)}"
            )
        return self

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return GroupedGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        if self.groups and len(names) % 2:
            raise MixError(
                f"{self.name}: {len(names)} experts cannot be halved into two groups; give an even number, or no groups"
            )
        return super().shared(sites, names)

    def uneven(self, gate: Gate, scores: Tensor, call: Call) -> Tensor:
        given, there = in_rows(gate.site, (scores / self.temperature).softmax(-1), call)
        Q = (given * there[..., None]).sum(1)  # [B, N]
        return variation(self.importance(gate, len(Q), call).to(Q.device) * Q)

    def importance(self, gate: Gate, rows: int, call: Call) -> Tensor:
        """I [B, N]."""
        tasks = call.tasks if call.tasks is not None and len(call.tasks) == rows else ()
        half = len(gate.shared.names) / 2
        own = torch.tensor([int(gate.shared.names.index(name) >= half) for name in gate.names])
        kinds = torch.tensor([self.groups.get(task, -1) for task in tasks or [""] * rows])[:, None]
        signed = torch.where(kinds < 0, 0.0, torch.where(kinds == own, -1.0, 1.0))
        return 1.0 + self.delta * signed


class GroupedGate(BalancedGate):
    """W [N, i], uniform at the start unless a deviation is said."""

    def start(self, generator: torch.Generator) -> None:
        if self.router.deviation:
            super().start(generator)
            return
        bound: Any = self.site.d_in**-0.5
        with torch.no_grad():
            self.W.uniform_(-bound, bound, generator=generator)
