"""Grafting: the few weights of a tuned model that hold its skill, put into the base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.adapter import Adapter, Card
from polytask.core.calibration import calibration_error
from polytask.core.errors import ConfigError
from polytask.core.head import Head
from polytask.core.metrics import choose_metric
from polytask.core.task import Example
from polytask.forms.importance import largest
from polytask.merge.fit import Fit, fits
from polytask.merge.grafts import Grafts, Skill, overlap, sparse
from polytask.merge.pool import Pool, Reader

DEEP = 10.0  # how far from the middle of the sigmoid the scores of the mask start


@fits.register("graft")
@dataclass(frozen=True)
class Graft(Fit):
    """For each model a mask m, so that ``b + m (t - b)`` is as good at its task with few weights: ``m = g + (1 - 2g) sigma(S -
    10)``, g the weights that differ most, S learned by ``S -= lr (1 - 2g) d/dm sigma'(S - 10)`` with ``d/dm = dloss/dtheta (t -
    b)``. After each step m is rounded and scored, and the best is kept; nothing is tuned again.

    Each model becomes a sparse adapter, of the fewest weights that keep ``share`` of its score. In memory a graft's numbers are
    the model's own, bit for bit; an adapter holds differences, whose sum with the base rounds to a neighbour where the two
    lie far apart: ``graft.json`` counts these as ``rounded``.

    Args:
        sparsities: shares of all the network's weights, of which each gives a point of the curve. No mask has more.
        steps: of S.
        lr: its learning rate, as large as ``sigma'`` is small at -10.
        batch_size: examples of a batch.
        batches: of a step, at most; their mean gradient is taken.
        share: of the model's score (on its examples and the dev split) that is enough.

    Reference: Panigrahi et al., Task-Specific Skill Localization in Fine-tuned Language Models, arXiv 2302.06600. There a
    mask may grow beyond the sparsity that it started with; ours, where more numbers round to one, takes the largest. Equal
    differences do not push each other out.

    Raises:
        ConfigError: a setting is out of range, or a sparsity leaves no weight.
        MergeError: a model's task is not known, or a model is the base.
    """

    sparsities: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    steps: int = 10
    lr: float = 1e7
    batch_size: int = 8
    batches: int = 128
    share: float = 0.95

    gives: ClassVar[Literal["model", "adapter", "parts"]] = "parts"
    paper: ClassVar[str] = "arXiv 2302.06600"
    labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.sparsities if isinstance(self.sparsities, tuple | list) else (self.sparsities,)
        try:
            chosen = tuple(sorted({float(value) for value in given}))  # YAML takes 1e-5 for a text
        except (TypeError, ValueError):
            chosen = ()
        if not chosen or not all(0 < value <= 1 for value in chosen):
            raise ConfigError(f"graft: sparsities must be numbers above 0 and at most 1, got {self.sparsities!r}")
        object.__setattr__(self, "sparsities", chosen)
        self.at_least("steps", 0)
        self.at_least("lr", 0)
        self.at_least("batch_size", 1)
        self.at_least("batches", 1)
        if not 0 < self.share <= 1:
            raise ConfigError(f"graft: share must be above 0 and at most 1, got {self.share!r}")

    def fit(self, pool: Pool) -> Grafts:
        weights = sum(p.numel() for p in pool.model.module.parameters() if p.is_floating_point())
        for sparsity in self.sparsities:
            if count_of(sparsity, weights) < 1:
                raise ConfigError(
                    f"graft: a share of {sparsity} of {weights:,} weights is less than one; the least is {1 / weights:.1e}"
                )
        adapters: dict[str, Adapter] = {}
        entries, masks = [], []
        for i, name in enumerate(_names(pool.names)):
            skill, reader = Skill(pool, i), pool.reader_of(i)
            entry, mask = self._model(skill, reader, weights)
            masks.append(dict(zip(skill.base, mask, strict=True)))
            adapters[name], entry["rounded"] = self._adapter(pool, i, name, skill, masks[-1], reader, entry)
            entries.append({"name": name, **entry})
        about = {
            "method": {"name": self.name, "paper": self.paper, **self.settings(), "sparsities": list(self.sparsities)},
            "seed": pool.seed, "base": pool.model.name, "weights": weights, "models": entries, "overlap": overlap(masks),
        }  # fmt: skip
        return Grafts(adapters, about)

    def _model(self, skill: Skill, reader: Reader, weights: int) -> tuple[dict[str, Any], list[Tensor]]:
        """The curve of one model, and the mask that is kept."""
        pool, task = skill.pool, reader.task
        split = "test" if task.test else "dev" if task.dev else reader.split
        examples = getattr(task, split)
        metric = choose_metric(task.kind, task.metric or None)
        tuned = [torch.ones_like(change, dtype=torch.bool) for change in skill.change.values()]
        whole = self._value(skill, reader, tuned)
        points: list[dict[str, Any]] = []
        masks = []
        for sparsity in self.sparsities:
            mask, value, step = self._localised(skill, reader, count_of(sparsity, weights))
            with pool.acting(skill.grafted(mask)):
                found = measured(reader, examples)
            entries = sum(int(own.sum()) for own in mask)
            points.append({"sparsity": sparsity, "entries": entries, **found, "chosen_by": value, "step": step})
            masks.append(mask)
            pool.say(f"graft: {skill.name} with {entries:,} of {weights:,} weights: {found['score']:.4f}")
        better = max if metric.higher_is_better else min
        goal = whole * self.share if metric.higher_is_better else whole / self.share
        enough = [point for point in points if better(point["chosen_by"], goal) == point["chosen_by"]]
        kept = enough[0] if enough else better(points, key=lambda p: p["chosen_by"])
        ends = {}
        for what, mask in (("tuned", tuned), ("base", [torch.zeros_like(own) for own in tuned])):
            with pool.acting(skill.grafted(mask)):
                ends[what] = {**measured(reader, examples), "chosen_by": self._value(skill, reader, mask)}
        entry = {
            "task": task.name, "metric": metric.name, "higher_is_better": metric.higher_is_better, "split": split,
            "changed": sum(int((change != 0).sum()) for change in skill.change.values()),
            **ends, "points": points, "kept": kept["sparsity"], "enough": bool(enough),
        }  # fmt: skip
        return entry, masks[points.index(kept)]

    def _localised(self, skill: Skill, reader: Reader, count: int) -> tuple[list[Tensor], float, int]:
        """The best mask of at most ``count`` numbers, its value, and the step that found it (0: those that moved most)."""
        start = skill.moved_most(count)
        sign = 1.0 if choose_metric(reader.task.kind, reader.task.metric or None).higher_is_better else -1.0
        best, value, found = start, self._value(skill, reader, start), 0
        generator = torch.Generator().manual_seed(_key(skill.pool.seed, skill.name))
        scores = [torch.rand(own.shape, generator=generator).to(own.device) for own in start]
        last, drawn = start, self._rounds(reader)
        for step in range(1, self.steps + 1):
            gradients = self._gradients(skill, reader, soft_mask(start, scores), next(drawn))
            for own, score, gradient, change in zip(start, scores, gradients, skill.change.values(), strict=True):
                score.sub_(self.lr * slope(own, score) * gradient * change)
            mask = rounded(start, scores, count)
            if all(torch.equal(a, b) for a, b in zip(mask, last, strict=True)):
                continue
            last, now = mask, self._value(skill, reader, mask)
            if sign * now > sign * value:
                best, value, found = mask, now, step
        return best, value, found

    def _rounds(self, reader: Reader) -> Iterator[list[list[Any]]]:
        """The batches of each step: all examples once, or as many batches as are allowed."""
        drawn = reader.batches(self.batch_size, answers=True)
        each = min(self.batches, -(-len(reader.examples) // self.batch_size))
        while True:
            yield [next(drawn) for _ in range(each)]

    @staticmethod
    def _gradients(skill: Skill, reader: Reader, mask: Sequence[Tensor], rounds: Sequence[Any]) -> list[Tensor]:
        """dloss/dtheta at the soft mask, the mean over batches, in fp32."""
        tensors = {name: tensor.requires_grad_() for name, tensor in skill.soft(mask).items()}
        sums = [torch.zeros_like(change) for change in skill.change.values()]
        with skill.pool.acting(tensors), torch.enable_grad():
            for rows in rounds:
                found = torch.autograd.grad(reader.loss(rows), list(tensors.values()), allow_unused=True)
                for own, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        own.add_(gradient.float(), alpha=1.0 / len(rounds))
        return sums

    @staticmethod
    def _value(skill: Skill, reader: Reader, mask: Sequence[Tensor]) -> float:
        """What masks are chosen by: the score on the reader's examples and that on dev, added up."""
        with skill.pool.acting(skill.grafted(mask)):
            value = reader.score()
            if reader.split != "dev" and reader.task.dev:
                value += reader.score(reader.task.dev)
        return value

    def _adapter(
        self, pool: Pool, model: int, name: str, skill: Skill, mask: dict[str, Tensor], reader: Reader, entry: dict[str, Any]
    ) -> tuple[Adapter, int]:  # fmt: skip
        """The sparse adapter, and how many of its sums with the base are not the model's number bit for bit."""
        item = pool.inputs[model]
        heads: dict[str, Head] = dict(item.heads) if isinstance(item, Adapter) else {}
        tasks = item.card.tasks if isinstance(item, Adapter) else []
        point = next(p for p in entry["points"] if p["sparsity"] == entry["kept"])
        said = {
            "method": self.name,
            "paper": self.paper,
            **self.settings(),
            "seed": pool.seed,
            "from": skill.name,
            "point": point,
        }
        card = Card(
            tasks=list(tasks) or [{**reader.task.summary(), "hash": reader.task.hash}],
            metrics={f"{entry['split']}/{reader.task.name}": point["score"]},
            training={"merge": said},
            parents=[item.hash] if isinstance(item, Adapter) else [],
            licence=item.card.licence if isinstance(item, Adapter) else "",
            notes=[f"The {point['entries']:,} weights that hold most of the skill of `{skill.name}` ({self.paper})."],
        )
        made = sparse(pool.model, mask, skill.change, heads, card, name)
        apart = 0
        for key, own in mask.items():
            sums = pool.cast(key, skill.base[key].float() + skill.change[key])
            apart += int(((sums != skill.tuned[key]) & own).sum())
        return made, apart


def count_of(sparsity: float, weights: int) -> int:
    """How many numbers a share of all weights is, rounded down."""
    return int(sparsity * weights * (1 + 1e-12))


def soft_mask(start: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """``m = g + (1 - 2g) sigma(S - 10)``."""
    pairs = zip(start, scores, strict=True)
    return [torch.where(own, 1 - torch.sigmoid(s - DEEP), torch.sigmoid(s - DEEP)) for own, s in pairs]


def slope(start: Tensor, score: Tensor) -> Tensor:
    """``dm/dS = (1 - 2g) sigma'(S - 10)``."""
    value = torch.sigmoid(score - DEEP)
    return torch.where(start, -1.0, 1.0) * value * (1 - value)


def rounded(start: Sequence[Tensor], scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Where the soft mask is a half or more; where these are more than ``count``, only the largest."""
    soft = soft_mask(start, scores)
    ones = [own >= 0.5 for own in soft]
    if sum(int(own.sum()) for own in ones) <= count:
        return ones
    made = []
    for own, at in zip(soft, largest(soft, count), strict=True):
        flat = torch.zeros(own.numel(), dtype=torch.bool, device=own.device)
        flat[at] = True
        made.append(flat.view(own.shape))
    return made


def measured(reader: Reader, examples: Sequence[Example]) -> dict[str, float | None]:
    """The task's metric as the base's weights are now, and how far confidence and rightness are apart where there are classes."""
    found: dict[str, float | None] = {"score": reader.score(examples), "ece": None}
    if reader.task.kind not in ("classify", "choose"):
        return found
    rows = reader.head.rows(reader.model, examples, scoring=True, longest=reader.longest)
    sure: list[float] = []
    right: list[bool] = []
    with torch.no_grad():
        for at in range(0, len(rows), 32):
            chosen = rows[at : at + 32]
            best = reader.logits(chosen).softmax(-1).max(-1)
            sure += best.values.tolist()
            right += [p == row.target for p, row in zip(best.indices.tolist(), chosen, strict=True)]
    found["ece"] = calibration_error(sure, right)
    return found


def _names(names: Sequence[str]) -> list[str]:
    """Names of folders, each of its own."""
    short = [Path(name).name or "model" for name in names]
    return [name if short.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(short)]


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "little")
