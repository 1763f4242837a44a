"""What a search chooses from: forms, their settings, and where they act.

A space asks an optuna trial for values (`ask`) and makes an adapter's form and sites of them (`build`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast

from polytask.core.config import read_yaml
from polytask.core.errors import ConfigError, SiteError, listing, nearest
from polytask.core.form import Form, forms
from polytask.core.model import Model
from polytask.core.select import parse

Choice = tuple[dict[str, Any], str | None]  # a form as a mapping, and a selector
NOTHING: Choice = ({"name": "head-only"}, None)


class Space(Protocol):
    """The contract of a space.

    Attributes:
        conditional: whether which values are asked for depends on other values.
        first: the values of the first trial, where there is one to start with.
    """

    conditional: bool
    first: Mapping[str, Any]

    def ask(self, trial: Any) -> dict[str, Any]:
        """A value for each name, from an optuna trial."""

    def build(self, values: Mapping[str, Any]) -> Choice:
        """The form and the sites that the values stand for."""

    def describe(self, values: Mapping[str, Any]) -> str:
        """The same in a few words."""

    def settings(self) -> dict[str, Any]:
        """What tells this space from another, as plain values."""


def space_of(space: Any, model: Model) -> Space:
    """A space from a space, ``"autopeft"``, a mapping (see `General.of`), or a YAML file with one.

    Raises:
        ConfigError: it is none of these, or holds what is not understood.
        SiteError: a part of it acts nowhere in the model.
    """
    if space == "autopeft":
        return AutoPEFT.of(model)
    if isinstance(space, str | Path):
        if not Path(space).is_file():
            raise ConfigError(f"no space is called {str(space)!r}; give 'autopeft', or a YAML file with `forms:` in it")
        return General.of(read_yaml(space), model, str(space))
    return General.of(space, model) if isinstance(space, Mapping) else cast(Space, space)


def at_layers(layers: Sequence[int], of: int) -> str:
    """The selector of some of ``of`` layers; empty for all of them: ``layer in 0..2 | layer==5``."""
    if len(layers) == of:
        return ""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " | ".join(f"layer=={a}" if a == b else f"layer in {a}..{b}" for a, b in runs)


def _layers(active: Sequence[int], of: int) -> str:
    """``layers 0-2 5``, or ``every layer``."""
    said = at_layers(active, of).replace(" | ", " ").replace("layer==", "").replace("layer in ", "").replace("..", "-")
    return f"layers {said}" if said else "every layer"


def _where(selector: str, layers: str) -> str:
    return f"({selector}) & ({layers})" if layers else selector


def _depth(model: Model) -> int:
    return 1 + max((site.layer for site in model.sites if site.layer is not None), default=-1)


def _acts(model: Model, form: Form, selector: str) -> bool:
    chosen = parse(selector)
    return any(chosen(site) and not form.refuses(site) for site in model.sites)


# AutoPEFT's own space


@dataclass(frozen=True)
class Kind:
    """A kind of module that AutoPEFT places: a form, which of its settings is the size, and where it stands."""

    form: Mapping[str, Any]
    size: str
    sites: str


KINDS = {
    "serial": Kind({"name": "bottleneck", "style": "pfeiffer"}, "width", "down"),
    "parallel": Kind({"name": "bottleneck", "style": "parallel"}, "width", "up | gate_up | down"),
    "prefix": Kind({"name": "prefix", "gated": True}, "length", "kind:attention"),
}
STEPS = 10  # k: 0 is the model's width, each step halves it, 9 is one, 10 nothing


@dataclass(frozen=True)
class AutoPEFT:
    """AutoPEFT's space: a size k in 0..10 for each kind of module, and one bit for each layer.

    The sizes are d / 2^k for k below 9, then 1, then 0: the width of an adapter after the feed-forwards (``serial``), of one
    beside them (``parallel``), and the length of a prefix in the attentions. Layers whose bit is 1 have all of them, the
    others nothing. Where every size is 0, or every bit, only the head is trained; a search starts there.

    Args:
        width: d of the model.
        layers: of the model.
        kinds: those that the model has a place for.

    Reference: Zhou et al., AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning, arXiv 2301.12132.
    There the modules start near the base; here they start at it, for which the prefix has a gate with a number per head.
    """

    width: int
    layers: int
    kinds: tuple[str, ...] = tuple(KINDS)
    conditional: bool = field(default=False, init=False)

    @classmethod
    def of(cls, model: Model) -> AutoPEFT:
        """The space of a model. Raises `SiteError` where nothing of it has a place there."""
        kinds = tuple(n for n, k in KINDS.items() if _acts(model, Form.of({**k.form, k.size: 1}), k.sites))
        if not kinds:
            raise SiteError(
                f"the space 'autopeft' has no place in {model.name!r}: it needs feed-forwards or transformers' attention; "
                "give a space of your own"
            )
        return cls(model.width, _depth(model), kinds)

    def size(self, k: int) -> int:
        """The size that k stands for."""
        return 0 if k == STEPS else 1 if k == STEPS - 1 else max(1, self.width >> k)

    @property
    def first(self) -> Mapping[str, Any]:
        """Nothing but the head."""
        return {**dict.fromkeys(self.kinds, STEPS), **{f"layer {i}": 0 for i in range(self.layers)}}

    def ask(self, trial: Any) -> dict[str, Any]:
        values = {kind: trial.suggest_int(kind, 0, STEPS) for kind in self.kinds}
        return values | {f"layer {i}": trial.suggest_int(f"layer {i}", 0, 1) for i in range(self.layers)}

    def build(self, values: Mapping[str, Any]) -> Choice:
        active = [i for i in range(self.layers) if values[f"layer {i}"]]
        layers = at_layers(active, self.layers)
        there = {kind: size for kind in self.kinds if (size := self.size(values[kind]))}
        if not active or not there:
            return NOTHING
        made = [{**KINDS[kind].form, KINDS[kind].size: size} for kind, size in there.items()]
        sites = [_where(KINDS[kind].sites, layers) for kind in there]
        return (made[0], sites[0]) if len(made) == 1 else ({"name": "union", "forms": made, "sites": sites}, None)

    def describe(self, values: Mapping[str, Any]) -> str:
        there = [f"{kind} {size}" for kind in self.kinds if (size := self.size(values[kind]))]
        active = [i for i in range(self.layers) if values[f"layer {i}"]]
        return ", ".join([*there, _layers(active, self.layers)]) if there and active else "the head alone"

    def proxy(self, values: Mapping[str, Any]) -> int:
        """The paper's count of parameters, 2 d (serial + parallel + prefix) for each active layer.

        It leaves out an adapter's biases, d and its width, and our gate's number per head.
        """
        active = sum(values[f"layer {i}"] for i in range(self.layers))
        return active * 2 * self.width * sum(self.size(values[kind]) for kind in self.kinds)

    def settings(self) -> dict[str, Any]:
        return {"name": "autopeft", "width": self.width, "layers": self.layers, "kinds": list(self.kinds)}


# A space in words


@dataclass(frozen=True)
class Range:
    """Values of one setting: some that are listed, or all between two numbers."""

    options: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @classmethod
    def of(cls, value: Any, where: str) -> Range:
        """A list of values, ``{low, high, log}``, ``{value}`` for a value that is itself a list, or one value."""
        if isinstance(value, list | tuple):
            if not value:
                raise ConfigError(f"{where} is an empty list; give at least one value")
            return cls(tuple(value))
        if not isinstance(value, Mapping):
            return cls((value,))
        if set(value) == {"value"}:
            return cls((value["value"],))
        bounds = [value.get("low"), value.get("high")]
        numbers = [b for b in bounds if isinstance(b, int | float) and not isinstance(b, bool)]
        if set(value) - {"low", "high", "log"} or len(numbers) < 2 or numbers[0] > numbers[1]:
            raise ConfigError(
                f"{where} must be one value, a list of values, or a range as {{low: 1, high: 64, log: true}}; got {value!r}"
            )
        if value.get("log") and numbers[0] <= 0:
            raise ConfigError(f"{where}: a range with log: true must begin above 0, got low: {numbers[0]}")
        return cls((), *numbers, bool(value.get("log")))

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        return (self.options[0], self.options[-1]) if self.options else (self.low, self.high)

    def ask(self, trial: Any, name: str) -> Any:
        """What a trial is to take, a number that `value` reads."""
        if not self.options:
            whole = isinstance(self.low, int) and isinstance(self.high, int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            return suggest(name, self.low, self.high, log=self.log)
        if len(self.options) == 1:
            return 0
        if all(
            isinstance(o, int | float) and not isinstance(o, bool) for o in self.options
        ):  # their order means something
            return trial.suggest_int(name, 0, len(self.options) - 1)
        return trial.suggest_categorical(name, range(len(self.options)))

    def value(self, asked: Any) -> Any:
        """The setting's value."""
        return self.options[asked] if self.options else asked


@dataclass(frozen=True)
class Entry:
    """One form of a space, with the values its settings may take and the selectors it may have."""

    name: str
    ranges: Mapping[str, Range]
    sites: Range


@dataclass(frozen=True)
class General:
    """A space of one's own: some forms, a range for each setting, selectors, and perhaps a bit for each layer."""

    entries: Mapping[str, Entry]
    layers: int
    given: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any], model: Model, where: str = "the space") -> General:
        """A space from a mapping.

        ``forms`` is a list of names, or of mappings with a name and for each setting one value, a list of values to choose
        among, or ``{low: 1, high: 64, log: true}``; ``sites`` in such a mapping (or beside ``forms``, for all that have none
        of their own) is a selector or a list of them; ``layers: true`` switches each layer on or off.

        Raises:
            ConfigError: something in it is not understood, or out of range.
            SiteError: a form acts nowhere in the model with one of its selectors.
        """
        allowed = ("forms", "sites", "layers")
        for key in given:
            if key not in allowed:
                raise ConfigError(
                    f"{where} has an unknown key {key!r}{nearest(str(key), allowed)}; there are: {listing(allowed)}"
                )
        listed = given.get("forms")
        if not isinstance(listed, list | tuple) or not listed:
            raise ConfigError(
                f"{where} needs `forms:`, a list of forms with what their settings may be; got {listed!r}"
            )
        if not isinstance(given.get("layers", False), bool):
            raise ConfigError(f"{where}: layers must be true or false, got {given['layers']!r}")
        entries: dict[str, Entry] = {}
        for item in listed:
            entry = _entry(item, given.get("sites"), where)
            _check(entry, model, where)
            label, again = entry.name, 2
            while label in entries:
                label, again = f"{entry.name} {again}", again + 1
            entries[label] = entry
        return cls(entries, _depth(model) if given.get("layers") else 0, dict(given))

    @property
    def conditional(self) -> bool:
        """Whether the form decides what else is asked."""
        return len(self.entries) > 1

    @property
    def first(self) -> Mapping[str, Any]:
        """Any will do."""
        return {}

    def ask(self, trial: Any) -> dict[str, Any]:
        label = (
            trial.suggest_categorical("form", list(self.entries)) if len(self.entries) > 1 else next(iter(self.entries))
        )
        entry = self.entries[label]
        values = {"form": label, "sites": entry.sites.ask(trial, f"{label}: sites")}
        values |= {name: r.ask(trial, f"{label}: {name}") for name, r in entry.ranges.items()}
        return values | {f"layer {i}": trial.suggest_int(f"layer {i}", 0, 1) for i in range(self.layers)}

    def build(self, values: Mapping[str, Any]) -> Choice:
        entry = self.entries[values["form"]]
        form = {"name": entry.name, **{name: r.value(values[name]) for name, r in entry.ranges.items()}}
        sites = entry.sites.value(values["sites"])
        active = [i for i in range(self.layers) if values[f"layer {i}"]]
        if not self.layers or len(active) == self.layers:
            return form, sites
        if not active:
            return NOTHING
        return form, _where(sites or Form.of(form).default_sites, at_layers(active, self.layers))

    def describe(self, values: Mapping[str, Any]) -> str:
        form, sites = self.build({**values, **{f"layer {i}": 1 for i in range(self.layers)}})
        active = [i for i in range(self.layers) if values[f"layer {i}"]]
        if self.layers and not active:
            return "the head alone"
        said = " ".join([form.pop("name"), *(f"{k}={v}" for k, v in form.items())]) + (f" at {sites}" if sites else "")
        return f"{said}, {_layers(active, self.layers)}" if self.layers else said

    def settings(self) -> dict[str, Any]:
        return dict(self.given)


def _entry(item: Any, sites: Any, where: str) -> Entry:
    chosen = {"name": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else {}
    name = chosen.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}: each of `forms:` is a name, or a mapping with `name:`; got {item!r}")
    selectors = Range.of(chosen.pop("sites", sites), f"{where}: the sites of {name!r}")
    if not selectors.options or not all(o is None or isinstance(o, str) for o in selectors.options):
        raise ConfigError(f"{where}: the sites of {name!r} must be a selector, or a list of them")
    known = {f.name for f in fields(cast(Any, forms[name]))}
    for setting in chosen:
        if setting not in known:
            raise ConfigError(
                f"{where}: the form {name!r} has no setting {setting!r}{nearest(setting, known)}; "
                f"it has: {listing(sorted(known))}"
            )
    return Entry(name, {s: Range.of(v, f"{where}: {s} of {name!r}") for s, v in chosen.items()}, selectors)


def _check(entry: Entry, model: Model, where: str) -> None:
    """Builds the form at both ends of its ranges, and finds a site for it with each selector."""
    for end in (0, 1):
        try:
            form = Form.of({"name": entry.name, **{s: r.ends[end] for s, r in entry.ranges.items()}})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    for selector in entry.sites.options:
        if not _acts(model, form, selector or form.default_sites):
            raise SiteError(
                f"{where}: the form {entry.name!r} acts nowhere in {model.name!r} at {selector or form.default_sites!r}"
            )
