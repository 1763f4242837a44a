"""What starts of LoRA see of the data: second moments, principal components or gradients at each site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask.core.site import Site

from .lora import LoRA, LoRAPatch
from .starts import StartPatch, low_rank_svd, matrix_of, start_of

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

Batches = Sequence[Callable[[], Tensor]]
MOMENTS, COMPONENTS, GRADIENTS = 16, 64, 8  # batches looked at, at most
DAMP = 0.01
BLOCK = 256  # columns of a second moment that are computed at once
STILL = 0.99  # the cosine from which a component counts as standing still


def begin(form: LoRA, model: Model, adapter: Adapter, batches: Batches) -> None:
    """Gives a fresh adapter that is attached and acts its start from data; see `Form.begin`."""
    looks = start_of(form.init).looks
    patches = {n: p for n, p in adapter.patches.items() if isinstance(p.form, LoRA) and p.form.init == form.init}
    if looks == "moments":
        found: Iterable[tuple[str, Tensor]] = _moments(model, adapter, patches, batches[:MOMENTS])
    elif looks == "gradient":
        found = _gradients(model, adapter, patches, batches[:GRADIENTS]).items()
    elif looks == "components":
        _deal_out(form, adapter, patches, _components(form, model, patches, batches[:COMPONENTS]))
        return
    else:
        return
    for name, seen in found:
        patch, (site, module) = patches[name], _module(model, adapter, patches[name])
        assert isinstance(patch, StartPatch)
        patch.begin_with(matrix_of(module, site), seen, torch.Generator().manual_seed(0))


def _module(model: Model, adapter: Adapter, patch: Any) -> tuple[Site, nn.Module]:
    site = adapter.fit(patch, model)
    return site, model.module.get_submodule(site.path)


See = Callable[[str, Tensor, Tensor], None]


@contextmanager
def _watched(
    model: Model, patches: Mapping[str, Any], see: See, owner: dict[str, str], every: frozenset[str] = frozenset()
) -> Iterator[Callable[[], None]]:
    """Calls ``see(site, x [n, i], y [n, o])`` with the real tokens of each site's inputs and outputs, once where several
    sites get the same, and always at ``every``.

    ``owner`` is filled with the site that stands for each. The context's value is to be called after every batch.
    """
    inputs: dict[int, tuple[str, Tensor]] = {}  # by the identity of a tensor, which is kept so that nobody else gets it

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            first = name if name in every else owner.setdefault(name, inputs.setdefault(id(x), (name, x))[0])
            if first == name:
                mask = model._hub.call.mask
                real = None if mask is None or mask.shape != x.shape[:-1] else mask.bool()
                parts = (t.flatten(0, -2) if real is None else t[real] for t in (x.detach(), y.detach()))
                see(name, *parts)

        return after

    handles = [
        model.module.get_submodule(patch.site.path).register_forward_hook(hook(name), with_kwargs=True)
        for name, patch in patches.items()
    ]
    try:
        yield inputs.clear
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _moments(
    model: Model, adapter: Adapter, patches: Mapping[str, Any], batches: Batches
) -> Iterator[tuple[str, Tensor]]:
    """Each site's weight times the mean second moment of its inputs, W C [o, i], where C is damped and has a mean
    diagonal of 1.

    A narrow layer has it from its own outputs, ``W X^T X = Y^T X``, which is cheaper than ``X^T X`` and needs no sharing.
    """
    narrow = frozenset(n for n, p in patches.items() if 2 * p.site.d_out <= p.site.d_in)
    sums: dict[str, Tensor] = {}  # X^T X, of which the upper half is filled; at narrow layers Y^T X
    squares: dict[str, Tensor] = {}
    owner: dict[str, str] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        x = x.float()
        wide = x.shape[1]
        if name in narrow:
            bias = getattr(patches[name].site, "bias", False) and _module(model, adapter, patches[name])[1].bias
            y = (y if bias is False else y - bias).float()  # type: ignore[operator]
            sums[name] = sums.get(name, y.new_zeros(y.shape[1], wide)).addmm_(y.T, x)
            squares[name] = squares.get(name, 0.0) + x.square().sum(dtype=torch.float64)
            return
        if name not in sums:
            sums[name] = x.new_zeros(wide, wide)
        total = sums[name]
        for at in range(0, wide, BLOCK):  # the other half is the same
            total[at : at + BLOCK, at:].addmm_(x[:, at : at + BLOCK].T, x[:, at:])

    with _watched(model, patches, see, owner, narrow) as done:
        for batch in batches:
            batch()
            done()
    whole: dict[str, Tensor] = {}
    for name in patches:
        site, module = _module(model, adapter, patches[name])
        weight = matrix_of(module, site).double()
        if name in narrow:
            product, mean = sums.pop(name).double(), squares[name] / site.d_in
        elif name in owner:
            first = owner[name]
            if first not in whole:
                half = sums.pop(first).triu().double()
                whole[first] = half + half.T - half.diagonal().diag()
            product, mean = weight @ whole[first], whole[first].diagonal().mean()
        else:
            continue  # it was not called
        yield name, product / mean.clamp_min(torch.finfo(product.dtype).tiny) + DAMP * weight


def _gradients(model: Model, adapter: Adapter, patches: Mapping[str, Any], batches: Batches) -> dict[str, Tensor]:
    """The mean gradient of the loss for each site's weight [o, i]."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                sums[name] = sums.get(name, 0.0) + gradient.flatten(0, -2).T.float() @ x.float() / len(batches)

            if out.requires_grad:
                out.register_hook(add)

        return after

    handles = [
        model.module.get_submodule(patch.site.path).register_forward_hook(hook(name), with_kwargs=True)
        for name, patch in patches.items()
    ]
    kept = [(parameter, parameter.grad) for parameter in adapter.parameters()]
    try:
        with torch.enable_grad():
            for batch in batches:
                batch().backward(inputs=[parameter for parameter, _ in kept if parameter.requires_grad])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in kept:
            parameter.grad = gradient
    return sums


@dataclass
class Components:
    """The first k principal components of rows that come in batches, with their shares of the whole variance.

    Incremental as in Ross et al., Incremental Learning for Robust Visual Tracking: the components so far, the new rows and
    the shift of the mean are one matrix, of which the first k singular directions are kept.
    """

    k: int
    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None
    S: Tensor | None = None
    V: Tensor | None = None
    still: int = 0  # how many of the first components did not turn in the last update
    waiting: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Takes rows [n, i]; fewer than k in all wait for more."""
        self.waiting.append(x.float())
        if sum(map(len, self.waiting)) >= self.k:
            self._update(torch.cat(self.waiting))
            self.waiting = []

    def _update(self, x: Tensor) -> None:
        wide, new, total = x.double(), len(x), self.count + len(x)
        own = wide.mean(0)
        squares = wide.square().sum(0)
        stack = [x - own.float()]
        if self.mean is None or self.V is None or self.S is None or self.squares is None:
            self.mean, self.squares = own, squares
        else:
            shift = math.sqrt(self.count * new / total) * (self.mean - own).float()
            stack = [self.S[:, None] * self.V, *stack, shift[None]]
            self.mean, self.squares = (self.count * self.mean + new * own) / total, self.squares + squares
        matrix = torch.cat(stack)
        if min(matrix.shape) <= 4 * self.k:
            _, S, V = torch.linalg.svd(matrix, full_matrices=False)
        else:
            _, S, V = low_rank_svd(matrix, self.k, 2, torch.Generator().manual_seed(0), more=self.k)
        before, self.S, self.V, self.count = self.V, S[: self.k], V[: self.k], total
        self.still = 0
        if before is not None and before.shape == self.V.shape:
            same = (before * self.V).sum(1).abs() >= STILL
            self.still = int(same.long().cumprod(0).sum())

    def shares(self) -> Tensor:
        """The share of the variance that each component explains, [k]; zero for those that too few rows left out."""
        if self.waiting and self.V is None:
            self._update(torch.cat(self.waiting))
            self.waiting = []
        assert self.S is not None and self.mean is not None and self.squares is not None
        variance = float((self.squares - self.count * self.mean.square()).sum())
        found = self.S.double().square() / max(variance, 1e-30)
        return torch.cat([found, found.new_zeros(self.k - len(found))])

    def rows(self) -> Tensor:
        """The components [k, i]; filled up with random directions orthogonal to them."""
        assert self.V is not None
        lacking = self.k - len(self.V)
        if lacking <= 0:
            return self.V
        more = torch.randn(self.V.shape[1], lacking, generator=torch.Generator().manual_seed(0)).to(self.V)
        Q = torch.linalg.qr(torch.cat([self.V.T, more], 1))[0]
        return torch.cat([self.V, Q[:, len(self.V) :].T])


@torch.no_grad()
def _components(
    form: LoRA, model: Model, patches: Mapping[str, Any], batches: Batches
) -> dict[str, tuple[Components, int]]:
    """Each site's components and the rank that it gets of the same total."""
    share = start_of(form.init).option
    ranks = {name: patch.form.rank for name, patch in patches.items()}
    most = {name: min(round(share * r), patches[name].site.d_in) for name, r in ranks.items()}
    seen: dict[str, Components] = {}
    owner: dict[str, str] = {}
    settled: set[str] = set()

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if name not in seen:
            seen[name] = Components(max(most.values()))
            seen[name].k = min(seen[name].k, x.shape[-1])
        if name not in settled:
            seen[name].see(x)

    dealt: dict[str, int] = {}
    with _watched(model, patches, see, owner) as done:
        for batch in batches:
            batch()
            done()
            if any(components.V is None for components in seen.values()):
                continue
            dealt = _dealt({name: seen[first].shares()[: most[name]] for name, first in owner.items()}, ranks)
            need = {first: max(dealt[n] for n, f in owner.items() if f == first) for first in seen}
            settled = {first for first, components in seen.items() if components.still >= need[first]}
            if len(settled) == len(seen):
                break
    if not dealt:
        dealt = _dealt({name: seen[first].shares()[: most[name]] for name, first in owner.items()}, ranks)
    return {name: (seen[first], dealt[name]) for name, first in owner.items()}


def _dealt(shares: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by site: the largest shares of all win, as many as there were ranks."""
    names = [name for name, values in shares.items() for _ in values]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    counts = dict.fromkeys(shares, 0)
    for place in order[: sum(ranks[name] for name in shares)].tolist():
        counts[names[place]] += 1
    return counts


def _deal_out(
    form: LoRA, adapter: Adapter, patches: Mapping[str, Any], found: Mapping[str, tuple[Components, int]]
) -> None:
    """Replaces the patches by ones of the new ranks that start from the components."""
    for name, (components, rank) in found.items():
        old = patches[name]
        if rank == 0:
            del adapter.patches[name]
            continue
        alpha = old.form.scale * (rank if old.form.scaling == "classic" else math.sqrt(rank))
        new = LoRAPatch(old.form if rank == old.form.rank else replace(old.form, rank=rank, alpha=alpha), old.site)
        new.to(old.A.device, old.A.dtype)
        with torch.no_grad():
            new.A.copy_(components.rows()[:rank])
            new.B.zero_()
        new.trainable(old.A.requires_grad)
        adapter.patches[name] = new
