"""Validated settings: what is not understood is refused, with the nearest valid name, all problems at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, listing, nearest


class Settings(BaseModel):
    """Base of every group of settings. Unknown keys and wrong values are a `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Settings from plain values.

        Args:
            values: by name.
            where: the file or command they come from, for the message.

        Raises:
            ConfigError: names every unknown key and every value out of range.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problems = [_say(cls, dict(problem)) for problem in error.errors()]
            raise ConfigError(f"{where + ': ' if where else ''}{'; '.join(problems)}") from error


def _say(cls: type[Settings], problem: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{nearest(name, cls.model_fields)}; there are: {listing(cls.model_fields, 40)}"
    return f"{name}: {problem['msg'].lower()}, got {problem['input']!r}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file with a mapping.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds something else.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    return parse_yaml(data, str(file))


def parse_yaml(data: bytes, where: str) -> dict[Any, Any]:
    """The mapping that a YAML text holds; an empty one when the text is empty.

    Args:
        data: the text.
        where: the file it comes from, for the message.

    Raises:
        ConfigError: it is no YAML (the line is named), or holds something else.
    """
    import yaml

    try:
        found = yaml.safe_load(data)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{line}: this is not valid YAML ({what}). Correct the line.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, dates that do not exist
        what = " ".join(str(error).split())
        raise ConfigError(f"{where}: this is not valid YAML ({what}). Write it as UTF-8 text.") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        held = repr(found) if len(repr(found)) <= 60 else repr(found)[:57] + "..."
        raise ConfigError(f"{where} must hold `key: value` lines, and holds {held}.")
    return found
