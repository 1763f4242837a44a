"""(IA)^3: a factor for each feature of a layer's output, or of its input in feed-forward layers.

Shapes: i = d_in, o = d_out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@forms.register("ia3")
@dataclass(frozen=True)
class IA3(Form):
    """Scales keys and values, and what enters a feed-forward's last layer: ``c = (l - 1) * y`` or ``W ((l - 1) * x)``.

    The factors l start at one. A layer's bias is scaled with its output, and not with its input.

    Args:
        side: what is scaled at a site: its ``"output"``, its ``"input"``, or ``"auto"``: the input of the last layer of
            a feed-forward (role ``down``), the output everywhere else.

    Reference: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv 2205.05638. Its losses and its pretrained start are no part of the form.

    Raises:
        ConfigError: a setting is out of range.
    """

    side: Literal["auto", "output", "input"] = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    default_sites: ClassVar[str] = "key | value | qkv | key_value | down"
    acts: ClassVar[str] = "around"
    default_lr: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "IA3"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2205.05638"
    tensor_names: ClassVar[dict[str, str]] = {"ia3_l": "l"}

    def __post_init__(self) -> None:
        if self.side not in ("auto", "output", "input"):
            raise ConfigError(f"IA3: side must be one of auto, output, input, got {self.side!r}")

    def at_input(self, site: Site) -> bool:
        """Whether the input is scaled at ``site``."""
        return self.side == "input" or (self.side == "auto" and site.kind == "linear" and site.role == "down")

    def patch(self, site: Site) -> Patch:
        return IA3Patch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and site.kind == "conv" and self.side == "input":
            return f"the form 'ia3' scales the output of convolutions such as {site.name!r}, not their input"
        return reason

    def unlike_peft(self, patch: Patch) -> str:
        return "a convolution in one dimension" if patch.site.kind == "conv" and len(patch.site.shape) == 3 else ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        inputs = [path for path, p in patches.items() if isinstance(p, IA3Patch) and p.at_input]
        outputs = [path for path in patches if path not in inputs]
        # PEFT compares the ends of paths; names that would catch others are written as one regular expression
        clear = not any(other.endswith(path) for path in inputs for other in outputs)
        pattern = "|".join(re.escape(path) for path in inputs)
        said = {"target_modules": list(patches)} if inputs and clear else {}  # it wants the one list inside the other
        return {
            **said,
            "feedforward_modules": inputs if clear else pattern,
            "fan_in_fan_out": any(p.site.transposed for p in patches.values()),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> IA3:
        if not path:
            return cls()
        named = config.get("feedforward_modules") or []
        hit = re.fullmatch(named, path) if isinstance(named, str) else any(path.endswith(end) for end in named)
        return cls(side="input" if hit else "output")

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensor, which tells the size of one side only; 0 stands for the other."""
        shape = tuple(tensors["l"].shape)
        if len(shape) > 2:
            return Site(path, "conv", "other", (shape[1], 0, *[0] * (len(shape) - 2)))
        at_input = cls.from_peft(config, path).at_input(Site(path, "linear", "other"))
        sizes = (0, shape[1]) if at_input else (shape[0], 0)
        turned = bool(config.get("fan_in_fan_out"))
        return Site(path, "linear", "other", sizes[::-1] if turned else sizes, transposed=turned)


class IA3Patch(Patch):
    """l: [o, 1] at outputs, [1, i] at inputs, [1, o, 1, ...] at convolutions, as PEFT stores it."""

    keys = {"l": "ia3_l"}
    form: IA3

    def __init__(self, form: IA3, site: Site) -> None:
        super().__init__(form, site)
        self.at_input = form.at_input(site)
        if site.kind == "conv":
            shape: tuple[int, ...] = (1, site.shape[0], *[1] * (len(site.shape) - 2))
        else:
            shape = (1, site.d_in) if self.at_input else (site.d_out, 1)
        self.l = nn.Parameter(torch.ones(shape))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.l.fill_(1.0)

    def _factor(self, like: Tensor) -> Tensor:
        """``l - 1``, to be multiplied with an input or output."""
        factor = (self.l - 1.0).to(like.dtype)
        return factor if self.site.kind == "conv" else factor.flatten()

    def _scaled(self, x: Tensor) -> Tensor:
        """``l * x``; as ``x + (l - 1) x`` in a type that would round l to one."""
        if self.l.dtype != x.dtype:
            return torch.addcmul(x, x, self._factor(x))
        return x * (self.l if self.site.kind == "conv" else self.l.view(-1))

    def around(self, run: Callable[[Tensor], Tensor], x: Tensor, call: Call = NO_CALL) -> Tensor:
        return run(self._scaled(x)) if self.at_input else self._scaled(run(x))

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if not self.at_input:
            return y * self._factor(y)
        weight = self._weight().T if self.site.transposed else self._weight()
        return F.linear(x * self._factor(x), weight.to(x.dtype))

    def _weight(self) -> Tensor:
        if self.base is None:
            raise AdapterError(f"the (IA)^3 at {self.site.name!r} must be attached to a model before it is used")
        stored = self.base._parameters.get(self.site.param or "weight")
        weight: Tensor = getattr(self.base, self.site.param or "weight") if stored is None else stored
        return weight

    def deltas(self) -> dict[str, Tensor]:
        weight = self._weight().detach()
        factor = self.l - 1.0
        if self.site.kind == "conv":
            factor = factor.transpose(0, 1)
        elif self.site.transposed:
            factor = factor.T
        changes = {self.site.param or "weight": factor * weight.to(torch.promote_types(weight.dtype, factor.dtype))}
        bias = None if self.base is None or self.at_input else self.base._parameters.get("bias")
        if bias is not None and not self.site.param:
            changes["bias"] = factor.flatten() * bias.detach()
        return changes

    def delta(self) -> Tensor:
        return self.deltas()[self.site.param or "weight"]

    def misfit(self, site: Site) -> str:
        """Only the side that is scaled matters, and a file of PEFT's tells nothing else."""
        if site.kind != self.site.kind:
            return super().misfit(site)
        sizes = [s.shape[0] if s.kind == "conv" else s.d_in if self.at_input else s.d_out for s in (self.site, site)]
        side = "input" if self.at_input else "output"
        return "" if sizes[0] == sizes[1] else f"it scales an {side} of {sizes[0]}, and the model's has {sizes[1]}"
