"""A merged model is made: in a folder, tensor by tensor, or in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError, MergeError
from polytask.core.measure import peak_memory

from .card import parents_of, record, written
from .embeddings import original
from .engine import Job, run
from .given import SMALL
from .vocabulary import REPLACED, Vocabulary
from .write import Writer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Out:
    """Where a merged model goes, and how.

    Attributes:
        folder: None gives what was given, in memory.
        dtype: of the result; as stored when None.
        shard: size of a file at most.
        resume: go on with an interrupted merge.
        hashes: whether the card has the sha256 of the parents' files.
        say: is told what goes on.
    """

    folder: str | Path | None = None
    dtype: torch.dtype | None = None
    shard: str | int = "5GB"
    resume: bool = False
    hashes: bool = True
    say: Callable[[str], None] = lambda text: None


def made(
    job: Job,
    given: Sequence[Any],
    out: Out,
    *,
    about: Mapping[str, Any] | None = None,
    words: Vocabulary | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Any:
    """The merged model: in a folder, or of the kind of the first that was given.

    Args:
        job: what is merged and how.
        given: what people gave, the base first.
        out: where it goes.
        about: how the weights were found, for the card.
        words: the vocabulary that the models were brought into.
        files: what lies beside the weights.
    """
    began = time.perf_counter()
    dtype = out.dtype
    if out.folder is None:
        return _in_memory(job, given, dtype)
    folder = Path(out.folder).expanduser()
    digests = [hashlib.sha256(data).hexdigest() for data in (files or {}).values()]
    key = "".join((key_of(job, dtype), words.key if words else "", *digests))
    writer = Writer(folder, layout(job, dtype), shard=size_of(out.shard), key=key, resume=out.resume)
    out.say(f"merging {len(job.models)} models by {job.rule}: {len(job.shapes)} tensors, {writer.bytes / 1e9:.2f} GB")
    try:
        with (
            parents_of(given, [original(source) for source in (job.base, *job.models)], out.hashes) as parents,
            peak_memory(torch.device("cpu")) as peak,
        ):
            run(job, writer.put, writer.finished, writer.done.__contains__)
            cited = parents()
    except BaseException:
        writer.close()
        raise
    said = record(job, dtype, time.perf_counter() - began, peak.mb) | ({"fit": dict(about)} if about else {})
    said |= {"parents": cited, "hashes": out.hashes, "shard": size_of(out.shard)}
    extras = {}
    if words is not None:
        said["tokenizer"], extras = words.card, words.files(job.first.folder)
    writer.finish({**(files or {}), **extras, **written(said)})
    copy_small(job.first.folder, folder, REPLACED if words is not None else ())
    return folder


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


def dtype_of(given: str | torch.dtype | None) -> torch.dtype | None:
    """A type from its name. Raises `ConfigError`."""
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


def copy_small(source: Path | None, folder: Path, without: Sequence[str] = ()) -> None:
    """The configuration, tokenizer and licence beside the merged weights."""
    if source is None:
        return
    for pattern in SMALL:
        for file in source.glob(pattern):
            if file.name in without or file.name.endswith(".index.json") or (folder / file.name).exists():
                continue
            if file.is_file():
                shutil.copy2(file, folder / file.name)
