"""Whole rows to the adapters whose tasks are nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, listing
from polytask.core.form import Call
from polytask.core.gate import routers
from polytask.core.gates import RowShared
from polytask.core.hub import Hub
from polytask.core.model import Model
from polytask.core.reading import means_of
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.by_data import Kept, centroids, vectors
from polytask.route.by_text import TextRouter

ALLOWED = {"by": ("data", "text"), "to": ("centroid", "examples"), "weights": ("uniform", "softmax")}


@routers.register("nearest")
@dataclass(frozen=True)
class Nearest(TextRouter):
    """Scores each row by its cosine with an adapter's task, the same at all sites; the best ``top_k`` act.

    By ``data`` the bare base reads the row first: the mean over its tokens of the last hidden states against that of the
    adapter's data. By ``text`` the text of the row, or of its task, against that of the adapter's task (see `TextRouter`). The
    scores of the last forward are ``mix.shared.scores`` [B, N].

    Args:
        top_k: how many adapters act for a row; all where 0.
        by: ``data`` or ``text``.
        to: of data: their ``centroid``, or the nearest of the ``examples``.
        examples: of each adapter's data, at most, where the nearest counts.
        weights: of the chosen: ``uniform`` or ``softmax``.
        temperature: the scores are divided by it, for the softmax.

    Reference: Zhao et al., LoraRetriever, arXiv 2402.09997, by centroids of a trained sentence encoder, with 1/k each; and the
    retrieval that Muqeeth et al., arXiv 2402.05859, compare with: the nearest of 1,000 examples. Both embed with a model of
    its own; ours with the base, or with the embedder given for texts.

    Raises:
        MixError: an adapter's data are not given, or a row has no text.
    """

    top_k: int = 1
    by: str = "data"
    to: str = "centroid"
    examples: int = 64
    weights: str = "uniform"
    temperature: float = 0.1

    signature: ClassVar[str] = "data"
    paper: ClassVar[str] = "arXiv 2402.09997"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("top_k", 0, whole=True)
        self.at_least("examples", 1, whole=True)
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"nearest: {name} must be one of {listing(allowed)}, got {getattr(self, name)!r}")
        if not self.temperature > 0.0:
            raise ConfigError(f"nearest: temperature must be above 0, got {self.temperature!r}")
        kind = "" if self.by == "text" else "data" if self.to == "centroid" else "examples"
        object.__setattr__(self, "signature", kind)
        object.__setattr__(self, "signed_by", ("examples",) if kind == "examples" else ())

    @property
    def needs(self) -> bool:
        return self.by == "text"

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        if self.to == "centroid":
            return centroids(self.name, adapter, model, data)
        return {"": vectors(self.name, adapter, model, data, self.examples)}

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> RowShared:
        return RowShared(self, names) if self.needs else Kept(self, names)

    def fill(self, shared: Any, signs: Mapping[str, Mapping[str, Tensor]]) -> None:
        if isinstance(shared, Kept):
            shared.fill([signs[name][""] for name in shared.names])

    def score(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        scores = self.cosines(shared, hub, inputs, call) if self.needs else shared.near(means_of(hub, inputs, call))
        shared.__dict__["scores"] = scores
        k = self.top_k or scores.shape[1]
        top, index = scores.topk(min(k, scores.shape[1]), 1)
        flat = torch.full_like(top, 1.0 / top.shape[1])
        values = flat if self.weights == "uniform" else (top / self.temperature).softmax(1)
        return torch.zeros_like(scores).scatter(1, index, values)
