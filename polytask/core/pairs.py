"""Many thin products per token, without computing those that nobody chose: the engine of routing.

Expert e is a pair of factors ``A_e`` [r, i] and ``B_e`` [r, o], stacked with the others; a token has k of them with weights.
Nothing here knows a form: what is a product of two thin factors brings its own stacks.

Shapes: T tokens, k experts of each token, P = T * k pairs, N experts, i = d_in, o = d_out, r rank. The stacks A [N + 1, r, i] and
B [N + 1, r, o] end with an expert of zeros, number N, which stands for nobody: its pairs are left out.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Which way is the fastest was measured on one core of a server CPU (AVX2) in fp32 with r = 16, i and o of 512 and 1408, k = 2.
DENSE = 64  # N * r up to which all experts for all tokens cost less than finding out who needs which
FEW = 256  # pairs up to which sorting them costs more than it saves
SPARSE = 8  # pairs per expert below which a product per expert costs more (3 us each) than a product per pair saves
ALIGNED = 16  # bytes: the strides that a grouped product takes are multiples of it


def aligned(rank: int, dtype: torch.dtype) -> int:
    """The rank that factors are padded to, with zeros, so that grouped products take their stacks."""
    step = max(1, ALIGNED // dtype.itemsize)
    return -(-rank // step) * step


def outputs(x: Tensor, out: Tensor, A: Tensor, B: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out + sum_k w B_e^T (A_e x)``: the weighted sum of what the chosen experts give.

    Args:
        x: [T, i], of the type of the stacks.
        out: [T, o]; changed in place where no gradients are recorded.
        A: [N + 1, r, i].
        B: [N + 1, r, o], with the experts' own scales in it.
        index: [T, k], who is chosen; N for nobody.
        values: [T, k], w. A pair of weight zero is left out where the weights take no gradients.
    """
    index, weight = _without_zeros(index, values, len(A) - 1)
    pairs = _way(index, x, A, B, out, values)
    return pairs.expand(weight(pairs.shrink(x, A)), B, out)


def parameters(x: Tensor, out: Tensor, A: Tensor, B: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out + (sum_k w B_e)^T (sum_k w A_e) x``: the chosen experts' factors averaged for each token, and applied once.

    It takes two passes over the pairs, ``h = sum_k w (A_e x)`` and ``out + sum_k w (B_e^T h)``; the averages are never there.

    Args:
        x, out, A, B, index, values: as for `outputs`.
    """
    index, weight = _without_zeros(index, values, len(A) - 1)
    pairs = _way(index, x, A, B, out, values)
    h = weight(pairs.shrink(x, A)).sum(1, keepdim=True)  # [T, 1, r]
    return pairs.expand(weight(h), B, out)


def products(x: Tensor, A: Tensor, index: Tensor) -> Tensor:
    """``A_e x`` for each chosen expert, [T, k, r].

    Args:
        x: [T, i].
        A: [N + 1, r, i].
        index: [T, k].
    """
    return _way(index, x, A).shrink(x, A)


def _without_zeros(index: Tensor, values: Tensor, nobody: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The index with nobody at pairs of weight zero, and ``w h`` for h [T, k, r], which is zero there whatever h is."""
    column = values.unsqueeze(-1)
    if values.requires_grad or (
        values.device.type == "cpu" and not torch.compiler.is_compiling() and bool(values.all())
    ):
        return index, lambda h: h * column
    zero = values == 0
    return index.masked_fill(zero, nobody), lambda h: (h * column).masked_fill(zero.unsqueeze(-1), 0.0)


def _way(index: Tensor, x: Tensor, A: Tensor, B: Tensor | None = None, *others: Tensor) -> _Pairs:
    """The way that is the fastest for these shapes, of those that can do it; ``others`` may take gradients too."""
    experts, rank, size = len(A) - 1, A.shape[1], x.element_size()
    if experts * rank <= DENSE:
        return _Dense(index)
    stacks = (A,) if B is None else (A, B)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *stacks, *others))
    if torch.compiler.is_compiling():
        return _Gathered(index)
    count = index.numel()
    if not graph and x.device.type == "cpu" and _samples(x.dtype):
        if count <= FEW:
            return _Sampled(index, (index.unsqueeze(-1) * rank + _steps(rank)).flatten(1))
        if count <= SPARSE * experts:
            return _sort(_SortedSampled, index, experts)
    if count <= FEW and (x.device.type != "cpu" or count < experts):
        return _Gathered(index)
    fits = all(width * size % ALIGNED == 0 for width in (rank, *(stack.shape[2] for stack in stacks)))
    return _sort(_Grouped if fits and x.dtype in _GROUPED.get(x.device.type, ()) else _Sorted, index, experts)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """A way to multiply the pairs of tokens and experts.

    Attributes:
        index: [T, k], the expert of each pair.
    """

    index: Tensor

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        """``A_e x`` for each pair, [T, k, r]; anything finite for nobody's."""
        raise NotImplementedError

    def expand(self, h: Tensor, B: Tensor, out: Tensor) -> Tensor:
        """``out + sum_k B_e^T h``, [T, o]; h is [T, k, r], with zeros for nobody's."""
        raise NotImplementedError


class _Dense(_Pairs):
    """All experts side by side for all tokens; what a token did not choose is multiplied by zero."""

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        h = F.linear(x, A.flatten(0, 1)).view(len(x), *A.shape[:2])  # [T, N + 1, r]
        return h.gather(1, self.index.unsqueeze(-1).expand(-1, -1, A.shape[1]))

    def expand(self, h: Tensor, B: Tensor, out: Tensor) -> Tensor:
        full = h.new_zeros(len(h), *B.shape[:2])
        full = full.scatter_add(1, self.index.unsqueeze(-1).expand(-1, -1, B.shape[1]), h)  # [T, N + 1, r]
        if torch.is_grad_enabled() or not out.is_contiguous():
            return torch.addmm(out, full.flatten(1), B.flatten(0, 1))
        return out.addmm_(full.flatten(1), B.flatten(0, 1))


class _Gathered(_Pairs):
    """The factors of each pair are copied together and multiplied in one batch: few pairs, or fixed shapes."""

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        return torch.matmul(A[self.index], x[:, None, :, None]).squeeze(-1)

    def expand(self, h: Tensor, B: Tensor, out: Tensor) -> Tensor:
        own = B[self.index].flatten(1, 2)  # [T, k * r, o]
        return out + torch.bmm(h.reshape(len(h), 1, -1), own).squeeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Sampled(_Pairs):
    """Each pair reads its factors where they lie: entries of a matrix product, and sums of weighted rows. Gives no gradients.

    Attributes:
        rows: [T, k * r], the rows of the stacks side by side.
    """

    rows: Tensor

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        return _entries(x, A.flatten(0, 1), self.rows).view(*self.index.shape, -1)

    def expand(self, h: Tensor, B: Tensor, out: Tensor) -> Tensor:
        part = F.embedding_bag(self.rows, B.flatten(0, 1), mode="sum", per_sample_weights=h.flatten(1))
        return out + part if torch.is_grad_enabled() else out.add_(part)


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted(_Pairs):
    """The pairs are brought together by expert, and each expert multiplies its own at once: a product for each that was chosen.

    Attributes:
        order: the pairs by expert, without nobody's: [Q], Q <= P.
        token: whose they are, [Q].
        ends: where each expert's end, [N].
    """

    order: Tensor
    token: Tensor
    ends: Tensor

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        h = self._down(x.index_select(0, self.token), A)
        full = h.new_zeros(self.index.numel(), h.shape[1])
        return full.index_copy(0, self.order, h).view(*self.index.shape, -1)

    def expand(self, h: Tensor, B: Tensor, out: Tensor) -> Tensor:
        part = self._up(h.reshape(-1, h.shape[-1]).index_select(0, self.order), B)
        return out.index_add(0, self.token, part) if torch.is_grad_enabled() else out.index_add_(0, self.token, part)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        """Each expert's rows [Q, i] times its A^T: [Q, r]."""
        return self._each(x, A.transpose(1, 2))

    def _up(self, h: Tensor, B: Tensor) -> Tensor:
        """Each expert's rows [Q, r] times its B: [Q, o]."""
        return self._each(h, B)

    def _each(self, rows: Tensor, stack: Tensor) -> Tensor:
        parts, start = [rows.new_empty(0, stack.shape[2])], 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                parts.append(rows[start:end] @ stack[expert])
                start = end
        return torch.cat(parts)


class _Grouped(_Sorted):
    """The same as one grouped product."""

    def _each(self, rows: Tensor, stack: Tensor) -> Tensor:
        return F.grouped_mm(rows, stack[: len(self.ends)], offs=self.ends)


class _SortedSampled(_Sorted):
    """As `_Sampled`, by expert: those who share one find its factors in the cache. Gives no gradients."""

    def _rows(self, rank: int) -> Tensor:
        expert = self.index.flatten().index_select(0, self.order)
        return expert.unsqueeze(-1) * rank + _steps(rank)  # [Q, r]

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return _entries(x, A.flatten(0, 1), self._rows(A.shape[1]))

    def _up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.embedding_bag(self._rows(B.shape[1]), B.flatten(0, 1), mode="sum", per_sample_weights=h)


def _sort(kind: type[_Sorted], index: Tensor, experts: int) -> _Sorted:
    flat = index.flatten()
    ends = torch.bincount(flat, minlength=experts + 1)[:experts].cumsum(0, dtype=torch.int32)
    # nobody's are the last; a grouped product would leave their rows as they were in memory
    order = flat.argsort(stable=True)[: int(ends[-1])]
    return kind(index, order, order // index.shape[1], ends)


def _entries(x: Tensor, stack: Tensor, rows: Tensor) -> Tensor:
    """The products of each x [Q, i] with its own ``rows`` [Q, e] of the stack [M, i]: [Q, e]."""
    count, each = rows.shape
    starts = _steps(count + 1, each)
    where = torch.sparse_csr_tensor(
        starts, rows.reshape(-1), x.new_zeros(count * each), (count, len(stack)), check_invariants=False
    )
    found: Tensor = torch.sparse.sampled_addmm(where, x, stack.t(), beta=0.0)
    return found.values().view(count, each)


@functools.lru_cache(maxsize=64)
def _steps(count: int, size: int = 1) -> Tensor:
    """0, size, 2 size, ...: kept, for every site needs them in every forward."""
    return torch.arange(0, count * size, size)


_GROUPED = {  # the types that grouped_mm takes
    "cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,),
}  # fmt: skip


@functools.cache
def _samples(dtype: torch.dtype) -> bool:
    """Whether this PyTorch computes single entries of a product on the CPU; it says once that such matrices are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1, dtype=dtype)
            where = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), one[0], (1, 1))
            torch.sparse.sampled_addmm(where, one, one, beta=0.0)
            F.embedding_bag(torch.zeros(1, 1, dtype=torch.int64), one, mode="sum", per_sample_weights=one)
        except (RuntimeError, NotImplementedError):
            return False
    return True
