"""Concrete masks: what the models' differences share of a mask that makes the merged model sure of its answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.fit import Fit, Plan, Tensors, fits
from polytask.merge.pool import Change, Pool

from .adamerging import AdaMerging, entropy

FILE = "mask.safetensors"
LEAST = 1e-12  # the smallest mean that a mask is divided by; a mask of nothing stays one


@dataclass
class MaskedChange(Change):
    """A change that is multiplied by a mask, the same for all models."""

    mask: Tensor | None = None

    def sum(self, weights: Tensor) -> Tensor:
        total = super().sum(weights)
        return total if self.mask is None else total * self.mask


@fits.register("concrete")
@dataclass(frozen=True)
class Concrete(Fit):
    """``b + sum_i l_i (m * t_i)`` with one mask m for all models: ``m = s / mean(s)`` in each tensor, with
    ``s = sigmoid((x + log u - log(1 - u)) / T)`` and uniform u. The logits x minimise the mean entropy of the answers to
    unlabelled examples, added up over the tasks. At the end one mask is drawn, which is used and written beside the result.

    Args:
        inner: where the coefficients l come from: ``task_arithmetic`` (all are ``start``), or ``adamerging``: in every step one
            step of Adam from ``start`` with m held, and then AdaMerging with the mask that was drawn.
        start: all coefficients at first.
        per: of ``adamerging``: ``tensor`` (a coefficient for each model and tensor) or ``model``.
        temperature: T.
        steps: of Adam on x; 2000 with ``task_arithmetic`` and 1000 with ``adamerging`` when None.
        lr: its learning rate.
        batch_size: examples of each task in a step.
        inner_lr: of Adam's step on the coefficients within a step; its moments persist.
        after: steps of AdaMerging at the end, with its own learning rate.

    With ``Checkpoint("merged/mask.safetensors")`` as each model's companion the rule ``masked`` gives the merged weights again.
    What is masked has no low rank: of LoRAs ask for a dense change (``as_="full"``).

    Reference: Tang et al., Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion,
    arXiv 2312.06173. There the examples are the unlabelled test inputs, and the mask is drawn anew for each evaluation. A mask
    whose mean is zero stays zero here.

    Raises:
        ConfigError: a setting is out of range.
    """

    inner: str = "task_arithmetic"
    start: float = 0.3
    per: str = "tensor"
    temperature: float = 0.5
    steps: int | None = None
    lr: float = 1e-3
    batch_size: int = 16
    inner_lr: float = 1.0
    after: int = 1000

    paper: ClassVar[str] = "arXiv 2312.06173"

    def __post_init__(self) -> None:
        for name, allowed in (("inner", ("task_arithmetic", "adamerging")), ("per", ("tensor", "model"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"concrete: {name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.temperature, bool) or not self.temperature > 0:
            raise ConfigError(f"concrete: temperature must be above 0, got {self.temperature!r}")
        for name, least in (("lr", 0), ("inner_lr", 0), ("batch_size", 1), ("after", 0)):
            self.at_least(name, least)
        if self.steps is not None:
            self.at_least("steps", 0)

    def fit(self, pool: Pool) -> Plan:
        generator = torch.Generator().manual_seed(pool.seed)
        logits = {name: torch.zeros_like(change.base).requires_grad_() for name, change in pool.changes.items()}
        history = self._learn(pool, logits, generator)
        with torch.no_grad():
            mask = drawn(logits, self.temperature, generator)
        weights: list[Any] = [self.start] * len(pool)
        if self.inner == "adamerging":
            last = AdaMerging(self.per, self.start, self.after, batch_size=self.batch_size, clamp=False)
            plan = last.fit(masked(pool, mask))
            weights, history = list(plan.weights or ()), history + plan.about["entropy"]
        held = {name: m.cpu().contiguous() for name, m in mask.items()}
        return self._plan(weights, held, history, len(pool))

    def _plan(self, weights: list[Any], mask: dict[str, Tensor], history: list[float], models: int) -> Plan:
        from safetensors.torch import save

        data = save(mask)
        about = {
            "entropy": history[:: max(1, len(history) // 20)],
            "mask": {"file": FILE, "sha256": hashlib.sha256(data).hexdigest()},
        }
        beside = [Tensors(mask, "mask")] * models
        return Plan("masked", weights, companions=beside, about=about, files={FILE: data})

    def _learn(self, pool: Pool, logits: Mapping[str, Tensor], generator: torch.Generator) -> list[float]:
        """Moves the logits, and says the mean entropy of each step."""
        steps = self.steps if self.steps is not None else 2000 if self.inner == "task_arithmetic" else 1000
        readers = [(reader, reader.batches(self.batch_size, answers=False)) for reader in pool.readers]

        def loss(mask: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]) -> Tensor:
            with pool.acting(masked(pool, mask).compose(coefficients)):
                return torch.stack([entropy(reader.logits(next(batches))).mean() for reader, batches in readers]).sum()

        optimizer = torch.optim.Adam(list(logits.values()), lr=self.lr)
        found = self._coefficients(pool)
        history = []
        for step in range(steps):
            mask = drawn(logits, self.temperature, generator)
            value = loss(mask, found({name: m.detach() for name, m in mask.items()}, loss))
            optimizer.zero_grad()
            value.backward(inputs=list(logits.values()))
            optimizer.step()
            history.append(float(value.detach()) / len(readers))
            if (step + 1) % 50 == 0:
                pool.say(f"concrete: step {step + 1} of {steps}, entropy {history[-1]:.4f}")
        return history

    def _coefficients(self, pool: Pool) -> Callable[..., Mapping[str, Tensor]]:
        """What gives the coefficients of each tensor for a mask that is held."""
        names = list(pool.changes)
        rows = len(names) if self.inner == "adamerging" and self.per == "tensor" else 1
        coefficients = torch.full((rows, len(pool)), self.start, device=pool.model.device, requires_grad=True)
        optimizer = torch.optim.Adam([coefficients], lr=self.inner_lr)

        def named() -> dict[str, Tensor]:
            return {name: coefficients[i if rows > 1 else 0] for i, name in enumerate(names)}

        def found(mask: Mapping[str, Tensor], loss: Callable[..., Tensor]) -> Mapping[str, Tensor]:
            if self.inner == "adamerging":
                with torch.no_grad():
                    coefficients.fill_(self.start)
                optimizer.zero_grad()
                loss(mask, named()).backward(inputs=[coefficients])
                optimizer.step()
            return {name: value.detach() for name, value in named().items()}

        return found


def drawn(logits: Mapping[str, Tensor], temperature: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A relaxed mask for each tensor, of mean 1; gradients reach the logits."""
    made = {}
    for name, x in logits.items():
        u = torch.rand(x.shape, generator=generator).to(x.device)
        soft = torch.sigmoid((x + torch.logit(u, eps=1e-6)) / temperature)
        made[name] = soft / soft.mean().clamp_min(LEAST)
    return made


def masked(pool: Pool, mask: Mapping[str, Tensor]) -> Pool:
    """The pool with every difference multiplied by its tensor's mask."""
    other = copy.copy(pool)
    other.changes = {name: MaskedChange(**vars(change), mask=mask[name]) for name, change in pool.changes.items()}
    return other
