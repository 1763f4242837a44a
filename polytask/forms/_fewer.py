"""Fewer tokens on the way through an image network: those that the class token looks at stay, the others become one.

Shapes: B rows, T tokens (the first s of them special), H heads, D head size, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError, MixError
from polytask.core.form import NO_CALL, Call, Form, Part, Patch
from polytask.core.site import Site, role_of
from polytask.core.tokens import attention_shape

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

WHERE = " | kind:block | kind:attention"


class Way(Part):
    """What the blocks know of one another.

    Attributes:
        special: s [1], how many tokens at the front are never dropped: the class token, and one for distillation.
        sizes: of how many tokens each is made, [B, T], or None before the first merge.
        off: whether all tokens stay for now.
    """

    keys = {"special": "tokens.special"}
    frozen = frozenset({"special"})
    special: nn.Parameter

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.special = nn.Parameter(torch.ones(1, dtype=torch.int32), requires_grad=False)
        self.first = ""  # the first block that merges
        self.sizes: Tensor | None = None
        self.off = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sizes": None}  # of one forward


class Merging(Patch):
    """After a block, its less looked at tokens are replaced by one: their mean, weighted by the class token's attention."""

    form: Any
    heads: int
    acts = "around"

    def bound(self, base: nn.Module, site: Site) -> Self:
        view = super().bound(base, site)
        roles = {role_of(f".{name}"): name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        owner = base.get_submodule(roles.get("query", "").rpartition(".")[0])
        shape = attention_shape(owner) if "query" in roles and "key" in roles else ()
        if not shape:
            raise AdapterError(
                f"the block {site.name!r} has no attention with queries and keys in layers of their own, so it is not known "
                "which tokens the class token looks at; use keep=1.0"
            )
        view.__dict__.update(heads=shape[0], **{k: base.get_submodule(roles[k]) for k in ("query", "key")})
        return view

    def around(self, run: Callable[[Tensor], Any], x: Tensor, call: Call = NO_CALL) -> Any:
        way: Way = self.shared
        if way.first == self.site.name or x.shape[:2] != (way.sizes.shape if way.sizes is not None else None):
            way.sizes = None
        caught: dict[str, Tensor] = {}
        handles = [
            getattr(self, name).register_forward_hook(lambda m, a, out, name=name: caught.__setitem__(name, out))
            for name in ("query", "key")
        ]
        try:
            out = run(x)
        finally:
            for handle in handles:
                handle.remove()
        if way.off:
            return out
        y = out[0] if isinstance(out, tuple) else out
        special = int(way.special)
        attention = self._looks(caught["query"], caught["key"])[:, special:]
        y, way.sizes = fewer(y, attention, self.form.keep, special, way.sizes)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    @torch.no_grad()
    def _looks(self, query: Tensor, key: Tensor) -> Tensor:
        """How much the class token looks at each token, the mean over heads [B, T]."""
        B, T, d = key.shape
        q = query[:, :1].reshape(B, 1, self.heads, -1).transpose(1, 2)
        k = key.reshape(B, T, self.heads, -1).transpose(1, 2)  # [B, H, T, D]
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        if self.shared.sizes is not None:
            scores = scores + self.shared.sizes[:, None, None].log()
        mean: Tensor = scores.softmax(-1).mean(1)
        return mean[:, 0]

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.shared.off:
            return torch.zeros_like(y)
        raise MixError(
            f"the form 'tr-pts' with keep={self.form.keep} leaves out tokens at {self.site.name!r}, so it acts alone, with "
            "weight 1, on all rows of a batch; run other rows by themselves, or use keep=1.0"
        )


class Proportional(Patch):
    """In the attention of later blocks a token counts as often as it has tokens in it: its scores get the log of that."""

    acts = "output"

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        sizes, heads = self.shared.sizes, call.heads
        if sizes is None or heads is None or heads.key.shape[2] != sizes.shape[1]:
            return torch.zeros_like(y)
        scores = heads.seen() + sizes[:, None, None].log()
        return heads.look(scores.softmax(-1).to(heads.value.dtype), heads.value) - y


def fewer(
    y: Tensor, attention: Tensor, keep: float, special: int, sizes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The special tokens, the ``floor(keep n)`` of the n others that are looked at most, in their order, and one for the rest.

    Args:
        y: [B, s + n, d].
        attention: of the others, [B, n].
        keep: the part that stays.
        special: s.
        sizes: of how many tokens each is made; None for ones.

    Returns:
        The tokens [B, s + floor(keep n) + 1, d] and their sizes; as they were where there is no more than one to merge.
    """
    n = y.shape[1] - special
    left = math.floor(keep * n + 1e-9)
    if n - left < 2:
        return y, sizes
    sizes = y.new_ones(y.shape[:2], dtype=torch.float32) if sizes is None else sizes
    order = attention.argsort(dim=1, descending=True, stable=True)
    best, rest = order[:, :left].sort(1).values + special, order[:, left:]
    weight = attention.gather(1, rest)
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=1e-12)).to(y.dtype)
    rest = rest + special
    wide = y.shape[2]
    kept = y.gather(1, best[..., None].expand(-1, -1, wide))
    merged = (weight[..., None] * y.gather(1, rest[..., None].expand(-1, -1, wide))).sum(1, keepdim=True)
    counts = [sizes[:, :special], sizes.gather(1, best), sizes.gather(1, rest).sum(1, keepdim=True)]
    return torch.cat([y[:, :special], kept, merged], 1), torch.cat(counts, 1)


def prepare(model: Model, patches: dict[str, Patch]) -> None:
    """Finds the tokens that always stay, and leaves the last block out: nothing comes after it.

    Raises:
        ConfigError: the model is no image network with a class token, or there is no block among the sites.
    """
    embeddings = getattr(model.module, "embeddings", None)
    special = sum(getattr(embeddings, name, None) is not None for name in ("cls_token", "distillation_token"))
    blocks = [patch for patch in patches.values() if isinstance(patch, Merging)]
    if not special or not blocks:
        raise ConfigError(
            "TRPTS: keep below 1 merges the tokens of image networks with a class token, such as ViT, at sites of kind block "
            f"(and attention); {model.name!r} has {'none' if not special else 'them, and sites picks no block'}"
        )
    for patch in blocks:
        if patch.site.depth == 1.0:
            del patches[patch.site.name]
    with torch.no_grad():
        blocks[0].shared.special.fill_(special)
    settle(patches, None)


def settle(patches: dict[str, Patch], count: int | None) -> None:
    """Keeps the ``count`` blocks whose layers have the fewest trained numbers (all for None), and attentions after the first."""
    blocks = [patch for patch in patches.values() if isinstance(patch, Merging)]
    trained: dict[int | None, int] = {}
    for patch in patches.values():
        if not isinstance(patch, Merging | Proportional):
            trained[patch.site.layer] = trained.get(patch.site.layer, 0) + patch.values.numel()  # type: ignore[operator]
    chosen = sorted(blocks, key=lambda p: (trained.get(p.site.layer, 0), p.site.layer or 0))[:count]
    first = min(patch.site.layer or 0 for patch in chosen)
    for name, patch in list(patches.items()):
        late = (patch.site.layer or 0) <= first
        if (isinstance(patch, Merging) and patch not in chosen) or (isinstance(patch, Proportional) and late):
            del patches[name]
    for patch in chosen:
        if patch.site.layer == first:
            patch.shared.first = patch.site.name


def first_of(sites: list[Site]) -> str:
    """The block that merges first."""
    blocks = [site for site in sites if site.kind == "block"]
    return min(blocks, key=lambda s: s.layer or 0).name if blocks else ""


def cost(model: Model, adapter: Adapter, keep: float) -> tuple[list[int], float]:
    """The tokens that enter each block, and the operations of the blocks over those with all tokens."""
    config: Any = model.module.config
    special = int(adapter.shared.special) if isinstance(adapter.shared, Way) else 1
    size, patch = config.image_size, config.patch_size
    size, patch = (v if isinstance(v, list | tuple) else (v, v) for v in (size, patch))
    tokens = (size[0] // patch[0]) * (size[1] // patch[1])
    merging = {p.site.layer for p in adapter.patches.values() if isinstance(p, Merging)}
    found, done, whole = [], 0.0, 0.0
    blocks = sorted((s for s in model.sites if s.kind == "block"), key=lambda s: s.layer or 0)
    n = tokens
    for site in blocks:
        found.append(special + n)
        weights = sum(p.numel() for p in model.module.get_submodule(site.path).parameters())
        now, all_ = (2.0 * t * weights + 4.0 * t**2 * config.hidden_size for t in (special + n, special + tokens))
        done, whole = done + now, whole + all_
        left = math.floor(keep * n + 1e-9)
        if site.layer in merging and n - left > 1:
            n = left + 1
    return found, done / whole


def patch_at(form: Form, site: Site) -> Patch:
    """The patch at a block or an attention."""
    return Merging(form, site) if site.kind == "block" else Proportional(form, site)


def refusal(site: Site, keep: float) -> str | None:
    """Why tokens cannot be merged at a site, "" where they can, None where the site is of another kind."""
    if site.kind not in ("block", "attention") or keep == 1.0:
        return None
    return (
        ""
        if site.shape or site.kind == "block"
        else f"the attention {site.name!r} is not one whose keys can be weighted"
    )
