"""Experts and data from a few examples: which adapters do well on them and differ, and which of a pool are like them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.callables import Embedder
from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.head import Head, LinearHead, collate, head_for
from polytask.core.metrics import METRICS, default_metric
from polytask.core.model import Model
from polytask.core.predict import batches, predict
from polytask.core.routing import Routing
from polytask.core.signature import signatures
from polytask.core.task import Example, Task

MOST = 16  # adapters on a shortlist: of these all subsets are compared


@dataclass(frozen=True)
class Ranked:
    """What one adapter does on the shots.

    Attributes:
        name: of the adapter.
        score: the task's metric, its accuracy for instance.
        loss: the mean negative log-likelihood of the answer, for each token of a text; its exponential is the perplexity.
        place: the mean of its places by both, 1 for the best; adapters that are equal share theirs.
    """

    name: str
    score: float
    loss: float
    place: float

    @property
    def perplexity(self) -> float:
        """Of the answers."""
        return math.exp(min(self.loss, 700.0))


@dataclass
class Experts:
    """What `polytask.kshot_experts` found.

    Attributes:
        mix: the experts, which have learned on, and their router.
        names: the chosen adapters.
        ranking: all of them, the best first.
        likeness: of the chosen: the sum of ``|cos|`` over their pairs and tensors.
        examples: what was learned from, the shots first.
    """

    mix: Routing
    names: tuple[str, ...]
    ranking: list[Ranked]
    likeness: float
    examples: list[Example] = field(default_factory=list)


def shots_of(task: Task, k: int | None = None) -> list[Example]:
    """The first k training examples of a task, all when None. Raises `ConfigError` where there is none."""
    shots = list(task.train if k is None else task.train[:k])
    if not shots or (k is not None and k < 1):
        raise ConfigError(
            f"experts are picked by examples, and {task.name!r} gives none (k={k!r}); give at least one training example"
        )
    return shots


def rank(
    model: Model, adapters: Mapping[str, Adapter], task: Task, shots: Sequence[Example], *, weight: float = 0.5,
    batch_size: int = 16, longest: int | None = None,
) -> list[Ranked]:  # fmt: skip
    """All adapters by how well they do on the shots, the best first; the order in which they are given does not matter.

    Args:
        model: the base.
        adapters: by name.
        task: of the shots.
        shots: examples.
        weight: of the place by the metric; that by the loss has the rest. How the two are weighed is ours.
        batch_size: sequences per forward.
        longest: tokens kept of a text.

    Raises:
        MixError: an adapter has no head that could answer.
    """
    measured = {
        name: _measured(model, name, adapters[name], task, shots, batch_size, longest) for name in sorted(adapters)
    }
    sign = -1.0 if METRICS[task.metric or default_metric(task.kind)].higher_is_better else 1.0
    by_score = _places({name: sign * score for name, (score, _) in measured.items()})
    by_loss = _places({name: loss for name, (_, loss) in measured.items()})
    found = [
        Ranked(name, score, loss, weight * by_score[name] + (1.0 - weight) * by_loss[name])
        for name, (score, loss) in measured.items()
    ]
    return sorted(found, key=lambda row: (row.place, row.loss, row.name))


def _places(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the least; what is equal shares the mean of its places."""
    ordered = sorted(values.values())
    return {name: ordered.index(v) + (ordered.count(v) + 1) / 2 for name, v in values.items()}


@torch.no_grad()
def _measured(
    model: Model,
    name: str,
    adapter: Adapter,
    task: Task,
    shots: Sequence[Example],
    batch_size: int,
    longest: int | None,
) -> tuple[float, float]:
    """Metric and loss of one adapter."""
    head = _head(model, name, adapter, task)
    metric = METRICS[task.metric or default_metric(task.kind)]
    attached = f"{name}+shots"
    model.attach(adapter, attached)
    try:
        with model.using(attached, tasks=task.name):
            found = predict(model, head, head.rows(model, shots, scoring=True, longest=longest), batch_size=batch_size)
            rows, total, count = head.rows(model, shots, longest=longest), 0.0, 0.0
            for batch in batches([r.length for r in rows], [r.count for r in rows], batch_size):
                some = [rows[i] for i in batch]
                losses, weights = head.loss(head.run(model, collate(model, head, some)), some)
                total, count = total + float(losses.sum()), count + float(weights.sum())
    finally:
        model.detach(attached)
    return float(metric.function(found, [e.target for e in shots], task.labels)), total / max(count, 1.0)


def _head(model: Model, name: str, adapter: Adapter, task: Task) -> Head:
    fresh = head_for(model, task, 0, adapter.form)
    if not isinstance(fresh, LinearHead):
        return fresh.to(model.device)
    for head in adapter.heads.values():
        if isinstance(head, LinearHead) and (head.task, set(head.labels)) == (fresh.task, set(fresh.labels)):
            return head.to(model.device)
    raise MixError(
        f"the adapter {name!r} has no head that answers {task.name!r} (labels {listing(task.labels)}), so it cannot be tried on "
        f"the shots; its heads are for {listing(adapter.heads) or 'nothing'}. Give adapters of tasks with the same labels, or a "
        "base that writes text"
    )


def likeness(adapters: Mapping[str, Adapter], names: Sequence[str]) -> dict[tuple[str, str], float]:
    """For each pair of names, sorted, the sum over the tensors that both have of ``|cos|``."""
    flat = {
        name: {
            f"{site}:{key}": torch.nn.functional.normalize(value.detach().double().flatten().cpu(), dim=0)
            for site, part in adapters[name].parts.items()
            for key, value in part.named_parameters()
            if key not in part.frozen and value.is_floating_point()
        }
        for name in names
    }
    found = {}
    for one, two in itertools.combinations(sorted(names), 2):
        both = [key for key in flat[one] if key in flat[two] and len(flat[one][key]) == len(flat[two][key])]
        found[one, two] = sum(float((flat[one][key] @ flat[two][key]).abs()) for key in both)
    return found


def diverse(adapters: Mapping[str, Adapter], shortlist: Sequence[str], count: int) -> tuple[tuple[str, ...], float]:
    """The ``count`` of a shortlist that are least alike, and how alike they are: the lowest sum over their pairs.

    Args:
        adapters: by name.
        shortlist: their names.
        count: how many; all where there are no more.
    """
    pairs = likeness(adapters, shortlist)

    def alike(some: tuple[str, ...]) -> float:
        return sum(pairs[pair] for pair in itertools.combinations(some, 2))

    subsets = itertools.combinations(sorted(shortlist), min(count, len(shortlist)))
    best = min(subsets, key=lambda some: (round(alike(some), 9), some))
    return best, alike(best)


def near(
    shots: Sequence[Example], pool: Sequence[Example], count: int, task: Task, *, embed: Embedder | None = None,
    apart: float = 0.1,
) -> list[Example]:  # fmt: skip
    """The ``count`` examples of a pool nearest to the mean of the shots, less those that are close to an earlier one.

    Args:
        shots: at least one.
        pool: to choose from; an example that is a shot is left out.
        count: how many, before the close ones are left out.
        task: which says how an example is written.
        embed: texts to vectors; words and their parts, hashed, when None.
        apart: the least cosine distance to the shots and to all nearer ones.
    """
    known = set(map(_text, shots))
    unique = {text: example for example in pool if (text := _text(example)) not in known}
    if not unique or count < 1:
        return []
    texts = sorted(unique)
    vectors = _vectors([*map(_text, shots), *texts], task, embed)
    own, others = vectors[: len(shots)], vectors[len(shots) :]
    far = (others - own.mean(0)).norm(dim=1)
    order = sorted(range(len(texts)), key=lambda i: (round(float(far[i]), 6), texts[i]))[:count]
    chosen = torch.cat([own, others[order]])
    close = ((chosen @ chosen.T) > 1.0 - apart).tril(-1).any(1)[len(shots) :]
    return [unique[texts[i]] for i, drop in zip(order, close.tolist(), strict=True) if not drop]


def _text(example: Example) -> str:
    target: Any = example.choices[example.target] if example.choices else example.target
    return "\n".join([*example.inputs, str(target)])


def _vectors(texts: Sequence[str], task: Task, embed: Embedder | None) -> Tensor:
    maker: Any = signatures["text"]()
    vectors: Tensor = maker.vectors([f"{task.instruction}\n{text}" for text in texts], embed)
    return vectors
