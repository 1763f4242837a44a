"""The command *merge*: models and adapters into one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.core.errors import ConfigError

from .app import Json, Seed, _need, _say, _show, _writable, app
from .options import form_of
from .words import WORDS, told


@app.command()
def merge(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, files or hub names of models, folders of adapters; a mergekit file, or the record of a merge, "
            "and a folder; an expression; or the word list.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="How, with settings: ties:density=0.3; linear by default. See polytask merge list. Repeatable with --evaluate.",
        ),
    ] = None,
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
    data: Annotated[str, typer.Option("--data", help="Tasks for methods that look at data: a file or a folder.")] = "",
    split: Annotated[str, typer.Option("--split", help="Of the data: train, dev or test.")] = "train",
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", help="One vocabulary for models whose tokenizers differ: union, base or an input."),
    ] = "",
    evaluate: Annotated[
        str, typer.Option("--evaluate", help="Tasks to score the result on; of several methods the best is kept.")
    ] = "",
    sweep: Annotated[
        str, typer.Option("--sweep", help="A setting to try values of: lambda=0.1..1.0, or density=0.1..0.9:5.")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge in --out.")] = False,
    hashes: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Whether the card has the sha256 of the models' files.")
    ] = True,
    mode: Annotated[str, typer.Option("--mode", help="Of subtract: factor or delta.")] = "factor",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge models into a model and adapters into an adapter, tensor by tensor: memory does not grow with their size.

    Example: polytask merge tuned-a tuned-b --base original --method ties:density=0.3 --out merged

    Example: polytask merge lib/a lib/b --weights 0.7,0.3 --out lib/both

    Example: polytask merge "base + 0.8*(a - base)" --base original --model a=tuned-a --out merged

    Example: polytask merge lib/a lib/b --base minilm --method adamerging:steps=200 --data tasks/ --out lib/both

    Example: polytask merge config.yml merged

    Example: polytask merge merged/polytask_merge.json again

    Example: polytask merge lib/a lib/b --base minilm --method ties --method linear --evaluate examples/tasks --out best

    Example: polytask merge readapt base tuned domain --weights 0.8,1 --rank 64 --out merged

    Example: polytask merge subtract lib/task lib/general --mode factor --out lib/own

    Example: polytask merge compress lib/a --method compeft:density=0.1 --out lib/a-small

    Example: polytask merge split tuned-a tuned-b --base original --method emr --out both

    Example: polytask merge restore both tuned-a --base original --out again

    polytask merge list shows the methods.
    """
    from polytask.merge.run import merge as run

    from .measuring import choosing, evaluated, unscored

    given = list(inputs or [])
    if given == ["list"]:
        records = methods()
        _show(records, as_json, "\n".join(_line(record) for record in records))
        return
    if not given:
        _need("", "what to merge")
    common: dict[str, Any] = {"shard": shard, "seed": seed, "resume": resume, "say": _say, "hashes": hashes}
    if given[0] in WORDS and len(given) > 1:
        if model or as_ or data or evaluate or sweep or len(method or []) > 1:
            raise ConfigError(f"{given[0]} takes no --model, --as, --data, --evaluate, --sweep or several --method")
        _writable(out)
        own = {**common, "dtype": dtype or None, "tokenizer": tokenizer or None}
        way = form_of(method[0], "--method") if method else None
        _done(told(given, out, _numbers(weights), mode, rank, way, base, **own), as_json)
        return
    if given[0].endswith((".json", ".yml", ".yaml")):
        unscored(evaluate, sweep, resume, "a record" if given[0].endswith(".json") else "a mergekit file")
        _done(_described(given, out, common), as_json)
        return
    _writable(out)
    ways = [form_of(text, "--method") for text in method or ["linear"]]
    choosing(ways, evaluate, sweep)
    expression = len(given) == 1 and not Path(given[0]).exists() and bool(re.search(r"[*+()]| - ", given[0]))
    if model and not expression:
        raise ConfigError(
            "--model gives names to an expression such as 'base + 0.8*(a - base)'; write one, or leave it out"
        )
    unscored(evaluate, sweep, resume, "an expression" if expression else "")
    if evaluate:
        evaluated(
            given, ways, base, evaluate, sweep, out, as_json, weights=_numbers(weights), dtype=dtype or None, as_=as_ or None,
            rank=rank, shard=shard, seed=seed, data=data or None, data_split=split, tokenizer=tokenizer or None, hashes=hashes,
        )  # fmt: skip
        return
    chosen = ways[0]
    name = str(chosen.pop("name"))
    settings = dict(_pair(text) for text in model or []) if expression else chosen
    folder = run(
        given[0] if expression else given, name, base or None, _numbers(weights), out=out, dtype=dtype or None,
        as_=as_ or None, rank=rank, data=data or None, split=split, tokenizer=tokenizer or None, **common, **settings,
    )  # fmt: skip
    _done(Path(folder), as_json)


def _described(given: list[str], out: str, common: dict[str, Any]) -> Path:
    """The merge that a file describes: the record of one, or a mergekit file; the folder comes after it, or from --out."""
    from polytask.merge.mergekit import merge_file
    from polytask.merge.replay import replay

    record = given[0].endswith(".json")
    if len(given) > 2:
        what = "a record names its parents" if record else "a mergekit file names its models"
        raise ConfigError(f"{what} itself; give it and a folder for the result, not {', '.join(given[1:])}")
    out = given[1] if len(given) == 2 else out
    _writable(out)
    if record:
        return replay(given[0], out, resume=common["resume"], say=common["say"])
    return Path(merge_file(given[0], out, **common))


def _done(folder: Path, as_json: bool) -> None:
    """Says what was made: a model, an adapter, which has a card of its own, or several parts."""
    import json

    record = folder / "polytask_merge.json"
    if record.is_file():
        card = json.loads(record.read_text(encoding="utf-8"))
        parts = card.get("slices", [card])
        seconds, peak = parts[-1]["seconds"], parts[-1]["peak_mb"]
        said = f"saved in {folder}; {seconds:.1f} s" + (f", {peak:.0f} MB at most" if peak else "")
        _show({"out": str(folder), **card}, as_json, said)
        return
    from polytask.jobs import drawn

    pictures = drawn(folder)
    if not (folder / "adapter_config.json").is_file():  # several parts, and what was found out about them
        found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
        there = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
        _show(
            {"out": str(folder), "pictures": [str(p) for p in pictures], **found},
            as_json,
            f"saved in {folder}: {there}",
        )
        return
    from polytask.core.adapter import Adapter

    made = Adapter.load(folder)
    facts = {"out": str(folder), "form": made.form.name, "parameters": made.size, "hash": made.hash}
    said = f"saved in {folder}: {made.form}, {made.size:,} parameters"
    _show({**facts, "card": made.card.training}, as_json, said)


def methods() -> list[dict[str, Any]]:
    """What is known of every merge method."""
    from polytask.merge.fit import fits
    from polytask.merge.rule import rules

    looking = set(fits)
    kinds: list[Any] = [*(kind for kind in rules.values() if kind.name not in looking), *fits.values()]
    return [
        {
            "name": kind.name, "summary": (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
            "paper": kind.paper, "needs_base": kind.name in looking or kind.needs_base,
            "data": ("labelled" if kind.labels else "unlabelled") if kind.name in looking else "",
            "settings": kind().settings(),
        }
        for kind in sorted(kinds, key=lambda kind: kind.name)
    ]  # fmt: skip


def _line(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v!r}" for k, v in record["settings"].items()) or "none"
    base = "needs a base" if record["needs_base"] else "needs no base"
    data = f" and {record['data']} examples" if record["data"] else ""
    summary = re.sub(r"\s+", " ", record["summary"])
    return f"{record['name']}: {summary}\n  {record['paper'] or 'no paper'}; {base}{data}; settings: {settings}"


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
