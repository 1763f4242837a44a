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
            help="A library or a folder of adapters, or a mixture; after the word trace the file of a mix and the library; after "
            "mbc or kshot-experts a library; or the word list.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        str, typer.Option("--router", help="How, with settings: arrow:top_k=2. See polytask route list.")
    ] = "",
    base: Annotated[str, typer.Option("--base", help="The pretrained model, for what learns or looks at data.")] = "",
    data: Annotated[
        str, typer.Option("--data", help="Tasks to learn from, or each adapter's own, or to trace: a file or a folder.")
    ] = "",
    pool: Annotated[str, typer.Option("--pool", help="Of kshot-experts: a task with more examples of the kind.")] = "",
    out: Annotated[
        str, typer.Option("--out", help="File for the mix (mix.safetensors); a folder for a trace or groups.")
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of what learns (epochs=3), of mbc (k=4) or kshot-experts; repeatable."),
    ] = None,
    train: Annotated[
        str, typer.Option("--train", help="Of a router that learns: gates, or all with the adapters.")
    ] = "",
    split: Annotated[
        str, typer.Option("--split", help="Of the data that a trace looks at: train, dev or test.")
    ] = "test",
    examples: Annotated[int, typer.Option("--examples", help="Of each task in a trace.", min=1)] = 16,
    write: Annotated[bool, typer.Option("--write", help="Trace the answers that the model writes itself.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose among adapters for each task, row or token, with or without learning.

    Example: polytask route lib --router arrow:top_k=2 --out mix.safetensors

    Example: polytask route lib --router phatgoose --base minilm --data examples/tasks --out mix.safetensors

    Example: polytask route lib --router adapterfusion --base minilm --data examples/tasks --set epochs=3

    Example: polytask route trace mix.safetensors lib --base minilm --data examples/tasks --out trace

    Example: polytask route mbc lib --set k=3 --base minilm --data examples/tasks --out groups

    Example: polytask route kshot-experts lib --base minilm --data examples/tasks/question-type --set k=20

    polytask route list shows the routers.
    """
    given = list(inputs or [])
    if given == ["list"]:
        records = known()
        _show(records, as_json, "\n".join(_line(record) for record in records))
        return
    if not given:
        _need("", "the library")
    word = given[0] if len(given) > 1 else ""
    if word and len(given) != (3 if word == "trace" else 2):
        raise ConfigError(
            f"write polytask route LIB, trace MIX LIB, mbc LIB or kshot-experts LIB, not polytask route {' '.join(given)}"
        )
    if word not in ("", "trace", "mbc", "kshot-experts"):
        raise ConfigError(f"{word!r} is no word of route; those are trace, mbc, kshot-experts and list")
    chosen = _settings(settings or [])
    if word == "trace":
        _trace(given[1], given[2], base, data, out or "trace", split, examples, write, as_json)
    elif word == "mbc":
        _mbc(given[1], base, data, out, seed, chosen, as_json)
    elif word == "kshot-experts":
        _kshot(given[1], router, base, data, pool, Path(out or "mix.safetensors"), seed, chosen, as_json)
    else:
        _route(given[0], router or "arrow", base, data, Path(out or "mix.safetensors"), seed, train, chosen, as_json)


def _route(
    library: str,
    router: str,
    base: str,
    data: str,
    out: Path,
    seed: int,
    train: str,
    chosen: dict[str, Any],
    as_json: bool,
) -> None:
    from polytask.core.model import Model
    from polytask.routing import route as run

    model = Model.load(base) if base else None
    mix = run(library, form_of(router, "--router"), model=model, data=data or None, seed=seed, train=train, **chosen)
    learned = [task["name"] for task in mix.about.get("tasks", [])]
    file = _saved(mix, out)
    facts = {
        "out": str(file), "router": {"name": mix.router.name, **mix.router.settings()}, "adapters": list(mix.adapters),
        "sites": len(mix.gates), "parameters": mix.size, "learned_from": learned, **mix.facts,
    }  # fmt: skip
    said = f"saved in {file}: {mix.router.name} over {len(mix.adapters)} adapters at {len(mix.gates)} sites"
    _show(facts, as_json, said + (f", {mix.size:,} learned numbers" if learned else ""))


def _saved(mix: Any, out: Path) -> Path:
    """Writes a mix, and beside it the adapters that learned with their router, which are nowhere yet."""
    for name, adapter in mix.adapters.items():
        if "mixture" in adapter.card.training or mix.about.get("training") == adapter.card.training:
            adapter.save(out.with_suffix("") / name)
            _say(f"saved in {out.with_suffix('') / name}")
    file: Path = mix.save(out)
    return file


def _mbc(library: str, base: str, data: str, out: str, seed: int, chosen: dict[str, Any], as_json: bool) -> None:
    from polytask.core.model import Model
    from polytask.experts import mbc

    model = Model.load(base) if base else None
    found = mbc(library, model=model, data=data or None, seed=seed, out=(out or "groups") if data else None, **chosen)
    facts = {"groups": [list(group) for group in found.groups], "names": list(found.names)}
    facts |= {"similarity": found.similarity.tolist(), "learned": list(found.adapters)}
    lines = [f"group{i}: {', '.join(group)}" for i, group in enumerate(found.groups)]
    _show(facts, as_json, "\n".join([*lines, *([f"saved in {out or 'groups'}"] if data else [])]))


def _kshot(
    library: str,
    router: str,
    base: str,
    data: str,
    pool: str,
    out: Path,
    seed: int,
    chosen: dict[str, Any],
    as_json: bool,
) -> None:
    from polytask.core.task import read_tasks
    from polytask.experts import kshot_experts

    tasks = read_tasks(_need(data, "the task with the shots (--data)"))
    if len(tasks) != 1:
        raise ConfigError(
            f"--data {data!r}: kshot-experts is for one task, and there are {len(tasks)}; give the one's path"
        )
    more = read_tasks(pool)[0] if pool else None
    made = kshot_experts(
        _need(base, "the base (--base)"), library, tasks[0], more,
        router=form_of(router, "--router") if router else None, seed=seed, **chosen,
    )  # fmt: skip
    file = _saved(made.mix, out)
    lines = [f"{row.name}: {row.score:.3f}, loss {row.loss:.3f}" for row in made.ranking]
    facts = {"out": str(file), "chosen": list(made.names), "likeness": made.likeness, "examples": len(made.examples)}
    facts["ranking"] = [vars(row) for row in made.ranking]
    _show(
        facts,
        as_json,
        "\n".join([*lines, f"saved in {file}: {', '.join(made.names)}, from {len(made.examples)} examples"]),
    )


def _trace(
    file: str, library: str, base: str, data: str, out: str, split: str, examples: int, write: bool, as_json: bool
) -> None:  # fmt: skip
    from polytask.core.model import Model
    from polytask.core.routing import Routing
    from polytask.core.task import read_tasks
    from polytask.jobs import drawn
    from polytask.route.trace import trace
    from polytask.routing import source_of

    tasks = read_tasks(_need(data, "the tasks (--data)"))
    mix = Routing.load(file, source_of(library))
    model = Model.load(_need(base, "the base (--base)"))
    found = trace(model, mix.attach(model), tasks, split=split, examples=examples, write=write)
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
