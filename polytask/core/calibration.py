"""Whether a classifier is as sure of its answers as it is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import DataError


def calibration_error(confidences: ArrayLike, right: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: ``sum_b |B_b| / n * |share right in B_b - mean confidence in B_b|``, with bins of equal
    width over (0, 1], each with its upper end.

    Args:
        confidences: the probability of each answer that was given, [n].
        right: whether it was right, [n].
        bins: how many.

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Raises:
        DataError: nothing to measure, lengths that differ, or a confidence outside [0, 1].
    """
    sure, hits = np.asarray(confidences, np.float64), np.asarray(right, bool)
    if sure.shape != hits.shape or sure.ndim != 1 or not len(sure):
        raise DataError(
            f"there are {sure.shape} confidences for {hits.shape} answers; give one for each, and at least one"
        )
    if not ((sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise DataError("a confidence lies outside [0, 1]; give the probability of the answer")
    places = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, hits - sure, bins)  # the number in a bin times its gap
    return float(np.abs(gaps).sum() / len(sure))
