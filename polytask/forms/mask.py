"""A learned binary mask over the base's own weights: some are switched off, none changes. One bit per weight on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Form, Patch, forms
from polytask.core.site import Site

from .full import DensePatch

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(flags: Tensor) -> Tensor:
    """Flags [n] as bytes [ceil(n / 8)], the first flag in the lowest bit."""
    rows = nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (rows * torch.tensor(_BITS, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def unpack(data: Tensor, count: int) -> Tensor:
    """The reverse of `pack`: bytes [ceil(n / 8)] as flags [n]."""
    bits = data[:, None] & torch.tensor(_BITS, dtype=torch.uint8, device=data.device)
    return bits.ne(0).flatten()[:count]


@forms.register("mask")
@dataclass(frozen=True)
class Mask(Form):
    """Switches single weights of the base off: ``W' = 1[m > threshold] W``, with a real number m learned per weight.

    m starts above the threshold everywhere, so it starts as the base. The gradient passes the step as if it were not
    there: ``dL/dm = W dL/dW'``. A file holds one bit per weight and so does a loaded adapter, until it trains again
    (then m is the start's value where a weight is on, and as far below the threshold where it is off).

    Args:
        threshold: what m must exceed.
        start_at: the m that every weight starts with.
        penalty_rate: lambda of the penalty ``lambda * sum over sites ||m||_2``.

    Reference: Zheng et al., Regularized Mask Tuning, arXiv 2307.15049. The gradient dropout of the paper is an objective,
    `polytask.learn.dropout.GradientDropout`. With AdamW a weight is switched off after
    ``(start_at - threshold) / lr`` steps at the earliest; the paper's 8e-5 suits long runs only.

    Raises:
        ConfigError: a setting is out of range.
    """

    threshold: float = 0.005
    start_at: float = 0.01
    penalty_rate: float = 1e-4

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts")
    default_sites: ClassVar[str] = "attention | patch"
    acts: ClassVar[str] = "weight"
    default_lr: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "POLYTASK_MASK"
    paper: ClassVar[str] = "arXiv 2307.15049"
    tensor_names: ClassVar[dict[str, str]] = {"mask.bits": "bits"}
    parameters: ClassVar[str] = "weight"

    def __post_init__(self) -> None:
        if not self.start_at > self.threshold:
            raise ConfigError(
                "Mask: start_at must be above threshold (or every weight starts switched off), got "
                f"start_at={self.start_at!r} and threshold={self.threshold!r}"
            )
        if self.penalty_rate < 0:
            raise ConfigError(f"Mask: penalty_rate must not be negative, got {self.penalty_rate!r}")

    def patch(self, site: Site) -> Patch:
        return MaskPatch(self, site)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        if not self.penalty_rate:
            return None
        norms = [p.scores.norm() for p in adapter.patches.values() if isinstance(p, MaskPatch)]
        return self.penalty_rate * torch.stack(norms).sum()


class MaskPatch(DensePatch):
    """A number per weight while it learns, in the weight's shape; a bit per weight when it was loaded."""

    keys = {"bits": "mask.bits"}
    packs = ("bits",)
    form: Any

    def __init__(self, form: Mask, site: Site) -> None:
        super().__init__(form, site)
        self.total = math.prod(site.shape)
        self.scores = nn.Parameter(torch.empty(site.shape))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.scores.fill_(self.form.start_at)

    @property
    def on(self) -> Tensor:
        """Which weights are switched on, as flags of the weight's shape."""
        bits = self._parameters.get("bits")
        if bits is not None:
            return unpack(bits, self.total).view(self.site.shape)
        return self.scores.detach() > self.form.threshold

    def deltas(self) -> dict[str, Tensor]:
        name = self.site.param or "weight"
        stored = self._base()._parameters[name]
        assert stored is not None
        off = ~self.on
        change = stored.detach() * off
        scores = self._parameters.get("scores")
        if scores is not None and scores.requires_grad and torch.is_grad_enabled():
            change = (scores - scores.detach()) * stored.detach() - change
            return {name: change}
        return {name: -change}

    def stored(self) -> dict[str, Tensor]:
        bits = self._parameters.get("bits")
        return {"bits": pack(self.on.flatten()) if bits is None else bits.detach()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._parameters = {"bits": nn.Parameter(torch.empty(-(-self.total // 8), dtype=torch.uint8), False)}
        super().load(tensors)
        if self.bits.dtype != torch.uint8:
            raise AdapterError(f"the mask at {self.site.name!r} must be bytes, and the file has {self.bits.dtype}")

    def trainable(self, flag: bool = True) -> None:
        if flag and "bits" in self._parameters:
            above = torch.where(self.on, self.form.start_at, 2 * self.form.threshold - self.form.start_at)
            self._parameters["scores"] = nn.Parameter(above.float())
            del self._parameters["bits"]
        super().trainable(flag)
