"""Whether tasks pull the skills that they share in one direction: the cosines of their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.head import Head, collate
from polytask.core.model import Model
from polytask.core.routing import Routing
from polytask.core.task import Task


def gradient_alignment(
    model: Model, source: Adapter | Routing, tasks: Sequence[Task], *, split: str = "dev", rows: int = 16
) -> dict[str, Any]:
    """The mean cosine over pairs of tasks of their gradients of the shared skills, ``cos(dL_a / ds, dL_b / ds)``.

    The skills are the experts of a mixture or a mix, without their router; of another adapter all of its patches. Nothing learns,
    and no noise or dropout acts.

    Args:
        model: the base.
        source: a mixture or another adapter that several tasks share, or a mix; with a head for each task.
        tasks: two or more.
        split: the examples that are looked at: ``train``, ``dev`` or ``test``.
        rows: how many of each task, the first ones.

    Returns:
        ``mean``, and ``pairs``: for each two tasks, ``"a / b"``, their cosine. A gradient of zero has the cosine 0.

    Reference: the diagnostic of Caccia et al., arXiv 2211.03831. One batch of each task, and all skills as one vector, are ours.

    Raises:
        ConfigError: fewer than two tasks, an unknown split, or a task without examples.
        MixError: there is no head for a task.
    """
    if len(tasks) < 2 or split not in ("train", "dev", "test") or rows < 1:
        raise ConfigError(
            "gradient_alignment: give two tasks or more, a split (train, dev or test), and at least one row"
        )
    lacking = [task.name for task in tasks if task.name not in source.heads]
    if lacking:
        raise MixError(f"there is no head for {listing(lacking)}; give what was learned with these tasks")
    with _attached(model, source) as mix, _learnable(model, source) as skills:
        found = {}
        for task in tasks:
            examples = list(getattr(task, split))[:rows]
            if not examples:
                raise ConfigError(f"the task {task.name!r} has no {split} examples; choose another split")
            with model.using(mix, tasks=task.name), torch.enable_grad():
                loss = _loss(model, source.heads[task.name], examples)
            parts = torch.autograd.grad(loss, skills, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(skills, parts, strict=True)]
            found[task.name] = torch.cat([part.flatten().double() for part in whole])
    pairs = {f"{a} / {b}": float(_cosine(found[a], found[b])) for a, b in itertools.combinations(found, 2)}
    return {"mean": sum(pairs.values()) / len(pairs), "pairs": pairs}


def _loss(model: Model, head: Head, examples: Sequence[Any]) -> Tensor:
    made = head.rows(model, examples)
    values, counts = head.loss(head.run(model, collate(model, head, made)), made)
    return values.sum() / counts.sum()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    size = a.norm() * b.norm()
    found: Tensor = a @ b / size if size else size
    return found


@contextmanager
def _attached(model: Model, source: Adapter | Routing) -> Iterator[Any]:
    """What lets it act; it is detached again where it was not attached before."""
    before = set(model.attached)
    if isinstance(source, Routing):
        mix: Any = source.attach(model)
    else:
        mix = next((name for name, adapter in model.adapters.items() if adapter is source), None) or model.attach(
            source
        )
    modes = [(module, module.training) for module in model.module.modules()]
    try:
        for module, _ in modes:
            module.__dict__["training"] = False
        yield mix
    finally:
        for module, mode in modes:
            module.__dict__["training"] = mode
        for name in set(model.attached) - before:
            model.detach(name)


@contextmanager
def _learnable(model: Model, source: Adapter | Routing) -> Iterator[list[nn.Parameter]]:
    """The skills' parameters, which take gradients inside the block, and nothing else does."""
    adapters = list(source.adapters.values()) if isinstance(source, Routing) else [source]
    skills: dict[int, nn.Parameter] = {}
    for adapter in adapters:
        for patch in adapter.patches.values():
            inner = getattr(patch, "patches", None)  # those of a mixture; its gate is no skill
            for part in [patch] if inner is None else inner.values():
                for name, parameter in part.named_parameters():
                    if name not in part.frozen and parameter.is_floating_point():
                        skills[id(parameter)] = parameter
    own = source.named_parameters()
    others = [*model.module.parameters(), *[p for _, p in own], *[p for a in adapters for p in a.parameters()]]
    every = {id(p): p for p in others} | skills
    flags = [(p, p.requires_grad) for p in every.values()]
    try:
        for p in every.values():
            p.requires_grad_(id(p) in skills)
        yield list(skills.values())
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
