"""RE-Adapt: what instruction tuning changed, put on a base that has learned a new domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polytask.core.errors import ConfigError
from polytask.core.storage import write

from .card import written
from .embeddings import embeddings
from .given import source_of
from .lowrank import LowRank
from .run import merge


def readapt(
    base: Any,
    tuned: Any,
    domain: Any,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    rank: int | None = None,
    **options: Any,
) -> Any:
    """``W_base + alpha Delta + beta (W_tuned - W_base)``: the change that tuning made is an adapter of its own.

    With alpha 0 and beta 1 that is the tuned model bit for bit, with beta 0 and alpha 1 the domain's.

    Args:
        base: the pretrained model or checkpoint.
        tuned: what somebody made of it: a model or checkpoint, or an adapter.
        domain: what was learned on the domain's texts from the base: an adapter, or a whole model.
        alpha: how much of the domain's change; below 1 the adaptation is partial.
        beta: how much of the tuning's.
        rank: keeps only so many singular components of the tuning's change in each matrix (LoRE-Adapt); the record in ``out``
            says what that loses. Embeddings stay whole where a vocabulary is changed too (``tokenizer``).
        options: of `polytask.merge`: ``out``, ``dtype``, ``shard``, ``tokenizer``, ...

    Reference: Fleshman and Van Durme, RE-Adapt, arXiv 2405.15007; RE-AdaptIR, arXiv 2406.14764, for retrieval.

    Raises:
        MergeError: the models do not fit each other; for a vocabulary that was enlarged say ``tokenizer="union"``.
        ConfigError: the rank is not positive, or ``as_`` asks for an adapter of it.
    """
    if rank is None:
        return merge([domain, tuned], "task_arithmetic", base, [alpha, beta], **options)
    if rank < 1:
        raise ConfigError(f"readapt: rank must be at least 1, got {rank}; leave it out for the whole change")
    if options.get("as_") is not None:
        raise ConfigError("readapt: a rank is for models; leave as_ or rank out")
    root = source_of(base, None)
    source = source_of(tuned, root)
    whole = embeddings(source)[0] if options.get("tokenizer") is not None else ()
    low = LowRank(source, root, rank, options.get("seed", 0), whole)
    made = merge([domain, low], "task_arithmetic", base, [alpha, beta], **options)
    options.get("say", lambda text: None)(f"rank {rank} loses {low.error:.2%} of the change that tuning made")
    if options.get("out") is not None:
        _note(Path(made), tuned, low)
    return made


def _note(folder: Path, tuned: Any, low: LowRank) -> None:
    """Says in the record what was cut, and what that lost."""
    from .replay import read

    said = read(folder / "polytask_merge.json")
    worst = max(low.errors, key=lambda name: low.errors[name][0] / (low.errors[name][1] or 1.0), default="")
    said["readapt"] = {"rank": low.rank, "error": low.error, "tensors": len(low.errors), "worst": worst}
    if isinstance(tuned, str | Path):
        for entry in said["parents"]:
            if entry["path"] is None and entry["name"] == low.source.name:
                entry["path"] = str(tuned)
    for name, data in written(said).items():
        write(folder / name, data)
