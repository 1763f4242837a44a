"""LoRA: a low-rank change of a weight.

Shapes: B rows, T tokens, i = d_in, o = d_out, r rank, N adapters, R the ranks of several adapters side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.peft_files import check_peft, pattern, pattern_keys
from polytask.core.site import Site

from .lora_bank import LoRABank, plus

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

PLAIN_STARTS = ("zero-B", "gaussian", "random")


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
        return plus(out, h, B, weight * form.scale)  # type: ignore[arg-type]

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
