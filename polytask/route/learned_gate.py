"""A gate vector for each site of one adapter, learned on the adapter's own task after the adapter itself.

Shapes: B rows, T tokens, i = d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MixError
from polytask.core.form import Call, Weights
from polytask.core.head import Head, collate, head_for
from polytask.core.mix import Mix
from polytask.core.model import Model
from polytask.core.rows import Row
from polytask.core.site import Site
from polytask.core.task import Task

WARM = 0.06  # of the steps, in which the learning rate rises


class Gated(Mix):
    """One adapter whose contribution is scaled at each site and token: ``y + sigmoid(v . x) c(x, y)``.

    Args:
        name: of the adapter.
        gates: v [i] by site; where none is, the adapter acts as it is.
    """

    def __init__(self, name: str, gates: Mapping[str, Tensor]) -> None:
        self.name, self.gates = name, gates

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        if self.name not in names:
            return Weights((), ())
        v = self.gates.get(site.name)
        if v is None:
            return Weights((self.name,), (1.0,))
        return Weights((self.name,), (x.to(v.dtype) @ v).sigmoid().unsqueeze(-1))  # [B, T, 1]


def learned_gates(
    adapter: Adapter, model: Model, task: Task, *, steps: int, lr: float, batch_size: int, seed: int = 0
) -> dict[str, Tensor]:
    """The vectors v by site, from zero, that make the loss of the adapter's own task least; nothing else moves.

    Texts are cut as they were while the adapter learned. A task that the adapter has no head for gets one that learns beside the
    gates and is dropped with them.

    Args:
        adapter: it need not be attached.
        model: the base.
        task: whose training examples are used.
        steps: of AdamW without decay, at a constant rate after the first 6 %.
        lr: the learning rate.
        batch_size: examples in a step.
        seed: of their order.

    Raises:
        MixError: there are no examples, or the loss is no number.
        ModelError: the base cannot do the task.
    """
    if not task.train:
        raise MixError(f"the task {task.name!r} has no training examples, and a gate learns from them; give it some")
    head = adapter.heads.get(task.name)
    fresh = head is None
    head = (head or head_for(model, task, seed, adapter.form)).to(model.device)
    gates = {
        name: torch.zeros(patch.site.d_in, device=model.device, requires_grad=True)
        for name, patch in adapter.patches.items()
    }
    moves = [*gates.values(), *(head.parameters() if fresh else ())]
    optimizer = torch.optim.AdamW(moves, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (WARM * steps)))
    with still(model, adapter) as name, torch.enable_grad(), model.using(Gated(name, gates), tasks=task.name):
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(task.train), generator=draw)[: steps * batch_size].tolist()  # more are never seen
        rows = head.rows(model, [task.train[i] for i in order], longest=adapter.schedule.get("longest"))
        drawn = batches(rows, batch_size, draw)
        for step in range(steps):
            loss = loss_of(model, head, next(drawn))
            if not bool(torch.isfinite(loss)):
                raise MixError(
                    f"the loss of the task {task.name!r} is {float(loss)} at step {step + 1} of its gate; lower lr"
                )
            found = torch.autograd.grad(loss, moves, allow_unused=True)
            for value, gradient in zip(moves, found, strict=True):
                value.grad = gradient
            optimizer.step()
            schedule.step()
    return {name: v.detach().cpu() for name, v in gates.items()}


def loss_of(model: Model, head: Head, rows: Sequence[Row]) -> Tensor:
    """Mean loss of some rows under the mix that acts."""
    values, divisors = head.loss(head.run(model, collate(model, head, rows)), rows)
    return values.sum() / divisors.sum()


def batches(rows: Sequence[Row], size: int, generator: torch.Generator) -> Iterator[list[Row]]:
    """Batches without end, every row once in each round."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for at in range(0, len(order), size):
            yield [rows[i] for i in order[at : at + size]]


@contextmanager
def still(model: Model, adapter: Adapter) -> Iterator[str]:
    """The adapter attached under a name of its own, which is given, to a base that evaluates."""
    name = f"gate of {adapter.name}"
    while name in model.attached:
        name += "'"
    training = [module for module in model.module.modules() if module.training]
    model.module.eval()
    model.attach(adapter, name)
    try:
        yield name
    finally:
        model.detach(name)
        for module in training:
            module.training = True
