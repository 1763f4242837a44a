"""RE-Adapt: what instruction tuning changed, put on a base that has learned a new domain."""

from __future__ import annotations

from typing import Any

from .run import merge


def readapt(base: Any, tuned: Any, domain: Any, alpha: float = 1.0, beta: float = 1.0, **options: Any) -> Any:
    """``W_base + alpha Delta + beta (W_tuned - W_base)``: the change that tuning made is an adapter of its own.

    With alpha 0 and beta 1 that is the tuned model bit for bit, with beta 0 and alpha 1 the domain's.

    Args:
        base: the pretrained model or checkpoint.
        tuned: what somebody made of it: a model or checkpoint, or an adapter.
        domain: what was learned on the domain's texts from the base: an adapter, or a whole model.
        alpha: how much of the domain's change; below 1 the adaptation is partial.
        beta: how much of the tuning's.
        options: of `polytask.merge`: ``out``, ``dtype``, ``shard``, ...

    Reference: Fleshman and Van Durme, RE-Adapt, arXiv 2405.15007; RE-AdaptIR, arXiv 2406.14764, for retrieval.

    Raises:
        MergeError: the models do not fit each other (a vocabulary that was enlarged, for instance).
    """
    return merge([domain, tuned], "task_arithmetic", base, [alpha, beta], **options)
