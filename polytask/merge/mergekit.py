"""mergekit's YAML: which models, layers and settings, as jobs of our engine. Unknown keys and methods are refused by name.

Looked up for each tensor and model, the first level that says something counts: the model (or the source of a slice), the slice,
the module, the whole file, the default.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError, listing, nearest
from polytask.core.measure import peak_memory

from .engine import Job, run
from .rule import rules
from .run import DTYPES, card, key_of, layout, size_of, source_of
from .run import _copy_small as copy_small
from .source import Source
from .values import Layers, resolve
from .write import Writer

TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "compat",
)  # fmt: skip
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what configurations call the number of layers
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
FIRST = ("embed", "wte", "wpe", "tok_")  # parts of names of what lies before the layers; the rest lies behind them


@dataclass(frozen=True)
class Method:
    """A method of mergekit's in our terms.

    Attributes:
        rule: our rule.
        base: what a base is: what ``differences`` are taken to (or optionally: ``maybe``), one more ``member``, or nothing but a
            model that is listed (``listed``).
        shared: settings of all models: mergekit's name and ours.
        own: settings of each model.
        weight: whether each model needs a weight.
        ignored: what changes nothing here.
        defaults: mergekit's, where ours are others.
    """

    rule: str
    base: Literal["differences", "maybe", "member", "listed"] = "differences"
    shared: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    weight: bool = False
    ignored: tuple[str, ...] = ("int8_mask",)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SUM = {"normalize": "normalize", "lambda": "scale"}
_CHANCE = {**_SUM, "rescale": "rescale"}
_SIZE = {"density": "density"}
METHODS = {
    "linear": Method("linear", "listed", {"normalize": "normalize"}, weight=True),
    "task_arithmetic": Method("task_arithmetic", shared=_SUM, weight=True, ignored=("int8_mask", "rescale", "density")),
    "ties": Method("ties", shared=_SUM, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "dare_linear": Method("dare_linear", shared=_CHANCE, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "dare_ties": Method("dare_ties", shared=_CHANCE, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "della": Method(
        "della", shared=_CHANCE, own={**_SIZE, "epsilon": "epsilon"}, weight=True, defaults={"density": 1.0, "epsilon": 0.15}
    ),
    "della_linear": Method(
        "della_linear", shared=_CHANCE, own={**_SIZE, "epsilon": "epsilon"}, weight=True,
        defaults={"density": 1.0, "epsilon": 0.15},
    ),
    "breadcrumbs": Method(
        "breadcrumbs", shared=_SUM, own={**_SIZE, "gamma": "gamma"}, weight=True, defaults={"density": 1.0, "gamma": 0.01}
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties", shared=_SUM, own={**_SIZE, "gamma": "gamma"}, weight=True,
        defaults={"density": 1.0, "gamma": 0.01},
    ),
    "sce": Method("sce", shared={"select_topk": "select_topk"}),
    "model_stock": Method("model_stock", shared={"filter_wise": "filter_wise"}),
    "slerp": Method("slerp", shared={"t": "t"}, ignored=()),
    "nearswap": Method("nearswap", shared={"t": "t"}, ignored=()),
    "nuslerp": Method("nuslerp", "maybe", {"nuslerp_flatten": "", "nuslerp_row_wise": ""}, weight=True, ignored=()),
    "multislerp": Method(
        "multislerp", "maybe", {"normalize_weights": "normalize_weights", "eps": "eps"}, weight=True, ignored=()
    ),
    "karcher": Method("karcher", "member", {"max_iter": "max_iter", "tol": "tol"}, ignored=()),
    "arcee_fusion": Method("arcee_fusion", ignored=()),
    "passthrough": Method("passthrough", "listed", own={"scale": "scale"}, ignored=()),
}  # fmt: skip


class Part(Layers):
    """Some layers of the output, as a stack of their own: t from 0 to 1 in them, and 1 in a single one."""

    def __init__(self, stack: str, first: int, count: int) -> None:
        self.stack, self.first, self.count = stack, first, count

    def place(self, name: str) -> tuple[int, int] | None:
        if not name.startswith(f"{self.stack}."):
            return None
        return int(name[len(self.stack) + 1 :].split(".")[0]) - self.first, self.count


class View(Source):
    """A source under other names.

    Args:
        source: what is read.
        names: the name there of each name here.
    """

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names
        self.name, self.folder = source.name, source.folder

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {new: self.source.shapes[old] for new, old in self.names.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.names[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[name], start, stop)


@dataclass
class Plan:
    """What a file asks for.

    Attributes:
        jobs: one for each slice of the output.
        dtype: of the result.
        tokenizer: what is said about it: ``source``, ``tokens``, ``pad_to_multiple_of``; empty where nothing is.
        chat_template: what is said about it.
        config: what changes in the model's ``config.json``.
        folder: where configuration and tokenizer are copied from.
    """

    jobs: list[Job]
    dtype: torch.dtype | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def layout(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of every tensor of the result."""
        return [entry for job in self.jobs for entry in layout(job, self.dtype)]


def merge_file(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    shard: str | int = "5GB",
    seed: int = 0,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Merges as a mergekit file says.

    Args:
        config: the file, its text, or what it holds.
        out: a folder for the merged checkpoint.
        shard: size of a file at most.
        seed: of everything random.
        resume: go on with an interrupted merge.
        say: is told what goes on.

    Returns:
        The folder.

    Raises:
        ConfigError: a key, method or value that is not known.
        MergeError: the models do not fit each other.
        StorageError: there is not enough space.
    """
    plan = load(config, seed)
    extras = _words(plan)
    folder = Path(out).expanduser()
    views = [list(view.names.items()) for job in plan.jobs for view in job.models if isinstance(view, View)]
    said = [json.dumps(views), *(key_of(job, plan.dtype) for job in plan.jobs)]
    key = hashlib.sha256("".join(said).encode()).hexdigest()
    began = time.perf_counter()
    writer = Writer(folder, plan.layout, shard=size_of(shard), key=key, resume=resume)
    say(f"merging {len(plan.layout)} tensors, {writer.bytes / 1e9:.2f} GB")
    try:
        with peak_memory(torch.device("cpu")) as peak:
            for job in plan.jobs:
                run(job, writer.put, writer.finished, writer.done.__contains__)
    except BaseException:
        writer.close()
        raise
    records = [card(job, plan.dtype, time.perf_counter() - began, peak.mb) for job in plan.jobs]
    record = records[0] if len(records) == 1 else {"slices": records}
    extras["polytask_merge.json"] = (json.dumps(record, indent=2) + "\n").encode()
    if plan.config:
        extras["config.json"] = (json.dumps(plan.config, indent=2) + "\n").encode()
    writer.finish(extras)
    copy_small(plan.folder, folder)
    return folder


def load(config: str | Path | Mapping[str, Any], seed: int = 0) -> Plan:
    """Reads a mergekit file. One key more is known: ``compat``, which is ``mergekit`` where it is not said, and may be empty for
    the methods as their papers have them.

    Raises:
        ConfigError: a key, method or value that is not known.
        MergeError: models that cannot be read or do not fit each other.
    """
    said = _mapping(config)
    _keys(said, TOP, "the merge configuration")
    name = str(said.get("merge_method") or "")
    if name not in METHODS:
        raise ConfigError(f"merge_method {name!r} is not known{nearest(name, METHODS)}; known are: {listing(METHODS)}")
    given = [key for key in ("models", "slices", "modules") if said.get(key)]
    if len(given) != 1:
        raise ConfigError(f"say exactly one of models, slices and modules; this says {listing(given) or 'none'}")
    module: Mapping[str, Any] = said
    if given == ["modules"]:
        if not isinstance(said["modules"], Mapping) or len(said["modules"]) != 1:
            raise ConfigError("modules must name one module; for models of several parts, say models instead")
        ((where, module),) = said["modules"].items()
        _keys(module, ("slices", "models", "parameters"), f"the module {where}")
        given = [key for key in ("models", "slices") if module.get(key)]
        if len(given) != 1:
            raise ConfigError(f"the module {where} must say either models or slices")
    reader = _Reader(name, said, module, seed)
    jobs = [reader.models(module["models"])] if given == ["models"] else reader.slices(module["slices"])
    dtype = said.get("out_dtype") or said.get("dtype")
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return Plan(
        jobs, DTYPES.get(str(dtype)), _tokenizer(said), said.get("chat_template"), reader.config, reader.home.folder
    )


class _Reader:
    """Opens the models of a file, each once, and makes jobs."""

    def __init__(self, name: str, said: Mapping[str, Any], module: Mapping[str, Any], seed: int) -> None:
        self.method, self.name, self.seed = METHODS[name], name, seed
        self.levels = (
            [module.get("parameters"), said.get("parameters")] if module is not said else [said.get("parameters")]
        )
        self.base = _model(said["base_model"]) if said.get("base_model") else None
        self.opened: dict[str, Source] = {}
        self.config: dict[str, Any] = {}
        self.fixed: dict[str, Any] = {}
        compat = said.get("compat", "mergekit") or ""
        if compat not in ("", "mergekit"):
            raise ConfigError(f"compat must be 'mergekit' or empty, got {compat!r}")
        if "compat" in (f.name for f in fields(rules[self.method.rule])):
            self.fixed["compat"] = compat
        for level in self.levels:
            self.check(level, "parameters")

    def models(self, entries: Sequence[Mapping[str, Any]]) -> Job:
        """Whole models."""
        sources = []
        for entry in _entries(entries, "models"):
            _keys(entry, ("model", "parameters"), "an entry of models")
            sources.append((_model(entry.get("model")), entry.get("parameters")))
        alone = self.method.base == "listed"  # a base that is not listed has no part in it
        if self.base and not alone and self.base not in (model for model, _ in sources):
            sources.append((self.base, None))
        self.home = self.open(self.base or sources[0][0])
        return self.job([(model, self.open(model), own) for model, own in sources], self.base, [], "models", None)

    def slices(self, entries: Sequence[Mapping[str, Any]]) -> list[Job]:
        """Layers of models, one slice on the other."""
        made, at = [], 0
        found = [self.slice(entry, i) for i, entry in enumerate(_entries(entries, "slices"))]
        first = self.base or found[0][0][0][0]
        self.home = self.open(first)
        stack = _stack(self.home)
        for number, (sources, base, own, where) in enumerate(found):
            count = sources[0][3]
            views = []
            for model, settings, start, _ in sources:
                source = self.open(model)
                names = _names(source, start, count, at, stack, number == 0, number == len(found) - 1, where)
                views.append((model, View(source, names), settings))
            made.append(self.job(views, base or self.base, [own], where, Part(stack, at, count)))
            at += count
        self.reconfigure([(sources[0][0], sources[0][2], sources[0][3]) for sources, *_ in found], at)
        return made

    def slice(
        self, entry: Mapping[str, Any], number: int
    ) -> tuple[list[tuple[str, Any, int, int]], str | None, Any, str]:
        """Sources (model, parameters, first layer, layers), base, parameters and name of one slice."""
        where = f"slices[{number}]"
        _keys(entry, ("sources", "base_model", "parameters"), where)
        self.check(entry.get("parameters"), where)
        sources = []
        for source in _entries(entry.get("sources"), f"sources of {where}"):
            _keys(source, ("model", "layer_range", "parameters"), f"a source of {where}")
            model, span = _model(source.get("model")), source.get("layer_range")
            if not isinstance(span, Sequence) or len(span) != 2 or not all(isinstance(n, int) for n in span):
                raise ConfigError(f"layer_range of {model} in {where} must be [first, last + 1], got {span!r}")
            layers = _layers(self.open(model))
            if not 0 <= span[0] < span[1] <= layers:
                raise ConfigError(
                    f"layer_range {list(span)} of {model} in {where} is not within its {layers} layers, from 0"
                )
            sources.append((model, source.get("parameters"), span[0], span[1] - span[0]))
        if len({count for *_, count in sources}) > 1:
            lengths = listing(str(count) for *_, count in sources)
            raise ConfigError(f"the sources of {where} must have the same number of layers, got {lengths}")
        base = entry.get("base_model")
        return sources, _model(base) if base else None, entry.get("parameters"), where

    def job(
        self,
        sources: Sequence[tuple[str, Source, Any]],
        base: str | None,
        levels: list[Any],
        where: str,
        stack: Layers | None,
    ) -> Job:
        """One job: the base taken out of the models where it is one, and each setting looked up."""
        names = [model for model, *_ in sources]
        twice = sorted({model for model in names if names.count(model) > 1})
        if twice:
            raise ConfigError(f"{where} lists {twice[0]} more than once; give its settings in one entry")
        kind, method = rules[self.method.rule], self.method
        if method.base == "differences" and base not in names:
            said = f"the base_model {base} is none of its sources" if base else "there is no base_model"
            raise ConfigError(f"{self.name} needs a base, and {said} in {where}; add it")
        apart = base if method.base in ("differences", "maybe") else None
        root = next((source for model, source, _ in sources if model == apart), None)
        others = [(source, own) for model, source, own in sources if model != apart or root is None]
        if not others:
            raise ConfigError(f"{where} has no model beside the base {base}; add one")
        for *_, own in sources:
            self.check(own, where)
        levels = [*levels, *self.levels]
        settings = {ours: chain(key, levels) for key, ours in method.shared.items() if ours}
        settings |= self.axis(levels)
        each = {}
        for key, ours in method.own.items():
            values = [chain(key, [own, *levels], method.defaults.get(key)) for _, own in others]
            if ours in kind.each:
                each[ours] = values
            else:
                settings[ours] = values[0]
        weights = [chain("weight", [own, *levels]) for _, own in others] if method.weight else None
        job = Job(
            [source for source, _ in others], method.rule, {**self.fixed, **{k: v for k, v in settings.items() if v is not None}},
            root, weights, each, self.seed, stack=stack,
        )  # fmt: skip
        self.weighed(job, where)
        return job

    def weighed(self, job: Job, where: str) -> None:
        """Every model has a weight at every tensor, and where a method needs ``t`` it is said."""
        if "t" in self.method.shared and "t" not in job.settings:
            raise ConfigError(f"{self.name} needs the parameter t in {where}; 0 is the base and 1 the other model")
        for name in job.shapes if job.weights is not None else ():
            for model, weight in zip(job.models, job.weights or (), strict=True):
                if not job.copied(name) and resolve(weight, name, job.layers.t(name)) is None:
                    raise ConfigError(
                        f"{model.name} has no weight at {name} in {where}; add one, or a filter that fits all"
                    )

    def axis(self, levels: list[Any]) -> dict[str, Any]:
        """NuSLERP's two switches are one setting of ours."""
        if self.name != "nuslerp":
            return {}
        flat, rows = (chain(f"nuslerp_{key}", levels) for key in ("flatten", "row_wise"))
        return {"axis": "whole" if flat is None or flat else "first" if rows else "last"}

    def check(self, parameters: Any, where: str) -> None:
        """Refuses parameters that are not known to the method."""
        if parameters is None:
            return
        method = self.method
        if "rescale" not in method.shared and isinstance(parameters, Mapping) and parameters.get("rescale") is False:
            parameters = {key: value for key, value in parameters.items() if key != "rescale"}  # what it is anyway
        known = [*method.shared, *method.own, *(["weight"] if method.weight else []), *method.ignored]
        _keys(parameters, known, f"{where} of {self.name}")

    def open(self, model: str) -> Source:
        """A model; ``model+adapter`` is one with an adapter on it, where nothing has that name."""
        if model not in self.opened:
            name, plus, adapter = model.rpartition("+")
            if plus and not Path(model).expanduser().exists():
                root = self.open(name)
                self.opened[model] = source_of(adapter, root)
            elif "@" in model and not Path(model).expanduser().exists():
                raise ConfigError(f"{model} names a revision; download it and give its folder")
            else:
                self.opened[model] = source_of(model, None)
        return self.opened[model]

    def reconfigure(self, parts: list[tuple[str, int, int]], layers: int) -> None:
        """The configuration of the new stack: its number of layers, and what is said about each."""
        config = _config(self.home)
        key = next((key for key in COUNTS if key in config), None)
        if key is None:
            return
        for name, value in config.items():
            if isinstance(value, list) and len(value) == config[key] and name.startswith("layer"):
                lists = [(_config(self.open(model)).get(name, value), start, count) for model, start, count in parts]
                config[name] = [entry for own, start, count in lists for entry in own[start : start + count]]
        config[key] = layers
        self.config = config


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


def _mapping(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
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


def _keys(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {given!r}")
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where} has no key {key!r}{nearest(str(key), known)}; it has: {listing(known) or 'none'}"
            )


def _entries(given: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where} must be a list with at least one entry, got {given!r}")
    return given


def _model(given: Any) -> str:
    """A model's name or folder. mergekit also writes it as a mapping."""
    if isinstance(given, Mapping) and set(given) <= {"model", "lora"} and "model" in given:
        lora = given.get("lora")
        return _model(given["model"]) + (f"+{_model(lora)}" if lora else "")
    if isinstance(given, Mapping) and set(given) <= {"path", "revision"} and given.get("path"):
        return str(given["path"]) + (f"@{given['revision']}" if given.get("revision") else "")
    if not isinstance(given, str) or not given:
        raise ConfigError(f"a model is a name or a folder, got {given!r}")
    return given


def _words(plan: Plan) -> dict[str, bytes]:
    """The file of a chat template. Raises `ConfigError` for what is said about tokenizers and would change embeddings."""
    sources = [source for job in plan.jobs for source in ([job.base] if job.base else []) + list(job.models)]
    folders = {source.folder for source in sources if source.folder}
    held = {tuple((f / name).read_bytes() if (f / name).is_file() else b"" for name in WORDS) for f in folders}
    more = sorted(set(plan.tokenizer) - {"source"})
    if more or plan.tokenizer and len(held) > 1:
        why = f"tokenizer says {listing(more)}" if more else "the models' tokenizers differ"
        raise ConfigError(
            f"{why}, so embeddings must be moved to one vocabulary first; write such models, then merge those"
        )
    template = plan.chat_template
    if template in (None, "", "auto"):
        return {}
    if "{{" not in str(template) and "{%" not in str(template):
        raise ConfigError(f"chat_template {template!r} is not known; give 'auto' or the template's own text")
    return {"chat_template.jinja": str(template).encode()}


def _tokenizer(said: Mapping[str, Any]) -> dict[str, Any]:
    source, more = said.get("tokenizer_source"), said.get("tokenizer")
    if source and more:
        raise ConfigError("say either tokenizer_source or tokenizer, not both")
    if source:
        return {"source": source}
    if more:
        _keys(more, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        return {"source": "union", **more}
    return {}


def _config(source: Source) -> dict[str, Any]:
    try:
        found = json.loads((source.folder / "config.json").read_text(encoding="utf-8")) if source.folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stack(source: Source) -> str:
    """The numbered list that holds a model's layers. Raises `MergeError` where there are none or several."""
    counts = Layers(source.shapes).counts
    prefixes = {name.split(".0.")[0].lstrip(".") for name in counts} if counts else _single(source)
    outer = [p for p in prefixes if not any(p != q and p.startswith(f"{q}.") for q in prefixes)]
    if len(outer) != 1:
        raise MergeError(
            f"slices need models with one stack of layers; {source.name} has {listing(sorted(outer)) or 'none'}"
        )
    return outer[0]


def _single(source: Source) -> set[str]:
    """Stacks of one layer."""
    return {name.split(".0.")[0] for name in source.shapes if ".0." in name}


def _layers(source: Source) -> int:
    stack = _stack(source)
    return 1 + max(int(name[len(stack) + 1 :].split(".")[0]) for name in source.shapes if name.startswith(f"{stack}."))


def _names(
    source: Source, start: int, count: int, at: int, stack: str, first: bool, last: bool, where: str
) -> dict[str, str]:
    """Each name of the output that comes from a source, with its name there."""
    own, out = _stack(source), {}
    for name in source.shapes:
        if name.startswith(f"{own}."):
            layer, rest = name[len(own) + 1 :].split(".", 1)
            if start <= int(layer) < start + count:
                out[f"{stack}.{int(layer) - start + at}.{rest}"] = name
        elif first if any(part in name for part in FIRST) else last:
            out[name] = name
    if not out:
        raise MergeError(f"{source.name} has no tensors for {where}")
    return out
