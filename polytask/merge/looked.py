"""Merging by methods that look at data: what they are given, and what becomes of what they find out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, listing
from polytask.core.storage import write, writing

from .adapters import merge_adapters
from .card import cite
from .engine import Job
from .fit import Plan, fits, fitted
from .given import adapter_of, packed_in, source_of
from .live import summed
from .made import Out, made
from .source import Adapted, Module, Source


def looked(
    inputs: Sequence[Any],
    method: str,
    base: Any,
    data: Any,
    split: str,
    longest: int | None,
    seed: int,
    say: Callable[[str], None],
    settings: Mapping[str, Any],
) -> tuple[Any, list[Adapter | Source], Source]:
    """What a method finds out that looks at data, and the models and the base as it saw them."""
    from polytask.core.model import Model

    if method not in fits:
        raise ConfigError(f"{method} looks at no data; leave data out, or choose one of: {listing(fits)}")
    model = Model.load(str(base)) if isinstance(base, str | Path) else base
    if model is None:
        raise ConfigError(f"{method} runs the models; say the base that they were tuned from (base=, --base)")
    if not isinstance(model, Model):
        raise ConfigError(
            f"{method} runs the base and needs its tokenizer too; give a Model (pt.Model(module, processor)) or its name, "
            f"not {type(base).__name__}"
        )
    items: list[Adapter | Source] = []
    for item in inputs:
        adapter = adapter_of(item)
        if adapter is None and isinstance(item, str | Path) and packed_in(item) is None:
            item = Model.load(str(item))
        items.append(adapter or source_of(item, None))
    found = fitted(items, method, model, data, split=split, longest=longest, seed=seed, say=say, **settings)
    root = Module(model.module, model.name)
    if isinstance(base, str | Path):
        folder = Path(base).expanduser()
        root.folder = folder if folder.is_dir() else None
    return found, items, root


def planned(
    plan: Plan,
    items: Sequence[Adapter | Source],
    root: Source,
    given: Sequence[Any],
    out: Out,
    as_: str | None,
    rank: int | None,
    seed: int,
) -> Any:
    """What a plan says: adapters alone give an adapter."""
    about = {"method": plan.method, **plan.about}
    adapters = [item for item in items if isinstance(item, Adapter)]
    if len(adapters) == len(items):
        if as_ == "mix":
            return summed(
                adapters, plan.rule, plan.weights, base=root, seed=seed, companions=plan.companions, **plan.settings
            )
        merged = merge_adapters(
            adapters, plan.rule, plan.weights, base=root, as_=as_, rank=rank, seed=seed,  # type: ignore[arg-type]
            companions=plan.companions, about=about, **plan.settings,
        )  # fmt: skip
        for part in merged.parts.values():
            part.to(dtype=out.dtype)
        merged.heads |= plan.heads
        if plan.heads:
            merged.card.training["merge"]["fit"]["heads"] = sorted(plan.heads)
        merged.trainable(False)
        first, *others = given
        cite(merged, (*others, first), (*adapters, root), out.dtype)
        return merged if out.folder is None else _beside(merged.save(Path(out.folder).expanduser()), plan.files)
    if as_ is not None or rank is not None:
        raise ConfigError("as_ and rank are for adapters; the inputs are models, or adapters and models")
    sources = [Adapted(root, item) if isinstance(item, Adapter) else item for item in items]
    job = Job(sources, plan.rule, plan.settings, root, plan.weights, {}, seed, companions=plan.companions)
    return made(job, given, out, about=about, files=plan.files)


def _beside(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The folder, with more files in it."""
    with writing(folder):
        for name, data in files.items():
            write(folder / name, data)
    return folder
