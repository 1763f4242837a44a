"""What a mergekit file says, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polytask.core.errors import ConfigError, listing, nearest

from .vocabulary import KEYS


def chain(key: str, levels: Sequence[Any], default: Any = None) -> Any:
    """What the levels say about a parameter, as one value: where a list of filters has none that fits, the next level counts."""
    entries: list[dict[str, Any]] = []
    for level in [*levels, {key: default}]:
        value = _numbers((level or {}).get(key))
        if isinstance(value, Mapping):
            value = [value]
        if value is None or value == []:
            continue
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            entries += value
            continue
        return [*entries, {"value": value}] if entries else value
    return entries or None


def _numbers(value: Any) -> Any:
    """With numbers such as ``1e-5``, which YAML takes for text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    if isinstance(value, Mapping):
        return {k: _numbers(v) if k == "value" else v for k, v in value.items()}
    return value


def mapping_of(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    text = config
    if isinstance(config, Path) or "\n" not in config:
        try:
            text = Path(config).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} cannot be read: {error}") from error
    try:
        said = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"the merge configuration is no YAML: {error}") from error
    if not isinstance(said, Mapping):
        raise ConfigError(f"the merge configuration must be a mapping with merge_method and models, got {said!r}")
    return said


def keys_of(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {given!r}")
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where} has no key {key!r}{nearest(str(key), known)}; it has: {listing(known) or 'none'}"
            )


def entries_of(given: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where} must be a list with at least one entry, got {given!r}")
    return given


def model_of(given: Any) -> str:
    """A model's name or folder. mergekit also writes it as a mapping."""
    if isinstance(given, Mapping) and set(given) <= {"model", "lora"} and "model" in given:
        lora = given.get("lora")
        return model_of(given["model"]) + (f"+{model_of(lora)}" if lora else "")
    if isinstance(given, Mapping) and set(given) <= {"path", "revision"} and given.get("path"):
        return str(given["path"]) + (f"@{given['revision']}" if given.get("revision") else "")
    if not isinstance(given, str) or not given:
        raise ConfigError(f"a model is a name or a folder, got {given!r}")
    return given


def template_of(said: str | None) -> dict[str, bytes]:
    """The file of a chat template."""
    if said in (None, "", "auto"):
        return {}
    if "{{" not in str(said) and "{%" not in str(said):
        raise ConfigError(f"chat_template {said!r} is not known; give 'auto' or the template's own text")
    return {"chat_template.jinja": str(said).encode()}


def tokenizer_of(said: Mapping[str, Any]) -> dict[str, Any]:
    source, more = said.get("tokenizer_source"), said.get("tokenizer")
    if source and more:
        raise ConfigError("say either tokenizer_source or tokenizer, not both")
    if source:
        return {"source": source}
    if more:
        keys_of(more, KEYS, "tokenizer")
        return {"source": "union", **more}
    return {}
