"""What is tried when merges are compared: methods, their settings, and a setting that is swept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polytask.core.errors import ConfigError, listing, nearest

from .fit import Fit, fits
from .rule import Rule, rules

POINTS = 10  # of a sweep that does not say how many
ALIASES = {"lambda": "scale"}  # what papers call a setting
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_SWEEP = re.compile(rf"(\w+)=({_NUMBER})\.\.({_NUMBER})(?::(\d+))?")


@dataclass(frozen=True)
class Sweep:
    """One setting, and the values that it has one after the other."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, given: str | Mapping[str, Sequence[float]] | Sweep | None) -> Sweep | None:
        """``lambda=0.1..1.0`` (ten points), ``density=0.1..0.9:5`` (five), or ``{"density": [0.1, 0.3]}``.

        Raises:
            ConfigError: it is written in another way.
        """
        if given is None or isinstance(given, Sweep):
            return given
        if isinstance(given, Mapping):
            if len(given) != 1 or not all(len(values) for values in given.values()):
                raise ConfigError(f"a sweep has one setting and its values, got {dict(given)!r}")
            ((name, values),) = given.items()
            return cls(name, tuple(float(v) for v in values))
        match = _SWEEP.fullmatch(given.strip())
        if not match:
            raise ConfigError(
                f"the sweep {given!r} is not understood; write name=first..last, as in lambda=0.1..1.0, or with the number of "
                "points, as in density=0.1..0.9:5"
            )
        first, last, points = float(match[2]), float(match[3]), int(match[4] or POINTS)
        if points < 2 or first == last:
            raise ConfigError(
                f"the sweep {given!r} has a single value; give two ends that differ and at least 2 points"
            )
        step = (last - first) / (points - 1)
        return cls(match[1], tuple(float(f"{first + i * step:.10g}") for i in range(points)))


@dataclass(frozen=True)
class Trial:
    """A method with its settings.

    Attributes:
        rule: the method's name.
        settings: of it.
        at: the swept setting's value, or None where the method lacks it.
    """

    rule: str
    settings: Mapping[str, Any]
    at: float | None = None

    @property
    def name(self) -> str:
        """``ties density=0.3``."""
        return " ".join(
            [self.rule, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.settings.items())]
        )


def trials(methods: Sequence[str | Mapping[str, Any]], sweep: Sweep | None = None) -> list[Trial]:
    """What is tried: every method, and those that have the swept setting once for each of its values.

    Args:
        methods: names, or mappings of a name and settings.
        sweep: a setting; ``lambda`` is the ``scale`` of methods that have no setting of that name.

    Raises:
        ConfigError: an unknown method or setting, or a setting that no method has.
    """
    found: dict[str, Trial] = {}
    swept = False
    for given in methods:
        chosen = {"name": given} if isinstance(given, str) else dict(given)
        rule = str(chosen.pop("name", ""))
        kind = kind_of(rule)
        knobs = kind.knobs()
        chosen = {_known(name, knobs): value for name, value in chosen.items()}
        unknown = next((name for name in chosen if name not in knobs), None)
        if unknown is not None:
            raise ConfigError(
                f"the merge method {rule!r} has no setting {unknown!r}{nearest(unknown, knobs)}; it has: "
                f"{listing(knobs) or 'none'}"
            )
        name = "" if sweep is None else _known(sweep.name, knobs)
        if sweep is None or name not in knobs:
            made = [Trial(rule, chosen)]
        elif name in chosen:
            raise ConfigError(f"{rule} has {name}={chosen[name]!r}, which the sweep changes; leave one of the two out")
        else:
            swept = True
            made = [Trial(rule, {**chosen, name: _typed(kind, name, value)}, value) for value in sweep.values]
        for trial in made:
            if all(isinstance(v, bool | int | float | str) for v in trial.settings.values()):
                (fits if rule in fits else rules).make(
                    {"name": rule, **trial.settings}
                )  # what is out of range is so before anything is scored
            found[trial.name] = trial
    if sweep is not None and not swept:
        there = sorted({knob for trial in found.values() for knob in kind_of(trial.rule).knobs()})
        raise ConfigError(
            f"no method that is tried has the setting {sweep.name!r}{nearest(sweep.name, there)}; they have: "
            f"{listing(there) or 'none'}"
        )
    return list(found.values())


def kind_of(name: str) -> type[Rule] | type[Fit]:
    """The class of a method, whether it looks at data or not. Raises `ConfigError` for an unknown one."""
    if name in fits:
        return fits[name]
    if name in rules:
        return rules[name]
    names = [*rules, *fits]
    raise ConfigError(f"no merge method is called {name!r}{nearest(name, names)}; there are: {listing(names, 60)}")


def _known(name: str, knobs: Sequence[str]) -> str:
    return name if name in knobs else ALIASES.get(name, name)


def _typed(kind: type[Rule] | type[Fit], name: str, value: float) -> float | int:
    """A whole number where the setting is one."""
    whole = isinstance(kind().settings()[name], int) and value.is_integer()
    return int(value) if whole else value
