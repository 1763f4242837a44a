"""Spectral gates: a token goes where it lies in the space that an adapter's change reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.form import Call, Weights
from polytask.core.gate import Gate, routers
from polytask.core.gates import TokenGate, TokenRouter
from polytask.core.model import Model
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.spectrum import spectrum

SCORES = {"row-space": "|V^T x|", "change": "|D x|", "top": "|V_k^T x|"}
WEIGHTS = ("uniform", "softmax")


@routers.register("spectral")
@dataclass(frozen=True)
class Spectral(TokenRouter):
    """Scores the length of x in the space that an adapter's change ``D = U S V^T`` reads; the best few share the token.

    Nothing is trained, and no data are needed. ``spectral`` as it is has SpectR's rule, ``smile`` SMILE's.

    Args:
        top_k: how many adapters act for a token; all where 0.
        temperature: the scores are divided by it, for the softmax.
        score: ``row-space`` (``|V^T x|``, all directions alike), ``change`` (``|D x|``: how much it changes x), or ``top``
            (``|V_k^T x|``, its k largest directions).
        gate_k: k, of ``top``.
        weights: of the chosen: ``uniform`` or ``softmax`` of the scores.

    Reference: SpectR, arXiv 2504.03454: there the score of the paper is ours of ``change``, that of its code ``row-space``,
    and the factors are averaged; ours adds up the outputs, since the bases of two adapters do not fit each other. SMILE,
    arXiv 2408.10174: one direction is Arrow's score.

    Raises:
        MixError: an adapter's form has no dense change, or ``row-space`` is asked for of one that reads every direction.
    """

    top_k: int = 4
    score: str = "row-space"
    gate_k: int = 1
    weights: str = "uniform"

    signature: ClassVar[str] = "spectral"
    paper: ClassVar[str] = "arXiv 2504.03454"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("gate_k", 1, whole=True)
        for name, allowed in (("score", SCORES), ("weights", WEIGHTS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{self.name}: {name} must be one of {listing(allowed)}, got {getattr(self, name)!r}")

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        return {site: spectrum(patch, site, model) for site, patch in adapter.patches.items()}

    def read(self, sign: Tensor, site: Site) -> Tensor:
        """What the score is the length of: M [r, i] with ``|M x|``, from ``S V^T``."""
        if self.score == "change":
            return sign
        size = sign.norm(dim=1, keepdim=True)
        unit = torch.where(size > 0.0, sign / size.clamp(min=torch.finfo(sign.dtype).tiny), 0.0)
        if self.score == "top":
            return unit[: self.gate_k]
        if int((size > 0.0).sum()) == site.d_in:
            raise MixError(
                f"an adapter changes all {site.d_in} directions at {site.name!r}, so that the score row-space would be |x|; say "
                "score='change' or 'top'"
            )
        return unit

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return SpectralGate(self, site, names)


@routers.register("smile")
@dataclass(frozen=True)
class Smile(Spectral):
    """SMILE's rule: the length of x in the ``gate_k`` largest directions of each change, the softmax over all adapters, of
    which the best ``top_k`` are kept and add up to one. Settings as `Spectral`.

    Reference: Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation
    Models, arXiv 2408.10174. There the experts are the changes of whole models, cut to a rank; ours are the adapters as they
    are.
    """

    top_k: int = 1
    score: str = "top"
    weights: str = "softmax"

    paper: ClassVar[str] = "arXiv 2408.10174"


class SpectralGate(TokenGate):
    """M [N, r, i]; computed, not trained. Adapters of lower rank have zero rows at the end."""

    frozen = frozenset({"M"})

    def __init__(self, router: Any, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        self.M = nn.Parameter(torch.zeros(len(names), 0, site.d_in), requires_grad=False)

    def fill(self, signs: Sequence[Tensor]) -> None:
        rows = [self.router.read(sign.float(), self.site) for sign in signs]
        self.M = nn.Parameter(nn.utils.rnn.pad_sequence(rows, batch_first=True), requires_grad=False)

    def load(self, tensors: Any) -> None:
        if (M := tensors.get("M")) is not None and M.dim() == 3:  # its rank is known from the adapters only
            self.M = nn.Parameter(self.M.new_zeros(len(self.names), M.shape[1], self.site.d_in), requires_grad=False)
        super().load(tensors)

    def scores(self, x: Tensor, call: Call) -> Tensor:
        N, r, _ = self.M.shape
        parts = (x @ self.M.to(x.dtype).flatten(0, 1).T).unflatten(-1, (N, r))
        found: Tensor = torch.linalg.vector_norm(parts, dim=-1)
        return found

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        found = super().weigh(x, y, call)
        if self.router.weights == "softmax":
            return found
        assert isinstance(found.values, Tensor)
        return Weights(self.names, torch.full_like(found.values, 1.0 / found.values.shape[-1]), found.index)
