"""What was merged and how: as a record for machines (`RECORD`), and as a model card for people.

A record holds everything that the result depends on; `polytask.merge.replay` does it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError
from polytask.core.files import CARD as ADAPTER_CARD
from polytask.core.files import CONFIG, WEIGHTS
from polytask.core.packed import FILE

from .engine import Job
from .rule import rules
from .source import Checkpoint, Source

RECORD, PAGE = "polytask_merge.json", "README.md"
PARTS = 4 << 20  # bytes that are hashed at once


def files_of(item: Any, source: Source | None = None) -> list[Path]:
    """The files that hold the weights of a parent, and for an adapter its form; none for what is in memory."""
    if isinstance(source, Checkpoint):
        return source.files
    if not isinstance(item, str | Path):
        return []
    path = Path(item).expanduser()
    if not path.is_dir():
        return [path] if path.is_file() else []
    own = [path / name for name in (WEIGHTS, FILE, CONFIG, ADAPTER_CARD) if (path / name).is_file()]
    return own if path / CONFIG in own else Checkpoint(path).files


class Digests:
    """sha256 of files, found in threads beside the work inside the block.

    Args:
        files: of each parent; a file that several have is read once.

    Raises:
        MergeError: on `of`, a file cannot be read.
    """

    def __init__(self, files: Iterable[Iterable[Path]]) -> None:
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        wanted = {path.resolve(): path for group in files for path in group}
        self._found: dict[Path, Future[str]] = {r: self._pool.submit(self._digest, r) for r in wanted}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._over.set()  # nobody asks for the rest
        self._pool.shutdown()

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """The hashes of a parent's files, by their names."""
        return {path.name: self._found[path.resolve()].result() for path in files}

    def _digest(self, path: Path) -> str:
        made, buffer = hashlib.sha256(), memoryview(bytearray(PARTS))
        try:
            with open(path, "rb", buffering=0) as file:
                while (count := file.readinto(buffer)) and not self._over.is_set():
                    made.update(buffer[:count])
        except OSError as error:
            raise MergeError(f"{path} cannot be read for its hash: {error.strerror or error}") from error
        return made.hexdigest()


@contextmanager
def parents_of(
    given: Sequence[Any], sources: Sequence[Source | None], hashes: bool
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Hashes the parents' files beside the work inside the block; what it gives is then called for what a record says of them.

    Args:
        given: the base, or None, and the models, as they were given.
        sources: the same, as they are read.
        hashes: whether their files are hashed.
    """
    named = [
        (item, source, "model" if i else "base") for i, (item, source) in enumerate(zip(given, sources, strict=True))
    ]
    there = [(item, source, role, files_of(item, source)) for item, source, role in named if source is not None]
    with Digests(files if hashes else [] for *_, files in there) as digests:
        yield lambda: [
            parent(item, source.name, role, digests.of(files if hashes else ())) for item, source, role, files in there
        ]


def cite(
    made: Adapter, given: Sequence[Any], parents: Sequence[Adapter | Source | None], dtype: torch.dtype | None
) -> None:
    """Adds to a merged adapter's card where its parents lie.

    Args:
        made: the merged adapter.
        given: what was merged, and the base or None, as they were given.
        parents: the same, as they were read.
        dtype: that its values were brought to.
    """
    said = made.card.training["merge"]
    files = [files_of(item) for item in given]
    with Digests(files) as digests:
        said["parents"] = [
            parent(item, own.name, "model" if i < len(given) - 1 else "base", digests.of(found))
            for i, (item, own, found) in enumerate(zip(given, parents, files, strict=True))
            if own is not None
        ]
    said["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    made.card.notes = adapter_notes(said, made.card.parents)


def parent(item: Any, name: str, role: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a record says of an input.

    Args:
        item: what was given: a path or hub name, which is kept as it was written, or something in memory, which has none.
        name: what the merge calls it, which random numbers depend on.
        role: ``model`` or ``base``.
        hashes: sha256 of its files; empty where they were not asked for.
    """
    if isinstance(item, Adapter):
        hashes = {"values": item.hash}
    path = str(item) if isinstance(item, str | Path) else None
    return {"name": name, "path": path, "role": role, "sha256": dict(hashes)}


def record(job: Job, dtype: torch.dtype | None, seconds: float, peak: float | None) -> dict[str, Any]:
    """What was merged and how, so that it can be done again."""
    return {
        "method": job.rule, "paper": job.kind.paper, "settings": dict(job.settings), "seed": job.seed,
        "base": job.base.name if job.base else None, "models": [model.name for model in job.models],
        "weights": None if job.weights is None else list(job.weights), "each": {k: list(v) for k, v in job.each.items()},
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."), "seconds": round(seconds, 2),
        "peak_mb": None if not peak else round(peak, 1), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what the numbers come from."""
    import polytask

    return {"polytask": polytask.__version__, "torch": torch.__version__, "numpy": version("numpy")}


def written(said: Mapping[str, Any]) -> dict[str, bytes]:
    """The record and the card, as files."""
    return {RECORD: (json.dumps(said, indent=2, default=str) + "\n").encode(), PAGE: page(said).encode()}


def page(said: Mapping[str, Any]) -> str:
    """The model card of a merged model."""
    first = said["slices"][0] if "slices" in said else said
    parents = said["parents"]
    front = {
        "base_model": list(dict.fromkeys(entry["path"] or entry["name"] for entry in parents)),
        "library_name": "transformers",
        "tags": ["merge", "polytask", first["method"]],
    }
    lines = ["---", *[f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()], "---", ""]
    many = sum(entry["role"] == "model" for entry in parents)
    lines += ["# Merged model", "", f"{many} model{'s' * (many != 1)} merged by {_cited(first)}.", ""]
    lines += ["## Parents", "", "| parent | part | sha256 |", "|---|---|---|"]
    lines += [f"| {_cell(p['path'] or p['name'])} | {p['role']} | {_hashes(p)} |" for p in parents]
    lines += ["", "## Method", ""]
    if "mergekit" in said:
        import yaml

        plain = json.loads(json.dumps(said["mergekit"], default=str))  # without YAML's references
        lines += ["```yaml", yaml.safe_dump(plain, sort_keys=False).strip(), "```", ""]
    else:
        lines += [*_settings(first), f"- dtype: {first['dtype'] or 'as stored'}"]
        if "readapt" in said:
            rank, error = said["readapt"]["rank"], said["readapt"]["error"]
            lines += [f"- rank of the change that tuning made: {rank}, which loses {error:.2%} of it"]
        lines += [""]
    last = said["slices"][-1] if "slices" in said else said
    peak = f", {last['peak_mb']:.0f} MB of memory at most" if last["peak_mb"] else ""
    libraries = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    lines += ["## Run", "", f"{last['seconds']:.1f} s{peak}; {libraries}.", ""]
    return "\n".join([*lines, *_again(RECORD, said)])


def adapter_notes(said: Mapping[str, Any], hashes: Sequence[str]) -> list[str]:
    """What the card of a merged adapter says, as lines.

    Args:
        said: what the adapter's card holds of the merge; with ``parents`` where their folders are known.
        hashes: of the adapters' values, in their order.
    """
    lines = [f"Merged by {_cited(said)}.", "", *_settings(said), ""]
    lines += ["| parent | sha256 of its values |", "|---|---|"]
    lines += [f"| {_cell(name)} | `{own}` |" for name, own in zip(said["adapters"], hashes, strict=True)]
    return [*lines, "", *_again(ADAPTER_CARD, said)]


def repeatable(said: Mapping[str, Any]) -> bool:
    """Whether a record holds all that a merge needs: one that looked at data does where it found weights of adapters alone."""
    fit = said.get("fit")
    return fit is None or ("adapters" in said and not rules[said["method"]].companion and not fit.get("heads"))


def _cited(said: Mapping[str, Any]) -> str:
    fit = said.get("fit", {}).get("method")
    if fit:
        return f"{_named(fit['name'], fit['paper'])}, whose result is one of {_named(said['method'], said['paper'])}"
    return _named(said["method"], said["paper"])


def _named(name: str, paper: str) -> str:
    paper = str(paper)
    links = [f"[arXiv {n}](https://arxiv.org/abs/{n})" for n in paper.removeprefix("arXiv ").split(", ")]
    where = ", ".join(links) if paper.startswith("arXiv ") else paper
    return f"`{name}`" + (f" ({where})" if where else "")


def _settings(said: Mapping[str, Any]) -> list[str]:
    """The settings, also those that nobody gave."""
    every = {**rules[said["method"]]().settings(), **said["settings"]}
    lines = [f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in every.items()]
    if said["weights"] is not None:
        each = any(isinstance(weight, Mapping) for weight in said["weights"])
        lines += [
            "- weights: one for each tensor, in the record" if each else f"- weights: {json.dumps(said['weights'])}"
        ]
    fit = said.get("fit", {}).get("method", {})
    lines += [f"- {fit['name']}, {k}: {json.dumps(v)}" for k, v in fit.items() if k not in ("name", "paper")]
    lines += [f"- {name} of each: {json.dumps(values)}" for name, values in said["each"].items()]
    return [*lines, f"- seed: {said['seed']}"]


def _hashes(entry: Mapping[str, Any]) -> str:
    return "<br>".join(f"{_cell(name)} `{own}`" for name, own in entry["sha256"].items()) or "not taken"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _again(file: str, said: Mapping[str, Any]) -> list[str]:
    """How it is made again."""
    if not repeatable(said):
        return ["It was made by looking at data, which is no part of this card: make it again with that data.", ""]
    if any(entry["path"] is None for entry in said.get("parents") or [{"path": None}]):
        return ["Parents were in memory when this was made, so no command makes it again.", ""]
    return [
        "## Again",
        "",
        "From where the parents' names are found:",
        "",
        "```sh",
        f"polytask merge {file} again",
        "```",
        "",
    ]
