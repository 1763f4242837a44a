"""The verb *merge*: models or adapters in, one of the same kind out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError, listing
from polytask.core.files import write, writing
from polytask.core.measure import peak_memory

from .adapters import merge_adapters
from .card import cite, parents_of, record, written
from .compress import FILE, Compressed, is_compressed, load_adapter
from .embeddings import original
from .engine import Job, run
from .expression import check_names, parse
from .fit import Plan, fits, fitted
from .source import Adapted, Checkpoint, Module, Source
from .vocabulary import REPLACED, Vocabulary, aligned
from .write import Writer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.tiktoken")  # what lies beside weights and is copied


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
        as_: what adapters become: ``lora``, ``full`` or ``sparse``. With ``base`` too, an adapter is made and not a model.
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
    if method in fits or data is not None:
        if weights is not None or each is not None:
            raise ConfigError(f"{method} finds the weights itself; leave weights and each out")
        plan, items, live = _looked(inputs, method, base, data, split, longest, seed, say, settings)
        if not isinstance(plan, Plan):
            return plan if out is None else plan.save(Path(out).expanduser())
        kind = _dtype(dtype)
        return _planned(plan, items, live, (base, *inputs), out, as_, rank, seed, kind, shard, resume, say, hashes)
    adapters = [a for item in inputs if (a := adapter_of(item)) is not None]
    if len(adapters) == len(inputs) and (base is None or as_ is not None or adapter_of(base) is not None):
        if tokenizer is not None:
            raise ConfigError(
                "tokenizer= is for models; adapters alone have no embeddings of their own, so leave it out"
            )
        root = None if base is None else adapter_of(base) or source_of(base, None)
        made = merge_adapters(
            adapters, method, weights, base=root, as_=as_, rank=rank, seed=seed, each=each, **settings  # type: ignore[arg-type]
        )  # fmt: skip
        for part in made.parts.values():
            part.to(dtype=_dtype(dtype))
        cite(made, (*inputs, base), (*adapters, root), _dtype(dtype))
        return made if out is None else made.save(Path(out).expanduser())
    if as_ is not None or rank is not None:
        raise ConfigError("as_ and rank are for adapters; the inputs are models, or adapters and models")
    root = None if base is None else source_of(base, None)
    sources, words = [source_of(item, root) for item in inputs], None
    if tokenizer is not None:
        root, sources, words = aligned(root, sources, tokenizer)
    job = Job(sources, method, settings, root, weights, each or {}, seed)
    return _made(job, (base, *inputs), out, _dtype(dtype), shard, resume, say, hashes, words=words)


def _made(
    job: Job,
    given: Sequence[Any],
    out: str | Path | None,
    dtype: torch.dtype | None,
    shard: str | int,
    resume: bool,
    say: Callable[[str], None],
    hashes: bool,
    about: Mapping[str, Any] | None = None,
    words: Vocabulary | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Any:
    """The merged model: in a folder, or of the kind of the first that was given."""
    began = time.perf_counter()
    if out is None:
        return _in_memory(job, given, dtype)
    folder = Path(out).expanduser()
    digests = [hashlib.sha256(data).hexdigest() for data in (files or {}).values()]
    key = "".join((key_of(job, dtype), words.key if words else "", *digests))
    writer = Writer(folder, layout(job, dtype), shard=size_of(shard), key=key, resume=resume)
    say(f"merging {len(job.models)} models by {job.rule}: {len(job.shapes)} tensors, {writer.bytes / 1e9:.2f} GB")
    try:
        with (
            parents_of(given, [original(source) for source in (job.base, *job.models)], hashes) as parents,
            peak_memory(torch.device("cpu")) as peak,
        ):
            run(job, writer.put, writer.finished, writer.done.__contains__)
            cited = parents()
    except BaseException:
        writer.close()
        raise
    said = record(job, dtype, time.perf_counter() - began, peak.mb) | ({"fit": dict(about)} if about else {})
    said |= {"parents": cited, "hashes": hashes, "shard": size_of(shard)}
    extras = {}
    if words is not None:
        said["tokenizer"], extras = words.card, words.files(job.first.folder)
    writer.finish({**(files or {}), **extras, **written(said)})
    _copy_small(job.first.folder, folder, REPLACED if words is not None else ())
    return folder


def _looked(
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
    if model is not None and not isinstance(model, Model):
        raise ConfigError(
            f"{method} runs the base and needs its tokenizer too; give a Model (pt.Model(module, processor)) or its name, "
            f"not {type(base).__name__}"
        )
    items: list[Adapter | Source] = []
    for item in inputs:
        adapter = adapter_of(item)
        if adapter is None and isinstance(item, str | Path) and not is_compressed(Path(item).expanduser()):
            item = Model.load(str(item))
        items.append(adapter or source_of(item, None))
    if model is None:
        raise ConfigError(f"{method} runs the models; say the base that they were tuned from (base=, --base)")
    found = fitted(items, method, model, data, split=split, longest=longest, seed=seed, say=say, **settings)
    root = Module(model.module, model.name)
    if isinstance(base, str | Path):
        folder = Path(base).expanduser()
        root.folder = folder if folder.is_dir() else None
    return found, items, root


def _planned(
    plan: Plan,
    items: Sequence[Adapter | Source],
    root: Source,
    given: Sequence[Any],
    out: str | Path | None,
    as_: str | None,
    rank: int | None,
    seed: int,
    dtype: torch.dtype | None,
    shard: str | int,
    resume: bool,
    say: Callable[[str], None],
    hashes: bool,
) -> Any:
    """What a plan says: adapters alone give an adapter."""
    about = {"method": plan.method, **plan.about}
    adapters = [item for item in items if isinstance(item, Adapter)]
    if len(adapters) == len(items):
        made = merge_adapters(
            adapters, plan.rule, plan.weights, base=root, as_=as_, rank=rank,  # type: ignore[arg-type]
             seed=seed, companions=plan.companions,
            about=about, **plan.settings,
        )  # fmt: skip
        for part in made.parts.values():
            part.to(dtype=dtype)
        made.heads |= plan.heads
        made.trainable(False)
        return made if out is None else _beside(made.save(Path(out).expanduser()), plan.files)
    if as_ is not None or rank is not None:
        raise ConfigError("as_ and rank are for adapters; the inputs are models, or adapters and models")
    sources = [Adapted(root, item) if isinstance(item, Adapter) else item for item in items]
    job = Job(sources, plan.rule, plan.settings, root, plan.weights, {}, seed, companions=plan.companions)
    return _made(job, given, out, dtype, shard, resume, say, hashes, about, files=plan.files)


def _beside(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The folder, with more files in it."""
    with writing(folder):
        for name, data in files.items():
            write(folder / name, data)
    return folder


def _expressed(text: str, given: Mapping[str, Any], base: Any) -> tuple[list[Any], list[float], Any]:
    """The models of an expression, their weights, and the base, where adapters among them need one."""
    given = {**({} if base is None else {"base": base}), **given}
    factors = parse(text)
    needed = any(adapter_of(item) is not None for item in given.values())
    check_names(text, given, ("base",) if needed else ())
    return [given[name] for name in factors], [float(f) for f in factors.values()], base if needed else None


def adapter_of(item: Any) -> Adapter | None:
    """The adapter, where an input is one or the folder of one."""
    if isinstance(item, str | Path) and (Path(item).expanduser() / "adapter_config.json").is_file():
        folder = Path(item).expanduser()
        item = load_adapter(folder) if (folder / FILE).is_file() else Adapter.load(item)
        item.name = item.name or folder.name
    return item if isinstance(item, Adapter) else None


def source_of(item: Any, base: Source | None) -> Source:
    """A source from what people give. Raises `MergeError` for what is none."""
    from polytask.core.model import Model

    if isinstance(item, Source):
        return item
    if isinstance(item, Model):
        return Module(item.module, item.name)
    if isinstance(item, nn.Module):
        return Module(item)
    item = adapter_of(item) or item
    if isinstance(item, str | Path) and is_compressed(Path(item).expanduser()):
        if base is None:
            raise MergeError(f"{item} is a difference and needs its base; say which (base=, --base)")
        return Compressed(Path(item).expanduser(), base, str(item))
    if isinstance(item, str | Path):
        place = _downloaded(str(item))
        found = adapter_of(place)  # of a hub name: a folder was looked at above
        if found is None:
            return Checkpoint(place, str(item))
        item = found
    if isinstance(item, Adapter):
        if base is None:
            raise MergeError(
                f"the adapter {item.name!r} needs its base to be merged with models; say which (base=, --base)"
            )
        return Adapted(base, item)
    raise MergeError(f"{type(item).__name__} cannot be merged; give a folder, a file, a module, a model or an adapter")


def _downloaded(name: str) -> Path:
    """The folder of a hub name (``org/model``, ``org/model@revision``), downloaded where it is not in the cache; other paths as
    they are."""
    from polytask.core.load import ALIASES

    if name in ALIASES:
        return Path(ALIASES[name]())
    path = Path(name).expanduser()
    place, _, revision = name.partition("@")
    if path.exists() or name.startswith((".", "/", "~")) or place.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.bin", *SMALL]
        return Path(snapshot_download(place, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MergeError(
            f"{name!r} is no folder, and could not be had from the hub: {str(error).splitlines()[0]}"
        ) from error


def layout(job: Job, dtype: torch.dtype | None) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and type of every tensor of the result."""
    return [
        (name, shape, job.first.dtype(name) if dtype is None or job.copied(name) else dtype)
        for name, shape in job.shapes.items()
    ]


def key_of(job: Job, dtype: torch.dtype | None) -> str:
    """What a merge's bytes depend on, as a hash."""
    said = [
        job.rule,
        dict(job.settings),
        list(job.weights or ()),
        {k: list(v) for k, v in job.each.items()},
        job.seed,
        str(dtype),
    ]
    said += [job.base.name if job.base else "", list(job.names), list(job.shapes.items())]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _in_memory(job: Job, given: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """The merged network, of the class of the base or of the first input that is one."""
    import copy

    from polytask.core.model import Model

    like = next((item for item in given if isinstance(item, nn.Module | Model)), None)
    if like is None:
        raise MergeError("checkpoints on disk are merged into a folder; say which (out=, --out)")
    module = copy.deepcopy(like.module if isinstance(like, Model) else like)
    state = module.state_dict()

    def put(name: str, tensor: Tensor, start: int) -> None:
        stored = state[name]
        (stored if stored.dim() == 0 else stored[start : start + len(tensor)]).copy_(tensor)

    run(job, put)
    if dtype is not None:
        module.to(dtype)
    return Model(module, like.processor, kind=like.kind, pooling=like.pooling) if isinstance(like, Model) else module  # type: ignore[arg-type]


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        return given
    if given not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {given!r}")
    return DTYPES[given]


def size_of(text: str | int) -> int:
    """Bytes from ``5GB`` or ``200MB``. Raises `ConfigError`."""
    if isinstance(text, int):
        return text
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            try:
                return max(1, int(float(text[: -len(unit)]) * factor))
            except ValueError:
                break
    raise ConfigError(f"a size is written like 5GB or 200MB, got {text!r}")


def _copy_small(source: Path | None, folder: Path, without: Sequence[str] = ()) -> None:
    """The configuration, tokenizer and licence beside the merged weights."""
    if source is None:
        return
    for pattern in SMALL:
        for file in source.glob(pattern):
            if file.name in without or file.name.endswith(".index.json") or (folder / file.name).exists():
                continue
            if file.is_file():
                shutil.copy2(file, folder / file.name)
