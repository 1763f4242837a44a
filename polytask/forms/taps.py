"""TAPS: a dense change per layer behind a learned switch, so that training says which layers a task needs for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError
from polytask.core.form import Patch, forms
from polytask.core.site import Site

from .full import FullPatch, Parameters

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter


@forms.register("taps")
@dataclass(frozen=True)
class TAPS(Parameters):
    """A layer's own change where its learned score is high enough: ``W' = W + 1[s >= threshold] dW``.

    Layers start active with a change of zero, so it starts as the base; a penalty on the scores turns off those whose
    change earns little, and the change of a layer that is off is not stored. The score's gradient is that of a factor of
    ``dW`` (straight through), so a layer that is off can come back.

    Args:
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.
        penalty_rate: lambda of the penalty ``lambda * mean |s|`` over the sites; more of it leaves fewer layers active.
        threshold: the score from which a layer is active.
        start_at: the score that layers start with.

    Reference: Wallingford et al., Task Adaptive Parameter Sharing for Multi-Task Learning, arXiv 2203.16708. There the
    penalty sets in after two epochs; here it acts from the first step, and with AdamW a score moves by at most about the
    learning rate per step: bring ``start_at`` closer to ``threshold`` for short runs.

    Raises:
        ConfigError: a setting is out of range.
    """

    penalty_rate: float = 0.1
    threshold: float = 0.1
    start_at: float = 0.15

    default_lr: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "POLYTASK_TAPS"
    paper: ClassVar[str] = "arXiv 2203.16708"
    tensor_names: ClassVar[dict[str, str]] = {**Parameters.tensor_names, "taps.score": "score"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty_rate < 0:
            raise ConfigError(f"TAPS: penalty_rate must not be negative, got {self.penalty_rate!r}")
        if not 0.0 <= self.threshold <= self.start_at:
            raise ConfigError(
                "TAPS: threshold must not be negative, and start_at must be at least threshold (or nothing learns), got "
                f"threshold={self.threshold!r} and start_at={self.start_at!r}"
            )

    def patch(self, site: Site) -> Patch:
        return TAPSPatch(self, site)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        scores = [patch.score for patch in adapter.patches.values() if isinstance(patch, TAPSPatch)]
        return self.penalty_rate * torch.stack(scores).abs().mean() if self.penalty_rate else None


class TAPSPatch(FullPatch):
    """A dense change of each parameter of the module, and one score."""

    form: Any

    def __init__(self, form: TAPS, site: Site) -> None:
        super().__init__(form, site)
        self.changes = tuple(self._parameters)
        self.score = nn.Parameter(torch.tensor(form.start_at))
        self.keys = {**self.keys, "score": "taps.score"}
        self.packs = (*self.changes, "score")

    @property
    def active(self) -> bool:
        """Whether the layer has a change of its own."""
        return bool(self.score >= self.form.threshold)

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        with torch.no_grad():
            self.score.fill_(self.form.start_at)

    def deltas(self) -> dict[str, Tensor]:
        score = self.score
        switch = (score >= self.form.threshold).to(score.dtype) + (score - score.detach())  # exactly 0 or 1
        return {self.site.param or name: switch * self._parameters[name] for name in self.changes}  # type: ignore[operator]

    def stored(self) -> dict[str, Tensor]:
        found = super().stored()
        return found if self.active else {"score": found["score"]}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        off = "score" in tensors and bool((tensors["score"] < self.form.threshold).all())
        absent = {name: torch.zeros(self._parameters[name].shape) for name in self.changes} if off else {}  # type: ignore[union-attr]
        super().load({**absent, **tensors})
