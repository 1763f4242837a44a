"""The commands. Each says what it takes and gives with a worked example in its help."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.core.errors import ConfigError, SiteError, StorageError
from polytask.core.recipe import Schedule

from .options import configurable, form_of, mix_of
from .streams import emit, first

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

app = typer.Typer(
    name="polytask",
    help="One pretrained model, many tasks: learn adapters, compare them, mix them, look into them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Base = Annotated[str, typer.Option("--base", help="Alias (minilm), hub name, or folder of the pretrained model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Skip = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and count them.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Sequences per forward of an evaluation.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Tasks = Annotated[str, typer.Argument(help="A task's file or folder, or a folder of tasks.", show_default=False)]


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import polytask

        emit(polytask.__version__)
        raise typer.Exit(0)


def _show(data: Any, as_json: bool, text: str) -> None:
    emit(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


def _say(text: str) -> None:
    if sys.stderr is not None and first():  # else print would take standard output for it
        print(text, file=sys.stderr)


def _need(value: str | None, what: str) -> str:
    if not value:
        raise ConfigError(f"{what} is missing; give it as an argument or in the --config file")
    return value


def _writable(out: str) -> None:
    """Finds out before the work whether its results have a place. Raises `StorageError`."""
    folder = Path(out).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise StorageError(f"cannot write {out}: {there} is a file where a folder is needed; choose another --out")
    if not os.access(there, os.W_OK):
        raise StorageError(f"cannot write {out}: {there} may not be written to; choose another --out")


def _notes(found: list[Any]) -> None:
    for task in found:
        for note in task.notes:
            _say(f"{task.name}: {note}")


@app.command()
@configurable(Schedule)
def learn(
    tasks: Tasks = "",
    base: Base = "minilm",
    out: Annotated[
        str, typer.Option("--out", help="Folder for the adapters; an interrupted run goes on from there.")
    ] = "lib",
    form: Annotated[str, typer.Option("--form", help="What learns: lora, or lora:rank=8,alpha=16.")] = "lora",
    sites: Annotated[
        str | None, typer.Option("--sites", help="Selector of where, as 'attention & depth>=0.5'.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Who gets how many ranks: adalora, or adalora:over=2,every=10.")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="One adapter for all tasks.")] = False,
    together: Annotated[bool, typer.Option("--together", help="One adapter per task, in one run.")] = False,
    sampling: Annotated[
        str, typer.Option("--sampling", help="Of joint tasks: proportional, equal, temperature.")
    ] = "proportional",
    start: Annotated[str | None, typer.Option("--start", help="Folder of an adapter to go on from.")] = None,
    seed: Seed = 0,
    tracker: Annotated[str | None, typer.Option("--tracker", help="tensorboard or wandb.")] = None,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Learn one adapter per task (or one for all with --joint).

    Example: polytask learn examples/tasks --base minilm --form lora:rank=8 --epochs 5 --out lib
    """
    from polytask.core.model import Model
    from polytask.core.task import read_tasks
    from polytask.jobs import learn_each
    from polytask.learn.learner import learn as run

    if joint and together:
        raise ConfigError(
            "--joint (one adapter for all tasks) and --together (one each) exclude each other; choose one"
        )
    chosen = form_of(form)
    dealt = form_of(budget, "--budget") if budget else None
    schedule = Schedule.of(settings, "learn").model_dump()
    _writable(out)
    found = read_tasks(_need(tasks, "the tasks"), skip_bad_rows=skip_bad_rows)
    _notes(found)
    model = Model.load(base)
    common = {"form": chosen, "sites": sites, "seed": seed, "tracker": tracker, "start": start, **schedule}
    common["budget"] = dealt
    if joint:
        made = [run(model, found, joint=True, sampling=sampling, out=Path(out) / "joint", **common)]
    elif together:
        made = run(model, found, together=True, out=out, **common)
    else:
        made = learn_each(model, found, out=out, say=_say, **common)
    records = [
        {"adapter": a.name, "folder": str(Path(out) / a.name), "parameters": a.size, **a.card.as_dict()} for a in made
    ]
    lines = []
    for adapter in made:
        training, metrics = adapter.card.training, adapter.card.metrics
        scores = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()) or "no dev split"
        lines.append(
            f"{adapter.name}: {scores}; {training['steps']} steps in {training['seconds']} s, {training['precision']} "
            f"({training['precision_because']}); saved in {Path(out) / adapter.name}"
        )
        lines += _measured(training)
    _show(records, as_json, "\n".join(lines))


def _measured(training: dict[str, Any]) -> list[str]:
    """What was measured of an adapter; what there is of each site stays in its card."""
    found = training.get("measured") or {}
    return [f"  {name}: {value}" for name, value in found.items() if not isinstance(value, dict)]


@app.command()
@configurable()
def evaluate(
    tasks: Tasks = "",
    base: Base = "minilm",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="Folder of an adapter, or name=folder; repeatable.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", help="Which acts: a name, or a=0.6,b=0.4. The only adapter by default.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="test, dev or train.")] = "test",
    metric: Annotated[str | None, typer.Option("--metric", help="Another metric than the task's.")] = None,
    batch_size: Batch = 32,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
) -> None:
    """Score a base, an adapter or a mix of adapters on tasks, with 95 % intervals.

    Example: polytask evaluate examples/tasks/commit-type --adapter lib/commit-type
    """
    from polytask.core.metrics import choose_metric
    from polytask.core.task import read_tasks
    from polytask.evaluate.evaluator import evaluate as run

    found = read_tasks(_need(tasks, "the tasks"), skip_bad_rows=skip_bad_rows)
    _notes(found)
    for task in found:
        choose_metric(task.kind, metric)  # before the work that it would score
    if mix and not adapter:
        raise ConfigError(f"--mix {mix!r} needs the adapters it mixes; give each with --adapter")
    model, names = _with_adapters(base, adapter or [])
    acting = mix_of(mix) or (names[0] if len(names) == 1 else None)
    if len(names) > 1 and acting is None:
        raise ConfigError(f"several adapters are given ({', '.join(names)}); say which act with --mix")
    scores = {t.name: run(model, t, acting, split=split, metric=metric, batch_size=batch_size) for t in found}
    _show({n: s.as_dict() for n, s in scores.items()}, as_json, "\n".join(f"{n}: {s}" for n, s in scores.items()))


def _with_adapters(base: str, given: list[str]) -> tuple[Model, list[str]]:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

    model = Model.load(base)
    names = []
    for text in given:
        name, sign, folder = text.partition("=")
        adapter = Adapter.load(folder if sign else text)
        names.append(model.attach(adapter, name if sign else adapter.name or Path(text).name))
    return model, names


@app.command()
@configurable()
def compare(
    library: Annotated[str, typer.Argument(help="Folder with a folder per adapter.", show_default=False)] = "",
    tasks: Tasks = "",
    base: Base = "minilm",
    out: Annotated[str, typer.Option("--out", help="Folder for report.html and table.json.")] = "report",
    joint: Annotated[bool, typer.Option("--joint/--no-joint", help="Also learn one adapter on all tasks.")] = True,
    merge: Annotated[
        list[str] | None,
        typer.Option("--merge", help="Also merge all adapters: ties, or ties:density=0.3; repeatable."),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option("--route", help="Also all adapters behind a router: arrow, or arrow:top_k=2; repeatable."),
    ] = None,
    cross: Annotated[bool, typer.Option("--cross/--no-cross", help="Every adapter on every task.")] = True,
    batch_size: Batch = 32,
    seed: Seed = 0,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
) -> None:
    """Put baselines, adapters, joint training and the average side by side; writes a report with pictures.

    Example: polytask compare lib examples/tasks --base minilm --out report

    Example: polytask compare lib examples/tasks --merge ties --route arrow:top_k=2 --route nearest
    """
    from polytask.core.task import read_tasks
    from polytask.jobs import compare as run

    found = read_tasks(_need(tasks, "the tasks"), skip_bad_rows=skip_bad_rows)
    _notes(found)
    folder = _need(library, "the folder of adapters")
    _writable(out)
    merges = [form_of(text, "--merge") for text in merge or []]
    routes = [form_of(text, "--route") for text in route or []]
    options = {
        "joint": joint,
        "merges": merges,
        "routes": routes,
        "cross": cross,
        "seed": seed,
        "batch_size": batch_size,
    }
    table = run(base, folder, found, say=_say, **options)
    page = Path(out) / "report.html"
    try:
        table.to_json(page.with_name("table.json"))
        table.to_html(page)
    except StorageError:
        _show(table.as_dict(), as_json, str(table))  # what was measured is not lost for want of a place
        raise
    _show(table.as_dict(), as_json, f"{table}\n\nreport: {page}")


@app.command()
@configurable(Schedule)
def search(
    task: Annotated[str, typer.Argument(help="A task's file or folder, with a dev split.", show_default=False)] = "",
    base: Base = "minilm",
    out: Annotated[
        str, typer.Option("--out", help="Folder for the trials and results; an interrupted search goes on from there.")
    ] = "search",
    space: Annotated[
        str, typer.Option("--space", help="What is chosen from: autopeft, or a YAML file with forms, sites, layers.")
    ] = "autopeft",
    trials: Annotated[int, typer.Option("--trials", help="Different configurations to learn.", min=1)] = 32,
    startup: Annotated[int, typer.Option("--startup", help="Of these, drawn at random at first.", min=1)] = 8,
    seed: Seed = 0,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Search forms, sites and sizes for one task: which score best on dev for how few parameters.

    Writes search.json, pareto.png, and points/NNN.yaml for each configuration that no other beats; such a file is learned
    on any task with: polytask learn TASK --config OUT/points/NNN.yaml

    Example: polytask search examples/tasks/commit-type --base minilm --trials 16 --epochs 2 --out search
    """
    from polytask.core.task import read_tasks
    from polytask.jobs import search as run

    schedule = Schedule.of(settings, "search")
    given = {
        name: getattr(schedule, name)
        for name in schedule.model_fields
        if getattr(schedule, name) != Schedule.model_fields[name].default
    }
    _writable(out)
    source = _need(task, "the task")
    chosen = read_tasks(source, skip_bad_rows=skip_bad_rows)
    if len(chosen) > 1:
        raise ConfigError(
            f"{source} holds {len(chosen)} tasks ({', '.join(t.name for t in chosen)}); a search is for one, so choose one"
        )
    _notes(chosen)
    options = {"space": space, "trials": trials, "startup": startup, "seed": seed, "source": source, **given}
    found = run(base, chosen[0], out=out, say=_say, **options)
    _show(found.as_dict(), as_json, f"{found}\n\npicture: {Path(out) / 'pareto.png'}; recipes: {Path(out) / 'points'}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder or hub name of an adapter.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub name.")] = None,
    subfolder: Annotated[str | None, typer.Option("--subfolder", help="Folder inside.")] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter is, where it comes from, and what serves it.

    Example: polytask inspect lib/commit-type
    """
    from polytask.core.adapter import Adapter
    from polytask.core.export import serving_problems

    adapter = Adapter.load(path, revision=revision, subfolder=subfolder)
    problems = serving_problems(adapter)
    data = {
        "name": adapter.name, "form": {"name": adapter.form.name, **adapter.form.settings()}, "sites": list(adapter.patches),
        "parameters": adapter.size, "heads": {k: h.settings() for k, h in adapter.heads.items()}, "hash": adapter.hash,
        "card": adapter.card.as_dict(), "serving_problems": problems,
    }  # fmt: skip
    _show(data, as_json, _inspected(adapter, problems))


def _inspected(adapter: Adapter, problems: list[str]) -> str:
    card = adapter.card
    lines = [
        f"{adapter.name or 'adapter'}: {adapter.form}",
        f"base: {card.base.get('name')} (weights {str(card.base.get('fingerprint') or 'not recorded')[:8]})",
        f"sites: {len(adapter.patches)}, parameters: {adapter.size:,}, hash {adapter.hash[:12]}",
    ]
    lines += [f"head {name}: {head.settings()}" for name, head in adapter.heads.items()]
    lines += [f"learned from {t.get('name')}: {t.get('sizes')}" for t in card.tasks]
    lines += [f"{name}: {value}" for name, value in card.metrics.items()]
    training = {
        k: card.training.get(k)
        for k in ("steps", "best_step", "seconds", "precision", "peak_mb", "lr")
        if k in card.training
    }
    lines += [f"training: {training}"] if training else []
    lines += _measured(card.training)
    if held := card.training.get("ranks"):
        each = held["sites"].values()
        lines.append(f"ranks: {held['total']} by {held['budget']['name']}, from {min(each)} to {max(each)} at a site")
    lines += [f"cannot be served by vLLM as it is: {p}" for p in problems] or ["can be served by vLLM as it is"]
    return "\n".join(lines)


@app.command()
def tasks(
    path: Tasks,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
) -> None:
    """Show what tasks are in a file or folder, and what was guessed about them.

    Example: polytask tasks examples/tasks
    """
    from polytask.core.task import read_tasks

    found = read_tasks(path, skip_bad_rows=skip_bad_rows)
    lines = []
    for task in found:
        sizes = ", ".join(f"{split} {len(getattr(task, split))}" for split in ("train", "dev", "test"))
        labels = f"; {len(task.labels)} labels: {', '.join(task.labels[:8])}" if task.labels else ""
        lines.append(f"{task.name}: {task.kind}, {sizes}, scored by {task.metric}{labels}")
        lines += [f"  {note}" for note in task.notes]
    _show([task.summary() for task in found], as_json, "\n".join(lines))


@app.command()
def sites(
    base: Annotated[str, typer.Argument(help="Alias, hub name, or folder of the model.")] = "minilm",
    select: Annotated[str, typer.Option("--select", help="Selector, as 'mlp & layer in 0..3'.")] = "all",
    as_json: Json = False,
) -> None:
    """List the places of a model where an adapter can act.

    A selector joins roles (query, value, up, ...), groups (attention, mlp, linear), kinds (kind:norm), depth>=0.5,
    layer in 0..3, re:PATTERN and paths with & | ! and parentheses.

    Example: polytask sites minilm --select "attention & depth>=0.5"
    """
    from polytask.core.model import Model

    picked = Model.load(base).select(select)
    width = max(len(site.name) for site in picked)
    lines = [
        f"{site.name.ljust(width)}  {site.kind:<9} {site.role:<10} "
        f"{'x'.join(map(str, site.shape)) or '-':<12} {'' if site.layer is None else f'layer {site.layer}'}".rstrip()
        for site in picked
    ]
    _show(
        [{"name": site.name, **site.as_dict()} for site in picked], as_json, "\n".join([*lines, f"{len(picked)} sites"])
    )


@app.command()
def forms(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Forms to say everything of; a table of all when not given.", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Also count the parameters for this model.")] = None,
    as_json: Json = False,
) -> None:
    """List the forms that an adapter can have, or say what some of them are and what their settings mean.

    Example: polytask forms --base minilm

    Example: polytask forms dora vera
    """
    from polytask.core.form import forms as registered

    model = None
    if base is not None:
        from polytask.core.model import Model

        model = Model.load(base)
    kinds = [registered[name] for name in names] if names else registered.values()
    records = [_form_record(kind, model) for kind in kinds]
    text = (
        "\n\n".join(_form_text(kind, r) for kind, r in zip(kinds, records, strict=True))
        if names
        else _forms_table(records)
    )
    _show(records, as_json, text)


def _forms_table(records: list[dict[str, Any]]) -> str:
    rows = [["form", "parameters", "merges", "PEFT", "sites", "paper"]]
    for r in records:
        count = "-" if r.get("parameters") is None else f"{r['parameters']:,}"
        answers = ["yes" if r[key] else "no" for key in ("mergeable", "in_peft")]
        rows.append([r["name"], count, *answers, ", ".join(r["kinds"]), r["paper"]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i == 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _form_text(kind: Any, record: dict[str, Any]) -> str:
    import inspect as python

    count = (
        "" if record.get("parameters") is None else f"; {record['parameters']:,} parameters at {kind.default_sites!r}"
    )
    facts = f"{'can' if kind.mergeable else 'cannot'} be merged, {'in' if kind.in_peft else 'not in'} PEFT{count}"
    settings = ", ".join(f"{k}={v!r}" for k, v in record["settings"].items()) or "none"
    return f"{record['name']} ({facts})\n\n{python.getdoc(kind)}\n\nSettings: {settings}"


def _form_record(kind: Any, model: Model | None) -> dict[str, Any]:
    summary = (kind.__doc__ or "").strip().split("\n")[0]
    record = {
        "name": kind.name, "summary": summary, "paper": kind.paper, "kinds": list(kind.kinds),
        "default_sites": kind.default_sites,
        "mergeable": kind.mergeable, "in_peft": kind.in_peft, "settings": kind().settings(),
    }  # fmt: skip
    if model is not None:
        from polytask.core.adapter import Adapter

        try:
            record["parameters"] = Adapter.new(model, kind()).size
        except SiteError:  # it acts at no site of this model
            record["parameters"] = None
    return record


@app.command()
def transfer(
    prompt: Annotated[str, typer.Argument(help="Folder of an adapter of the form prompt.")],
    base: Base = "minilm",
    to: Annotated[str, typer.Option("--to", help="The model that gets the prompt.")] = "",
    out: Annotated[str, typer.Option("--out", help="Folder for the new adapter.")] = "transferred",
    steps: Annotated[int, typer.Option("--steps", help="Of the search.")] = 2000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a prompt for another model from one that was learned, without data of its task.

    Example: polytask transfer lib/sentiment --base minilm --to roberta-base --out lib/sentiment-roberta
    """
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model
    from polytask.learn.transfer import transfer_prompt

    source = (Adapter.load(prompt), Model.load(base))
    made = transfer_prompt(source, Model.load(_need(to, "the target model (--to)")), steps=steps, seed=seed)
    _writable(out)
    made.save(out)
    loss = made.card.training["transferred"]
    _show(
        {"out": out, "loss": loss, "hash": made.hash}, as_json, f"saved in {out}; 1 - cosine of the codes: {loss:.4f}"
    )
