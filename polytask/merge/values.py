"""Settings that differ between tensors: numbers, gradients over the layers, and lists of filters by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polytask.core.errors import ConfigError

_NUMBER = re.compile(r"\.(\d+)\.")


class Layers:
    """Where each tensor stands in its stack of layers: t from 0 (first) to 1 (last).

    Args:
        names: of all tensors. The stack is the numbered list with the most members (``model.layers.{i}.``).
    """

    def __init__(self, names: Iterable[str]) -> None:
        seen: dict[str, set[int]] = {}
        sizes: Counter[str] = Counter()
        for name in names:
            match = _NUMBER.search(f".{name}")
            if match:
                stack = f".{name}"[: match.start()]
                seen.setdefault(stack, set()).add(int(match[1]))
                sizes[stack] += 1
        self.counts = {stack: max(numbers) + 1 for stack, numbers in seen.items() if len(numbers) > 1}

    def place(self, name: str) -> tuple[int, int] | None:
        """(layer, layers of its stack), or None outside every stack."""
        match = _NUMBER.search(f".{name}")
        count = self.counts.get(f".{name}"[: match.start()]) if match else None
        return (int(match[1]), count) if match and count else None

    def t(self, name: str) -> float:
        """Position in the stack. Everything outside one (embeddings and the last norm and head alike) is at 0; the layer of
        a stack of one at 1."""
        place = self.place(name)
        if place is None:
            return 0.0
        layer, count = place
        return layer / (count - 1) if count > 1 else 1.0


def resolve(value: Any, name: str, t: float) -> Any:
    """What a setting is for one tensor; None where no filter matches.

    Args:
        value: a number, text or truth value for all tensors; a list of numbers (a gradient, linear between them over t); a list
            of texts (one for each part of the layers); a mapping with a ``name``, whose values are settings; a mapping
            ``{tensors, else}`` of values by the tensors' names; or a list of ``{filter, value}``, of which the first counts
            whose filter is missing, ``*`` or a part of the name.
        name: the tensor's name.
        t: its place among the layers, from 0 to 1.

    Raises:
        ConfigError: a list that is none of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and "name" in value:  # a method within a method, with its own settings
        return {key: resolve(own, name, t) for key, own in value.items()}
    if isinstance(value, Mapping) and set(value) == {"tensors", "else"}:
        return value["tensors"].get(name, value["else"])
    if isinstance(value, Mapping):
        raise ConfigError(f"{dict(value)!r} must stand in a list: [{{filter: ..., value: ...}}, ...]")
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{value!r} is no setting; give a number, a list of numbers, or a list of {{filter, value}}")
    if all(isinstance(v, bool) for v in value):
        raise ConfigError(f"a list of truth values has no gradient, got {value!r}; use filters")
    if all(isinstance(v, int | float) for v in value):
        return gradient([float(v) for v in value], t)
    if all(isinstance(v, str) for v in value):
        return value[int(t * (len(value) - 1))]
    if all(isinstance(v, Mapping) and set(v) <= {"filter", "value"} and "value" in v for v in value):
        for entry in value:
            wanted = entry.get("filter")
            if wanted in (None, "*") or str(wanted) in name:
                return resolve(entry["value"], name, t)
        return None
    raise ConfigError(f"{value!r} mixes kinds of entries; give all numbers, all texts, or all {{filter, value}}")


def gradient(values: Sequence[float], t: float) -> float:
    """Linear between evenly spaced values, the first at t = 0 and the last at t = 1."""
    if len(values) == 1:
        return values[0]
    place = min(max(t, 0.0), 1.0) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])
