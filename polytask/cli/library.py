"""The commands *library ...*: many adapters in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.core.errors import ConfigError

from .app import Json, _show, _writable, app

if TYPE_CHECKING:
    from polytask.core.library import Library
    from polytask.core.library.entry import Entry

library = typer.Typer(
    name="library",
    help="Many adapters over one base in one place: added, found, compared, looked after.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(library)

Lib = Annotated[str, typer.Argument(help="Folder of the library.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Of the adapter.", show_default=False)]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A word to find it by; repeatable.")]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of one that has the name.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Also take adapters that were made for another base.")]


def _open(path: str, model: str | None = None, *, new: bool = False, repair: bool = True) -> Library:
    from polytask.core.library import Library

    if not new and not Path(path).expanduser().is_dir():
        raise ConfigError(f"there is no library at {path!r}; `polytask library add {path} ADAPTER` makes one")
    if new:
        _writable(path)
    return Library(path, model or None, repair=repair)


def _line(entry: Entry) -> str:
    ranks = "/".join(map(str, entry.ranks))
    facts = [entry.form + (f" {ranks}" if ranks else ""), f"{entry.size:,}"]
    facts += [", ".join(str(task["name"]) for task in entry.tasks)] if entry.tasks else []
    facts += [f"{name} {score:.3f}" for name, score in entry.scores.items()]
    facts += [f"tags {', '.join(entry.tags)}"] if entry.tags else []
    return f"{entry.name}: {'; '.join(facts)}"


def _list(entries: Iterable[Entry], as_json: bool, none: str) -> None:
    found = list(entries)
    light = [{k: v for k, v in entry.as_dict().items() if k not in ("files", "settings")} for entry in found]
    _show(light, as_json, "\n".join(map(_line, found)) or none)


@library.command()
def add(
    lib: Lib,
    adapters: Annotated[list[str], typer.Argument(help="Folders or hub names of adapters.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What one adapter is called; its folder's name by default.")] = "",
    tag: Tags = None,
    base: Annotated[str, typer.Option("--base", help="The base, for signatures that look at data.")] = "",
    data: Annotated[str, typer.Option("--data", help="The task it learned from, for the same; needs --base.")] = "",
    replace: Replace = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Add adapters to a library, which is made where there is none.

    Example: polytask library add shelf lib/commit-type lib/review-stars --tag first
    """
    from polytask.core.task import read_tasks

    if name and len(adapters) > 1:
        raise ConfigError(
            f"--name {name!r} is for one adapter, and {len(adapters)} are given; add them one after the other"
        )
    if data and not base:
        raise ConfigError("--data is read by the base; say which with --base")
    found = _open(lib, base, new=True)
    tasks = read_tasks(data) if data else None
    options: dict[str, Any] = {"tags": tag or (), "data": tasks, "replace": replace, "check_base": not any_base}
    made = [found.add(adapter, name or None, **options) for adapter in adapters]
    _show({"added": made}, as_json, f"added {', '.join(made)}; {len(found)} adapters")


@library.command("import")
def import_(
    lib: Lib,
    folder: Annotated[str, typer.Argument(help="Searched with all its sub-folders.", show_default=False)],
    tag: Tags = None,
    replace: Replace = False,
    any_base: AnyBase = False,
    as_json: Json = False,
) -> None:
    """Add every adapter below a folder, ours or PEFT's; what cannot be read is named and left out.

    Example: polytask library import shelf lib --tag first
    """
    found = _open(lib, new=True).import_(folder, tag or (), replace=replace, check_base=not any_base)
    _show(found.as_dict(), as_json, str(found))


@library.command()
def export(
    lib: Lib,
    name: Name,
    out: Annotated[str, typer.Argument(help="A new folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Copy an adapter out of a library, for PEFT, vLLM or another library.

    Example: polytask library export shelf commit-type out/commit-type
    """
    made = _open(lib).export(name, out)
    _show({"out": str(made)}, as_json, f"saved in {made}")


@library.command()
def tag(
    lib: Lib,
    name: Name,
    tags: Annotated[list[str], typer.Argument(help="Words.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Take them away instead.")] = False,
    as_json: Json = False,
) -> None:
    """Give an adapter words to find it by.

    Example: polytask library tag shelf commit-type code short
    """
    found = _open(lib)
    held = found.untag(name, *tags) if remove else found.tag(name, *tags)
    _show({"name": name, "tags": held}, as_json, f"{name}: {', '.join(held) or 'no tags'}")


@library.command()
def find(
    lib: Lib,
    query: Annotated[str, typer.Argument(help="task:mood & score>0.8", show_default=False)],
    as_json: Json = False,
) -> None:
    """Find adapters.

    A query joins conditions with & | ! and parentheses: words (in name, tag or task), field:text (also with * and ?),
    field=text, field>number. Fields: name, tag, task, kind, form, base, parent, hash, licence, signature, added, rank, size,
    score (or score.accuracy).

    Example: polytask library find shelf "task:sentiment & score>0.8"
    """
    _list(_open(lib).find(query), as_json, f"nothing matches {query!r}")


@library.command("list")
def list_(
    lib: Lib,
    removed: Annotated[bool, typer.Option("--removed", help="Those that are removed instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the adapters of a library.

    Example: polytask library list shelf
    """
    found = _open(lib)
    _list(found.removed if removed else found.entries.values(), as_json, "nothing there")


@library.command()
def show(lib: Lib, name: Name, as_json: Json = False) -> None:
    """Show what is known of an adapter, without reading its weights.

    Example: polytask library show shelf commit-type
    """
    data = _open(lib).show(name).as_dict()
    files: Mapping[str, Any] = data["files"]
    lines = [f"{key}: {_said(value)}" for key, value in data.items() if key != "files" and value not in ("", (), {}, 0)]
    lines += [f"{file}: {known['size']:,} bytes, sha256 {known['sha256'][:12]}" for file, known in files.items()]
    _show(data, as_json, "\n".join(lines))


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


@library.command()
def diff(
    lib: Lib,
    first: Annotated[str, typer.Argument(help="An adapter.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="The base, for forms whose change depends on it.")] = "",
    as_json: Json = False,
) -> None:
    """Compare what two adapters change: cosine by layer, and how much the spaces overlap that they write to and read from.

    Example: polytask library diff shelf commit-type review-stars
    """
    found = _open(lib, base).diff(first, second)
    _show(found.as_dict(), as_json, str(found))


@library.command()
def graph(
    lib: Lib,
    out: Annotated[str, typer.Option("--out", help="Also draw it: a file .png or .svg.")] = "",
    as_json: Json = False,
) -> None:
    """Show who came from whom, as a tree and as a picture.

    Example: polytask library graph shelf --out family.png
    """
    found = _open(lib).graph()
    if out:
        from polytask.report.family import draw

        draw(found.as_dict(), out)
    picture = f"\n\npicture: {out}" if out else ""
    _show({**found.as_dict(), "out": out or None}, as_json, (str(found) or "nothing there") + picture)


@library.command()
def remove(lib: Lib, names: Annotated[list[str], typer.Argument(help="Of adapters.")], as_json: Json = False) -> None:
    """Take adapters away. They are kept until gc, and restore brings them back.

    Example: polytask library remove shelf commit-type
    """
    found = _open(lib)
    for name in names:
        found.remove(name)
    _show(
        {"removed": names}, as_json, f"removed {', '.join(names)}; `polytask library restore` brings it back until gc"
    )


@library.command()
def restore(lib: Lib, name: Name, as_json: Json = False) -> None:
    """Bring back an adapter that was removed.

    Example: polytask library restore shelf commit-type
    """
    made = _open(lib).restore(name)
    _show({"restored": made}, as_json, f"{made} is back")


@library.command()
def gc(lib: Lib, as_json: Json = False) -> None:
    """Delete for good what was removed, and what ended processes have left.

    Example: polytask library gc shelf
    """
    gone = _open(lib).gc()
    _show({"deleted": gone}, as_json, f"deleted {', '.join(gone)}" if gone else "nothing to delete")


@library.command()
def check(
    lib: Lib,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what is found.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Read only files whose size or time differs.")] = False,
    as_json: Json = False,
) -> None:
    """Look for what is not as it should be: folders and index that differ, changed or damaged files, leftovers. Exit code 1
    where something is left to do.

    Example: polytask library check shelf --repair
    """
    found = _open(lib, repair=repair).check(repair, deep=not quick)
    data = [{"what": f.what, "name": f.name, "text": f.text, "repaired": f.repaired} for f in found]
    _show(data, as_json, "\n".join(map(str, found)) or "all is as it should be")
    if not all(f.repaired for f in found):
        raise typer.Exit(1)
