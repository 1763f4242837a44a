"""Flags from signatures and settings, and YAML files that say the same as the flags."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import TypeAdapter, ValidationError

from polytask.core.config import Settings, read_yaml
from polytask.core.errors import ConfigError, listing, nearest

CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file with the same names as the flags; flags win.")]


def described(settings: type[Settings]) -> dict[str, str]:
    """The sentence that a settings class's docstring has for each of its fields."""
    text = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    for line in text.split("\n"):
        if match := re.match(r"    (\w+): (.*)", line):
            found[match[1]] = match[2]
            last = match[1]
        elif line.strip() and found:
            found[last] += " " + line.strip()
    return found


def flags_of(settings: type[Settings]) -> list[inspect.Parameter]:
    """A keyword parameter for typer for each field of a settings class."""
    texts = described(settings)
    made = []
    for name, field in settings.model_fields.items():
        option = typer.Option("--" + name.replace("_", "-"), help=texts.get(name, "").replace("``", ""))
        kind: Any = field.annotation
        made.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[_flag(kind), option]
            )
        )
    return made


def _flag(kind: Any) -> Any:
    """What typer is told: a choice of words is a text that the settings class checks later."""
    return str if "Literal" in str(kind) else kind


def configurable(*groups: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command: adds the flags of settings classes (given to it as ``**settings``) and ``--config``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        extra = [flag for group in groups for flag in flags_of(group)]
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG)
        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            ctx: typer.Context = values.pop("ctx")
            file = values.pop("config")
            if file is not None:
                values = _with_file(values, file, ctx, [*own, *extra])
            return function(**values)

        command.__signature__ = inspect.Signature([context, *own, *extra, config])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [context, *own, *extra, config]}
        del command.__wrapped__  # typer would look at the original's signature
        return command

    return decorate


def _with_file(
    values: dict[str, Any], file: Path, ctx: typer.Context, known: list[inspect.Parameter]
) -> dict[str, Any]:
    kinds = {_spelled(p): p.annotation for p in known}
    fields = {_spelled(p): p.name for p in known}
    problems = []
    merged = dict(values)
    for key, value in read_yaml(file).items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            problems.append(f"unknown setting {key!r}{nearest(name, kinds)}; there are: {listing(sorted(kinds), 40)}")
            continue
        kind, name = kinds[name], fields[name]
        source = ctx.get_parameter_source(name)
        if source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind
        if name in ("form", "budget", "space") and isinstance(value, dict):
            merged[name] = value
            continue
        try:
            merged[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            problems.append(f"{key}: {error.errors()[0]['msg'].lower()}, got {value!r}")
    if problems:
        raise ConfigError(f"{file}: {'; '.join(problems)}")
    return merged


def _spelled(parameter: inspect.Parameter) -> str:
    """What a file calls a parameter: as its flag, or as itself where it has none."""
    for option in getattr(parameter.annotation, "__metadata__", ()):
        # inside Annotated, typer takes the first name given to Option for its default
        for flag in (getattr(option, "default", None), *(getattr(option, "param_decls", None) or ())):
            if isinstance(flag, str) and flag.startswith("--"):
                return flag.split("/")[0].lstrip("-").replace("-", "_")
    return parameter.name


def form_of(text: str | dict[str, Any], flag: str = "--form") -> dict[str, Any]:
    """``lora``, ``lora:rank=8,alpha=16`` or ``mpt:tasks=[mood,topic]`` (or the mapping of a YAML file) as a mapping."""
    if isinstance(text, dict):
        return text
    import yaml

    name, _, rest = text.partition(":")
    chosen: dict[str, Any] = {"name": name}
    for part in filter(None, (p.strip() for p in re.split(r",(?![^\[]*\])", rest))):  # [a, b] is one value
        key, sign, value = part.partition("=")
        if not sign:
            raise ConfigError(f"{flag} {text!r}: {part!r} is no setting; write name=value, as in lora:rank=8,alpha=16")
        try:
            chosen[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{flag} {text!r}: {value!r} is no value; write name=value, as in lora:rank=8") from None
    return chosen


def mix_of(text: str | None) -> Any:
    """What ``--mix`` says: a name, ``a=0.5,b=0.5``, or nothing."""
    if not text:
        return None
    if "=" not in text:
        return text
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--mix {text!r}: {value!r} is no number; write name=weight,name=weight") from None
    return weights
