"""AdaMerging: coefficients of the differences that make the merged model sure of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.fit import Fit, Plan, fits, per_tensor
from polytask.merge.pool import Pool


@fits.register("adamerging")
@dataclass(frozen=True)
class AdaMerging(Fit):
    """``b + sum_i l_i t_i`` with coefficients that minimise the mean entropy of the answers to unlabelled examples, added up
    over the tasks, each read by its own head. Only the coefficients move.

    Args:
        per: ``tensor`` (a coefficient for each model and tensor) or ``model``.
        start: all coefficients at first.
        steps: of Adam.
        lr: its learning rate.
        batch_size: examples of each task in a step.
        clamp: keep the coefficients within [0, 1]; in the paper's code that is done in the forward, which stops the gradient
            of one that has left. Here they are put back after each step, so they can return.

    Reference: Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, arXiv 2310.02575. There the examples
    are the unlabelled test inputs.

    Raises:
        ConfigError: a setting is out of range.
    """

    per: str = "tensor"
    start: float = 0.3
    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 16
    clamp: bool = True

    paper: ClassVar[str] = "arXiv 2310.02575"

    def __post_init__(self) -> None:
        if self.per not in ("tensor", "model"):
            raise ConfigError(f"adamerging: per must be tensor or model, got {self.per!r}")
        self.at_least("steps", 0)
        self.at_least("batch_size", 1)
        self.at_least("lr", 0)

    def fit(self, pool: Pool) -> Plan:
        names = list(pool.changes)
        rows = len(names) if self.per == "tensor" else 1
        coefficients = torch.full((rows, len(pool)), self.start, device=pool.model.device, requires_grad=True)
        optimizer = torch.optim.Adam([coefficients], lr=self.lr)
        drawn = [(reader, reader.batches(self.batch_size, answers=False)) for reader in pool.readers]
        history = []
        for step in range(self.steps):
            with pool.acting(pool.compose(self._named(names, coefficients))):
                losses = [entropy(reader.logits(next(batches))).mean() for reader, batches in drawn]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward(inputs=[coefficients])
            optimizer.step()
            if self.clamp:
                with torch.no_grad():
                    coefficients.clamp_(0.0, 1.0)
            history.append(float(loss.detach()) / len(drawn))
            if (step + 1) % 50 == 0:
                pool.say(f"adamerging: step {step + 1} of {self.steps}, entropy {history[-1]:.4f}")
        found = self._named(names, coefficients.detach())
        return Plan(
            "task_arithmetic", per_tensor(found, len(pool)), about={"entropy": history[:: max(1, len(history) // 20)]}
        )

    @staticmethod
    def _named(names: list[str], coefficients: Tensor) -> dict[str, Tensor]:
        return {name: coefficients[i if len(coefficients) > 1 else 0] for i, name in enumerate(names)}


def entropy(logits: Tensor) -> Tensor:
    """Of the answers, [B] in nats, from logits [B, C]; -inf is no answer."""
    logs = logits.log_softmax(-1)
    there = logs > -torch.inf
    return -(logs.exp() * logs.masked_fill(~there, 0.0)).sum(-1)
