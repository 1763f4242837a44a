"""A merge done again from its record: the same bytes, from parents that are what they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polytask.core.errors import MergeError, listing

from .card import Digests, files_of, repeatable
from .given import source_of
from .mergekit import merge_file
from .readapt import readapt
from .run import merge


def replay(
    file: str | Path, out: str | Path, *, resume: bool = False, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Merges as a record says.

    Args:
        file: ``polytask_merge.json`` of a merged model, or ``polytask.json`` of a merged adapter.
        out: a folder for the result.
        resume: go on with an interrupted merge in ``out``.
        say: is told what goes on.

    Returns:
        The folder.

    Raises:
        MergeError: the file is no record of a merge; a parent is not there, was in memory, or is another than then.
    """
    said = read(file)
    parents: list[Mapping[str, Any]] = said["parents"]
    held = [entry["name"] for entry in parents if entry["path"] is None]
    if held:
        raise MergeError(f"{listing(held)} was in memory when {file} was written; merge such parents from Python again")
    check(parents, file, say)
    if "mergekit" in said:
        return merge_file(
            said["mergekit"], out, shard=said["shard"], seed=said["seed"], resume=resume, say=say, hashes=said["hashes"]
        )
    base = [entry["path"] for entry in parents if entry["role"] == "base"]
    inputs = [entry["path"] for entry in parents if entry["role"] == "model"]
    more: dict[str, Any] = {"shard": said.get("shard", 0), "resume": resume, "hashes": said.get("hashes", True)}
    if "adapters" in said:
        more = {"as_": said["as"], "rank": said["rank"]}
    if "tokenizer" in said:
        more["tokenizer"] = {key: value for key, value in said["tokenizer"].items() if key != "rows"}
    if "readapt" in said:
        domain, tuned = inputs
        again = {"dtype": said["dtype"], "seed": said["seed"], "say": say, **more}
        return Path(readapt(base[0], tuned, domain, *said["weights"], rank=said["readapt"]["rank"], out=out, **again))
    return Path(
        merge(
            inputs,
            said["method"],
            base[0] if base else None,
            said["weights"],
            out=out,
            dtype=said["dtype"],
            seed=said["seed"],
            each=said["each"],
            say=say,
            **more,
            **said["settings"],
        )  # fmt: skip
    )


def read(file: str | Path) -> dict[str, Any]:
    """A record. Raises `MergeError` for a file that is none."""
    path = Path(file).expanduser()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{file} cannot be read: {error}") from error
    if isinstance(said, dict) and isinstance(said.get("card"), dict):
        said = (said["card"].get("training") or {}).get("merge")
    if not isinstance(said, dict) or not ({"method", "slices"} & set(said)):
        raise MergeError(
            f"{file} is no record of a merge; give polytask_merge.json of a merged model, or polytask.json of a merged adapter"
        )
    if not repeatable(said):
        raise MergeError(
            f"{file} is of a merge that looked at data and used more of it than weights, which it does not hold; merge again "
            "with that data"
        )
    if not said.get("parents"):
        raise MergeError(
            f"{file} does not say where the parents lie, so it cannot be done again; merge them from Python"
        )
    return said


def check(parents: list[Mapping[str, Any]], file: str | Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Raises `MergeError` with the names of parents that are not there, or that have other bytes than then."""
    found = {}
    for entry in parents:
        path = entry["path"]
        found[path] = _files(path)
    changed = []
    with Digests(found.values()) as digests:
        for entry in parents:
            now = digests.of(found[entry["path"]]) if entry["sha256"] else {}
            names = sorted(n for n in {*now, *entry["sha256"]} if now.get(n) != entry["sha256"].get(n))
            changed += [f"{entry['path']} ({listing(names)})"] if names else []
    if changed:
        raise MergeError(
            f"{listing(changed)} has other bytes than when {file} was written, so the result would be another; bring the "
            "parents of then back, or merge anew"
        )
    bare = [entry["path"] for entry in parents if not entry["sha256"]]
    if bare:
        say(f"{file} has no hashes of {listing(bare)}; whether these are the same cannot be seen")


def _files(path: str) -> list[Path]:
    """Of a parent as a record names it."""
    here = Path(path).expanduser()
    own = files_of(path) if here.exists() else []
    return own or files_of(path, source_of(path, None))
