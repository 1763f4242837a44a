"""aTLAS: differences of other models, each tensor with a coefficient of its own, learned for a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError, listing
from polytask.core.head import LinearHead
from polytask.core.rows import Row
from polytask.learn.warm import warm
from polytask.merge.fit import Fit, Plan, fits, per_tensor
from polytask.merge.pool import Pool, Reader

from ._views import view

RATES = {"few-shot": 1e-1, "unlabelled": 1e-3}
SURE = 0.99  # how sure the model must be of an answer to learn from it


@fits.register("atlas")
@dataclass(frozen=True)
class Atlas(Fit):
    """``b + sum_i l_ip t_ip`` at each tensor p, with coefficients that start at 0 and learn the given tasks, whose losses are
    added up. The models may have been tuned for other tasks. Only the coefficients move, which may be negative or large.

    ``few-shot`` minimises the loss of the answers. A task whose head no adapter brings is read by a linear probe of the base,
    fitted to the same examples, which the result keeps; generative bases need none. ``unlabelled`` minimises the cross-entropy of
    another view of an example (texts lose tokens, images are flipped and shifted) to what the model says of the example itself,
    ``p^2 / sum p^2``, where it is surer than 0.99. Of each class the k examples that the base is surest of keep the base's answer
    throughout, ``k = min(n / (10 classes), 100)``.

    Args:
        objective: ``few-shot`` (needs answers) or ``unlabelled``.
        steps: of AdamW; its rate falls to 0 as a cosine.
        lr: its learning rate at first; 0.1, or 0.001 for ``unlabelled``, when None.
        batch_size: examples of each task in a step.
        weight_decay: towards the base.
        clip: the largest norm of a gradient.
        penalty: times the mean over the tensors of the coefficients' p-norm over the models (0.5 in the paper's code).
        norm: p, 1 or 2.
        drop: the chance that a token is left out of a view.

    Reference: Zhang et al., Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, arXiv 2407.02880. There
    the task's own model is not among the models; here it is for the caller to leave out. Its code for unlabelled examples scales
    the probabilities and does not sharpen them, and keeps the base's answer of every example; what is described is done here.

    Raises:
        ConfigError: a setting is out of range, or examples lack answers.
        MergeError: a head would have to be made for whole models, which have no place for it.
    """

    objective: str = "few-shot"
    steps: int = 200
    lr: float | None = None
    batch_size: int = 128
    weight_decay: float = 0.1
    clip: float = 1.0
    penalty: float = 0.0
    norm: int = 1
    drop: float = 0.1

    paper: ClassVar[str] = "arXiv 2407.02880"
    labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.objective not in RATES:
            raise ConfigError(f"atlas: objective must be {' or '.join(RATES)}, got {self.objective!r}")
        if self.norm not in (1, 2):
            raise ConfigError(f"atlas: norm must be 1 or 2, got {self.norm!r}")
        if isinstance(self.drop, bool) or not 0.0 <= self.drop < 1.0:
            raise ConfigError(f"atlas: drop must be at least 0 and below 1, got {self.drop!r}")
        for name in ("steps", "weight_decay", "clip", "penalty", *(["lr"] if self.lr is not None else [])):
            self.at_least(name, 0)
        self.at_least("batch_size", 1)

    def starts(self) -> bool:
        return self.objective == "few-shot"

    def fit(self, pool: Pool) -> Plan:
        heads = {reader.task.name: reader.head for reader in pool.readers if reader.task.name not in pool.heads}
        if pool.fresh:
            _probe(pool)
        losses = [self._loss(pool, reader) for reader in pool.readers]
        names = list(pool.changes)
        coefficients = torch.zeros(len(names), len(pool), device=pool.model.device, requires_grad=True)
        rate = RATES[self.objective] if self.lr is None else self.lr
        optimizer = torch.optim.AdamW([coefficients], lr=rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps)))
        )
        history = []
        for step in range(self.steps):
            composed = pool.compose(dict(zip(names, coefficients, strict=True)))
            with pool.acting(composed):
                loss = torch.stack([one() for one in losses]).sum()
            if self.penalty:
                loss = loss + self.penalty * coefficients.norm(self.norm, dim=1).mean()
            optimizer.zero_grad()
            loss.backward(inputs=[coefficients])
            torch.nn.utils.clip_grad_norm_([coefficients], self.clip)
            optimizer.step()
            schedule.step()
            history.append(float(loss.detach()))
            if (step + 1) % 50 == 0:
                pool.say(f"atlas: step {step + 1} of {self.steps}, loss {history[-1]:.4f}")
        about = {"loss": history[:: max(1, len(history) // 20)], "coefficients": coefficients.numel()}
        found = dict(zip(names, coefficients.detach(), strict=True))
        return Plan("task_arithmetic", per_tensor(found, len(pool)), about=about, heads=heads)

    def _loss(self, pool: Pool, reader: Reader) -> Callable[[], Tensor]:
        """What gives the loss of a task's next examples as the base's weights are then."""
        if self.objective == "unlabelled":
            return Unlabelled(pool, reader, self.batch_size, self.drop)
        _answered(reader)
        batches = reader.batches(self.batch_size, answers=True)
        return lambda: reader.loss(next(batches))


class Unlabelled:
    """The loss of a task's examples without their answers.

    Args:
        pool: of the models.
        reader: of the task.
        size: examples in a batch.
        drop: the chance that a token is left out of a view.

    Attributes:
        trusted: the answers, [C], of the examples whose answer is the base's from the start, by their place.
    """

    def __init__(self, pool: Pool, reader: Reader, size: int, drop: float) -> None:
        self.reader, self.drop = reader, drop
        self.special = getattr(pool.model.tokenizer, "all_special_ids", None) or []
        self.generator = torch.Generator().manual_seed(pool.seed)
        rows = reader.rows(answers=False)
        self.place = {id(row): i for i, row in enumerate(rows)}
        self.batches = reader.batches(size, answers=False)
        with pool.acting({}):
            parts = [self._sure(rows[at : at + size]) for at in range(0, len(rows), size)]
        width = max(part.shape[1] for part in parts)
        sure = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        self.trusted = trusted(sure)

    def __call__(self) -> Tensor:
        rows = next(self.batches)
        wanted = self._sure(rows)
        counts = wanted.max(1).values > SURE
        wanted = wanted.square() / wanted.square().sum(1, keepdim=True)
        for i, row in enumerate(rows):
            answer = self.trusted.get(self.place[id(row)])
            if answer is not None:
                wanted[i], counts[i] = (
                    torch.nn.functional.one_hot(torch.tensor(answer), wanted.shape[1]).to(wanted),
                    True,
                )
        views = [view(row, self.special, self.drop, self.generator) for row in rows]
        logs = self.reader.logits(views).log_softmax(1)
        crossed = -(wanted * logs.masked_fill(wanted == 0, 0.0)).sum(1)  # -inf where a row has fewer answers
        return (crossed * counts).mean()

    @torch.no_grad()
    def _sure(self, rows: Sequence[Row]) -> Tensor:
        """The probabilities of the rows' answers now."""
        return self.reader.logits(rows).softmax(1)


def trusted(sure: Tensor) -> dict[int, int]:
    """The answers of the k surest examples among those of each class, by their place, from probabilities [n, C]."""
    count, classes = sure.shape
    k = max(1, min(count // (10 * classes), 100))
    best, given = sure.max(1)
    found = {}
    for answer in range(classes):
        own = (given == answer).nonzero().squeeze(1)
        for i in own[best[own].argsort(descending=True, stable=True)[:k]].tolist():
            found[i] = answer
    return found


def _probe(pool: Pool) -> None:
    """Fits the heads that no model brings."""
    whole = [name for name, item in zip(pool.names, pool.inputs, strict=True) if not isinstance(item, Adapter)]
    if whole:
        raise MergeError(
            f"no adapter brings a head for {listing(pool.fresh)}, and with whole models ({listing(whole)}) one that is found "
            "here has no place in the result; give adapters, among them one with that head"
        )
    for reader in pool.readers:
        if reader.task.name in pool.fresh:
            _answered(reader)
            assert isinstance(reader.head, LinearHead)
            with pool.acting({}):
                warm(pool.model, reader.head, reader.rows(answers=True))


def _answered(reader: Reader) -> None:
    """Raises `ConfigError` where examples have no answer that can be learned."""
    task = reader.task
    lacking = [
        example
        for example in ([] if task.kind == "lm" else reader.examples)
        if example.target is None or (task.kind == "classify" and example.target not in task.labels)
    ]
    if lacking:
        raise ConfigError(
            f"atlas: few-shot learns from answers, and {len(lacking)} of {len(reader.examples)} examples in the split "
            f"{reader.split!r} of {task.name!r} have none{' among its labels' if task.labels else ''}; give them, or say "
            "objective='unlabelled'"
        )
