"""Two measures of causal models beside their tasks: texts made of several tasks, and text that has nothing to do with any."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One task's example within a text: tokens ``start`` to ``end``, of which those from ``answer`` on are scored."""

    task: str
    start: int
    answer: int
    end: int


@dataclass(frozen=True)
class Composite:
    """The tokens of a text, and its parts in order."""

    ids: tuple[int, ...]
    parts: tuple[Part, ...]


def composites(model: Any, tasks: Sequence[Any], texts: int, parts: int, longest: int) -> list[Composite]:
    """Texts of ``parts`` test examples each, of different tasks, one after the other with their answers.

    Args:
        model: the base, for its tokenizer.
        tasks: that examples are drawn from; the same for each seed of an experiment.
        texts: how many.
        parts: of each.
        longest: tokens kept of a part; its prompt loses its beginning.
    """
    from polytask.core.head import head_for

    pick, made = random.Random(0), []
    for _ in range(texts):
        ids: list[int] = []
        found = []
        for task in pick.sample(list(tasks), parts):
            row = head_for(model, task).rows(model, [pick.choice(task.test)], longest=longest)[0]
            start = len(ids)
            ids += row.sequences[0]
            found.append(Part(task.name, start, start + row.starts[0], len(ids)))
        made.append(Composite(tuple(ids), tuple(found)))
    return made


@torch.no_grad()
def composite_score(model: Any, texts: Sequence[Composite], mix: Any, own: bool = False) -> dict[str, float]:
    """``nll``: nats a token of the answers, each read after the parts before it. For a mix with gates that decide by token also
    ``agreement``: at what part of the tokens of a part the adapter of its task has the largest weight, a mean over sites.

    Args:
        model: the base.
        texts: from `composites`.
        mix: what acts; with ``own`` it is a function of the task's name, and each answer is read under its task's own.
        own: as said.
    """
    from polytask.core.gate import serving
    from polytask.core.routing import Routing

    total, count = 0.0, 0
    agreed: list[float] = []
    for text in texts:
        ids = torch.tensor([text.ids])
        runs = [(mix(part.task), [part]) for part in text.parts] if own else [(mix, text.parts)]
        for acting, parts in runs:
            labels = torch.full_like(ids, -100)
            for part in parts:
                labels[0, part.answer : part.end] = ids[0, part.answer : part.end]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            with model.using(acting, tasks=parts[0].task):
                nll, seen = model.likelihood(batch)
            total, count = total + float(nll), count + int(seen)
    found = {"nll": total / count}
    if isinstance(mix, Routing):
        serves = serving(mix.adapters)
        for text in texts:
            agreed += _agreement(model, text, mix, serves)
        if agreed:
            found["agreement"] = sum(agreed) / len(agreed)
    return found


def _agreement(model: Any, text: Composite, mix: Any, serves: dict[str, str]) -> list[float]:
    """For each part and site, how often the adapter of the part leads; nothing from gates that decide for whole rows."""
    found: list[float] = []

    def see(gate: Any, weights: Any, call: Any) -> None:
        dense = weights.dense().detach()
        dense = dense.reshape(-1, dense.shape[-1])
        if len(dense) != len(text.ids):
            return
        best = dense.argmax(-1)
        for part in text.parts:
            if serves.get(part.task) in weights.names:
                own = weights.names.index(serves[part.task])
                found.append(float((best[part.start : part.end] == own).float().mean()))

    with mix.tracing(see), model.using(mix, tasks=text.parts[0].task):
        ids = torch.tensor([text.ids])
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
    return found


def plain_text(model: Any, file: Path, task: str, windows: int, longest: int) -> list[Any]:
    """The first windows of a text that no adapter learned from."""
    import json
    import lzma

    from polytask.core.rows import windows as cut

    with lzma.open(file, "rt", encoding="utf-8", newline="\n") as lines:
        text = next(row["x"] for row in map(json.loads, lines) if row["task"] == task)
    return cut(model, text[: windows * longest * 8], longest)[:windows]


@torch.no_grad()
def plain_score(model: Any, rows: Sequence[Any], mix: Any, task: str) -> float:
    """Nats a token of plain text: what the base knew and a change of it may lose."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.sequences[0]])
        labels = ids.clone()
        labels[0, : row.starts[0]] = -100
        with model.using(mix, tasks=task):
            nll, seen = model.likelihood({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        total, count = total + float(nll), count + int(seen)
    return total / count
