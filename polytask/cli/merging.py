"""The command *merge*: models and adapters into one."""

from __future__ import annotations

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
            help="Folders, files or hub names of models, folders of adapters; or the word list.", show_default=False
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
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16; as the base's by default.")] = "",
    shard: Annotated[str, typer.Option("--shard", help="Size of a file at most.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge in --out.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge models, adapters, or both into one model, tensor by tensor: memory does not grow with their size.

    Example: polytask merge tuned-a tuned-b --base original --method task_arithmetic:scale=0.4 --out merged

    polytask merge list shows the methods.
    """
    import json

    from polytask.merge.run import merge as run

    given = list(inputs or [])
    if given == ["list"]:
        records = methods()
        _show(records, as_json, "\n".join(_line(record) for record in records))
        return
    if not given:
        _need("", "what to merge")
    _writable(out)
    chosen = form_of(method, "--method")
    name = str(chosen.pop("name"))
    folder = run(
        given, name, base or None, _numbers(weights), out=out, dtype=dtype or None, shard=shard, seed=seed, resume=resume,
        say=_say, **chosen,
    )  # fmt: skip
    card = json.loads((Path(folder) / "polytask_merge.json").read_text(encoding="utf-8"))
    peak = f", {card['peak_mb']:.0f} MB at most" if card["peak_mb"] else ""
    _show({"out": str(folder), **card}, as_json, f"saved in {folder}; {card['seconds']:.1f} s{peak}")


def methods() -> list[dict[str, Any]]:
    """What is known of every merge method."""
    from polytask.merge.rule import rules

    return [
        {
            "name": kind.name, "summary": (kind.__doc__ or "").strip().split("\n")[0], "paper": kind.paper,
            "needs_base": kind.needs_base, "settings": kind().settings(),
        }
        for kind in rules.values()
    ]  # fmt: skip


def _line(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v!r}" for k, v in record["settings"].items()) or "none"
    base = "needs a base" if record["needs_base"] else "needs no base"
    return f"{record['name']}: {record['summary']}\n  {record['paper'] or 'no paper'}; {base}; settings: {settings}"


def _numbers(text: str) -> list[float] | None:
    """``1,0.5`` as numbers. Raises `ConfigError`."""
    if not text:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: write a number for each input, as in 1,0.5,0.5") from None
