"""Scoring a base under a mix on a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, DataError
from polytask.core.head import Head, TextHead, head_for
from polytask.core.metrics import Score, score
from polytask.core.mix import Mix, MixLike
from polytask.core.model import Model
from polytask.core.predict import predict
from polytask.core.task import SPLITS, Example, Task

from .probe import probe


def evaluate(
    model: Model | str,
    task: Task,
    mix: MixLike = None,
    *,
    split: str = "test",
    head: Head | None = None,
    metric: str | None = None,
    batch_size: int = 32,
    longest: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    keep: bool = False,
) -> Score:
    """The score of a base under a mix on one split of a task, with a 95 % bootstrap interval over its examples.

    The answer is read by ``head``; by default by the head for this task that an adapter of the mix brings. Where there is
    none, a generative base answers as it is (zero-shot), and any other base by a linear probe: a logistic or ridge
    regression, fitted on the train split's frozen features under the same mix.

    Args:
        model: the base, or what `Model.load` takes.
        task: what to score on.
        mix: a name, ``{name: weight}``, a `Mix`, or None for the bare base.
        split: ``test``, ``dev`` or ``train``.
        head: reads the answers.
        metric: the task's own when None.
        batch_size: sequences per forward.
        longest: tokens read of a text.
        resamples: of the bootstrap; 0 gives no interval (low and high equal the value).
        seed: of the bootstrap.
        keep: keep the predictions in the score.

    Raises:
        DataError: the split is empty.
        MixError: the mix names an adapter that is not attached.
        ModelError: this kind of base cannot do this kind of task.
    """
    model = Model.load(model) if isinstance(model, str) else model
    examples = examples_of(task, split)
    acting = Mix.of(mix)
    reader = head or _head(model, task, acting)
    with model.using(acting, tasks=task.name):
        if reader is None:
            found = probe(model, task, batch_size=batch_size, longest=longest).predict(
                model, examples, batch_size, longest
            )
        else:
            rows = reader.rows(model, examples, scoring=True, longest=longest)
            write = isinstance(reader, TextHead) and task.kind == "generate"
            found = predict(model, reader, rows, batch_size=batch_size, write=write)
    targets = [example.target for example in examples]
    if task.kind == "lm":
        targets = [None] * len(found)
    return score(
        task.kind, found, targets, metric=metric or task.metric or None, labels=task.labels, resamples=resamples, seed=seed,
        keep=keep,
    )  # fmt: skip


def examples_of(task: Task, split: str) -> Sequence[Example]:
    """A split's examples. Raises `ConfigError` for an unknown one and `DataError` for an empty one."""
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}; a task has {', '.join(SPLITS)}")
    examples: Sequence[Example] = getattr(task, split)
    if not examples:
        raise DataError(f"the split {split!r} of the task {task.name!r} is empty; choose another or give it examples")
    return examples


def _head(model: Model, task: Task, mix: Mix | None) -> Head | None:
    """The head for a task that the mix's adapters bring; a generative base needs none of its own."""
    present: dict[str, Adapter] = dict(model.adapters)
    for name in mix.names() if mix is not None else ():
        kept = present[name].heads.get(task.name) if name in present else None
        # a head of class texts answers for other classes by their names
        if kept is not None and not (kept.trunk == "similarity" and set(kept.labels) != set(task.labels)):  # type: ignore[arg-type]
            return kept
    form = next((present[n].form for n in (mix.names() if mix is not None else ()) if n in present), None)
    compared = model.kind == "dual" and task.kind == "classify" and task.modality == "image"
    return head_for(model, task, form=form) if model.kind in ("causal", "seq2seq") or compared else None


def results(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores by task as plain values."""
    return {name: found.as_dict() for name, found in scores.items()}
