"""Routers that score the adapters for each token, and those that weigh whole rows.

Shapes: B rows, T tokens, i = d_in, N adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError, MixError
from .form import Call, Part, Weights
from .gate import Gate, Router, by_row, chosen
from .levels import Levels
from .site import Site

if TYPE_CHECKING:
    from .hub import Hub


LEAST = 64  # adapters below which groups of them save nothing


class TokenGate(Gate):
    """A gate that scores the adapters for each token and takes the best: give `scores`, or parameters and that."""

    def scores(self, x: Tensor, call: Call) -> Tensor:
        """[..., i] to [..., N]."""
        raise NotImplementedError

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        values, index = chosen(self.scores(x, call), self.router.top_k, self.router.temperature)
        return Weights(self.names, values.to(y.dtype), index)


class VectorGate(TokenGate):
    """Scores ``v_n . read(x)``, or its size, with a vector v_n for each adapter that is computed, not trained: v [N, i].

    With the router's ``probe`` only the adapters in the best groups of like vectors are scored; see `Levels`.
    """

    frozen = frozenset({"v"})
    unsigned: ClassVar[bool] = False

    def __init__(self, router: Any, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        self.v = nn.Parameter(torch.zeros(len(names), site.d_in), requires_grad=False)
        self._levels: tuple[Any, Levels] | None = None

    def read(self, x: Tensor) -> Tensor:
        """What is compared of an input."""
        return x

    def scores(self, x: Tensor, call: Call) -> Tensor:
        x = self.read(x)
        found = x @ self.v.to(x.dtype).T
        return found.abs() if self.unsigned else found

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        k, probe = self.router.top_k, self.router.probe
        if not probe or len(self.names) < LEAST or torch.compiler.is_compiling():
            return super().weigh(x, y, call)
        read = self.read(x)
        levels = self._grouped(read)
        if probe >= len(levels) or k > probe * (len(self.names) // len(levels)):
            return super().weigh(x, y, call)
        top, index = levels.best(read, k, probe)
        return Weights(self.names, (top / self.router.temperature).softmax(-1).to(y.dtype), index)

    def _grouped(self, x: Tensor) -> Levels:
        """The vectors in groups, in the type of what they are compared with."""
        key = (self.v.data_ptr(), self.v._version, x.dtype, x.device)
        if self._levels is None or self._levels[0] != key:
            with torch.no_grad():
                self._levels = (key, Levels(self.v.to(x), self.unsigned))
        return self._levels[1]


class LinearGate(TokenGate):
    """Scores ``W x``, W [N, i] without a bias, from a normal distribution with the router's ``deviation``."""

    def __init__(self, router: Any, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        self.W = nn.Parameter(torch.zeros(len(names), site.d_in))

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        self.W.normal_(std=self.router.deviation, generator=generator)

    def scores(self, x: Tensor, call: Call) -> Tensor:
        return F.linear(x.to(self.W.dtype), self.W)


@dataclass(frozen=True)
class TokenRouter(Router):
    """A router that scores adapters for each token; see `TokenGate`.

    Args:
        top_k: how many act for a token; all where 0.
        temperature: the scores are divided by it.
    """

    top_k: int = 0
    temperature: float = 1.0

    reads: ClassVar[Any] = "token"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "block")

    def __post_init__(self) -> None:
        self.at_least("top_k", 0, whole=True)
        if not self.temperature > 0.0:
            raise ConfigError(f"{self.name}: temperature must be above 0, got {self.temperature!r}")


@dataclass(frozen=True)
class VectorRouter(TokenRouter):
    """A router whose gates are `VectorGate`.

    Args:
        probe: where there are hundreds of adapters: how many of their about sqrt(N) groups of like ones a token looks into. Fewer
            products, and the best may be missed; 0 scores all.
    """

    probe: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("probe", 0, whole=True)
        if self.probe and not self.top_k:
            raise ConfigError(
                f"{self.name}: probe finds the best few adapters; say how many with top_k, or leave probe out"
            )


class RowShared(Part):
    """What a router that weighs whole rows keeps: the weights of the forward that runs.

    Attributes:
        names: all N adapters.
        weights: [B, N], or None before the first forward.
    """

    weights: Tensor | None = None

    def __init__(self, router: Router, names: Sequence[str]) -> None:
        super().__init__(router)
        self.names = tuple(names)

    def of(self, names: tuple[str, ...]) -> Tensor:
        """The columns of some adapters. Raises `MixError` before the first forward."""
        if self.weights is None:
            raise MixError(
                f"the router {self.form.name!r} weighs the rows of a whole forward, and a part of the model was called alone; "
                "call the model, or model.features"
            )
        place = [self.names.index(name) for name in names]
        return self.weights if place == list(range(len(self.names))) else self.weights[:, place]


class RowGate(Gate):
    """The columns of the adapters that have a patch at this site."""

    shared: RowShared

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return by_row(self.site, self.names, self.shared.of(self.names), x, y)


@dataclass(frozen=True)
class RowRouter(Router):
    """A router that gives every row of a batch weights of its own, the same at all sites: give `score`.

    While ``generate`` writes, and while a cache is continued, the weights are those of the prompts.
    """

    reads: ClassVar[Any] = "row"

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return RowGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> RowShared:
        return RowShared(self, names)

    def begin(self, shared: RowShared, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        kept = carried(shared.weights, hub, inputs, call)
        shared.__dict__["weights"] = self.score(shared, hub, inputs, call) if kept is None else kept

    def score(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        """The weights of each row, [B, N]."""
        raise NotImplementedError


def carried(kept: Tensor | None, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor | None:
    """What was kept of the rows [B, ...] where a forward goes on with their texts, for each of their beams; None else."""
    if kept is None or not (hub.generating or goes_on(inputs)):
        return None
    rows = call.rows or len(kept)
    return kept.repeat_interleave(rows // len(kept), 0) if rows % len(kept) == 0 else None


def goes_on(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward continues texts that are in a cache."""
    cache: Any = inputs.get("past_key_values")
    return bool(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache is not None
