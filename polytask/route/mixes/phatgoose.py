"""PHATGOOSE: each adapter learns, alone and on its own data, which tokens are for it; the gates are compared afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import MixError, listing
from polytask.core.gate import Gate, routers
from polytask.core.gates import VectorGate, VectorRouter
from polytask.core.model import Model
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.learned_gate import learned_gates


@routers.register("phatgoose")
@dataclass(frozen=True)
class PhatGoose(VectorRouter):
    """Scores ``LN(v_n) . LN(x) / sqrt(i)``; the softmax of the best ones weighs the adapters' outputs.

    v_n [i] learns for each site after the adapter, which is frozen then, on the adapter's own task: its contribution is scaled
    by ``sigmoid(v_n . x)``, from v_n = 0. The scaling itself is dropped afterwards. LN has no parameters.

    Args:
        top_k: how many adapters act for a token; all where 0.
        temperature: the scores are divided by it.
        probe: see `VectorRouter`.
        steps: of a gate.
        lr: its learning rate.
        batch_size: examples in a step.

    Reference: Muqeeth et al., Learning to Route Among Specialized Experts for Zero-Shot Generalization, arXiv 2402.05859, with
    batches of 1,024. Its code adds 1e-6 to the sum of the chosen weights, and 1e-5 to the variance of v; ours does not, so that
    one adapter acts as it is and the length of v does not matter.

    Raises:
        MixError: an adapter's task is not given, or a gate is constant, as one that never learned.
    """

    top_k: int = 2
    steps: int = 100
    lr: float = 5e-3
    batch_size: int = 16

    signature: ClassVar[str] = "phatgoose"
    signed_by: ClassVar[tuple[str, ...]] = ("steps", "lr", "batch_size")
    paper: ClassVar[str] = "arXiv 2402.05859"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("steps", 1, whole=True)
        self.at_least("batch_size", 1, whole=True)
        self.at_least("lr", 0.0)

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        if model is None or data is None:
            raise MixError(
                f"{self.name} needs a gate that learned from the adapter's own task; give the base (model=) and the task among "
                "data="
            )
        for site, patch in adapter.patches.items():
            if reason := self.refuses(patch.site, {adapter.name: patch}):
                raise MixError(f"{reason} (at {site!r})")
        return learned_gates(adapter, model, data, steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=seed)

    def fill(self, shared: Any, signs: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().fill(shared, signs)
        lost = [name for name, sites in signs.items() if not any(bool(standard(v).any()) for v in sites.values())]
        if lost:
            raise MixError(
                f"the gates of {listing(lost)} are constant, as before they learn; sign them again with their task"
            )

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return PhatGooseGate(self, site, names)


class PhatGooseGate(VectorGate):
    """LN(v) [N, i]; computed, not trained with the others."""

    def fill(self, signs: Sequence[Tensor]) -> None:
        v = torch.stack([standard(sign) for sign in signs])
        there = v.any(1)
        lost = [name for name, known in zip(self.names, there.tolist(), strict=True) if not known]
        if 0 < len(lost) < len(self.names):  # it would be chosen wherever the others score below zero
            raise MixError(
                f"the gate of {listing(lost)} at {self.site.name!r} is constant, as before it learns, and those of the others "
                "are not; sign it again with its task, or leave that site out of the adapter"
            )
        self.v = nn.Parameter(v, requires_grad=False)

    def read(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]) / math.sqrt(x.shape[-1])


def standard(v: Tensor) -> Tensor:
    """v [i] with mean 0 and variance 1 in fp32; zero where it is constant."""
    v = v.double()
    centred = v - v.mean()
    size = centred.square().mean().sqrt()
    flat = not bool(size > 1e-7 * v.abs().max())
    return torch.zeros_like(v).float() if flat else (centred / size).float()
