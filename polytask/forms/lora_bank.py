"""Several LoRAs at one site, in as few products as can be.

Shapes: B rows, T tokens, i = d_in, o = d_out, r rank, N adapters, R the ranks of several adapters side by side, k
adapters of a row, G chunks of rows that have the same adapters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.errors import MixError, listing
from polytask.core.form import NO_CALL, Bank, Call, Patch, Weights, per_row
from polytask.core.pairs import aligned, outputs, parameters

_VERSION, _LEARNS = operator.attrgetter("_version"), operator.attrgetter("requires_grad")


class LoRABank(Bank):
    """Several LoRAs at once: factors side by side for the whole batch, stacked for the rows of a batch or for its tokens."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        from .lora import LoRAPatch

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
            return plus(out, F.linear(x.to(A.dtype), A), B)
        A, B, owner = self._keep("side by side", (out.dtype, out.device), lambda: self._side_by_side(out.dtype))
        x, out, scale = self._dense(x, out, weights)
        h = F.linear(x.to(A.dtype), A)  # [..., R]
        return plus(out, h * scale[..., owner].to(h.dtype), B)

    def average(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        self._check_average()
        if self._dropping:  # the average is one LoRA, and draws one mask
            x = F.dropout(x, max(self._dropouts), training=True)
        if weights.fixed is not None:
            key = (weights.names, weights.fixed, out.dtype, out.device)
            A, B = self._keep("mean", key, lambda: self._mean(weights, out.dtype))  # [r, i], [r, o]
            return plus(out, F.linear(x.to(A.dtype), A), B.t())
        if self._by_token(x, weights):
            if weights.index is not None:
                return self._tokens(x, out, weights, parameters)
            A, B, _ = self._keep("side by side", (out.dtype, out.device), lambda: self._side_by_side(out.dtype))
            x, out, scale = self._dense(x, out, weights)
            scale = scale.to(A.dtype).unsqueeze(-1)  # [..., N, 1]
            h = (F.linear(x.to(A.dtype), A).unflatten(-1, (-1, self._rank)) * scale).sum(-2, keepdim=True)
            return plus(out, (h * scale).flatten(-2), B)
        A, B = self._mean(weights, out.dtype)
        if A.dim() == 2:
            return plus(out, F.linear(x.to(A.dtype), A), B.t())
        x, out, _ = per_row(x, out, len(A), self._site)
        return _batched(x, out, A, B, 1.0, _Layout(()))

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


def plus(out: Tensor, h: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
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
