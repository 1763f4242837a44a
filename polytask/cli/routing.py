"""The command *route*: adapters to a mix that chooses among them, and a look at what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.core.errors import ConfigError

from .app import Json, Seed, _need, _say, _show, app
from .options import form_of


@app.command()
def route(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="A library or a folder of adapters; or trace, the file of a mix and the library; or the word list.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        str, typer.Option("--router", help="How, with settings: arrow:top_k=2. See polytask route list.")
    ] = "arrow",
    base: Annotated[str, typer.Option("--base", help="The pretrained model, for what learns or looks at data.")] = "",
    data: Annotated[
        str, typer.Option("--data", help="Tasks to learn from, or each adapter's own, or to trace: a file or a folder.")
    ] = "",
    out: Annotated[
        str,
        typer.Option("--out", help="File for the mix; a folder for a trace. mix.safetensors, or trace, by default."),
    ] = "",
    learn: Annotated[
        list[str] | None, typer.Option("--set", help="Of what learns: epochs=3, lr=0.001; repeatable.")
    ] = None,
    train: Annotated[
        str, typer.Option("--train", help="Of a router that learns: gates, or all with the adapters.")
    ] = "",
    split: Annotated[
        str, typer.Option("--split", help="Of the data that a trace looks at: train, dev or test.")
    ] = "test",
    examples: Annotated[int, typer.Option("--examples", help="Of each task in a trace.", min=1)] = 16,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose among adapters for each task, row or token, with or without learning.

    Example: polytask route lib --router arrow:top_k=2 --out mix.safetensors

    Example: polytask route lib --router phatgoose --base minilm --data examples/tasks --out mix.safetensors

    Example: polytask route lib --router adapterfusion --base minilm --data examples/tasks --set epochs=3

    Example: polytask route trace mix.safetensors lib --base minilm --data examples/tasks --out trace

    polytask route list shows the routers.
    """
    given = list(inputs or [])
    if given == ["list"]:
        records = known()
        _show(records, as_json, "\n".join(_line(record) for record in records))
        return
    if not given:
        _need("", "the library")
    if given[0] == "trace" and len(given) > 1:
        if len(given) != 3:
            raise ConfigError(
                "a trace needs the file of a mix and its library: polytask route trace mix.safetensors lib"
            )
        _trace(given[1], given[2], base, data, out or "trace", split, examples, as_json)
        return
    if len(given) > 1:
        raise ConfigError(f"give one library or folder of adapters, not {', '.join(given)}")
    from polytask.core.model import Model
    from polytask.routing import route as run
    from polytask.routing import source_of

    chosen = form_of(router, "--router")
    source = source_of(given[0])
    model = Model.load(base) if base else None
    mix = run(source, chosen, model=model, data=data or None, seed=seed, train=train, **_settings(learn or []))
    learned = [task["name"] for task in mix.about.get("tasks", [])]
    file = Path(out or "mix.safetensors")
    for name, adapter in mix.adapters.items():  # those that learned with their router are nowhere yet
        if adapter.card.training.get("mixture") == mix.router.name:
            adapter.save(file.with_suffix("") / name)
    file = mix.save(file)
    facts = {
        "out": str(file), "router": {"name": mix.router.name, **mix.router.settings()}, "adapters": list(mix.adapters),
        "sites": len(mix.gates), "parameters": mix.size, "learned_from": learned,
    }  # fmt: skip
    said = f"saved in {file}: {mix.router.name} over {len(mix.adapters)} adapters at {len(mix.gates)} sites"
    _show(facts, as_json, said + (f", {mix.size:,} learned numbers" if learned else ""))


def _trace(file: str, library: str, base: str, data: str, out: str, split: str, examples: int, as_json: bool) -> None:
    from polytask.core.model import Model
    from polytask.core.routing import Routing
    from polytask.core.task import read_tasks
    from polytask.jobs import drawn
    from polytask.route.trace import trace
    from polytask.routing import source_of

    tasks = read_tasks(_need(data, "the tasks (--data)"))
    mix = Routing.load(file, source_of(library))
    model = Model.load(_need(base, "the base (--base)"))
    found = trace(model, mix.attach(model), tasks, split=split, examples=examples)
    folder = found.save(out)
    pictures = drawn(folder)
    _say(f"saved in {folder}: {', '.join(path.name for path in (folder / 'trace.json', *pictures))}")
    short = {k: v for k, v in found.as_dict().items() if k != "examples"}
    _show({"out": str(folder), **short}, as_json, found.text())


def known() -> list[dict[str, Any]]:
    """What is known of every router, and of forms that route inside themselves."""
    from polytask.core.form import forms
    from polytask.core.gate import routers

    kinds: list[Any] = [*routers.values(), *(form for form in forms.values() if getattr(form, "routes", False))]
    return [
        {
            "name": kind.name, "summary": (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
            "paper": kind.paper, "reads": getattr(kind, "reads", "token"), "trains": getattr(kind, "trains", "a form"),
            "combines": getattr(kind, "combines", "outputs"), "settings": _plain(kind),
        }
        for kind in sorted(kinds, key=lambda kind: kind.name)
    ]  # fmt: skip


def _plain(kind: Any) -> dict[str, Any]:
    return dict(kind().settings())


def _line(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v!r}" for k, v in record["settings"].items()) or "none"
    summary = re.sub(r"\s+", " ", record["summary"])
    how = f"reads {record['reads']}; trains {record['trains']}; combines {record['combines']}"
    if record["trains"] == "a form":
        how = "a form of its own (polytask learn --form)"
    return f"{record['name']}: {summary}\n  {record['paper'] or 'no paper'}; {how}; settings: {settings}"


def _settings(texts: list[str]) -> dict[str, Any]:
    """``epochs=3`` as names and values. Raises `ConfigError`."""
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, _ = text.partition("=")
        if not (sign and name.isidentifier()):
            raise ConfigError(f"--set {text!r}: write a setting and its value, as in epochs=3")
        found |= {k: v for k, v in form_of(f"settings:{text}", "--set").items() if k != "name"}
    return found
