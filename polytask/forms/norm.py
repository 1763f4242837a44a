"""The scale and shift of norms, and biases: the smallest parts of a network that are worth training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from .full import FullPatch


@forms.register("norm")
@dataclass(frozen=True)
class Norm(Form):
    """Trains the scale and shift of LayerNorm, RMSNorm, BatchNorm and their kin, and nothing else.

    Holds the new values, which start as the base's own; a BatchNorm's running statistics stay as they are.

    Args:
        parameters: ``"all"``, or only the scale (``"weight"``) or the shift (``"bias"``).

    Reference: Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning,
    arXiv 2312.11420; Frankle et al., Training BatchNorm and Only BatchNorm, arXiv 2003.00152. The running statistics
    are those of the base, where the latter goes on collecting them.

    Raises:
        ConfigError: a setting is out of range.
    """

    parameters: Literal["all", "weight", "bias"] = "all"

    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    default_sites: ClassVar[str] = "kind:norm"
    acts: ClassVar[str] = "weight"
    peft_type: ClassVar[str] = "LN_TUNING"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2312.11420"
    tensor_names: ClassVar[dict[str, str]] = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
    stored: ClassVar[str] = "value"

    def __post_init__(self) -> None:
        if self.parameters not in ("all", "weight", "bias"):
            raise ConfigError(f"Norm: parameters must be one of all, weight, bias, got {self.parameters!r}")

    def patch(self, site: Site) -> Patch:
        return NormPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and self.parameters == "bias" and not site.bias:
            return f"the norm {site.name!r} has no shift"
        return reason

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Norm:
        return cls()

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensors. PEFT can train any module so; only norms are read."""
        weight = tensors["weight"]
        if weight.dim() != 1:
            raise AdapterError(
                f"this PEFT adapter trained {path!r}, whose weight of shape {tuple(weight.shape)} is no norm's, which "
                "the form 'norm' does not do; train it again with target_modules that are norms"
            )
        return Site(path, "norm", "norm", tuple(weight.shape), bias="bias" in tensors)


class NormPatch(FullPatch):
    """weight and bias, each of the width of the norm."""

    form: Norm

    def __init__(self, form: Norm, site: Site) -> None:
        super().__init__(form, site)
        self.keys = {name: f"ln_tuning_layers.{name}" for name in self._parameters}

    def start(self, generator: torch.Generator) -> None:
        base = self._base()
        with torch.no_grad():
            for name, own in self.named_parameters():
                own.copy_(base._parameters[name])  # type: ignore[arg-type]


@forms.register("bitfit")
@dataclass(frozen=True)
class BitFit(Form):
    """Trains the biases of linear layers, convolutions and norms: ``c(x) = b``, zero at the start.

    Modules without a bias are left out.

    Reference: Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models, arXiv 2106.10199. All biases, as in its main variant.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")
    default_sites: ClassVar[str] = "linear | kind:norm"
    peft_type: ClassVar[str] = "POLYTASK_BITFIT"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def patch(self, site: Site) -> Patch:
        return BitFitPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        return reason or ("" if site.bias else f"site {site.name!r} has no bias, which is all that 'bitfit' trains")


class BitFitPatch(Patch):
    """bias [o], the change of the base's."""

    keys = {"bias": "bias"}

    def __init__(self, form: BitFit, site: Site) -> None:
        super().__init__(form, site)
        self.bias = nn.Parameter(torch.zeros(site.d_out if site.kind == "linear" else site.shape[0]))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.bias.zero_()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return along(self.bias.to(y.dtype), y, self).expand_as(y)

    def deltas(self) -> dict[str, Tensor]:
        return {"bias": self.bias}


def along(vector: Tensor, y: Tensor, patch: Patch) -> Tensor:
    """A vector with an entry per channel, shaped to meet a module's output where its channels lie."""
    second = patch.site.kind == "conv" or isinstance(patch.base, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
    if not second:
        return vector
    after = y.dim() - 2 if patch.site.kind == "norm" else len(patch.site.shape) - 2  # a convolution may lack its batch
    return vector.reshape(-1, *[1] * after)
