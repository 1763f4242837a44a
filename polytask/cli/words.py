"""What *merge* does on a word of its own: ``readapt`` and ``subtract``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polytask.core.errors import ConfigError, MergeError

WORDS = ("readapt", "subtract")


def told(
    given: Sequence[str], out: str, weights: list[float] | None, mode: str, rank: int | None, **options: Any
) -> Path:
    """Does what the first word says.

    Args:
        given: the word, and what it is about.
        out: a folder for the result.
        weights: of ``readapt``: of the domain's change and of the tuning's.
        mode: of ``subtract``.
        rank: of ``readapt``: of the tuning's change.
        options: of ``readapt``: those of `polytask.merge`.

    Raises:
        ConfigError: a wrong number of inputs, or a setting that the word does not know.
    """
    word, *rest = given
    if word == "readapt":
        from polytask.merge.readapt import readapt

        if len(rest) != 3 or len(weights or (1.0, 1.0)) != 2:
            raise ConfigError(
                "readapt takes three models, and two weights where any: polytask merge readapt BASE TUNED DOMAIN --weights 0.8,1"
            )
        alpha, beta = weights or (1.0, 1.0)
        base, tuned, domain = rest
        return Path(readapt(base, tuned, domain, alpha, beta, rank=rank, out=out, **options))
    from polytask.merge.given import adapter_of
    from polytask.merge.subtract import genknowsub

    if len(rest) < 2 or weights or rank is not None:
        raise ConfigError(
            "subtract takes an adapter and general ones, no weights and no rank: polytask merge subtract LIB/A LIB/GENERAL"
        )
    adapters = [adapter_of(item) for item in rest]
    for item, adapter in zip(rest, adapters, strict=True):
        if adapter is None:
            raise MergeError(f"{item} is no folder of an adapter; subtract is for adapters")
    first, *general = [adapter for adapter in adapters if adapter is not None]
    return Path(genknowsub(first, general, mode).save(Path(out).expanduser()))  # type: ignore[arg-type]
