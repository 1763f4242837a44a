"""Prefix: learned keys and values that every attention sees beside the text's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms
from polytask.core.site import Site


@forms.register("prefix")
@dataclass(frozen=True)
class Prefix(Form):
    """Learned keys and values before those of the text, in every attention: ``c = g (softmax(q K_p^T) V_p - y)``.

    ``g`` is the prefix's part of the attention, ``sum exp(prefix scores) / sum exp(all scores)``, so adding c is exactly
    attention over both; y stays the base's own attention, of any implementation. The change is additive, so prefixes of
    different lengths mix like any other form.

    Args:
        length: m, the number of keys and values.
        hidden: width of a two-layer network (linear, tanh, linear) that gives all keys and values from m vectors while it
            is learned (the paper's reparametrisation); learning ends with the plain ones. None learns them directly.
        gated: multiply c by tanh of a learned number per head that starts at zero, so that a new prefix is the base
            (LLaMA-Adapter's gate, arXiv 2303.16199). Without it there is no such start.
        std: deviation of the start; PEFT's is 1.
        shifted: count the positions of real tokens after the prefix's, as PEFT does, which holds it in the cache.

    Reference: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190; the additive
    form is that of He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: an attention that transformers' table of attention functions does not serve.
    """

    length: int = 20
    hidden: int | None = None
    gated: bool = False
    std: float = 1.0
    shifted: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("attention", "input")
    default_sites: ClassVar[str] = "kind:attention"
    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2101.00190"
    exceptions: ClassVar[Mapping[str, str]] = {
        "start": "keys that everyone sees change the attention whatever their values; gated=True starts as the base"
    }

    def __post_init__(self) -> None:
        if not (isinstance(self.length, int) and self.length >= 1):
            raise ConfigError(f"Prefix: length must be a whole number of at least 1, got {self.length!r}")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"Prefix: hidden must be at least 1 or None, got {self.hidden!r}")

    def patch(self, site: Site) -> Patch:
        return Shift(self, site) if site.kind == "input" else PrefixPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason:
            return reason
        if site.kind == "input":
            return (
                ""
                if self.shifted and site.shape and site.shape[0]
                else "a prefix moves the positions at the input with shifted=True only"
            )
        if not site.shape:
            return f"the attention {site.name!r} does not use transformers' attention functions, which a prefix needs"
        return ""

    def shared(self, sites: Sequence[Site]) -> Part | None:
        return None if self.hidden is None else Reparametrised(self, [s for s in sites if s.kind == "attention"])

    def finish(self, adapter: Adapter) -> Adapter:
        """Without the network: the keys and values that it gives."""
        if self.hidden is None:
            return adapter
        plain = replace(self, hidden=None)
        patches: dict[str, Patch] = {}
        for name, patch in adapter.patches.items():
            patches[name] = plain.patch(patch.site)
            with torch.no_grad():
                patches[name].load({n: v.detach().clone() for n, v in patch.values().items()})  # type: ignore[operator]
        return Adapter(plain, patches, adapter.heads, replace(adapter.card), adapter.name, adapter.targets)

    # PEFT's file: one table [m, layers * 2 * heads * D]

    def unlike_peft(self, patch: Patch) -> str:
        if self.gated:
            return "a gate"
        if self.hidden is not None:
            return "a network that is still learned"
        return "" if self.shifted else "positions that the prefix does not move"

    def pack(self, patches: Mapping[str, Patch]) -> dict[str, Tensor] | None:
        own = [p for p in patches.values() if isinstance(p, PrefixPatch)]
        if any(self.unlike_peft(p) for p in own) or len({p.site.shape for p in own}) > 1:
            return None
        parts = [t.detach().transpose(0, 1).flatten(1) for p in own for t in (p.K, p.V)]  # [m, G * D] each
        return {"prompt_embeddings": torch.cat(parts, 1)}

    @classmethod
    def unpack(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> dict[str, dict[str, Tensor]]:
        own = [site for site in sites if site.kind == "attention"]
        table = tensors["prompt_embeddings"]
        _, G, D = own[0].shape
        if table.shape[1] != len(own) * 2 * G * D:
            raise AdapterError(
                f"prompt_embeddings has {table.shape[1]} columns, and {len(own)} layers of {G} heads of size {D} need "
                f"{len(own) * 2 * G * D}"
            )
        parts = table.reshape(len(table), len(own), 2, G, D).permute(1, 2, 3, 0, 4)  # [layers, 2, G, m, D]
        return {site.name: {"K": k.contiguous(), "V": v.contiguous()} for site, (k, v) in zip(own, parts, strict=True)}

    @classmethod
    def packed_sites(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site] | None:
        heads, layers = int(config["num_attention_heads"]), int(config["num_layers"])
        size = int(config["token_dim"]) // heads
        if int(config.get("num_transformer_submodules") or 1) > 1:
            raise AdapterError(
                "this PEFT prefix is for encoder and decoder (num_transformer_submodules=2); one is read"
            )
        found = [Site("*input", "input", "input", (0, 0))]
        return found + [Site(f"*attention.{i}", "attention", "attention", (0, heads, size), i) for i in range(layers)]

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        own = [p for p in patches.values() if isinstance(p, PrefixPatch)]
        _, G, D = own[0].site.shape
        return {
            "num_virtual_tokens": self.length, "token_dim": G * D, "num_transformer_submodules": 1,
            "num_attention_heads": G, "num_layers": len(own), "encoder_hidden_size": G * D, "prefix_projection": False,
            "settings": self.settings(),
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Prefix:
        return cls(length=int(config["num_virtual_tokens"]), shifted=True)


class Shift(Patch):
    """Moves the positions of a row's tokens behind its prefix. It has no parameters."""

    def __init__(self, form: Prefix, site: Site) -> None:
        super().__init__(form, site)
        self.moves = form.length

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        own = y.new_zeros(y.shape)  # the last channel says that nothing stands there and the positions move
        at = y.shape[1] - x.shape[1]
        own[:, at - self.moves : at, -1] = 1.0
        return own

    def values(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def misfit(self, site: Site) -> str:
        return "" if site.shape else "the base takes no token ids"


class Reparametrised(Part):
    """The network that gives all keys and values: E [m, w], then w to hidden to 2 G D for each site."""

    def __init__(self, form: Prefix, sites: Sequence[Site]) -> None:
        super().__init__(form)
        self.places: dict[str, int] = {}
        total = 0
        for site in sites:
            self.places[site.name] = total
            total += 2 * site.shape[1] * site.shape[2]
        width, hidden = sites[0].shape[0] * sites[0].shape[2], form.hidden or 1
        self.E = nn.Parameter(torch.empty(form.length, width))
        self.W1, self.b1 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(hidden))
        self.W2, self.b2 = nn.Parameter(torch.empty(total, hidden)), nn.Parameter(torch.empty(total))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.E.normal_(generator=generator)
            for weight, bias in ((self.W1, self.b1), (self.W2, self.b2)):
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)

    def values(self, site: Site, length: int) -> tuple[Tensor, Tensor]:
        """K and V [G, m, D] of a site."""
        _, G, D = site.shape
        at, size = self.places[site.name], 2 * G * D
        hidden = torch.tanh(F.linear(self.E, self.W1, self.b1))
        both = F.linear(hidden, self.W2[at : at + size], self.b2[at : at + size])  # [m, 2 G D]
        K, V = both.reshape(length, 2, G, D).permute(1, 2, 0, 3)
        return K, V


class PrefixPatch(Patch):
    """K, V [G, m, D] at one attention; with a network none of its own. The gate has a number per head."""

    form: Prefix

    def __init__(self, form: Prefix, site: Site) -> None:
        super().__init__(form, site)
        H, G, D = site.shape
        if form.hidden is None:
            self.K = nn.Parameter(torch.empty(G, form.length, D))
            self.V = nn.Parameter(torch.empty(G, form.length, D))
        if form.gated:
            self.gate = nn.Parameter(torch.empty(H))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            if self.form.hidden is None:
                self.K.normal_(std=self.form.std, generator=generator)
                self.V.normal_(std=self.form.std, generator=generator)
            if self.form.gated:
                self.gate.zero_()

    def values(self) -> dict[str, Tensor]:
        """The keys, values and gate that act, by name."""
        K, V = (self.K, self.V) if self.form.hidden is None else self.shared.values(self.site, self.form.length)
        return {"K": K, "V": V, **({"gate": self.gate} if self.form.gated else {})}

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        heads = call.heads
        if heads is None:
            raise AdapterError(f"the prefix at {self.site.name!r} must be used inside an attention of the model")
        values = self.values()
        K, V = (values[n].to(heads.query.dtype)[None] for n in ("K", "V"))  # [1, G, m, D]
        scores = heads.scores(K).float()  # [B, H, T, m]
        own = scores.logsumexp(-1, keepdim=True)
        share = torch.sigmoid(own - heads.total().unsqueeze(-1))  # g, [B, H, T, 1]
        if "gate" in values:
            share = share * torch.tanh(values["gate"].float())[None, :, None, None]
        weights = torch.softmax(scores, -1) * share
        B, H, T, _ = share.shape
        kept = share.transpose(1, 2).expand(B, T, H, y.shape[-1] // H).flatten(2)
        return heads.look(weights.to(y.dtype), V.expand(B, -1, -1, -1)) - kept.to(y.dtype) * y

    def misfit(self, site: Site) -> str:
        mine, other = self.site.shape[1:], site.shape[1:]
        return "" if mine == other else f"its keys have {mine} (heads, size), and the model's {other}"
