"""A linear probe: what a simple model can read from frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polytask.core.errors import DataError, ModelError
from polytask.core.head import LinearHead
from polytask.core.model import Model
from polytask.core.predict import embed
from polytask.core.task import Example, Task


@dataclass
class Probe:
    """A fitted regression on pooled features; see `probe`."""

    task: Task
    head: LinearHead
    regression: Any

    def predict(
        self, model: Model, examples: Sequence[Example], batch_size: int = 64, longest: int | None = None
    ) -> list[Any]:
        """Predictions under the mix that acts now, as a head gives them."""
        rows = self.head.rows(model, examples, longest=longest)
        vectors = embed(model, self.head, rows, batch_size=batch_size).numpy()
        kind, labels = self.task.kind, self.task.labels
        if kind == "multilabel":
            marks = self.regression.predict(vectors)
            return [[labels[i] for i in np.flatnonzero(row)] for row in marks]
        if kind == "choose":
            score = self.regression.decision_function(vectors)
            ends = np.cumsum([row.count for row in rows])[:-1]
            return [int(np.argmax(part)) for part in np.split(score, ends)]
        found = self.regression.predict(vectors)
        return [float(v) for v in found] if kind == "regress" else [str(v) for v in found]


def probe(model: Model, task: Task, *, batch_size: int = 64, longest: int | None = None) -> Probe:
    """Fits a regression on the train split's features under the mix that acts now.

    Logistic regression (scikit-learn's defaults, C = 1) for classes and choices, one per label for ``multilabel``, ridge
    regression for numbers. Features are standardised by the train split.

    Raises:
        DataError: there is nothing to fit on.
        ModelError: the task is not one that a probe can do.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task.kind not in ("classify", "multilabel", "regress", "choose"):
        raise ModelError(
            f"a linear probe cannot do the task {task.name!r} of kind {task.kind!r}; use a generative base"
        )
    if not task.train:
        raise DataError(f"the task {task.name!r} has no training examples to fit a linear probe on")
    head = LinearHead(task.kind, 1, task.labels)
    rows = head.rows(model, task.train, longest=longest)
    vectors = embed(model, head, rows, batch_size=batch_size).numpy()
    logistic = LogisticRegression(max_iter=1000)
    target: Any
    if task.kind == "regress":
        kind, target = Ridge(), np.array([e.target for e in task.train])
    elif task.kind == "multilabel":
        kind, target = (
            OneVsRestClassifier(logistic),
            np.array([[label in e.target for label in task.labels] for e in task.train]),
        )
    elif task.kind == "choose":
        kind = logistic
        target = np.array([i == e.target for e in task.train for i in range(len(e.choices))])
    else:
        target = np.array([e.target for e in task.train])
        # of one label there is nothing to tell apart: the probe says that label
        kind = logistic if len(set(target)) > 1 else DummyClassifier()
    regression = make_pipeline(StandardScaler(), kind)
    regression.fit(vectors, target)
    return Probe(task, head, regression)
