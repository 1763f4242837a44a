"""BOFT: a rotation of a layer's input as a product of sparse ones, wired like the stages of a fast Fourier transform.

Shapes: i = d_in, m factors of n blocks of size b; factor k joins neighbours at distance 2^(k-1) half blocks, so that
the product is block-diagonal with blocks of size ``b 2^(m-1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from .oft import TurnPatch, blockwise, cayley, plain_peft

DENSE = 128  # up to this width the product of the factors is multiplied out before it meets the activations


@forms.register("boft")
@dataclass(frozen=True)
class BOFT(Form):
    """Turns the input of a linear layer by m butterfly factors: ``c(x) = s W (R^T - I) x + (s - 1) W x``.

    ``R = F_m ... F_1``, where each factor is block-diagonal after a permutation and each block the Cayley transform of
    a skew matrix that starts at zero. One factor is OFT; m factors reach ``b 2^(m-1)`` inputs.

    Args:
        block_size: b, even where there are several factors.
        blocks: n instead of a block size, 0 to go by the size.
        factors: m; the layer's width must be a multiple of ``b 2^(m-1)``.
        scale: also train a factor s for each output, as PEFT does. It is no rotation.

    Reference: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.
    ``scale`` is off by default, which keeps ``W W^T``; the file holds ones then, as PEFT wants them.

    Raises:
        ConfigError: a setting is out of range.
    """

    block_size: int = 8
    blocks: int = 0
    factors: int = 2
    scale: bool = False

    acts: ClassVar[str] = "around"
    peft_type: ClassVar[str] = "BOFT"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2311.06243"
    tensor_names: ClassVar[dict[str, str]] = {"boft_R": "D", "boft_s": "s"}

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.factors < 1 or self.blocks < 0:
            raise ConfigError(
                f"BOFT: block_size must be at least 2 and factors at least 1, got {self.block_size!r}, {self.factors!r}"
            )
        if self.factors > 1 and self.block_size % 2:
            raise ConfigError(f"BOFT: block_size must be even where there are several factors, got {self.block_size}")

    def size(self, site: Site) -> int:
        """b at ``site``."""
        return site.d_in // self.blocks if self.blocks else self.block_size

    def reach(self, site: Site) -> int:
        """How many inputs an input is mixed with at ``site``."""
        return self.size(site) << (self.factors - 1)

    def patch(self, site: Site) -> Patch:
        return BOFTPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason:
            return reason
        size, reach = self.size(site), self.reach(site)
        even = self.factors == 1 or size % 2 == 0
        if size > 1 and even and site.d_in % reach == 0 and site.d_in % (self.blocks or 1) == 0:
            return ""
        return (
            f"site {site.name!r} has {site.d_in} inputs, which {self} does not divide into blocks: they must be a "
            "multiple of the block size times 2^(factors - 1), and the size even where there are several factors"
        )

    def unlike_peft(self, patch: Patch) -> str:
        return "a weight that is stored transposed" if patch.site.transposed else ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {
            "boft_block_size": 0 if self.blocks else self.block_size,
            "boft_block_num": self.blocks,
            "boft_n_butterfly_factor": self.factors,
            "boft_dropout": 0.0,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> BOFT:
        """The form of a PEFT adapter, which always has a scale."""
        plain_peft(config, "boft", {})
        size, blocks = (int(config.get(f"boft_block_{key}") or 0) for key in ("size", "num"))
        factors = int(config.get("boft_n_butterfly_factor") or 1)
        return cls(block_size=size or cls.block_size, blocks=blocks, factors=factors, scale=True)

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensors."""
        _, count, size, _ = tensors["D"].shape
        return Site(path, "linear", "other", (tensors["s"].shape[0], count * size))


class BOFTPatch(TurnPatch):
    """D [m, n, b, b], of which the skew part ``(D - D^T) / 2`` counts, and s [o, 1]."""

    keys = {"D": "boft_R", "s": "boft_s"}
    form: BOFT

    def __init__(self, form: BOFT, site: Site) -> None:
        super().__init__(form, site)
        size = form.size(site)
        self.D = nn.Parameter(torch.zeros(form.factors, site.d_in // size, size, size))
        self.s = nn.Parameter(torch.ones(site.d_out, 1))
        self.frozen = frozenset() if form.scale else frozenset({"s"})

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.D.zero_()
            self.s.fill_(1.0)

    def _make(self) -> Tensor:
        """``R - I``: the m factors [m, n, b, b], or where it pays their product [i / reach, reach, reach]."""
        D = self.D.to(torch.promote_types(self.D.dtype, torch.float32))
        change = cayley(0.5 * (D - D.mT))
        if len(D) == 1:
            return change[0]
        if self.form.reach(self.site) > DENSE:
            return change
        return _product(change)

    def _factors(self, x: Tensor, change: Tensor, back: bool = False) -> Tensor:
        """``x R`` factor by factor, from the last to the first; ``x R^T`` the other way when ``back``."""
        half = change.shape[-1] // 2
        rows = x.reshape(-1, x.shape[-1])
        for k in range(len(change)) if back else reversed(range(len(change))):
            blocks = change[k].mT if back else change[k]
            if k == 0:
                rows = blockwise(rows, blocks, plus=True)
                continue
            # half block j of a stretch of 2^(k+1) meets half block j + 2^k
            split = rows.view(len(rows), -1, 2, 2**k, half).transpose(2, 3)  # [N, i / (b 2^k), 2^k, 2, b / 2]
            done = blockwise(split.reshape(rows.shape), blocks, plus=True)
            rows = done.view(len(rows), -1, 2**k, 2, half).transpose(2, 3).reshape(rows.shape)
        return rows.reshape(x.shape)

    def turn(self, x: Tensor, change: Tensor, back: bool = False) -> Tensor:
        if change.dim() == 4:
            return self._factors(x, change, back) - x
        return blockwise(x, change.mT if back else change)

    def turned(self, x: Tensor, change: Tensor) -> Tensor:
        return self._factors(x, change) if change.dim() == 4 else blockwise(x, change, plus=True)

    def around(self, run: Callable[[Tensor], Tensor], x: Tensor, call: Call = NO_CALL) -> Tensor:
        out = super().around(run, x, call)
        return out + self._scaled(out) if self.form.scale else out

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        part = super().contribute(x, y, call)
        return part + self._scaled(y + part) if self.form.scale else part

    def _scaled(self, out: Tensor) -> Tensor:
        """``(s - 1)`` times the output without its bias."""
        bias = self.base._parameters.get("bias") if self.base is not None else None
        plain = out if bias is None else out - bias.to(out.dtype)
        return plain * (self.s[:, 0] - 1.0).to(out.dtype)

    def delta(self) -> Tensor:
        delta = super().delta()
        if not self.form.scale:
            return delta
        weight = self.weight().detach()
        s = self.s.T if self.site.transposed else self.s
        weight = weight.T if self.site.transposed else weight
        return s * delta + (s - 1.0) * weight.to(delta.dtype)


def _product(change: Tensor) -> Tensor:
    """``F_m ... F_1 - I`` of factors ``I + change`` [m, n, b, b], as blocks [S, s, s] of the size s that they reach.

    The product of the first k factors has blocks of ``b 2^(k-1)``; the next one joins two of them, half block by half block,
    so no product meets a zero.
    """
    m, n, b, _ = change.shape
    half = b // 2
    eye = torch.eye(b, dtype=change.dtype, device=change.device)
    factors = (change + eye).contiguous()
    done = factors[0]  # [n, b, b]
    for k in range(1, m):
        S, J, wide = n >> k, 1 << k, done.shape[1]
        left = factors[k].view(S, J, b, 2, half).permute(0, 3, 1, 2, 4).reshape(-1, b, half)  # [S 2 J, b, b/2]
        out = left @ done.view(-1, half, wide)  # [S 2 J, b, wide], where the two halves of b are rows far apart
        done = out.view(S, 2, J, 2, half, wide).permute(0, 3, 2, 4, 1, 5).reshape(S, 2 * wide, 2 * wide)
    return done - torch.eye(done.shape[1], dtype=change.dtype, device=change.device)
