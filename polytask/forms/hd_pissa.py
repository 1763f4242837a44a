"""HD-PiSSA: workers with disjoint singular directions of a weight, whose steps are folded into one dense change.

Shapes: i = d_in, o = d_out, r directions of a worker, K workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from .full import Full
from .lora import LoRA, LoRAPatch
from .starts import leading_values, matrix_of, starts

if TYPE_CHECKING:
    from polytask.core.model import Model

TOLERANCE = 0.01  # of the largest singular value: what counts for the measured rank


@dataclass(frozen=True)
class Rank:
    """What the singular values of a change [o, i] say of its rank.

    Attributes:
        rank: how many are above `TOLERANCE` times the largest.
        beyond: the share of the change's length that lies beyond the first ``bound`` of them.
    """

    rank: int
    beyond: float

    @classmethod
    def of(cls, change: Tensor, bound: int) -> Rank:
        """Measured; a change of zero has rank 0."""
        whole = float(change.double().norm())
        if not whole:
            return cls(0, 0.0)
        values = leading_values(change, min(2 * bound, *change.shape))
        left = 1.0 - float(values[:bound].square().sum()) / whole**2
        return cls(int((values > TOLERANCE * values[0]).sum()), max(0.0, left) ** 0.5)


@forms.register("hd-pissa")
@dataclass(frozen=True)
class HDPiSSA(Form):
    """A dense change that K workers add up from steps in their own singular directions: ``W + D``, rank up to ``2 r K``.

    Worker i owns the singular components ``[i r, (i+1) r)`` of W as fixed A_i, B_i and sees its share of each batch, of
    whose gradient G_i it takes ``B_i^T G_i`` and ``G_i A_i^T`` through Adam to dA_i, dB_i. After every step of
    `polytask.learn`, ``D <- D - sum_i (dB_i A_i + B_i dA_i - dB_i dA_i)``. Starts at zero; what is left after learning is D
    alone, and its measured rank is in the card.

    Args:
        rank: r, the directions of a worker. ``groups * rank`` may not exceed a weight's smaller side.
        groups: K, the workers. Row j of a batch belongs to worker ``j mod K``, in however many processes the run has: with
            K of them each is one worker, in one process all are simulated, and the result is the same.
        keep: ``"dense"`` leaves D (the form ``full``), ``"low-rank"`` the best LoRA of rank ``2 r K``, whose error is measured.
        iterations: of the randomised SVD at the start; 0 for the full one.

    Reference: HD-PiSSA: High-Rank Distributed Orthogonal Adaptation, arXiv 2505.18777. Its code adds ``1e-16 B A`` to the
    weight for the gradients and gathers steps; ours computes the same gradients from a product that is exactly zero, adds them
    up over the processes and lets each hold all Adam moments, so that clipping and checkpoints are as ever. Its factor
    ``alpha // r``, which Adam cancels, is left out. D is a tensor of its own in fp32 and W stays as it is, so small steps are
    not lost in a bf16 base.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 4
    groups: int = 4
    keep: Literal["dense", "low-rank"] = "dense"
    iterations: int = 0

    peft_type: ClassVar[str] = "POLYTASK_HD_PISSA"
    default_lr: ClassVar[float] = 1e-3
    paper: ClassVar[str] = "arXiv 2505.18777"

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("groups", 1), ("iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"HDPiSSA: {name} must be a whole number of at least {least}, got {value!r}")
        if self.keep not in ("dense", "low-rank"):
            raise ConfigError(f"HDPiSSA: keep must be one of dense, low-rank, got {self.keep!r}")

    @property
    def bound(self) -> int:
        """2 r K, the rank of the change but for terms of second order in the learning rate."""
        return 2 * self.rank * self.groups

    def patch(self, site: Site) -> Patch:
        return HDPiSSAPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason or not site.shape:
            return reason
        if site.read != "call":
            return f"the weight of {site.name!r} is read without a call, so rows have no workers there"
        if self.groups * self.rank > min(site.shape):
            return (
                f"{self.groups} groups of rank {self.rank} need {self.groups * self.rank} singular components, and the weight "
                f"of {site.name!r} ({site.shape[0]} x {site.shape[1]}) has {min(site.shape)}"
            )
        return ""

    def stepped(self, adapter: Adapter) -> None:
        for patch in adapter.patches.values():
            if isinstance(patch, HDPiSSAPatch):
                patch.fold()

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        found = {
            name: Rank.of(patch.change().detach(), self.bound)
            for name, patch in adapter.patches.items()
            if isinstance(patch, HDPiSSAPatch)
        }
        return {
            "rank of the change": max(one.rank for one in found.values()),
            "its bound to first order": self.bound,
            "singular values counted above": TOLERANCE,
            "largest share of a change beyond the bound": round(max(one.beyond for one in found.values()), 6),
            "rank by site": {name: one.rank for name, one in found.items()},
        }

    def finish(self, adapter: Adapter) -> Adapter:
        small = self.keep == "low-rank"
        form: Form = LoRA(rank=self.bound, alpha=self.bound) if small else Full(parameters="weight")
        patches = {
            name: patch.packed(small) if isinstance(patch, HDPiSSAPatch) else patch
            for name, patch in adapter.patches.items()
        }
        return Adapter(form, patches, adapter.heads, adapter.card, adapter.name, adapter.short_targets)


class HDPiSSAPatch(Patch):
    """``c(x) = (D + (B + b)(A + a) - B A) x``. A [Kr, i] and B [o, Kr] stay; a and b, zero but within a step, are trained; D
    [o, i] is what the steps came to."""

    keys = {"D": "hd_pissa_D", "A": "hd_pissa_A", "B": "hd_pissa_B", "a": "hd_pissa_a", "b": "hd_pissa_b"}
    frozen = frozenset({"A", "B", "D"})
    form: HDPiSSA

    def __init__(self, form: HDPiSSA, site: Site) -> None:
        super().__init__(form, site)
        wide = form.groups * form.rank
        for name, shape in {"D": (site.d_out, site.d_in), "A": (wide, site.d_in), "B": (site.d_out, wide)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.a = nn.Parameter(torch.zeros(wide, site.d_in))
        self.b = nn.Parameter(torch.zeros(site.d_out, wide))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for zero in (self.D, self.a, self.b):
                zero.zero_()
            if self.base is not None:
                form, weight = self.form, matrix_of(self.base, self.site)
                A, B = starts["pissa"].make(weight, form.groups * form.rank, generator, None, form.iterations)
                self.A.copy_(A)
                self.B.copy_(B)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        out = F.linear(x, self.D.to(x.dtype))
        # (B + b)(A + a) - B A = (B + b) a + b A: exactly zero where a and b are
        A, B = torch.cat([self.a, self.A]).to(x.dtype), torch.cat([self.B + self.b, self.b], 1).to(x.dtype)
        if not (torch.is_grad_enabled() and self.a.requires_grad) or self.form.groups == 1:
            return out + F.linear(F.linear(x, A), B)
        out = out + F.linear(F.linear(x, A.detach()), B.detach())
        own = F.linear(F.linear(x.detach(), A) * self._owned(x, call), B)  # each worker's rows alone reach a and b
        return out + (own - own.detach())

    def _owned(self, x: Tensor, call: Call) -> Tensor:
        """1 where a row of x is of the worker that a direction is of, [lead, 1, ..., 2Kr]."""
        many, form = x.shape[0], self.form
        per = many // call.rows if call.rows and many % call.rows == 0 else 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
        row = (torch.arange(many, device=x.device) // per) * world + rank  # as the learner deals out rows
        worker = torch.arange(form.groups, device=x.device).repeat_interleave(form.rank).repeat(2)
        owned = (row % form.groups)[:, None] == worker
        return owned.to(x.dtype).view(many, *[1] * (x.dim() - 2), -1)

    def change(self) -> Tensor:
        """What is added to the weight, [o, i]."""
        return self.D + (self.B + self.b) @ self.a + self.b @ self.A

    def delta(self) -> Tensor:
        return self.change().t() if self.site.transposed else self.change()

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the step that a and b have taken to D; they are zero again."""
        self.D.copy_(self.change())
        self.a.zero_()
        self.b.zero_()

    @torch.no_grad()
    def packed(self, small: bool) -> Patch:
        """The change alone: dense, or as the best product of rank ``2 r K``."""
        if not small:
            dense = Full(parameters="weight").patch(self.site)
            dense.load({"weight": self.delta().contiguous()})
            return dense
        rank = min(self.form.bound, *self.D.shape)
        U, S, Vh = torch.linalg.svd(self.change(), full_matrices=False)
        root = S[:rank].sqrt()
        patch = LoRAPatch(LoRA(rank=rank, alpha=rank), self.site)
        tensors: Mapping[str, Tensor] = {"A": root[:, None] * Vh[:rank], "B": U[:, :rank] * root}
        patch.load(tensors)
        return patch


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
