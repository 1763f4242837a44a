"""Adapters that act on tokens: virtual tokens before a text's own, and what attention sees beside them.

Shapes: B rows, T tokens, S keys, H heads, G key and value heads, D head size, d width, m virtual tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import SiteError

if TYPE_CHECKING:
    from .attach import Slot

ATTENTION = "polytask"  # our name in transformers' table of attention functions


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What one attention works on, for patches at sites of kind ``attention``.

    Attributes:
        query: [B, H, T, D].
        key: [B, G, S, D].
        value: [B, G, S, D].
        mask: broadcastable to [B, H, T, S], boolean (True where it looks) or added to the scores; None for no mask.
        scale: of the scores.
        causal: whether a token sees only those up to it, where the mask does not say so.
        bias: added to the scores, broadcastable to [B, H, T, S], or None.
        softcap: scores are ``softcap * tanh(scores / softcap)``, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    bias: Tensor | None = None
    softcap: float | None = None

    def take(self, index: Tensor) -> Heads:
        """The same for the rows in ``index``."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[index]

        return dataclasses.replace(
            self, query=self.query[index], key=self.key[index], value=self.value[index],
            mask=some(self.mask), bias=some(self.bias),
        )  # fmt: skip

    def scores(self, key: Tensor) -> Tensor:
        """The scaled products of the queries with ``key`` [B or 1, G, n, D]: [B, H, T, n]."""
        B, H, T, D = self.query.shape
        G = key.shape[1]
        query = self.query.reshape(B, G, H // G * T, D) * self.scale
        scores = (query @ key.transpose(-1, -2)).reshape(B, H, T, -1)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def look(self, weights: Tensor, value: Tensor) -> Tensor:
        """The sum of ``value`` [B or 1, G, n, D] by ``weights`` [B, H, T, n], as the module gives it: [B, T, H * D]."""
        B, H, T, n = weights.shape
        G = value.shape[1]
        out = (weights.reshape(B, G, H // G * T, n) @ value).reshape(B, H, T, -1)
        return out.transpose(1, 2).flatten(2)

    def total(self) -> Tensor:
        """The logarithm of the sum of the exponentiated scores of the base's own keys, [B, H, T], in fp32."""
        return self.seen().logsumexp(-1)

    def seen(self) -> Tensor:
        """The scores of the base's own keys, [B, H, T, S] in fp32, minus infinity where it does not look."""
        scores = self.scores(self.key).float()
        if self.bias is not None:
            scores = scores + self.bias
        if self.mask is not None:
            mask = self.mask[..., : scores.shape[-1]]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        elif self.causal and scores.shape[-2] > 1:
            T, S = scores.shape[-2:]
            later = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores


def attention_shape(module: nn.Module) -> tuple[int, ...]:
    """(H, G, D) of an attention that goes through transformers' table of attention functions, else ()."""
    cls = getattr(type(module), "_polytask_class", type(module))
    config = module.__dict__.get("config")
    if config is None or "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[cls.__module__]):
        return ()

    def first(*names: str) -> int:
        found = [getattr(owner, n, None) for owner in (module, config) for n in names]
        return next((int(v) for v in found if isinstance(v, int) and v), 0)

    heads = first("num_heads", "num_attention_heads", "n_heads")
    size = first("head_dim", "attention_head_size", "key_value_proj_dim", "attention_size")
    if heads and not size:
        size = first("embed_dim", "hidden_size", "dim", "d_model") // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return (heads, int(groups), size) if heads and size else ()


class _Config:
    """A configuration that sends its module's attention through `_attend`. Everything else is as it was."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._attn_implementation = ATTENTION

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def config_of(module: nn.Module) -> Any:
    """What an attention with adapters answers for ``config``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    return _Config(module.__dict__["config"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """The attention that the model would have used, plus the mix of the patches at this site."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .attach import SLOT

    cls: Any = getattr(type(module), "_polytask_class", type(module))
    plain = vars(sys.modules[cls.__module__]).get("eager_attention_forward")
    chosen = module.__dict__["config"]._attn_implementation or "eager"
    out, seen = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, plain)(
        module, query, key, value, attention_mask, **options
    )
    slot: Slot | None = module.__dict__.get(SLOT)
    if slot is None or slot.hub.mix is None:
        return out, seen
    if options.get("s_aux") is not None:
        raise SiteError(f"the attention {slot.site.name!r} has sinks, which adapters at attention sites do not know")
    scale = options.get("scaling")
    causal = options.get("is_causal")
    heads = Heads(
        query, key, value, attention_mask,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=bool(getattr(module, "is_causal", False) if causal is None else causal),
        bias=options.get("position_bias"), softcap=options.get("softcap"),
    )  # fmt: skip
    call = dataclasses.replace(slot.hub.call, heads=heads)
    mixed = slot(query.transpose(1, 2).flatten(2), out.flatten(2), call)
    return mixed.view_as(out), seen


def _active(slot: Slot) -> list[Any]:
    """The patches that act at the input."""
    names = slot.hub.mix.names() if slot.hub.mix is not None else ()
    return [slot.patches[n] for n in names if n in slot.patches]


def _longest(slot: Slot, what: str) -> int:
    """The most ``tokens`` or ``moves`` of a patch that acts at the input."""
    return max((getattr(patch, what) for patch in _active(slot)), default=0)


class Inserted:
    """The virtual tokens of one forward: what was put before the text, and how to take it away again.

    The site's own ``y`` is [B, m + T, d + 2]: zeros for the virtual tokens, then the real ones, and two channels more for
    what patches say about a place: that a virtual token is there, and that there is none but the positions move.

    Args:
        slot: the site of kind ``input``.
        module: the network that takes token ids, or images.
    """

    def __init__(self, slot: Slot, module: nn.Module) -> None:
        self.slot = slot
        self.module = module
        self.count = 0  # m, when the forward's sequence has become longer by as much
        self.at = 0  # where the virtual tokens stand
        self._hooks: list[Any] = []

    def __enter__(self) -> Inserted:
        self._call = self.slot.hub.call
        return self

    def __exit__(self, *_: object) -> None:
        self.slot.hub.call = self._call
        for hook in self._hooks:
            hook.remove()

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The forward's arguments with the virtual tokens in them."""
        cls = getattr(type(self.module), "_polytask_class", type(self.module))
        names = tuple(inspect.signature(cls.forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        m, moved = _longest(self.slot, "tokens"), _longest(self.slot, "moves")
        touched = any(p.touches for p in _active(self.slot))
        if not (m or moved or touched):
            return given
        if "pixel_values" in names:
            self._images(m)
            return given
        if "inputs_embeds" not in names:
            return self._pooled_by_ids(given, m, moved)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            ids = given.get("input_ids")
            if ids is None:
                raise SiteError(f"site {self.slot.site.name!r} got neither input_ids nor inputs_embeds")
            embeds = self.module.get_input_embeddings()(ids)  # type: ignore[operator]
        B, T, d = embeds.shape
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise SiteError("virtual tokens need the mask of the tokens, [B, T], and got one of the scores")
        if isinstance(mask, Tensor) and self.slot is self.slot.hub.crossing and mask.shape[1] == m + T:
            mask = mask[:, m:]  # the whole model's forward has put them there for the decoder
        past = given.get("past_key_values")
        seen = int(past.get_seq_length()) if past is not None else 0
        old = seen - m if seen else 0  # real tokens in the cache
        call = dataclasses.replace(self.slot.hub.call, past=old, mask=mask)
        mixed = self._mix(embeds, max(m, moved), call)
        virtual, real = mixed[:, : max(m, moved)], mixed[:, max(m, moved) :, :d]
        shift = (virtual[..., d + 1] != 0).sum(1, keepdim=True)  # [B, 1]
        virtual = virtual[:, virtual.shape[1] - m :]
        there = virtual[..., d] != 0  # [B, m]
        if mask is None and not bool(there.all()):
            mask = there.new_ones(B, old + T, dtype=torch.long)
        if mask is not None and m:
            given["attention_mask"] = torch.cat([there.to(mask.dtype), mask], 1)
            self.slot.hub.call = dataclasses.replace(self._call, mask=given["attention_mask"])
        if m or moved:
            self._positions(given, names, there, shift, old, T, embeds.device, first=not seen)
        if seen or not m:
            if touched:
                given["input_ids"], given["inputs_embeds"] = None, real
            return given
        self.count = m
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types[:, :1].expand(B, m), types], 1)
        given["input_ids"], given["inputs_embeds"] = None, torch.cat([virtual[..., :d], real], 1)
        return given

    def _mix(self, embeds: Tensor, m: int, call: Any) -> Tensor:
        B, T, d = embeds.shape
        y = embeds.new_zeros(B, m + T, d + 2)
        y[:, m:, :d] = embeds
        return self.slot(embeds, y, call)

    def _positions(
        self, given: dict[str, Any], names: tuple[str, ...], there: Tensor, shift: Tensor, old: int, T: int,
        device: Any, first: bool,
    ) -> None:  # fmt: skip
        """Real tokens are counted on after the virtual ones of their own row."""
        config = getattr(self.module, "config", None)
        if "position_ids" not in names or getattr(config, "model_type", "") == "opt":  # counted by the mask there
            return
        positions = given.get("position_ids")
        start = 0
        if positions is None:
            embeddings = getattr(self.module, "embeddings", None)
            make = getattr(embeddings, "create_position_ids_from_input_ids", None)
            if make is not None and given.get("input_ids") is not None:
                start = int(embeddings.padding_idx) + 1  # type: ignore[union-attr]
                positions = make(given["input_ids"], embeddings.padding_idx)  # type: ignore[union-attr]
            else:
                positions = torch.arange(old, old + T, device=device).expand(len(there), T)
        real = positions.expand(len(there), T) + there.sum(1, keepdim=True) + shift
        virtual = (there.cumsum(1) - 1).clamp(min=0) + start
        given["position_ids"] = torch.cat([virtual, real], 1) if first else real

    def _pooled_by_ids(self, given: dict[str, Any], m: int, moved: int) -> dict[str, Any]:
        """Virtual tokens behind a text's first token, for networks that look at the ids again afterwards (CLIP's text).

        The ids become longer by ones that mean nothing, and the table answers with the virtual tokens there.
        """
        ids: Tensor = given["input_ids"]
        (B, T), room = ids.shape, int(getattr(getattr(self.module, "config", None), "max_position_embeddings", 0) or 0)
        table: Any = self.module.get_input_embeddings()  # type: ignore[operator]
        mask = given.get("attention_mask")
        call = dataclasses.replace(self.slot.hub.call, mask=mask)
        mixed = self._mix(table(ids), max(m, moved), call)
        d = mixed.shape[2] - 2
        virtual, real = mixed[:, : max(m, moved)], mixed[:, max(m, moved) :, :d]
        shift = (virtual[..., d + 1] != 0).sum(1, keepdim=True)  # [B, 1]
        virtual = virtual[:, virtual.shape[1] - m :]
        there = self._layered(virtual[..., d] != 0, m)
        self.at, count = 1, self.count
        if room and T + count > room:
            raise SiteError(
                f"{count} virtual tokens and a text of {T} make {T + count} tokens, and the base has positions for {room}; "
                "use a shorter prompt, or shorter texts"
            )
        first, *later = virtual[..., :d].split(count, 1) if count else (virtual[..., :d],)
        embeds = torch.cat([real[:, :1], first, real[:, 1:]], 1)
        self._hooks.append(table.register_forward_hook(lambda *_: embeds))
        self._replace(list(later))

        def widened(rows: Tensor, between: Tensor) -> Tensor:
            return torch.cat([rows[:, :1], between.to(rows.dtype), rows[:, 1:]], 1)

        end = getattr(self.module, "eos_token_id", None)
        given["input_ids"] = widened(ids, torch.full_like(there, 1 if end == 0 else 0, dtype=ids.dtype))
        if mask is not None or not bool(there.all()):
            mask = ids.new_ones(B, T) if mask is None else mask
            given["attention_mask"] = widened(mask, there)
            self.slot.hub.call = dataclasses.replace(self._call, mask=given["attention_mask"])
        positions = given.get("position_ids")
        positions = torch.arange(T, device=ids.device) if positions is None else positions
        positions = positions.expand(B, T)
        after = positions + there.sum(1, keepdim=True) + shift
        positions = torch.cat([positions[:, :1], after[:, 1:]], 1)
        given["position_ids"] = widened(positions, there.cumsum(1).clamp(min=1))
        return given

    def _layered(self, there: Tensor, m: int) -> Tensor:
        """Which virtual tokens of the first block are there, [B, count], where later blocks have some of their own."""
        layers = max((p.layers for p in _active(self.slot)), default=1)
        self.count = m // layers
        if layers > 1 and not bool(there.all()):
            raise SiteError(
                "virtual tokens that later blocks replace have no place in rows without them, so every row of a batch needs "
                "a prompt of the same length and depth; run rows without one by themselves"
            )
        return there[:, : self.count]

    def _replace(self, later: list[Tensor]) -> None:
        """Puts the virtual tokens of later blocks, [B, count, d] each, in the place of what the block before made."""
        from .site import stacks

        if not later:
            return
        at, end = self.at, self.at + self.count
        blocks = [self.module.get_submodule(path) for path in stacks(self.module)]
        if len(later) >= len(blocks):
            raise SiteError(
                f"a prompt of depth {len(later) + 1} does not fit a network of {len(blocks)} blocks; use a smaller depth"
            )

        def replacing(tokens: Tensor) -> Any:
            def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (torch.cat([args[0][:, :at], tokens, args[0][:, end:]], 1), *args[1:])

            return replace

        for block, tokens in zip(blocks[1:], later, strict=False):
            self._hooks.append(block.register_forward_pre_hook(replacing(tokens)))

    def _images(self, m: int) -> None:
        """Virtual tokens after an image's class token, once positions are added; those of later blocks replace them."""
        from .site import CLASS_TOKENS

        embeddings = self.module.get_submodule("embeddings")
        self.at = at = sum(getattr(embeddings, name, None) is not None for name in CLASS_TOKENS)

        def insert(_: nn.Module, __: Any, embeds: Tensor) -> Tensor:
            mixed = self._mix(embeds, m, self.slot.hub.call)
            d = embeds.shape[2]
            if not bool((mixed[:, :m, d] != 0).all()):
                raise SiteError(
                    "an image network has no mask for tokens, so every row of a batch needs a visual prompt of the same "
                    "length and depth; run rows without one by themselves"
                )
            self._layered(mixed[:, :m, d] != 0, m)
            first, *later = mixed[:, :m, :d].split(self.count, 1)
            self._replace(list(later))
            return torch.cat([embeds[:, :at], first, embeds[:, at:]], 1)

        self._hooks.append(embeddings.register_forward_hook(insert))

    @staticmethod
    def cross(slot: Slot, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an encoder-decoder with a mask that lets the decoder see the encoder's virtual tokens."""
        m = _longest(slot, "tokens")
        if not m:
            return given
        done, ids, embeds = given.get("encoder_outputs"), given.get("input_ids"), given.get("inputs_embeds")
        if done is not None:
            rows, T, device = done[0].shape[0], done[0].shape[1] - m, done[0].device
        else:
            inputs = ids if ids is not None else embeds
            if inputs is None:
                return given
            rows, T, device = inputs.shape[0], inputs.shape[1], inputs.device
        width = slot.site.shape[1]
        x = torch.zeros(rows, 0, width, device=device)
        there = slot(x, x.new_zeros(rows, m, width + 2), slot.hub.call)[..., width] != 0
        mask = given.get("attention_mask")
        if mask is None:
            mask = there.new_ones(rows, T, dtype=torch.long)
        if mask.shape[1] == T:
            given = {**given, "attention_mask": torch.cat([there.to(mask.dtype), mask], 1)}
        return given

    def leave(self, out: Any) -> Any:
        """The forward's result without the positions of virtual tokens."""
        if not self.count or self.slot is self.slot.hub.crossing:  # a decoder looks at these too
            return out
        if isinstance(out, tuple):
            return (self._cut(out[0]), *out[1:])
        for name in ("last_hidden_state", "logits"):
            if isinstance(out.get(name), Tensor):
                out[name] = self._cut(out[name])
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(self._cut(h) for h in out["hidden_states"])
        pooler = getattr(self.module, "pooler", None)
        if out.get("pooler_output") is not None and pooler is not None:
            out["pooler_output"] = pooler(out["last_hidden_state"])
        return out

    def _cut(self, hidden: Tensor) -> Tensor:
        if not self.at:
            return hidden[:, self.count :]
        return torch.cat([hidden[:, : self.at], hidden[:, self.at + self.count :]], 1)
