"""FLoRA: a low-rank change with a core and a factor for each dimension of a weight.

Shapes: o outputs, c inputs (of one group), k kernel sizes, p, q and l the core's sizes for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from ._shapes import CONVOLVE, MatrixPatch, convolution, padded


@forms.register("flora")
@dataclass(frozen=True)
class FLoRA(Form):
    """A Tucker product keeps a weight's dimensions apart: ``dW = s G x_1 F_1 x_2 F_2 ...``.

    At linear layers that is ``s F_out G F_in^T``; at convolutions the kernel has its own, smaller size in the core, and
    the change is three thin convolutions. Starts at zero, by the core G, so that only G has a gradient at first.

    Args:
        rank: p and q, the core's sizes for outputs and inputs; a dimension that is smaller keeps its own size.
        kernel_rank: l, the core's size for each dimension of a kernel.
        scale: s, a plain multiplier.
        dropout: probability of zeroing each input feature, while the model is in training mode.

    Reference: Si et al., FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739. Grouped convolutions, where the
    authors' code counts the inputs of all groups, have factors for the inputs of one.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    kernel_rank: int = 2
    scale: float = 1.0
    dropout: float = 0.0

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_type: ClassVar[str] = "POLYTASK_FLORA"
    paper: ClassVar[str] = "arXiv 2405.14739"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("kernel_rank", self.kernel_rank)):
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"FLoRA: {name} must be a whole number of at least 1, got {value!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"FLoRA: dropout must be in [0, 1), got {self.dropout!r}")

    def patch(self, site: Site) -> Patch:
        return FLoRAPatch(self, site)


class FLoRAPatch(MatrixPatch):
    """The core G [p, q, l...], F0 [o, p], F1 [c, q] and a factor [k, l] for each dimension of a kernel."""

    form: FLoRA

    def __init__(self, form: FLoRA, site: Site) -> None:
        super().__init__(form, site)
        sizes = (site.d_out, site.d_in) if site.kind == "linear" else site.shape
        ranks = [min(n, form.rank if i < 2 else form.kernel_rank) for i, n in enumerate(sizes)]
        self.G = nn.Parameter(torch.empty(ranks))
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            self.register_parameter(f"F{i}", nn.Parameter(torch.empty(size, rank)))
        self.keys = {"G": "flora_core", **{f"F{i}": f"flora_factor_{i}" for i in range(len(sizes))}}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, own in self.named_parameters():
                if name == "G":
                    own.zero_()
                else:
                    own.normal_(std=(0.5 / own.shape[1]) ** 0.5, generator=generator)  # kaiming_normal(a=sqrt(3))

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.form.dropout and self.dropping:
            x = F.dropout(x, self.form.dropout, training=True)
        if self.site.kind == "linear":
            h = F.linear(x, self.F1.t().to(x.dtype))  # [..., q]
            return F.linear(h, (self.F0 @ self.G * self.form.scale).to(x.dtype))
        base: Any = convolution(self)
        if base.groups > 1:
            return super().contribute(x, y, call)
        x, padding = padded(base, x)
        convolve = CONVOLVE[len(base.kernel_size) - 1]
        points = (1,) * len(base.kernel_size)
        h = convolve(x, self.F1.t().reshape(*self.F1.t().shape, *points).to(x.dtype))  # c to q channels
        h = convolve(h, self._kernel().to(x.dtype), None, base.stride, padding, base.dilation)  # q to p
        return convolve(h, (self.F0 * self.form.scale).reshape(*self.F0.shape, *points).to(x.dtype))  # p to o

    def matrix(self) -> Tensor:
        inner = torch.tensordot(self.F1, self._kernel(), ([1], [1]))  # [c, p, k...]
        return torch.tensordot(self.F0 * self.form.scale, inner, ([1], [1])).flatten(1)  # [o, c * k]

    def _kernel(self) -> Tensor:
        """The core with the kernel's own sizes: [p, q, k...]."""
        core: Tensor = self.G
        for i in range(2, core.dim()):
            factor: Any = self._parameters[f"F{i}"]
            core = torch.tensordot(core, factor, ([2], [1]))  # takes the first that is left, and appends its size
        return core
