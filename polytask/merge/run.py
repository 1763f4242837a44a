"""The verb *merge*: models or adapters in, one of the same kind out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polytask.core.errors import ConfigError, MergeError

from .adapters import merge_adapters
from .card import cite
from .engine import Job
from .expression import check_names, parse
from .fit import Plan, fits
from .given import adapter_of, source_of
from .live import summed
from .looked import looked, planned
from .made import Out, dtype_of, made
from .vocabulary import aligned


def merge(
    inputs: Sequence[Any] | str,
    method: str = "linear",
    base: Any = None,
    weights: Sequence[Any] | None = None,
    *,
    out: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    shard: str | int = "5GB",
    seed: int = 0,
    resume: bool = False,
    each: Mapping[str, Sequence[Any]] | None = None,
    say: Callable[[str], None] = lambda text: None,
    as_: str | None = None,
    rank: int | None = None,
    data: Any = None,
    split: str = "train",
    longest: int | None = None,
    tokenizer: str | Mapping[str, Any] | None = None,
    hashes: bool = True,
    **settings: Any,
) -> Any:
    """Merges models, adapters, or a mixture of both, tensor by tensor.

    Adapters alone give an adapter, see `polytask.merge.adapters.merge_adapters`. An expression over names is computed as it
    stands: ``merge("base + 0.8*(a - base)", base="org/model", a="tuned/")``.

    Args:
        inputs: folders, files or hub names of checkpoints, modules, models, or adapters (ours and PEFT's, or their folders).
            An adapter among models stands for the base with it.
        method: the rule; ``polytask merge list`` shows them.
        base: what differences are taken to: a checkpoint, a module or a model.
        weights: one for each input: a number, a list (a gradient over the layers), or a list of ``{filter, value}``.
        out: a folder for the merged checkpoint, written tensor by tensor; None gives what was given, in memory.
        dtype: of the result: ``float32``, ``float16``, ``bfloat16``; as the base (or first model) stores each tensor when None.
        shard: size of a file at most.
        seed: of everything random.
        resume: go on with an interrupted merge in ``out``.
        each: settings of each input, by name: ``{"density": [0.2, 0.5]}``.
        say: is told what goes on.
        as_: what adapters become: ``lora``, ``full`` or ``sparse``; with ``base`` too, an adapter is made and not a model. Or
            ``mix``: nothing is made, and a mix weighs the adapters, attached under their names (rules that are weighted sums).
        rank: the largest rank of a LoRA that is made.
        data: what a method looks at that does: tasks, or a path of them. Such methods run the models: ``base`` is a `Model`, or
            what `Model.load` takes, and adapters give an adapter.
        split: of the data's tasks.
        longest: tokens of a text that are looked at.
        tokenizer: brings folders whose tokenizers differ into one vocabulary: ``union``, ``base``, or what
            `polytask.merge.vocabulary.align` takes.
        hashes: whether the card has the sha256 of the parents' files, which are read once more for it, beside the merge.
        settings: of the method; or the models of an expression by name.

    Returns:
        The folder; or a module, model or adapter where such were given and ``out`` was not.

    Raises:
        MergeError: the inputs do not fit each other, or a file is damaged.
        ConfigError: an unknown method or setting.
        StorageError: there is not enough space.
    """
    if not inputs:
        raise MergeError("there is nothing to merge; give at least one model or adapter")
    if isinstance(inputs, str):
        if method != "linear" or weights is not None or each is not None:
            raise ConfigError("an expression says how models are merged; leave method, weights and each out")
        inputs, weights, base = _expressed(inputs, settings, base)
        settings = {"normalize": False}
    if tokenizer is not None and (method in fits or out is None):
        raise ConfigError("tokenizer= is for folders that are merged into a folder (out=, --out) by a rule")
    place = Out(out, dtype_of(dtype), shard, resume, hashes, say)
    if method in fits or data is not None:
        if weights is not None or each is not None:
            raise ConfigError(f"{method} finds the weights itself; leave weights and each out")
        if method in fits and fits[method].gives != "model" and any(v is not None for v in (as_, rank, dtype)):
            raise ConfigError(f"{method} says itself what it makes; leave as_, rank and dtype out")
        plan, items, live = looked(inputs, method, base, data, split, longest, seed, say, settings)
        if not isinstance(plan, Plan):
            return plan if out is None else plan.save(Path(out).expanduser())
        if as_ == "mix":
            _unmade(out, rank, dtype)
        return planned(plan, items, live, (base, *inputs), place, as_, rank, seed)
    adapters = [a for item in inputs if (a := adapter_of(item)) is not None]
    if len(adapters) == len(inputs) and (base is None or as_ is not None or adapter_of(base) is not None):
        if tokenizer is not None:
            raise ConfigError(
                "tokenizer= is for models; adapters alone have no embeddings of their own, so leave it out"
            )
        root = None if base is None else adapter_of(base) or source_of(base, None)
        if as_ == "mix":
            _unmade(out, rank, dtype)
            return summed(adapters, method, weights, base=root, seed=seed, each=each, **settings)
        merged = merge_adapters(
            adapters, method, weights, base=root, as_=as_, rank=rank, seed=seed, each=each, **settings  # type: ignore[arg-type]
        )  # fmt: skip
        for part in merged.parts.values():
            part.to(dtype=place.dtype)
        cite(merged, (*inputs, base), (*adapters, root), place.dtype)
        return merged if out is None else merged.save(Path(out).expanduser())
    if as_ is not None or rank is not None:
        raise ConfigError("as_ and rank are for adapters; the inputs are models, or adapters and models")
    root = None if base is None else source_of(base, None)
    sources, words = [source_of(item, root) for item in inputs], None
    if tokenizer is not None:
        root, sources, words = aligned(root, sources, tokenizer)
    job = Job(sources, method, settings, root, weights, each or {}, seed)
    return made(job, (base, *inputs), place, words=words)


def _unmade(out: Any, rank: int | None, dtype: Any) -> None:
    """Raises `ConfigError` for what a mix does not have."""
    if any(v is not None for v in (out, rank, dtype)):
        raise ConfigError(
            "as_='mix' gives a live mix, which has no folder, rank or dtype; leave out, rank and dtype out"
        )


def _expressed(text: str, given: Mapping[str, Any], base: Any) -> tuple[list[Any], list[float], Any]:
    """The models of an expression, their weights, and the base, where adapters among them need one."""
    given = {**({} if base is None else {"base": base}), **given}
    factors = parse(text)
    needed = any(adapter_of(item) is not None for item in given.values())
    check_names(text, given, ("base",) if needed else ())
    return [given[name] for name in factors], [float(f) for f in factors.values()], base if needed else None
