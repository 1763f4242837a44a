"""Objectives: what a stage minimises. The plain one is each head's own loss; others change or add to it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polytask.core.head import Head, Out
from polytask.core.registry import Registry
from polytask.core.rows import Row

objectives: Registry[Objective]


class Objective:
    """The head's own loss: cross-entropy, squared error, or the likelihood of the answer's tokens."""

    name = "task"

    def __call__(self, head: Head, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Sum of losses and divisor of each row, ([B], [B]).

        Args:
            head: of the rows' task.
            out: what the base computed for the head's trunk.
            rows: the examples.
        """
        return head.loss(out, rows)


objectives = Registry("objective", "polytask.learn")
objectives.register("task")(Objective)
