"""The command *merge*: models and adapters into one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.core.errors import ConfigError

from .app import Json, Seed, _need, _say, _show, _writable, app
from .options import form_of


@app.command()
def merge(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, files or hub names of models, folders of adapters; a mergekit file and a folder; an expression; "
            "or the word list.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="How, with settings: ties:density=0.3. See polytask merge list.")
    ] = "linear",
    base: Annotated[str, typer.Option("--base", help="What differences are taken to; adapters need theirs.")] = "",
    weights: Annotated[
        str, typer.Option("--weights", help="A number for each input: 1,0.5,0.5. 1 each by default.")
    ] = "",
    out: Annotated[str, typer.Option("--out", help="Folder for the result.")] = "merged",
    model: Annotated[
        list[str] | None, typer.Option("--model", help="What a name in an expression means: a=tuned-a; repeatable.")
    ] = None,
    as_: Annotated[str, typer.Option("--as", help="What adapters become: lora, full or sparse.")] = "",
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of a LoRA that is made.", min=1)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16; the base's by default.")] = "",
    shard: Annotated[str, typer.Option("--shard", help="Size of a file at most.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge in --out.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge models into a model and adapters into an adapter, tensor by tensor: memory does not grow with their size.

    Example: polytask merge tuned-a tuned-b --base original --method ties:density=0.3 --out merged

    Example: polytask merge lib/a lib/b --weights 0.7,0.3 --out lib/both

    Example: polytask merge "base + 0.8*(a - base)" --base original --model a=tuned-a --out merged

    Example: polytask merge config.yml merged

    polytask merge list shows the methods.
    """
    from polytask.merge.mergekit import merge_file
    from polytask.merge.run import merge as run

    given = list(inputs or [])
    if given == ["list"]:
        records = methods()
        _show(records, as_json, "\n".join(_line(record) for record in records))
        return
    if not given:
        _need("", "what to merge")
    common: dict[str, Any] = {"shard": shard, "seed": seed, "resume": resume, "say": _say}
    if given[0].endswith((".yml", ".yaml")):
        if len(given) > 2:
            more = ", ".join(given[1:])
            raise ConfigError(
                f"a mergekit file names its models itself; give the file and a folder for the result, not {more}"
            )
        out = given[1] if len(given) == 2 else out
        _writable(out)
        _done(Path(merge_file(given[0], out, **common)), as_json)
        return
    _writable(out)
    chosen = form_of(method, "--method")
    name = str(chosen.pop("name"))
    expression = len(given) == 1 and not Path(given[0]).exists() and bool(re.search(r"[*+()]| - ", given[0]))
    if model and not expression:
        raise ConfigError(
            "--model gives names to an expression such as 'base + 0.8*(a - base)'; write one, or leave it out"
        )
    settings = dict(_pair(text) for text in model or []) if expression else chosen
    folder = run(
        given[0] if expression else given, name, base or None, _numbers(weights), out=out, dtype=dtype or None,
        as_=as_ or None, rank=rank, **common, **settings,
    )  # fmt: skip
    _done(Path(folder), as_json)


def _done(folder: Path, as_json: bool) -> None:
    """Says what was made: a model, or an adapter, which has a card of its own."""
    import json

    record = folder / "polytask_merge.json"
    if record.is_file():
        card = json.loads(record.read_text(encoding="utf-8"))
        parts = card.get("slices", [card])
        seconds, peak = parts[-1]["seconds"], parts[-1]["peak_mb"]
        said = f"saved in {folder}; {seconds:.1f} s" + (f", {peak:.0f} MB at most" if peak else "")
        _show({"out": str(folder), **card}, as_json, said)
        return
    from polytask.core.adapter import Adapter

    made = Adapter.load(folder)
    facts = {"out": str(folder), "form": made.form.name, "parameters": made.size, "hash": made.hash}
    said = f"saved in {folder}: {made.form}, {made.size:,} parameters"
    _show({**facts, "card": made.card.training}, as_json, said)


def methods() -> list[dict[str, Any]]:
    """What is known of every merge method."""
    from polytask.merge.rule import rules

    return [
        {
            "name": kind.name, "summary": (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
            "paper": kind.paper, "needs_base": kind.needs_base, "settings": kind().settings(),
        }
        for kind in rules.values()
    ]  # fmt: skip


def _line(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v!r}" for k, v in record["settings"].items()) or "none"
    base = "needs a base" if record["needs_base"] else "needs no base"
    summary = re.sub(r"\s+", " ", record["summary"])
    return f"{record['name']}: {summary}\n  {record['paper'] or 'no paper'}; {base}; settings: {settings}"


def _pair(text: str) -> tuple[str, str]:
    """``a=tuned-a`` as a name and what it means. Raises `ConfigError`."""
    name, sign, path = text.partition("=")
    if not (sign and name.isidentifier() and path):
        raise ConfigError(f"--model {text!r}: write a name and what it means, as in a=tuned-a")
    return name, path


def _numbers(text: str) -> list[float] | None:
    """``1,0.5`` as numbers. Raises `ConfigError`."""
    if not text:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: write a number for each input, as in 1,0.5,0.5") from None
