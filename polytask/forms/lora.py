"""LoRA: a low-rank change of a weight.

Shapes: B rows, T tokens, i = d_in, o = d_out, r rank, N adapters, R the ranks of several adapters side by side.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError, MixError, listing
from polytask.core.form import NO_CALL, Bank, Call, Form, Patch, Weights, forms, per_row
from polytask.core.pairs import aligned, outputs, parameters
from polytask.core.peft_files import check_peft, pattern, pattern_keys
from polytask.core.site import Site

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

PLAIN_STARTS = ("zero-B", "gaussian", "random")
_VERSION, _LEARNS = operator.attrgetter("_version"), operator.attrgetter("requires_grad")


@forms.register("lora")
@dataclass(frozen=True)
class LoRA(Form):
    """A weight's change as a product of two thin matrices: ``c(x) = s B (A x)``.

    ``s = alpha / rank`` ("classic"), or ``alpha / sqrt(rank)`` ("rank-stabilised", arXiv 2312.03732), which keeps the
    size of the update when the rank grows. Acts on linear layers (also stored transposed), convolutions (A has the
    layer's kernel and stride, B is 1x1), embeddings (A is looked up, not multiplied) and fused experts (factors per
    expert).

    Args:
        rank: r, the inner size of both factors.
        alpha: the scale's numerator; twice the rank when None.
        dropout: probability of zeroing each input feature, while the model is in training mode. None at embeddings, as
            in PEFT, and none where the change is made to the weight.
        scaling: ``"classic"`` or ``"rank-stabilised"``.
        init: ``"zero-B"`` (A Kaiming-uniform, B zero: starts as the base), ``"gaussian"`` (A normal with deviation
            1/rank, B zero), ``"random"`` (both Kaiming-uniform: does not start as the base; for tests), or one of
            `polytask.forms.starts`: ``pissa``, ``olora``, ``orthogonal``, ``loftq``, ``corda``, ``eva``, ``lora-ga``,
            some with an option after a colon, as ``"pissa:16"``. All of those start as the base too.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. Where the paper starts A
    from a normal distribution, its code and PEFT use Kaiming-uniform; so does ``"zero-B"``.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["classic", "rank-stabilised"] = "classic"
    init: str = "zero-B"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts")
    peft_type: ClassVar[str] = "LORA"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2106.09685"
    tensor_names: ClassVar[dict[str, str]] = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"LoRA: rank must be a whole number of at least 1, got {self.rank!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA: dropout must be in [0, 1), got {self.dropout!r}")
        if self.scaling not in ("classic", "rank-stabilised"):
            raise ConfigError(f"LoRA: scaling must be one of classic, rank-stabilised, got {self.scaling!r}")
        if self.init not in PLAIN_STARTS:
            from .starts import check

            check(self)

    @property
    def scale(self) -> float:
        """s, the number that the product is multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "classic" else math.sqrt(self.rank))

    @property
    def subtracts(self) -> bool:
        """Whether its factors start at a product that is taken out again."""
        if self.init in PLAIN_STARTS:
            return False
        from .starts import start_of

        return start_of(self.init).subtracts

    @property
    def in_file(self) -> LoRA:
        """The plain LoRA that a file describes: of twice the rank, with the same s, where a start is subtracted."""
        if not self.subtracts:
            return self
        rank = 2 * self.rank
        alpha = self.scale * (rank if self.scaling == "classic" else math.sqrt(rank))
        return replace(self, rank=rank, alpha=alpha, init="zero-B")

    def patch(self, site: Site) -> Patch:
        if self.subtracts:
            from .starts import StartPatch

            return StartPatch(self, site)
        return LoRAPatch(self, site)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        if self.init not in PLAIN_STARTS:
            from .seen import begin

            begin(self, model, adapter, batches)

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        if self.init in PLAIN_STARTS:
            return {}
        from .starts import measured

        return measured(self, model, adapter)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason or not site.shape:
            return reason
        if site.kind == "linear" and len(site.shape) != 2:
            return f"site {site.name!r} has a weight of shape {site.shape}; LoRA needs two dimensions there"
        if self.init not in PLAIN_STARTS:
            from .starts import misfit

            return misfit(self, site)
        return ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        own: dict[str, LoRA] = {path: p.form.in_file for path, p in patches.items() if isinstance(p.form, LoRA)}
        general = self.in_file
        stable = {f.scaling for f in own.values()} | {self.scaling} == {"rank-stabilised"}

        def alpha(form: LoRA) -> float:
            """PEFT has one scaling for all sites: where both occur, the classic one, with the alpha that gives s."""
            classic = form.scaling == "rank-stabilised" and not stable
            value = form.scale * form.rank if classic else 2.0 * form.rank if form.alpha is None else form.alpha
            return int(value) if value == int(value) else value

        keys = pattern_keys(own)
        return {
            "r": general.rank,
            "lora_alpha": alpha(general),
            "lora_dropout": 0.0 if any(p.site.kind == "experts" for p in patches.values()) else self.dropout,
            "use_rslora": stable,
            "rank_pattern": {keys[path]: f.rank for path, f in own.items() if f.rank != general.rank},
            "alpha_pattern": {keys[path]: alpha(f) for path, f in own.items() if alpha(f) != alpha(general)},
            "fan_in_fan_out": any(p.site.transposed for p in patches.values()),
            "init_lora_weights": True,
            "bias": "none",
            "use_dora": False,
            "lora_bias": False,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> LoRA:
        """The form at one site of a PEFT adapter. Raises `AdapterError` for what plain LoRA cannot express."""
        if not path:
            _check_peft(config)
        rank = pattern(config.get("rank_pattern") or {}, path, config.get("r", 8))
        return cls(
            rank=int(rank),
            alpha=pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            scaling="rank-stabilised" if config.get("use_rslora") else "classic",
        )

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        if config.get("peft_type") == "ADALORA":
            return cls is LoRA
        return config.get("peft_type") == cls.peft_type and not config.get("use_dora")  # that is the form "dora"

    @classmethod
    def translated(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        if config.get("peft_type") != "ADALORA":
            return config, tensors
        from .adalora import as_lora

        return as_lora(config, tensors)

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensors, for files that do not describe it."""
        A, B = tensors["A"], tensors["B"]
        if config.get("_experts"):
            module, _, param = path.rpartition(".")
            return Site(module, "experts", "other", (A.shape[0], B.shape[1], A.shape[2]), param=param, read="weight")
        if A.dim() > 2 and A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"PEFT's LoRA of the grouped convolution {path!r} mixes the groups, which no change of its weight "
                "does; leave grouped convolutions out of target_modules"
            )
        if A.dim() > 2:
            return Site(path, "conv", "other", (B.shape[0], *A.shape[1:]))
        if config.get("_embedding"):
            return Site(path, "embedding", "other", (A.shape[1], B.shape[0]))
        if config.get("fan_in_fan_out"):
            return Site(path, "linear", "other", (A.shape[1], B.shape[0]), transposed=True)
        return Site(path, "linear", "other", (B.shape[0], A.shape[1]))


_ELSE = {  # PEFT's settings that make it another function
    "use_dora": "DoRA", "lora_bias": "a bias in B", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing", "use_bdlora": "block-diagonal LoRA", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
}  # fmt: skip
_PLAIN = (  # and those that are read, or that do not matter once it is trained
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config", "megatron_core",
    "qalora_group_size",
)  # fmt: skip


def _check_peft(config: Mapping[str, Any]) -> None:
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"this PEFT adapter was started with init_lora_weights={start!r}, which changes the base's own weights; "
            "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...): that is plain LoRA"
        )
    check_peft(config, "lora", _PLAIN, _ELSE)


class LoRABank(Bank):
    """Several LoRAs at once: factors side by side for the whole batch, stacked for the rows of a batch or for its tokens."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        super().__init__(patches)
        forms = {name: patch.form for name, patch in self.patches.items()}
        ranks = {form.rank for form in forms.values()}
        self._rank, self._uneven = max(ranks), len(ranks) > 1
        self._dropouts = {form.dropout for form in forms.values()}
        # one site has patches of one class; one that computes something else is served by the loop over its own methods
        self._first = next(iter(self.patches.values()))
        kind, site = type(self._first), self._first.site
        self._site = site.name
        self._plain = site.kind == "linear" and kind.add is LoRAPatch.add and kind.contribute is LoRAPatch.contribute
        self._parts: dict[str, tuple[Tensor, Tensor, float]] = {
            name: (patch._parameters["A"], patch._parameters["B"], forms[name].scale)  # type: ignore[misc]
            for name, patch in self.patches.items()
        }
        self._tensors = [tensor for A, B, _ in self._parts.values() for tensor in (A, B)]
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._layout: tuple[Any, _Layout] | None = None

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        if not self._plain or self._dropping or (weights.fixed is not None and len(self.patches) == 1):
            return super().apply(x, y, out, weights, call)
        if weights.picks is not None:
            return self._picked(x, out, weights)
        if weights.index is not None:
            if self._by_token(x, weights):
                return self._tokens(x, out, weights, outputs)
            return self._indexed(x, out, weights)
        if weights.fixed is not None:
            A, B = self._keep("fixed", (weights.fixed, out.dtype, out.device), lambda: self._fixed(weights, out.dtype))
            return _plus(out, F.linear(x.to(A.dtype), A), B)
        A, B, owner = self._keep("side by side", (out.dtype, out.device), lambda: self._side_by_side(out.dtype))
        x, out, scale = self._dense(x, out, weights)
        h = F.linear(x.to(A.dtype), A)  # [..., R]
        return _plus(out, h * scale[..., owner].to(h.dtype), B)

    def average(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        self._check_average()
        if self._dropping:  # the average is one LoRA, and draws one mask
            x = F.dropout(x, max(self._dropouts), training=True)
        if weights.fixed is not None:
            key = (weights.names, weights.fixed, out.dtype, out.device)
            A, B = self._keep("mean", key, lambda: self._mean(weights, out.dtype))  # [r, i], [r, o]
            return _plus(out, F.linear(x.to(A.dtype), A), B.t())
        if self._by_token(x, weights):
            if weights.index is not None:
                return self._tokens(x, out, weights, parameters)
            A, B, _ = self._keep("side by side", (out.dtype, out.device), lambda: self._side_by_side(out.dtype))
            x, out, scale = self._dense(x, out, weights)
            scale = scale.to(A.dtype).unsqueeze(-1)  # [..., N, 1]
            h = (F.linear(x.to(A.dtype), A).unflatten(-1, (-1, self._rank)) * scale).sum(-2, keepdim=True)
            return _plus(out, (h * scale).flatten(-2), B)
        A, B = self._mean(weights, out.dtype)
        if A.dim() == 2:
            return _plus(out, F.linear(x.to(A.dtype), A), B.t())
        x, out, _ = per_row(x, out, len(A), self._site)
        h = torch.bmm(x.reshape(len(A), -1, x.shape[-1]).to(A.dtype), A.transpose(1, 2))  # [B, T, r]
        return out + torch.bmm(h, B).view(out.shape).to(out.dtype)

    def forget(self) -> None:
        self._kept, self._layout = {}, None

    @property
    def _dropping(self) -> bool:
        return any(self._dropouts) and self._first.dropping  # all are bound to one module

    def _keep(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, or returned the last time if neither the key nor the adapters have changed since."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(map(_LEARNS, self._tensors))):
            return make()
        try:
            # versions only grow, so their sum tells of any change; a thousand of them are read at each site
            key = (key, torch.is_inference_mode_enabled(), sum(map(_VERSION, self._tensors)))
        except RuntimeError:  # made in inference mode: such tensors do not say when they change
            return make()
        kept = self._kept.get(what)
        if kept is None or kept[0] != key:
            self._kept.pop(what, None)  # before the new ones are made: together they may not fit into memory
            kept = self._kept[what] = (key, make())
        return kept[1]

    def _check_average(self) -> None:
        if not self._plain:
            raise MixError(
                f"the parameters of the adapters at {self._site!r} cannot be averaged: that needs plain LoRAs at linear sites; "
                "use a mix that combines outputs"
            )
        for what, uneven in (("rank", self._uneven), ("dropout", len(self._dropouts) > 1 and self._dropping)):
            if uneven:
                each = listing(f"{name} ({getattr(patch.form, what)})" for name, patch in self.patches.items())
                raise MixError(
                    f"LoRAs of different {what} cannot be averaged at {self._site!r}: {each}; use a mix that combines outputs"
                )

    def _by_token(self, x: Tensor, weights: Weights) -> bool:
        """Whether each token has weights of its own: rows that are one token each count."""
        shape = weights.values.shape[:-1]  # type: ignore[union-attr]
        return len(shape) > 1 or (len(shape) == 1 and x.shape[0] == shape[0] == x.shape[:-1].numel())

    def _places(self, names: tuple[str, ...], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Where each of ``names`` [M] lies in the stacks (N: it is another bank's), and where each of ours [N] lies there.

        Both are None where the names are ours in order.
        """
        kept = self._kept.get("places")
        if kept is None or kept[0][1] != device or (kept[0][0] is not names and kept[0][0] != names):
            if names == tuple(self.patches):
                kept = ((names, device), (None, None))
            else:
                ours, theirs = ({name: i for i, name in enumerate(given)} for given in (self.patches, names))
                place = [ours.get(name, len(ours)) for name in names]
                back = [theirs[name] for name in self.patches]
                kept = ((names, device), (torch.tensor(place, device=device), torch.tensor(back, device=device)))
            self._kept["places"] = kept
        places: tuple[Tensor | None, Tensor | None] = kept[1]
        return places

    def _index(self, weights: Weights, device: torch.device) -> Tensor:
        """Where the chosen lie in the stacks, [..., k]; N for those of other banks."""
        index: Tensor = weights.index.to(device)  # type: ignore[union-attr]
        place, _ = self._places(weights.names, device)
        return index if place is None else place[index]

    def _dense(self, x: Tensor, out: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """x, out and the weights of ours in order, [N] or [..., N], lined up with them."""
        scale: Tensor = weights.values.to(x.device)  # type: ignore[union-attr]
        _, back = self._places(weights.names, x.device)
        if back is not None:
            scale = scale.index_select(-1, back)
        if scale.dim() == 2:
            x, out, per = per_row(x, out, scale.shape[0], self._site)
            scale = scale.repeat_interleave(per, 0) if per > 1 else scale
            scale = scale.reshape(scale.shape[0], *[1] * (x.dim() - 2), scale.shape[1])
        elif scale.dim() > 2:
            shape = self._line_up(x, scale)
            x, out = x.expand(*shape, -1), out.expand(*shape, -1)
        return x, out, scale

    def _line_up(self, x: Tensor, values: Tensor) -> torch.Size:
        """The leading shape that tokens and weights for each of them have together."""
        try:
            shape: torch.Size = torch.broadcast_shapes(x.shape[:-1], values.shape[:-1])
        except RuntimeError:
            raise MixError(
                f"site {self._site!r} got an input of shape {tuple(x.shape)}, and the mix has weights for tokens of shape "
                f"{tuple(values.shape[:-1])}; give weights for {tuple(x.shape[:-1])}, for each row, or leave this site out of "
                "the adapters"
            ) from None
        return shape

    def _tokens(self, x: Tensor, out: Tensor, weights: Weights, step: Callable[..., Tensor]) -> Tensor:
        """Each token its own adapters, chosen by a router."""
        values: Tensor = weights.values  # type: ignore[assignment]
        index, k = self._index(weights, x.device), values.shape[-1]
        shape = x.shape[:-1]
        if values.shape[:-1] != shape:
            if values.dim() > 2:
                shape = self._line_up(x, values)
                values, index = values.expand(*shape, k), index.expand(*shape, k)
                x, out = x.expand(*shape, -1), out.expand(*shape, -1)
            values, index = values.reshape(-1, k), index.reshape(-1, k)
        A, B = self._stacks(out.dtype, out.device)
        flat = out.reshape(-1, out.shape[-1])
        given = (index.reshape(-1, k), values.reshape(-1, k).to(out.device, out.dtype))
        return step(x.reshape(-1, x.shape[-1]).to(out.dtype), flat, A, B, *given).view(*shape, -1)

    def _stacks(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """All A [N + 1, r, i] and s*B [N + 1, r, o], the last ones zero, for adapters of other banks; r is the largest rank."""

        def make() -> tuple[Tensor, Tensor]:
            count, rank, (A, B, _) = len(self._parts), aligned(self._rank, dtype), next(iter(self._parts.values()))
            if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(map(_LEARNS, self._tensors))):
                parts = [(_pad(A, rank, 0), _pad(B.t() * s, rank, 0)) for A, B, s in self._parts.values()]
                parts.append((A.new_zeros(rank, A.shape[1]), B.new_zeros(rank, B.shape[0])))
                found = [torch.stack(part).to(dtype) for part in zip(*parts, strict=True)]
                return found[0], found[1]
            all_A = torch.zeros(count + 1, rank, A.shape[1], dtype=dtype, device=device)
            all_B = torch.zeros(count + 1, rank, B.shape[0], dtype=dtype, device=device)
            with torch.no_grad():
                for i, (A, B, s) in enumerate(self._parts.values()):
                    all_A[i, : len(A)] = A
                    all_B[i, : len(A)] = B.t() * s
            return all_A, all_B

        stacks: tuple[Tensor, Tensor] = self._keep("stacks", (dtype, device), make)
        return stacks

    def _mean(self, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``sum_n w_n A_n`` [r, i] and ``sum_n w_n s_n B_n`` [r, o]; of weights for each row, one for each."""
        device = self._first._parameters["A"].device  # type: ignore[union-attr]
        A, B = self._stacks(dtype, device)
        values = torch.tensor(weights.fixed) if weights.fixed is not None else weights.values
        values = values.to(device, dtype)  # type: ignore[union-attr]
        if weights.index is not None:
            index = self._index(weights, device)
            found = [torch.bmm(values[:, None], S[index].flatten(2)).view(-1, *S.shape[1:]) for S in (A, B)]
            return found[0], found[1]
        _, back = self._places(weights.names, device)
        if back is not None:
            values = values.index_select(-1, back)
        count = len(self.patches)
        found = [(values @ S[:count].flatten(1)).unflatten(-1, S.shape[1:]) for S in (A, B)]
        return found[0], found[1]

    def _fixed(self, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A of the adapters with a weight as [R, i], and w*s*B as [o, R]."""
        pairs = zip(weights.names, weights.fixed or (), strict=True)
        used = [(self.patches[name], weight) for name, weight in pairs if name in self.patches]
        A = torch.cat([p.A for p, _ in used])
        return A.to(dtype), torch.cat([p.B * (w * p.form.scale) for p, w in used], 1).to(dtype)

    def _side_by_side(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """All A as [R, i], all s*B as [o, R], and which adapter each of the R ranks belongs to."""
        patches = list(self.patches.values())
        A = torch.cat([p.A for p in patches]).to(dtype)
        B = torch.cat([p.B * p.form.scale for p in patches], 1).to(dtype)
        ranks = torch.tensor([p.form.rank for p in patches], device=A.device)
        return A, B, torch.repeat_interleave(torch.arange(len(patches), device=A.device), ranks)

    def _picked(self, x: Tensor, out: Tensor, weights: Weights) -> Tensor:
        """Each row its own adapters, known beforehand.

        Stacked factors cost memory traffic, moved rows cost it too: with fewer tokens per row than ranks, rows of the
        same adapters are brought together and share a stacked copy; with more, each row gets its own and stays there.
        """
        picks: Picks = weights.picks  # type: ignore[assignment]
        x, out, _ = per_row(x, out, len(picks), self._site)
        short = x.numel() // (len(picks) * x.shape[-1]) < self._rank
        key = (picks, short, out.device)
        layout = self._layout[1] if self._layout is not None and self._layout[0] == key else None
        again = layout is not None
        if layout is None:
            own = picks
            if len(self.patches) < len(weights.names):  # the others are of another form
                own = tuple(tuple(pick for pick in row if pick[0] in self.patches) for row in picks)
            layout = _lay_out(own, short, out.device)
            self._layout = (key, layout)
        if not any(layout.chunks):
            return out

        def make() -> tuple[Tensor, Tensor, float | Tensor]:
            return self._stacked(layout.chunks, out.dtype)

        # a mix that acts once (a batch of requests) leaves nothing behind: memory used again at once stays in the cache
        A, B, scale = self._keep("picked", (key, out.dtype), make) if again and layout.keep else make()
        return _batched(x, out, A, B, scale, layout)

    def _stacked(self, chunks: Picks, dtype: torch.dtype) -> tuple[Tensor, Tensor, float | Tensor]:
        """For G chunks of rows with up to k adapters: A [G, k*r, i], B [G, k*r, o]; w*s, a number or [G, 1, k*r]."""
        rank, k = self._rank, max(map(len, chunks))
        flat = [pick for chunk in chunks for pick in chunk + (None,) * (k - len(chunk))]  # [G*k]
        parts = self._parts
        if self._uneven:
            parts = {name: (_pad(A, rank, 0), _pad(B, rank, 1), scale) for name, (A, B, scale) in parts.items()}
        if None in flat:
            A, B, _ = next(iter(parts.values()))
            zero = (A.new_zeros(()).expand(A.shape), B.new_zeros(()).expand(B.shape), 0.0)
            used = [zero if pick is None else parts[pick[0]] for pick in flat]
        else:
            used = [parts[pick[0]] for pick in flat]  # type: ignore[index]
        A = torch.stack([part[0] for part in used]).to(dtype).view(len(chunks), k * rank, -1)
        if k == 1:
            B = torch.stack([part[1] for part in used]).to(dtype).transpose(1, 2)
        else:
            B = torch.stack([part[1].t() for part in used]).to(dtype).view(len(chunks), k * rank, -1)
        scales = [0.0 if pick is None else pick[1] * part[2] for pick, part in zip(flat, used, strict=True)]
        distinct = {scale for pick, scale in zip(flat, scales, strict=True) if pick is not None}  # zeros take any scale
        if len(distinct) == 1:
            return A, B, distinct.pop()
        scale = torch.tensor(scales, dtype=dtype, device=A.device)
        return A, B, scale.repeat_interleave(rank).view(len(chunks), 1, -1)

    def _indexed(self, x: Tensor, out: Tensor, weights: Weights) -> Tensor:
        """Each row its own adapters, chosen by a router: the factors are gathered by index."""
        values: Tensor = weights.values  # type: ignore[assignment]
        x, out, _ = per_row(x, out, len(values), self._site)
        A, B = self._stacks(out.dtype, out.device)
        index = self._index(weights, out.device)  # [B, k]
        scale = values.to(out.dtype).repeat_interleave(A.shape[1], 1)[:, None]  # [B, 1, k*r]
        return _batched(x, out, A[index].flatten(1, 2), B[index].flatten(1, 2), scale, _Layout(()))


Picks = tuple[tuple[tuple[str, float], ...], ...]  # for each row (or chunk of rows) the adapters and their weights


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the B rows of a batch lie in a batched product: in G chunks of ``size`` rows that have the same adapters."""

    chunks: Picks
    order: Tensor | None = None  # [G * size], the row at each place; None where the rows lie so already
    back: Tensor | None = None  # [B], the place of each row
    keep: bool = True  # whether the stacked factors are few enough to be kept


def _lay_out(picks: Picks, short: bool, device: torch.device) -> _Layout:
    """The layout for rows with few tokens (``short``), or many. G is less than three times the number of groups."""
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for row, pick in enumerate(picks):
        groups.setdefault(pick, []).append(row)
    size = len(picks) // len(groups)
    if size == 1:
        return _Layout(picks)
    chunks, order = [], []
    for pick, rows in groups.items():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            chunks.append(pick)
            order += part + part[:1] * (size - len(part))  # filled up with a row whose second result nobody reads
    if order == list(range(len(picks))):
        return _Layout(tuple(chunks))
    if not short:
        return _Layout(picks, keep=False)
    back = [0] * len(picks)
    for place in reversed(range(len(order))):
        back[order[place]] = place
    return _Layout(tuple(chunks), torch.tensor(order, device=device), torch.tensor(back, device=device))


def _batched(x: Tensor, out: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, layout: _Layout) -> Tensor:
    """``out`` plus one product per chunk: x [B, ..., i] times A [G, R, i], scaled, times B [G, R, o]."""
    dtype, count = A.dtype, len(A)
    if layout.order is not None:
        x = x.index_select(0, layout.order)
    h = torch.bmm(x.reshape(count, -1, x.shape[-1]).to(dtype), A.transpose(1, 2))  # [G, size*T, R]
    alpha = 1.0
    if isinstance(scale, Tensor):
        h = h * scale
    else:
        alpha = scale
    if layout.back is not None:
        part = torch.bmm(h, B).view(-1, *out.shape[1:])[layout.back]
        if torch.is_grad_enabled() or part.dtype != out.dtype or not out.is_contiguous():
            return out + (part * alpha).to(out.dtype)
        return out.add_(part, alpha=alpha)
    flat = out.reshape(count, -1, out.shape[-1])
    if torch.is_grad_enabled() or h.dtype != out.dtype or not out.is_contiguous():
        return torch.baddbmm(flat, h.to(B.dtype), B, alpha=alpha).to(out.dtype).view(out.shape)
    flat.baddbmm_(h, B, alpha=alpha)
    return out


def _plus(out: Tensor, h: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
    """``out + alpha * h B^T`` in one kernel; h is [..., r] and B [o, r]. In place where no gradients are recorded."""
    if h.dtype != out.dtype or B.dtype != out.dtype:  # autocast, or a base that changes its type
        return out + (F.linear(h, B.to(h.dtype)) * alpha).to(out.dtype)
    h = h.reshape(-1, h.shape[-1])
    if not torch.is_grad_enabled() and out.is_contiguous():
        out.view(-1, out.shape[-1]).addmm_(h, B.t(), alpha=alpha)
        return out
    return torch.addmm(out.reshape(-1, out.shape[-1]), h, B.t(), alpha=alpha).view(out.shape)


def _pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    short = size - tensor.shape[dim]
    if not short:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


class LoRAPatch(Patch):
    """A [r, i] and B [o, r] at one site; at convolutions A [r, c, *kernel], B [o, r, 1, ...]; per expert at experts."""

    bank = LoRABank
    form: LoRA

    def __init__(self, form: LoRA, site: Site) -> None:
        super().__init__(form, site)
        r, shape = form.rank, site.shape
        if site.kind == "conv":
            a, b = (r, *shape[1:]), (shape[0], r, *[1] * (len(shape) - 2))
        elif site.kind == "experts":  # [E, o, i]
            a, b = (shape[0], r, shape[2]), (shape[0], shape[1], r)
        else:
            a, b = (r, site.d_in), (site.d_out, r)
        self.A = nn.Parameter(torch.empty(a))
        self.B = nn.Parameter(torch.empty(b))
        if site.kind == "embedding":
            self.keys = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        else:
            self.keys = {"A": "lora_A.weight", "B": "lora_B.weight"}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            if self.site.kind == "embedding":
                # as PEFT: the zero factor is A, which is looked up, and B is normal
                self.A.zero_()
                self.B.normal_(generator=generator)
                if self.form.init == "random":
                    self.A.normal_(generator=generator)
                return
            fan_in = self.A[0].numel() if self.site.kind != "experts" else self.A.shape[2]
            if self.form.init == "gaussian":
                self.A.normal_(std=1.0 / self.form.rank, generator=generator)
            else:
                self.A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)  # kaiming_uniform(a=sqrt(5))
            self.B.zero_()
            if self.form.init == "random":
                self.B.uniform_(-(self.form.rank**-0.5), self.form.rank**-0.5, generator=generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.site.kind == "embedding":
            h = F.embedding(x, self.A.T.to(y.dtype))  # [..., r]
            return F.linear(h, self.B.to(y.dtype)) * (self.form.scale * self._embedding_scale())
        x = self._drop(x)
        if self.site.kind == "conv":
            return self._convolve(x)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.form.scale

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if self.site.kind != "linear":
            return super().add(x, y, out, weight, call)
        form = self.form
        if form.dropout:
            x = self._drop(x)
        A, B = self._parameters["A"], self._parameters["B"]
        if A.dtype != x.dtype:  # type: ignore[union-attr]
            A, B = A.to(x.dtype), B.to(x.dtype)  # type: ignore[union-attr]
        h = F.linear(x, A)  # type: ignore[arg-type]  # [..., r]
        if B.dtype != h.dtype:  # type: ignore[union-attr]
            B = B.to(h.dtype)  # type: ignore[union-attr]
        return _plus(out, h, B, weight * form.scale)  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        s = self.form.scale
        if self.site.kind == "embedding":
            return (self.B @ self.A).T * s
        if self.site.kind == "experts":
            return torch.bmm(self.B, self.A) * s
        if self.site.kind == "conv":
            return (torch.tensordot(self.B.flatten(1), self.A.flatten(1), 1) * s).reshape(self.site.shape)
        product = (self.B @ self.A) * s
        return product.T if self.site.transposed else product

    def thin(self) -> tuple[Tensor, Tensor] | None:
        if type(self).delta is not LoRAPatch.delta or self.site.kind == "experts":  # a form that changes more than B A
            return None
        return self.B.detach().flatten(1) * self.form.scale, self.A.detach().flatten(1)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.form.dropout, training=True) if self.form.dropout and self.dropping else x

    def _embedding_scale(self) -> float:
        """Gemma multiplies the looked-up vectors; the change of the weight is multiplied the same."""
        scale = getattr(self.base, "embed_scale", None)
        return 1.0 if scale is None else float(scale)

    def _convolve(self, x: Tensor) -> Tensor:
        base = self.base
        if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise AdapterError(f"the LoRA at {self.site.name!r} must be attached to a convolution before it is used")
        convolve: Sequence[Any] = (F.conv1d, F.conv2d, F.conv3d)
        dims = len(base.kernel_size)
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        A, B, groups = self.A.to(x.dtype), self.B.to(x.dtype), base.groups
        if groups == 1:
            h = convolve[dims - 1](x, A, None, base.stride, padding, base.dilation)
            return convolve[dims - 1](h, B) * self.form.scale
        # A sees the inputs of one group; the product is taken first, which is exact for any number of groups
        weight = LoRAPatch.delta(self).to(x.dtype)  # not that of a form which adds more to it
        return convolve[dims - 1](x, weight, None, base.stride, padding, base.dilation, groups)
