"""Gradient dropout: what a task would unlearn of the base's own judgement is learned only with a probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.head import Head, LinearHead, Out, collate
from polytask.core.model import Model
from polytask.core.rows import Row

from .objectives import Objective


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """How likely a task's gradient is kept beside the gradient of general knowledge, elementwise.

    ``(1 + sign(a) (a + b) / (|a| + |b|)) / 2``: 1 where the signs agree, ``|a| / (|a| + |b|)`` where they do not.
    """
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs()).clamp(min=torch.finfo(a.dtype).tiny)) / 2


class GradientDropout(Objective):
    """The head's loss, with gradients dropped at random where they conflict with what the bare base says.

    Beside the task's gradient ``a`` that of a second loss, ``b``, is computed: the distance between what the head makes
    of the adapted base and of the bare base (cross-entropy to the base's class probabilities for classes, squared else).
    Each entry of ``a`` is kept with the probability `agreement`; ``b`` itself is never applied.

    Args:
        model: the base that learns; pass ``objective=GradientDropout(model)`` to `polytask.learn`.
        level: 1 drops the entry, less only weakens it by that part.
        seed: of the draws.

    Reference: Zheng et al., Regularized Mask Tuning, arXiv 2307.15049, where the base's judgement is that of its text
    encoder (zero-shot) instead of the task's head on bare features.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "gradient-dropout"

    def __init__(self, model: Model, level: float = 1.0, seed: int = 0) -> None:
        if not 0.0 <= level <= 1.0:
            raise ConfigError(f"GradientDropout: level must be between 0 and 1, got {level!r}")
        self.model, self.level = model, level
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, head: Head, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        found = head.loss(out, rows)
        if torch.is_grad_enabled() and found[0].requires_grad:
            self._guard(head, out, rows)
        return found

    def _guard(self, head: Head, out: Out, rows: Sequence[Row]) -> None:
        with torch.no_grad(), self.model.using(None):
            bare = head.run(self.model, collate(self.model, head, rows))
        moving = [
            p
            for adapter in self.model.adapters.values()
            for part in adapter.parts.values()
            for p in part.parameters()
            if p.requires_grad
        ]
        general = torch.autograd.grad(_distance(head, out, bare), moving, retain_graph=True, allow_unused=True)
        for parameter, b in zip(moving, general, strict=True):
            if b is not None:
                self._once(parameter, b)

    def _once(self, parameter: nn.Parameter, b: Tensor) -> None:
        def keep(a: Tensor) -> Tensor:
            handle.remove()
            drawn = torch.rand(a.shape, generator=self.generator).to(a.device)
            return a * ((1 - self.level) + self.level * (agreement(a, b) > drawn))

        handle = parameter.register_hook(keep)


def _distance(head: Head, out: Out, bare: Out) -> Tensor:
    """Mean over rows of how far what is said now is from what the bare base says."""
    if isinstance(out, tuple) or isinstance(bare, tuple):
        return (out[0] - bare[0]).square().mean()
    if isinstance(head, LinearHead):
        now, then = head._logits(out), head._logits(bare).detach()
        if head.task == "classify":
            return F.cross_entropy(now, then.softmax(-1))
        return (now - then).square().mean()
    return (out - bare).square().mean()
