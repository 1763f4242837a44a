"""X-LoRA: the base reads everything once alone, and says how much of each adapter every token gets in the second pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MixError
from polytask.core.form import Call, Part, Weights
from polytask.core.gate import Gate, by_row, routers
from polytask.core.gates import TokenRouter, carried
from polytask.core.site import Site
from polytask.route.layers import fill, grow, stream, through

if TYPE_CHECKING:
    from polytask.core.hub import Hub


@routers.register("x-lora")
@dataclass(frozen=True)
class XLoRA(TokenRouter):
    """``w = scale softmax(f(H) / T)``, H [B, T, d] the last hidden states of the bare base, f a small network: N weights for each
    token, the same at all sites. The first pass is without gradients; every forward costs two.

    A decoder of an encoder-decoder, and sites that see other tokens than H has, get the mean of their row's weights. A causal
    text is written without a cache, since each token needs the whole first pass.

    Args:
        top_k: how many of a token's weights are kept, the rest is zero; all where 0.
        temperature: T.
        depth: linear layers of f.
        width: between them.
        dropout: between them, while they learn.
        layerwise: weights of its own for each site.
        renormalise: another softmax over the weights that were kept.
        scale: of all weights.

    Reference: Buehler and Buehler, X-LoRA, arXiv 2402.07148, as in PEFT, without its option of adapters in the first pass.

    Raises:
        ConfigError: a setting is out of range.
        MixError: a causal model is asked for a cache, a width cannot be told, or a base gives no vectors of tokens.
    """

    depth: int = 1
    width: int = 2048
    dropout: float = 0.2
    layerwise: bool = False
    renormalise: bool = False
    scale: float = 1.0

    trains: ClassVar[Any] = "gates"
    rereads: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "norm", "block")
    paper: ClassVar[str] = "arXiv 2402.07148"
    exceptions: ClassVar[Mapping[str, str]] = {
        "writing": "it reads the whole text before it acts, so it refuses a cache; with an encoder-decoder it needs none",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "width"):
            self.at_least(name, 1, whole=True)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{self.name}: dropout must be in [0, 1), got {self.dropout!r}")

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return XGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return Reader(self, sites, names)

    def begin(self, shared: Reader, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        if hub.crossed:
            kept = {name: carried(getattr(shared, name), hub, inputs, call) for name in ("weights", "rows")}
            if kept["weights"] is not None:
                shared.__dict__.update(kept)
                return
        if not hub.crossed and inputs.get("past_key_values") is not None:
            raise MixError(
                f"the router {self.name!r} reads the whole text before it acts, which a cache does not hold; call "
                "generate(..., use_cache=False), or set module.generation_config.use_cache = False"
            )
        out = hub.read(inputs, call)
        hidden: Tensor = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", out[0])
        if hidden.dim() != 3 or hidden.shape[-1] != shared.d:
            raise MixError(
                f"the router {self.name!r} was made for vectors of {shared.d} numbers for each token, and the base gives "
                f"{tuple(hidden.shape)}; choose another router"
            )
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2] else None
        shared.keep(shared.weigh(hidden), mask)
        shared.__dict__["beyond"] = hub.beyond()


class Reader(Part):
    """f, and what it said of the forward that runs.

    Attributes:
        d: the width of H.
        weights: [B, T, 1, N], or [B, T, S, N] for each of S sites; None before the first forward.
        rows: their mean over the real tokens, [B, 1 or S, N].
        beyond: sites of a decoder, whose tokens are others.
    """

    weights: Tensor | None = None
    rows: Tensor | None = None
    beyond: frozenset[str] = frozenset()

    def __init__(self, router: XLoRA, sites: Sequence[Site], names: Sequence[str]) -> None:
        super().__init__(router)
        self.names = tuple(names)
        self.places = {site.name: i if router.layerwise else 0 for i, site in enumerate(sites)}
        self.d = stream(sites)
        if not self.d:
            raise MixError(
                f"the router {router.name!r} cannot tell the width of the base's vectors from the sites of the adapters; take "
                "adapters that also act at attention or feed-forward layers"
            )
        self.count = len(sites) if router.layerwise else 1
        grow(self, [self.d, *[router.width] * (router.depth - 1), self.count * len(names)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None, "rows": None}  # what is on its way belongs to one forward

    def start(self, generator: torch.Generator) -> None:
        fill(self, generator)

    def weigh(self, hidden: Tensor) -> Tensor:
        """[B, T, d] to [B, T, 1 or S, N]."""
        router = self.form
        logits = through(self, hidden, router.dropout).unflatten(-1, (self.count, len(self.names)))
        values = (logits / router.temperature).softmax(-1)
        if 0 < router.top_k < len(self.names):
            out = torch.ones_like(values, dtype=torch.bool).scatter(-1, values.topk(router.top_k).indices, False)
            kept = values.masked_fill(out, -torch.inf).softmax(-1) if router.renormalise else values
            values = kept.masked_fill(out, 0.0)
        elif router.renormalise:
            values = values.softmax(-1)
        weights: Tensor = router.scale * values
        return weights

    def keep(self, weights: Tensor, mask: Tensor | None) -> None:
        """Remembers the weights of the forward that runs."""
        real = torch.ones(weights.shape[:2], device=weights.device) if mask is None else mask
        real = real.to(weights.dtype)[..., None, None]
        self.__dict__["weights"] = weights
        self.__dict__["rows"] = (weights * real).sum(1) / real.sum(1).clamp(min=1.0)


class XGate(Gate):
    """No parameters of its own."""

    shared: Reader

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        shared = self.shared
        if shared.weights is None or shared.rows is None:
            raise MixError(
                f"the router {self.router.name!r} reads the whole input first, and a part of the model was called alone; "
                "call the model, or model.features"
            )
        at = shared.places[self.site.name]
        tokens, rows = shared.weights[:, :, at], shared.rows[:, at]  # [B, T, N], [B, N]
        if self.names != shared.names:
            place = [shared.names.index(name) for name in self.names]
            tokens, rows = tokens[..., place], rows[..., place]
        tokens = tokens.to(y.dtype)
        if self.site.name not in shared.beyond:
            if y.shape[:-1] == tokens.shape[:-1]:
                return self.sparse(tokens)
            if y.dim() == 2 and len(y) == tokens.shape[0] * tokens.shape[1]:  # tokens flattened into the batch
                return self.sparse(tokens.flatten(0, 1))
        return by_row(self.site, self.names, rows, x, y)

    def sparse(self, values: Tensor) -> Weights:
        """The weights of the tokens, without those that are zero."""
        k = self.router.top_k
        return Weights(self.names, *values.topk(k, -1)) if 0 < k < len(self.names) else Weights(self.names, values)
