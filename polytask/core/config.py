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
    import yaml

    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds {type(data).__name__} where names and values are needed")
    return data
