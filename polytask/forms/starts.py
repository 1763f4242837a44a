"""Starts of LoRA: where its factors begin, from the base's weight or from what some batches show.

A start is one function, registered by name: ``(weight [o, i], rank, generator, seen, option) -> A [r, i], B [o, r]``. Papers
that begin with ``B A != 0`` take that product out of the base's weight. Here the base stays bit for bit: the product is taken
out of the change instead, ``c(x) = s (B A - B0 A0) x`` with frozen ``A0, B0``, which is the same function of A and B. It is
computed as ``s (B (A - A0) + (B - B0) A0) x``: exactly zero at the start in every precision, and without cancellation later.
A file holds plain LoRA of twice the rank, ``[B, -B0] [A; A0]``, as PEFT's conversion of such adapters does.

Shapes: i = d_in, o = d_out, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError, listing, nearest
from polytask.core.site import Site

from .factored import FactoredPatch
from .lora import PLAIN_STARTS, LoRA

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

Made = tuple[Tensor, Tensor]
EXACT = 1024  # sides of a weight up to which all its singular values are computed to measure something


@dataclass(frozen=True)
class Start:
    """A registered start with its option read.

    Attributes:
        make: the function of the module's docstring.
        looks: what it needs to see of the batches: nothing, the inputs' second moments or principal components, or the
            gradient of the weight.
        subtracts: whether its product is taken out again, so that the adapter begins as the base.
        scaled: whether the product ``s B A`` is to be what ``make`` gives as ``B A``; both factors are divided by sqrt(s).
        sides: the smaller side of the weight must be this many times the rank.
        reads: the option's reader, from the text after the colon.
        option: its value; the default where the name stands alone.
    """

    make: Callable[[Tensor, int, torch.Generator, Any, Any], Made]
    looks: Literal["", "moments", "components", "gradient"] = ""
    subtracts: bool = True
    scaled: bool = False
    sides: int = 1
    reads: Callable[[str], Any] | None = None
    option: Any = None


starts: dict[str, Start] = {}


def start(name: str, **about: Any) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Registers a function as a start; ``about`` are fields of `Start`."""

    def add(make: Callable[..., Made]) -> Callable[..., Made]:
        starts[name] = Start(make, **about)
        return make

    return add


def start_of(init: str) -> Start:
    """The start that ``init`` names, as ``"pissa"`` or, with its option, ``"pissa:16"``. Raises `ConfigError`."""
    name, colon, text = init.partition(":")
    known = [*PLAIN_STARTS, *starts]
    if name not in starts or (colon and starts[name].reads is None):
        raise ConfigError(f"LoRA: init must be one of {', '.join(known)}{nearest(name, known)}, got {init!r}")
    found = starts[name]
    if not colon or found.reads is None:
        return found
    try:
        return replace(found, option=found.reads(text))
    except ValueError as error:
        raise ConfigError(f"LoRA: init {init!r}: after the colon {error}") from None


def check(form: LoRA) -> None:
    """Raises `ConfigError` for a start that is not known, or cannot go with the form's other settings."""
    chosen = start_of(form.init)
    if type(form).patch is not LoRA.patch:
        raise ConfigError(
            f"{form.name}: init must be one of {', '.join(PLAIN_STARTS)}, got {form.init!r}; it is for lora"
        )
    if chosen.scaled and form.scale <= 0:
        raise ConfigError(
            f"LoRA: init {form.init!r} divides by s = alpha/rank; give an alpha above 0, got {form.alpha!r}"
        )
    if form.init == "orthogonal" and form.rank % 2:
        raise ConfigError(f"LoRA: init 'orthogonal' needs an even rank, got {form.rank}")


def misfit(form: LoRA, site: Site) -> str:
    """Why a form's start is not possible at a site, or the empty string."""
    chosen = start_of(form.init)
    if site.kind == "experts":
        return f"the start {form.init!r} is not made for fused experts, as {site.name!r} has them"
    if chosen.looks and (site.kind != "linear" or site.read != "call"):
        return f"the start {form.init!r} looks at the inputs of linear layers that are called; {site.name!r} is none"
    sides = (site.shape[0], math.prod(site.shape[1:]))
    if chosen.sides * form.rank > min(sides):
        most = min(sides) // chosen.sides
        return (
            f"the start {form.init!r} takes ranks up to {most} from a weight of {sides[0]} x {sides[1]} ({site.name!r})"
        )
    return ""


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"a whole number of at least 1 is allowed, got {text!r}")
    return int(text)


def _bits(text: str) -> int:
    if text not in ("2", "3", "4", "8"):
        raise ValueError(f"2, 3, 4 or 8 bits are allowed, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value < math.inf:
        raise ValueError(f"a number of at least 1 is allowed, got {text!r}")
    return value


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{', '.join(allowed)} are allowed, got {text!r}")
        return text

    return read


def low_rank_svd(matrix: Tensor, rank: int, iterations: int, generator: torch.Generator, more: int = 8) -> Any:
    """U [o, r], S [r], V^T [r, i]: the largest singular values by subspace iteration, in time o*i*r.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4: orthonormal after every product. ``more`` directions beyond
    the rank are carried along.
    """
    width = min(rank + more, *matrix.shape)
    start_at = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    Q = torch.linalg.qr(matrix @ start_at)[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank]


def leading_values(matrix: Tensor, count: int) -> Tensor:
    """The largest singular values, descending: all are computed up to a side of 1024, beyond that by subspace iteration."""
    wide = matrix.double()
    if min(wide.shape) <= EXACT:
        gram = wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide
        return torch.linalg.eigvalsh(gram).flip(0)[:count].clamp_min(0.0).sqrt()
    found: Tensor = low_rank_svd(wide, count, 24, torch.Generator().manual_seed(0), more=count)[1]
    return found


def excess(weight: Tensor, product: Tensor, rank: int) -> float:
    """How much worse a product of rank r fits a weight [o, i] than the best one: 0 for a full SVD, 0.01 for 1 % more error.

    The ratio of ``|W - product|`` to the root of the squared singular values beyond r, less one.
    """
    wide = weight.double()
    best = (wide.square().sum() - leading_values(weight, rank).square().sum()).clamp_min(1e-30).sqrt()
    return float((wide - product.double()).norm() / best) - 1.0


@start("pissa", scaled=True, reads=_whole, option=0)
def pissa(weight: Tensor, rank: int, generator: torch.Generator, seen: None, iterations: int) -> Made:
    """The principal singular directions, ``B A = U_r S_r V_r^T``, split evenly. ``pissa:16`` takes 16 subspace iterations
    in place of a full SVD; `excess` says how far off it is.

    Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv 2404.02948. Its code and PEFT
    divide S by s as here, so the product does not depend on alpha.
    """
    if iterations:
        U, S, Vh = low_rank_svd(weight, rank, iterations, generator)
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@start("olora")
def olora(weight: Tensor, rank: int, generator: torch.Generator, seen: None, option: None) -> Made:
    """``B = Q_r, A = R_r`` of the weight's QR decomposition: B is orthonormal and spans the weight's first r columns.

    Buyukakyuz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775. As in PEFT the product
    is not divided by s.
    """
    Q, R = torch.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


@start("orthogonal", sides=0)
def orthogonal(weight: Tensor, rank: int, generator: torch.Generator, seen: None, option: None) -> Made:
    """Both factors random and ``B A = 0`` but for rounding: they use the odd and the even rows of one orthogonal matrix.

    As PEFT's ``init_lora_weights="orthogonal"``, with its deviation of 0.1. What rounding leaves is subtracted.
    """
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0].to(weight.device)
    inner = torch.randn(weight.shape[1], rank // 2, generator=generator).to(weight.device) / 10
    outer = torch.randn(weight.shape[0], rank // 2, generator=generator).to(weight.device) / 10
    return (inner @ Q[0::2]).T, outer @ Q[1::2]


@start("loftq", scaled=True, reads=_bits, option=4)
def loftq(weight: Tensor, rank: int, generator: torch.Generator, seen: None, bits: int) -> Made:
    """The principal directions of what a quantised weight would lose: ``B A = (W - quantised(W))_r``.

    Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv 2310.08659, begins with the
    quantised base plus this product. Here the base stays as it is and the product is subtracted like that of any other
    start, so nothing is corrected: only the directions that learning begins in come from the quantisation error. One round
    of the paper's alternation (PEFT's default), NormalFloat levels, absolute maxima of 64 neighbours; unlike in PEFT S is
    divided by s. ``loftq:2`` takes 2 bits.
    """
    U, S, Vh = torch.linalg.svd(weight - quantised(weight, bits), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def quantised(weight: Tensor, bits: int, block: int = 64) -> Tensor:
    """A weight rounded to 2^bits NormalFloat levels (QLoRA, arXiv 2305.14314), times the absolute maximum of each block."""
    half = 2 ** (bits - 1)
    up = torch.special.ndtri(torch.linspace(0.9677083, 0.5, half + 1, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, half, dtype=torch.float64)[:-1])
    levels = torch.cat([down, up.new_zeros(1), up]).sort().values
    levels = (levels / levels.abs().max()).to(weight)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    nearest_level = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest_level] * largest).flatten()[: len(flat)].view(weight.shape)


@start("corda", looks="moments", scaled=True, reads=_one_of("ipm", "kpm"), option="ipm")
def corda(weight: Tensor, rank: int, generator: torch.Generator, seen: Tensor, mode: str) -> Made:
    """Directions by what the inputs use: of ``svd(W C) = U S V^T`` the r largest (``corda:ipm``, instruction-previewed) or
    smallest (``corda:kpm``, knowledge-preserved), ``B = U_k sqrt(S_k)``, ``A = sqrt(S_k) V_k^T C^-1 = U_k^T W / sqrt(S_k)``.

    ``seen`` is W C [o, i], where C is the inputs' mean second moment plus 1 % of its mean diagonal. Yang et al., CorDA:
    Context-Oriented Decomposition Adaptation of Large Language Models, arXiv 2406.05223. Where its code and PEFT divide each
    batch by its largest entry, ours counts every token alike and divides C by its mean diagonal: the product does not depend
    on the scale of C, the balance of A and B does. In double precision C needs neither an inverse nor more damping.
    """
    wide, product = weight.double(), seen.double()
    tall = product.shape[0] > product.shape[1]
    values, vectors = torch.linalg.eigh(product.T @ product if tall else product @ product.T)
    chosen = slice(0, rank) if mode == "kpm" else slice(len(values) - rank, len(values))  # they ascend
    S = values[chosen].clamp_min(float(values[-1]) * 1e-24).sqrt()
    U = vectors[:, chosen]
    if tall:
        U = product @ U
        U = U / U.norm(dim=0).clamp_min(torch.finfo(wide.dtype).tiny)
    return ((U.T @ wide) / S.sqrt()[:, None]).float(), (U * S.sqrt()).float()


@start("eva", looks="components", subtracts=False, sides=0, reads=_share, option=2.0)
def eva(weight: Tensor, rank: int, generator: torch.Generator, seen: Tensor, share: float) -> Made:
    """``A`` is the first principal components of the layer's inputs and B zero; the ranks are dealt out anew by how much of
    its inputs' variance each component explains, with the same total. ``eva:1`` keeps the ranks, ``eva:2`` (the default)
    lets a layer have up to twice its rank; one that gets none loses its patch. The scale s stays everywhere.

    ``seen`` is the components [k, i], k >= r. Paischer et al., Parameter Efficient Fine-tuning via Explained Variance
    Adaptation, arXiv 2410.07170. Batches are passed once, until the components stand still or the data ends.
    """
    return seen[:rank], weight.new_zeros(weight.shape[0], rank)


_GAMMA = 16.0


@start(
    "lora-ga", looks="gradient", sides=2, reads=_one_of("ArB2r", "A2rBr", "ArBr"), option="ArB2r"
)  # fmt: skip
def lora_ga(weight: Tensor, rank: int, generator: torch.Generator, seen: Tensor, direction: str) -> Made:
    """Singular directions of the weight's gradient, so that the first step goes where full fine-tuning's would.

    ``seen`` is the mean gradient [o, i] of eight batches. ``lora-ga:ArB2r`` (the default) gives A the first r right and B
    the next r left singular vectors, ``A2rBr`` the other way round, ``ArBr`` every second to each; both factors have the
    length d_out^(1/4) / sqrt(16). Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000;
    the rule of its own code, from which PEFT's differs (it also multiplies B by the singular values).
    """
    U, _, Vh = low_rank_svd(seen.float(), 2 * rank, 4, generator, more=2 * rank)
    first, second, every = slice(0, rank), slice(rank, 2 * rank), slice(0, 2 * rank, 2)
    rows, columns = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, 2 * rank, 2), every),
    }[direction]
    length = weight.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return Vh[rows] * length, U[:, columns] * length


def matrix_of(base: nn.Module, site: Site) -> Tensor:
    """A site's stored weight as [o, i] in fp32: convolutions flattened, embeddings and GPT-2's layers turned."""
    name = site.param or "weight"
    stored = base._parameters.get(name)
    weight = (getattr(base, name) if stored is None else stored).detach().float()
    if site.kind == "conv":
        return weight.flatten(1)
    return weight.T if site.transposed or site.kind == "embedding" else weight


def measured(form: LoRA, model: Model, adapter: Adapter) -> dict[str, Any]:
    """What an adapter's card keeps of its start: how far off a randomised SVD was."""
    chosen = start_of(form.init)
    if chosen.make is not pissa or not chosen.option:
        return {}
    errors = {}
    for name, patch in adapter.patches.items():
        if isinstance(patch, StartPatch):
            site = adapter.fit(patch, model)
            taken = patch.form.scale * patch.B0.flatten(1) @ patch.A0.flatten(1)
            weight = matrix_of(model.module.get_submodule(site.path), site)
            errors[name] = float(f"{max(0.0, excess(weight, taken, patch.form.rank)):.3g}")
    return {
        "excess error of the randomised SVD": max(errors.values(), default=0.0),
        "excess error by site": errors,
    }


class StartPatch(FactoredPatch):
    """A LoRA whose start is subtracted: A and B learn, A0 and B0 hold where they began."""

    frozen = frozenset({"A0", "B0"})
    packs = ("A", "B")

    def __init__(self, form: LoRA, site: Site) -> None:
        super().__init__(form, site)
        self.A0 = nn.Parameter(torch.empty_like(self.A), requires_grad=False)
        self.B0 = nn.Parameter(torch.empty_like(self.B), requires_grad=False)

    def start(self, generator: torch.Generator) -> None:
        """From the weight; what looks at data begins with a zero B until it has."""
        chosen = start_of(self.form.init)
        if chosen.looks or self.base is None:
            super().start(generator)
            self._hold()
        else:
            self.begin_with(matrix_of(self.base, self.site), None, generator)

    @torch.no_grad()
    def begin_with(self, weight: Tensor, seen: Any, generator: torch.Generator) -> None:
        """Sets the values that the start gives for a weight [o, i] and what was seen at its site."""
        chosen = start_of(self.form.init)
        A, B = chosen.make(weight, self.form.rank, generator, seen, chosen.option)
        root = math.sqrt(self.form.scale) if chosen.scaled else 1.0
        self.A.copy_((A / root).reshape(self.A.shape))
        self.B.copy_((B / root).reshape(self.B.shape))
        self._hold()

    def _hold(self) -> None:
        with torch.no_grad():
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)

    def factors(self) -> tuple[Tensor, Tensor, LoRA]:
        A = torch.cat([self.A - self.A0, self.A0])  # [2r, i]
        return A, torch.cat([self.B, self.B - self.B0], 1), self.form.in_file  # B [o, 2r]

    def stored(self) -> dict[str, Tensor]:
        A = torch.cat([self.A.detach(), self.A0])
        return {"A": A, "B": torch.cat([self.B.detach(), -self.B0], 1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        rank, parts = self.form.rank, dict(tensors)
        for name, dim in (("A", 0), ("B", 1)):
            whole = parts.get(name)
            if whole is None or whole.dim() <= dim or whole.shape[dim] != 2 * rank:
                continue  # the general check says what is wrong
            ours, held = (part.contiguous() for part in whole.split(rank, dim))
            parts |= {name: ours, f"{name}0": -held if dim else held}
        lacking = [name for name in ("A", "B") if f"{name}0" not in parts]
        if lacking:
            raise AdapterError(
                f"{listing(lacking)} at {self.site.name!r} must hold {2 * rank} ranks, those learned and those they began "
                f"with, and the file has shapes {[tuple(t.shape) for t in tensors.values()]}"
            )
        super().load(parts)
