"""Twin-Merging: a shared expert, the tasks' own parts in few ranks, and a router that mixes them for each input."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError, listing
from polytask.core.form import Patch
from polytask.core.head import collate
from polytask.core.reading import means
from polytask.merge.changed import Factors, Place, adapter_of, made, places_of, thin_of, weighted
from polytask.merge.factors import reduced, split
from polytask.merge.fit import Fit, fits
from polytask.merge.pool import Change, Pool, Reader
from polytask.merge.twin import Router, Twin


@fits.register("twin")
@dataclass(frozen=True)
class TwinMerging(Fit):
    """A shared expert ``b* = b + scale * sum_i t_i`` for all inputs; what each model has beside it, ``v_i = (b + t_i) - b*``,
    each matrix in its largest singular directions; and a router on the shared expert's mean last hidden state: an input is
    served by ``b* + sum_i softmax(logits)_i v_i``. The result is a `polytask.merge.twin.Twin`, no single model.

    Args:
        scale: of the sum of differences in the shared expert.
        share: of the full rank of each matrix that a part keeps, at least rank 1. Tensors without a matrix are kept whole.
        fixed_rank: the same rank for all matrices; 0 for the share.
        epochs: of the router.
        batch_size: its examples in a step.
        lr: its learning rate, with Adam.
        dropout: of its hidden vectors.
        held_out: the share of each task's examples that the router does not learn from. The epoch with the best accuracy
            on them is kept.

    Reference: Lu et al., Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, arXiv 2406.15479. Its code
    learns the router in batches of 1024; here 64 suit tasks with few examples. Singular values are kept in the factors.
    Where a tensor is read without a call, or does not see the rows of a batch, rows cannot differ: the shared expert alone
    acts there, and the result names the place.

    Raises:
        ConfigError: a setting is out of range.
        MergeError: two models were tuned for one task, or the base compares images with texts.
    """

    scale: float = 0.3
    share: float = 0.1
    fixed_rank: int = 0
    epochs: int = 50
    batch_size: int = 64
    lr: float = 5e-4
    dropout: float = 0.5
    held_out: float = 0.2

    gives: ClassVar[Literal["model", "adapter", "parts"]] = "parts"
    paper: ClassVar[str] = "arXiv 2406.15479"
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.at_least("fixed_rank", 0)
        self.at_least("epochs", 0)
        self.at_least("batch_size", 2)
        self.at_least("lr", 0)
        if not 0 < self.share <= 1:
            raise ConfigError(f"twin: share must be above 0 and at most 1, got {self.share!r}")
        for name in ("dropout", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"twin: {name} must be at least 0 and below 1, got {getattr(self, name)!r}")

    def fit(self, pool: Pool) -> Twin:
        readers = own_readers(pool)
        if pool.model.kind == "dual":
            raise MergeError("twin reads the last hidden state of one network, and a dual model has two; merge its towers' "
                             "adapters by another method")  # fmt: skip
        both = torch.full((len(pool),), self.scale, device=pool.model.device)
        with pool.acting(pool.compose(both)):
            x = [self._vectors(pool, reader) for reader in readers]
        router, said = self._learn(pool, x)
        places = places_of(pool)
        about: dict[str, Any] = {"method": self.name, "paper": self.paper, **self.settings()}
        apart = [place for place in places if place.site.rows and place.site.read == "call"]
        left_out = [place.site.name for place in places if place not in apart]
        if left_out:
            pool.say(f"twin: rows cannot differ at {listing(left_out, 4)}, so only the shared expert acts there")
        if not apart:
            raise MergeError("twin needs places that see the rows of a batch, and the models change none; merge them by another "
                             "method")  # fmt: skip
        shared = adapter_of(pool.model, weighted(pool, places, both), "shared", parents=_parents(pool), about=about)
        exclusive = {name: self._part(pool, apart, i, about) for i, name in enumerate(pool.names)}
        if len(exclusive) < len(pool):
            raise MergeError(f"two of {listing(pool.names)} have one name; give each a name of its own")
        found = {
            "router": said,
            "tasks": {name: reader.task.name for name, reader in zip(pool.names, readers, strict=True)},
            "bytes": {name: _bytes(adapter.patches, apart) for name, adapter in exclusive.items()},
            "stored_bytes": {name: 4 * adapter.size for name, adapter in exclusive.items()},
            "bytes_by_rank": bytes_by_rank(apart, pool),
            "shared_bytes": 4 * shared.size,
            "left_out": left_out,
        }
        return Twin(shared, exclusive, router, {**about, **found})

    def rank_at(self, place: Place) -> int:
        """The rank that a part keeps of a matrix."""
        return min(place.most, self.fixed_rank or max(1, int(self.share * place.most)))

    def _part(self, pool: Pool, places: Sequence[Place], i: int, about: Mapping[str, Any]) -> Adapter:
        """What model i has beside the shared expert."""
        weights = F.one_hot(torch.tensor(i), len(pool)).to(pool.model.device) - self.scale

        def thin(place: Place, change: Change) -> Factors:
            rank = self.rank_at(place)
            factors = thin_of(place, change)
            if factors is None:
                return split(place.site, change.sum(weights), rank)[:2]
            A, B = factors[0], factors[1] * weights[change.ranks]
            return (A, B) if len(A) <= rank else reduced(place.site, A, B, rank)[:2]

        patches = [made(pool, place, thin, lambda change: change.sum(weights)) for place in places]
        item = pool.inputs[i]
        heads = item.heads if isinstance(item, Adapter) else {}
        tasks = item.card.tasks if isinstance(item, Adapter) else ()
        parents = [item.hash] if isinstance(item, Adapter) else ()
        return adapter_of(
            pool.model, patches, pool.names[i], heads=heads, tasks=tasks, parents=parents, about={**about, "part": i}
        )

    @torch.no_grad()
    def _vectors(self, pool: Pool, reader: Reader) -> Tensor:
        rows, found = reader.rows(answers=False), []
        for at in range(0, len(rows), 32):
            batch = collate(pool.model, reader.head, rows[at : at + 32])
            found.append(means(pool.model, batch))
        return torch.cat(found)

    def _learn(self, pool: Pool, x: Sequence[Tensor]) -> tuple[Router, dict[str, Any]]:
        """A router for vectors [n, d] of each task, and how well it does."""
        device, counts = pool.model.device, [len(part) for part in x]
        y = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)]).to(device)
        both = torch.cat(list(x))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(pool.seed)
            apart = [torch.randperm(count)[: math.floor(count * self.held_out)] for count in counts]
            held = torch.cat([own + sum(counts[:i]) for i, own in enumerate(apart)]).to(device)
            learned = torch.ones(len(y), dtype=torch.bool, device=device)
            learned[held] = False
            test = held if len(held) else learned.nonzero().flatten()
            router = Router(both.shape[1], len(x), self.dropout).to(device)
            best, kept, losses = -1.0, copy.deepcopy(router.state_dict()), []
            optimizer = torch.optim.Adam(router.parameters(), lr=self.lr)
            for epoch in range(self.epochs):
                losses.append(_epoch(router, optimizer, both[learned], y[learned], self.batch_size))
                accuracy = _accuracy(router, both[test], y[test])
                if accuracy > best:
                    best, kept = accuracy, copy.deepcopy(router.state_dict())
                if (epoch + 1) % 10 == 0:
                    pool.say(f"twin: epoch {epoch + 1} of {self.epochs}, the router is right on {accuracy:.1%}")
        router.load_state_dict(kept)
        accuracy = _accuracy(router, both[test], y[test])
        said = {"accuracy": accuracy, "examples": int(learned.sum()), "held_out": len(held), "loss": losses[-1:]}
        return router.eval().requires_grad_(False), said


def own_readers(pool: Pool) -> list[Reader]:
    """The reader of each model's own task. Raises `MergeError` where two have the same."""
    readers = [pool.reader_of(i) for i in range(len(pool))]
    for i, reader in enumerate(readers):
        first = readers.index(reader)
        if first < i:
            raise MergeError(
                f"{pool.names[first]!r} and {pool.names[i]!r} were both tuned for {reader.task.name!r}, so inputs cannot be told "
                "apart; merge them into one first"
            )
    return readers


def bytes_by_rank(places: Sequence[Place], pool: Pool) -> dict[str, int]:
    """What a part would take with the same rank at all matrices, ``sum k (d_out + d_in + 1)`` numbers of 4 bytes and the
    tensors that are kept whole."""
    matrices = [place for place in places if place.weight]
    names = {(place.site.name, p): n for place in places for p, n in place.tensors.items() if p != place.weight}
    whole = sum(pool.changes[name].base.numel() for name in names.values())
    most = max((place.most for place in matrices), default=1)
    ranks = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    return {str(rank): 4 * (whole + sum(numbers(place, rank) for place in matrices)) for rank in ranks}


def numbers(place: Place, rank: int) -> int:
    """``k (d_out + d_in + 1)`` for a matrix: both sides' singular vectors and the values."""
    return min(rank, place.most) * (sum(place.size) + 1)


def _bytes(patches: Mapping[str, Patch], places: Sequence[Place]) -> int:
    """Of a part, with singular values of their own as in the paper."""
    total = 0
    for place in places:
        sizes = {name: p.numel() for name, p in patches[place.site.name].named_parameters()}
        factors = sum(size for name, size in sizes.items() if name in ("A", "B", "p0_A", "p0_B"))
        total += sum(sizes.values()) + factors // (sum(place.size) if factors else 1)
    return 4 * total


def _parents(pool: Pool) -> list[str]:
    return [item.hash for item in pool.inputs if isinstance(item, Adapter)]


def _epoch(router: Router, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, size: int) -> float:
    """One round of steps; the mean loss."""
    router.train()
    losses = []
    order = torch.randperm(len(x)).to(x.device)
    for batch in order.split(size):
        if len(batch) < 2:  # a batch of one has no variance
            continue
        loss = F.cross_entropy(router(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / max(1, len(losses))


@torch.no_grad()
def _accuracy(router: Router, x: Tensor, y: Tensor) -> float:
    router.eval()
    return float((router(x).argmax(-1) == y).float().mean())
