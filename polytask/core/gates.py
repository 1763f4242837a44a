"""Routers that score the adapters for each token, and those that weigh whole rows.

Shapes: B rows, T tokens, i = d_in, N adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .errors import ConfigError, MixError
from .form import Call, Part, Weights
from .gate import Gate, Router, by_row, chosen
from .site import Site

if TYPE_CHECKING:
    from .attach import Hub


class TokenGate(Gate):
    """A gate that scores the adapters for each token and takes the best: give `scores`, or parameters and that."""

    def scores(self, x: Tensor, call: Call) -> Tensor:
        """[..., i] to [..., N]."""
        raise NotImplementedError

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        values, index = chosen(self.scores(x, call), self.router.top_k, self.router.temperature)
        return Weights(self.names, values.to(y.dtype), index)


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


class RowShared(Part):
    """What a router that weighs whole rows keeps: the weights of the forward that runs.

    Attributes:
        names: all N adapters.
        weights: [B, N], or None before the first forward.
    """

    weights: Tensor | None = None

    def __init__(self, router: Router, names: Sequence[str]) -> None:
        super().__init__(router)  # type: ignore[arg-type]  # a part's form is what its settings are
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
        kept = shared.weights
        if kept is not None and (hub.generating or goes_on(inputs)):
            rows = call.rows or len(kept)
            if rows % len(kept) == 0:  # all beams of a row are its own
                shared.__dict__["weights"] = kept.repeat_interleave(rows // len(kept), 0)
                return
        shared.__dict__["weights"] = self.score(shared, hub, inputs, call)

    def score(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        """The weights of each row, [B, N]."""
        raise NotImplementedError


def goes_on(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward continues texts that are in a cache."""
    cache: Any = inputs.get("past_key_values")
    return bool(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache is not None
