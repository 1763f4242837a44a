"""What *merge* does on a word of its own: ``readapt``, ``subtract``, ``compress``, ``split`` and ``restore``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.core.errors import ConfigError, MergeError, listing, nearest

WORDS = ("readapt", "subtract", "compress", "split", "restore")


def told(
    given: Sequence[str],
    out: str,
    weights: list[float] | None,
    mode: str,
    rank: int | None,
    method: Mapping[str, Any] | None = None,
    base: str = "",
    **options: Any,
) -> Path:
    """Does what the first word says.

    Args:
        given: the word, and what it is about.
        out: a folder for the result.
        weights: of ``readapt``: of the domain's change and of the tuning's.
        mode: of ``subtract``.
        rank: of ``readapt``: of the tuning's change.
        method: of ``compress`` and ``split``: its name and settings.
        base: of ``compress`` (where a model is given), ``split`` and ``restore``.
        options: of ``readapt``: those of `polytask.merge`.

    Raises:
        ConfigError: a wrong number of inputs, or a setting that the word does not know.
    """
    word, *rest = given
    if word not in ("compress", "split", "restore"):
        if method or base:
            raise ConfigError(f"{word} takes no --method and no --base; leave them out")
    elif weights or rank is not None:
        raise ConfigError(f"{word} takes no --weights and no --rank; leave them out")
    if word == "compress":
        return _compressed(rest, out, dict(method or {}), base)
    if word == "split":
        return _split(rest, out, dict(method or {}), base)
    if word == "restore":
        return _restored(rest, out, base, method, **options)
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


def _compressed(given: Sequence[str], out: str, method: dict[str, Any], base: str) -> Path:
    """An adapter, or a model's difference to its base, in signs and one size."""
    from polytask.merge import compress
    from polytask.merge.given import adapter_of, source_of

    settings = _settings("compress", method, "compeft", ("density", "alpha"))
    if len(given) != 1:
        raise ConfigError(
            "compress takes one adapter or model: polytask merge compress LIB/A --method compeft:density=0.1"
        )
    adapter = adapter_of(given[0])
    if adapter is not None:
        return compress.save_adapter(adapter, Path(out).expanduser(), **settings)
    if not base:
        raise ConfigError(
            f"{given[0]} is a model, of which the difference to its base is compressed; say which (--base)"
        )
    root = source_of(base, None)
    file = Path(out).expanduser() / "compressed.safetensors"
    compress.compress(source_of(given[0], root), root, file, **settings)
    return file.parent


def _split(given: Sequence[str], out: str, method: dict[str, Any], base: str) -> Path:
    """One difference for all models, with a mask for each."""
    from polytask.merge.unified import split

    if not given or not base:
        raise ConfigError("split takes models and their base: polytask merge split A B --base M --method emr")
    name = str(method.get("name", "emr"))
    allowed = {"emr": ("rescale",), "tall": ("threshold",)}
    settings = _settings("split", method, name, allowed.get(name, ()))
    return split(list(given), base, out, name, names=[Path(item).name for item in given], **settings)


def _restored(given: Sequence[str], out: str, base: str, method: Any, **options: Any) -> Path:
    """One of the models that `_split` took."""
    from polytask.merge.run import merge
    from polytask.merge.unified import Unified

    if len(given) != 2 or not base or method:
        raise ConfigError(
            "restore takes a folder that split wrote, and a task: polytask merge restore DIR TASK --base M"
        )
    return Path(merge([Unified(given[0], base).model(given[1])], "passthrough", out=out, **options))


def _settings(word: str, method: dict[str, Any], name: str, allowed: Sequence[str]) -> dict[str, Any]:
    """A method's settings. Raises `ConfigError` for others than it has."""
    given = str(method.pop("name", name))
    if given != name:
        raise ConfigError(f"{word} has no method {given!r}{nearest(given, [name])}; it has {name}")
    for key in method:
        if key not in allowed:
            raise ConfigError(
                f"{word}: {name} has no setting {key!r}{nearest(key, allowed)}; it has: {listing(allowed)}"
            )
    return method
