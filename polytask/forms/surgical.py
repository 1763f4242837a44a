"""Surgical fine-tuning: the layers that the task's Fisher information is largest for are tuned, the others stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.core.form import Patch, forms
from polytask.core.site import Site

from .full import FullPatch, Parameters
from .importance import fisher

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model


@forms.register("surgical")
@dataclass(frozen=True)
class Surgical(Parameters):
    """Ordinary fine-tuning of the few layers that matter for a task: ``c(x) = f(x; W + dW) - f(x; W)`` there.

    When learning begins each layer (a block of the network; outside of blocks a single site) is scored by its parameters'
    Fisher information ``E[(d log p(y|x) / dW)^2]``; the ``keep`` best remain in the adapter and learn. Until then it is a
    dense change of all. Starts at zero.

    Args:
        keep: how many layers: a fraction of them, or a whole number of at least 1.
        score: ``"sum"`` of a layer's Fisher information, or ``"norm"``, the sum over its tensors of their Frobenius norms.
        samples: examples that it is measured on.
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.

    Reference: Lodha et al., On Surgical Fine-tuning for Language Encoders, arXiv 2310.17041. The formula is the paper's;
    its code takes gradients of the label's logit and ``"norm"``. As there, a fresh head is not trained before.

    Raises:
        ConfigError: a setting is out of range.
    """

    keep: float = 0.5
    score: Literal["sum", "norm"] = "sum"
    samples: int = 100

    begin_rows: ClassVar[int | None] = 1
    peft_type: ClassVar[str] = "POLYTASK_SURGICAL"
    paper: ClassVar[str] = "arXiv 2310.17041"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.among("score", ("sum", "norm"))
        if not (0.0 < self.keep < 1.0 or (self.keep >= 1 and self.keep == int(self.keep))):
            raise ConfigError(
                f"Surgical: keep must be a fraction between 0 and 1, or a whole number of layers, got {self.keep!r}"
            )
        if self.samples < 1:
            raise ConfigError(f"Surgical: samples must be at least 1, got {self.samples!r}")

    def patch(self, site: Site) -> Patch:
        return FullPatch(self, site)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        scores = self.scores(model, adapter, batches)
        count = int(self.keep) if self.keep >= 1 else max(1, round(self.keep * len(scores)))
        best = sorted(scores, key=lambda layer: -scores[layer])[:count]
        where = layers(model, adapter)
        adapter.patches = {name: patch for name, patch in adapter.patches.items() if where[name] in best}
        adapter.card.notes.append(f"surgical: {len(best)} of {len(scores)} layers are tuned: {', '.join(best)}")

    def scores(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> dict[str, float]:
        """The score of each layer, by its path."""
        where = layers(model, adapter)
        owned = [(where[name], p) for name, patch in adapter.patches.items() for p in patch.parameters()]
        found = fisher([p for _, p in owned], batches[: self.samples])
        totals = dict.fromkeys(where.values(), 0.0)
        for (layer, _), values in zip(owned, found, strict=True):
            totals[layer] += float(values.sum() if self.score == "sum" else torch.linalg.vector_norm(values))
        return totals


def layers(model: Model, adapter: Adapter) -> dict[str, str]:
    """The block that each site of an adapter is in, by path; a site outside of all blocks is its own."""
    blocks = [site.path for site in model.sites if site.kind == "block"]
    found = {}
    for name, patch in adapter.patches.items():
        path = adapter.fit(patch, model).path
        found[name] = next((block for block in blocks if f"{path}.".startswith(f"{block}.")), path)
    return found
