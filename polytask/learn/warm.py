"""A head's start: what a linear probe on the frozen base finds, so that adapters learn from a sensible reading.

Learning with a random head first distorts the features it reads (Kumar et al., arXiv 2202.10054); the probe costs one forward
over the training examples. The probe is regularised more than one that is used by itself, to leave something to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polytask.core.head import LinearHead, Row
from polytask.core.model import Model
from polytask.core.predict import embed

STRENGTH = 0.1  # C of the logistic regressions, on standardised features


def warm(model: Model, head: LinearHead, rows: Sequence[Row], batch_size: int = 64) -> None:
    """Sets a head's values by a regression on the features that the model gives now.

    Args:
        model: the base, with whatever acts on it.
        head: of the rows' task.
        rows: training rows with their targets.
        batch_size: sequences per forward.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    x = embed(model, head, rows, batch_size=batch_size).numpy().astype(np.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / spread
    logistic = LogisticRegression(C=STRENGTH, max_iter=300)
    outputs = head.linear.out_features
    weight, bias = np.zeros((outputs, x.shape[1])), np.zeros(outputs)
    if head.task == "regress":
        ridge = Ridge(alpha=1.0 / STRENGTH).fit(z, [row.target for row in rows])
        weight[0], bias[0] = ridge.coef_, ridge.intercept_
    elif head.task == "classify":
        targets = [row.target for row in rows]
        if len(set(targets)) < 2:
            return
        fit = logistic.fit(z, targets)
        if len(fit.classes_) == 2:  # one direction for both
            weight[fit.classes_[1]], weight[fit.classes_[0]] = fit.coef_[0] / 2, -fit.coef_[0] / 2
            bias[fit.classes_[1]], bias[fit.classes_[0]] = fit.intercept_[0] / 2, -fit.intercept_[0] / 2
        else:
            weight[fit.classes_], bias[fit.classes_] = fit.coef_, fit.intercept_
    else:
        marks = (
            np.array([row.target for row in rows])
            if head.task == "multilabel"
            else np.concatenate([np.arange(row.count) == row.target for row in rows])[:, None]
        )
        for i in range(outputs):
            if 0 < marks[:, i].sum() < len(marks):
                fit = logistic.fit(z, marks[:, i])
                weight[i], bias[i] = fit.coef_[0], fit.intercept_[0]
    scaled = weight / spread
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(scaled))
        head.linear.bias.copy_(torch.from_numpy(bias - scaled @ mean))
