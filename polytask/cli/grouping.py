"""The commands *groupwise* and *transferability*: groups of tasks on one base, and which belong together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polytask.core.recipe import Schedule

from .app import Base, Json, Seed, Skip, Tasks, _need, _notes, _say, _show, _writable, app
from .options import configurable, form_of


@app.command()
@configurable(Schedule)
def groupwise(
    tasks: Tasks = "",
    base: Base = "minilm",
    groups: Annotated[
        str, typer.Option("--groups", help="YAML file: each group and its tasks. The tasks' own group by default.")
    ] = "",
    plan: Annotated[
        str, typer.Option("--plan", help="Who learns together: measured, or direction (of translations).")
    ] = "measured",
    pivot: Annotated[str, typer.Option("--pivot", help="The language that directions go into or out of.")] = "en",
    merge: Annotated[
        str, typer.Option("--merge", help="How those of a group that learn alone become one adapter; none keeps each.")
    ] = "ties",
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of a merged LoRA; the largest of its parts' by default.", min=1)
    ] = None,
    form: Annotated[str, typer.Option("--form", help="What learns: lora, or lora:rank=8,alpha=16.")] = "lora",
    sites: Annotated[
        str | None, typer.Option("--sites", help="Selector of where, as 'attention & depth>=0.5'.")
    ] = None,
    out: Annotated[
        str, typer.Option("--out", help="Folder for adapters and table; an interrupted run goes on from there.")
    ] = "groupwise",
    seed: Seed = 0,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Learn groups of tasks together where that helps and apart where it does not, and merge within groups what is apart.

    Each task's own adapter is compared with one of its whole group on dev. A group ends with at most two adapters: one that
    is learned together, one that is merged. --plan direction takes the plan of translations instead: into English apart, out
    of it together. A file of groups says them as lists, or with directions: {germanic: {de-en: de-en, en-de: en-de}}.

    Example: polytask groupwise examples/tasks --base minilm --groups groups.yaml --merge ties:density=0.3 --out grouped
    """
    from polytask.core.task import read_tasks
    from polytask.grouping import groupwise as run

    schedule = Schedule.of(settings, "groupwise").model_dump()
    way = None if merge in ("", "none") else form_of(merge, "--merge")
    _writable(out)
    found = read_tasks(_need(tasks, "the tasks"), skip_bad_rows=skip_bad_rows)
    _notes(found)
    result = run(
        base, found, groups=groups or None, plan=plan, pivot=pivot, merge=way, rank=rank, out=out, seed=seed, say=_say,
        form=form_of(form), sites=sites, **schedule,
    )  # fmt: skip
    _show(result.as_dict(), as_json, f"{result}\n\nsaved in {out}")


@app.command()
@configurable(Schedule)
def transferability(
    tasks: Tasks = "",
    base: Base = "minilm",
    split: Annotated[str, typer.Option("--split", help="That is scored.")] = "dev",
    form: Annotated[str, typer.Option("--form", help="What learns: lora, or prompt:length=16.")] = "lora",
    sites: Annotated[
        str | None, typer.Option("--sites", help="Selector of where, as 'attention & depth>=0.5'.")
    ] = None,
    out: Annotated[
        str, typer.Option("--out", help="Folder for adapters and matrix; an interrupted run goes on from there.")
    ] = "transferability",
    seed: Seed = 0,
    skip_bad_rows: Skip = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Measure what every task gains when its adapter starts from every other task's.

    Writes the matrix as CSV, JSON and picture, and groups of tasks that help each other, for groupwise --groups.

    Example: polytask transferability examples/tasks --base minilm --form prompt:length=16 --epochs 3 --out gains
    """
    from polytask.core.task import read_tasks
    from polytask.grouping import transferability as run

    schedule = Schedule.of(settings, "transferability").model_dump()
    _writable(out)
    found = read_tasks(_need(tasks, "the tasks"), skip_bad_rows=skip_bad_rows)
    _notes(found)
    result = run(
        base, found, split=split, out=out, seed=seed, say=_say, form=form_of(form), sites=sites, **schedule
    )  # fmt: skip
    helped = ", ".join(f"{task} from {source}" for task, source in result.best().items() if source) or "no task gains"
    groups = "; ".join(", ".join(own) for own in result.groups().values())
    _show(result.as_dict(), as_json, f"{result}\n\nbest starts: {helped}\ngroups: {groups}\nsaved in {out}")
