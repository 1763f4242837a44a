"""Fisher merging: how much each model's answers depend on each of its weights, measured on its task's examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, DataError, MergeError
from polytask.core.rows import Row
from polytask.merge.fit import Fit, Plan, Tensors, fits
from polytask.merge.pool import Pool, Reader

CHOOSING = ("classify", "choose")  # kinds of tasks whose answers have probabilities that add up to one


@fits.register("fisher")
@dataclass(frozen=True)
class FisherWeighted(Fit):
    """``sum_i l_i F_i W_i / sum_i l_i F_i`` with the diagonal of each model's Fisher information on its own task: the mean
    over examples of ``sum_c p_c (d log p_c)^2``. It looks at inputs alone, with ``empirical`` at their answers too.

    Gradients are of one example at a time, as squares of a batch's sum would have cross terms; an example takes a backward
    pass for each class, with ``empirical`` a single one. In memory there is a number for each weight that changes, for each
    model. Generative bases choose among the candidate answers by their likelihood.

    Args:
        examples: of each model's task, at most.
        empirical: ``(d log p_y)^2`` for the true answer y instead of the mean over all of them. Tasks without classes need it
            (multilabel, regress, generate, lm); for them the head's loss stands for ``-log p_y``.
        normalize: divide each model's statistics by their root mean square: its global norm, with the same factor for all.
        floor: the least that a statistic counts; where all are below it, the models' mean is taken.
        coefficients: l_i, one for each model; 1 each when empty.

    Reference: Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832. Their code divides the
    coefficients by the norms and sets the floor on the raw statistics; here the floor comes after the norm, so it means the
    same for models of any size.

    Raises:
        ConfigError: a setting is out of range.
        MergeError: it is not known which task a model was tuned for, or a task has no classes.
        DataError: an example has no answer, with ``empirical``.
    """

    examples: int = 256
    empirical: bool = False
    normalize: bool = True
    floor: float = 1e-6
    coefficients: tuple[float, ...] = ()

    paper: ClassVar[str] = "arXiv 2111.09832"

    def __post_init__(self) -> None:
        self.at_least("examples", 1)
        self.at_least("floor", 0)

    def fit(self, pool: Pool) -> Plan:
        weights = weights_of(self.name, self.coefficients, pool)
        readers = [pool.reader_of(i) for i in range(len(pool))]
        beside, norms = [], []
        for i, reader in enumerate(readers):
            sums = self._measured(pool, i, reader)
            squares = torch.stack([s.double().square().sum() for s in sums.values()]).sum()
            norms.append(float(squares.sqrt()))
            mean = norms[-1] / sum(s.numel() for s in sums.values()) ** 0.5
            if self.normalize and mean:
                sums = {name: s / mean for name, s in sums.items()}
            beside.append(Tensors({name: s.cpu() for name, s in sums.items()}, pool.names[i]))
            pool.say(f"fisher: {pool.names[i]} on {reader.task.name}, norm {norms[-1]:.4g}")
        about = {"norms": norms, "tasks": [reader.task.name for reader in readers]}
        return Plan("fisher", weights, {"floor": self.floor}, beside, about)

    def _measured(self, pool: Pool, model: int, reader: Reader) -> dict[str, Tensor]:
        """F of every tensor that changes."""
        if not self.empirical and reader.task.kind not in CHOOSING:
            raise MergeError(
                f"fisher: the task {reader.task.name!r} is of kind {reader.task.kind!r}, whose answers cannot be gone "
                f"through; say empirical=True, or give one of kind {' or '.join(CHOOSING)}"
            )
        tensors = {name: t.detach().requires_grad_() for name, t in pool.alone(model).items()}
        sums = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in tensors.items()}
        answers = reader.task.kind not in CHOOSING
        rows = next(reader.batches(self.examples, answers))
        with pool.acting(tensors), torch.enable_grad():
            for k, row in enumerate(rows):
                if k and k % 50 == 0:
                    pool.say(f"fisher: {pool.names[model]}, {k} of {len(rows)} examples")
                for share, log in self._logs(reader, row):
                    found = torch.autograd.grad(log, list(tensors.values()), retain_graph=True, allow_unused=True)
                    for own, gradient in zip(sums.values(), found, strict=True):
                        if gradient is not None:
                            own.addcmul_(gradient.float(), gradient.float(), value=share / len(rows))
        return sums

    def _logs(self, reader: Reader, row: Row) -> Iterator[tuple[float, Tensor]]:
        """Log-probabilities of an example's answers, each with how much its squared gradient counts."""
        if reader.task.kind not in CHOOSING:
            yield 1.0, -reader.head.loss(reader.out([row]), [row])[0].sum()
            return
        logs = reader.logits([row])[0].log_softmax(0)
        if not self.empirical:
            yield from zip(logs.detach().exp().tolist(), logs, strict=True)
            return
        if not isinstance(row.target, int) or not 0 <= row.target < len(logs):
            raise DataError(
                f"fisher: an example of the task {reader.task.name!r} has no answer that is one of its classes, which "
                "empirical=True needs; leave that out, or give answers"
            )
        yield 1.0, logs[row.target]


def weights_of(name: str, coefficients: tuple[float, ...], pool: Pool) -> list[float] | None:
    """The models' weights; None for 1 each. Raises `ConfigError` for another number of them, or what is no weight."""
    if not coefficients:
        return None
    if len(coefficients) != len(pool) or min(coefficients) < 0 or not sum(coefficients):
        raise ConfigError(
            f"{name}: coefficients must be {len(pool)} numbers, one for each model, of at least 0 and not all 0, got "
            f"{list(coefficients)}"
        )
    return list(coefficients)
