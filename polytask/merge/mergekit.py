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
from typing import Any

import torch

from polytask.core.errors import ConfigError, listing, nearest
from polytask.core.measure import peak_memory

from .card import parents_of, record, written
from .embeddings import original
from .engine import Job, run
from .given import source_of
from .made import DTYPES, copy_small, key_of, layout, size_of
from .methods import METHODS
from .reading import chain, entries_of, keys_of, mapping_of, model_of, template_of, tokenizer_of
from .rule import rules
from .slices import Part, View, layers_of, modules_of, names_of, stack_of
from .source import Checkpoint, Source, config_of
from .values import Layers, resolve
from .vocabulary import REPLACED, Vocabulary, align
from .write import Writer

TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "compat",
)  # fmt: skip
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what configurations call the number of layers
SECTIONS = {"text_decoder": "text_config", "vision_tower": "vision_config", "vision_model": "vision_config"}


@dataclass
class Plan:
    """What a file asks for.

    Attributes:
        jobs: one for each slice of the output.
        dtype: of the result.
        words: the vocabulary, where the models' are brought into one.
        chat_template: what is said about it.
        config: what changes in the model's ``config.json``.
        folder: where configuration and tokenizer are copied from.
        opened: the models and adapters that it names, the base (or None) first, each as it is written and as it is read.
        said: what the file holds.
    """

    jobs: list[Job]
    dtype: torch.dtype | None = None
    words: Vocabulary | None = None
    chat_template: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    opened: Sequence[tuple[str | None, Source | None]] = ()
    said: Mapping[str, Any] = field(default_factory=dict)

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
    hashes: bool = True,
) -> Path:
    """Merges as a mergekit file says.

    Args:
        config: the file, its text, or what it holds.
        out: a folder for the merged checkpoint.
        shard: size of a file at most.
        seed: of everything random.
        resume: go on with an interrupted merge.
        say: is told what goes on.
        hashes: whether the card has the sha256 of the models' files.

    Returns:
        The folder.

    Raises:
        ConfigError: a key, method or value that is not known.
        MergeError: the models do not fit each other.
        StorageError: there is not enough space.
    """
    plan = load(config, seed)
    extras = template_of(plan.chat_template)
    folder = Path(out).expanduser()
    views = [list(view.names.items()) for job in plan.jobs for view in job.models if isinstance(view, View)]
    said = [json.dumps(views), *(key_of(job, plan.dtype) for job in plan.jobs), plan.words.key if plan.words else ""]
    key = hashlib.sha256("".join(said).encode()).hexdigest()
    began = time.perf_counter()
    writer = Writer(folder, plan.layout, shard=size_of(shard), key=key, resume=resume)
    say(f"merging {len(plan.layout)} tensors, {writer.bytes / 1e9:.2f} GB")
    try:
        given, sources = zip(*plan.opened, strict=True)
        with parents_of(given, sources, hashes) as parents, peak_memory(torch.device("cpu")) as peak:
            for job in plan.jobs:
                run(job, writer.put, writer.finished, writer.done.__contains__)
            cited = parents()
    except BaseException:
        writer.close()
        raise
    records: list[dict[str, Any]] = [record(job, plan.dtype, time.perf_counter() - began, peak.mb) for job in plan.jobs]
    about: dict[str, Any] = records[0] if len(records) == 1 else {"slices": records}
    about |= {"parents": cited, "hashes": hashes, "shard": size_of(shard), "seed": seed, "mergekit": dict(plan.said)}
    if plan.words is not None:
        about["tokenizer"] = plan.words.card
        extras = plan.words.files(plan.folder, plan.config) | extras
    elif plan.config:
        extras["config.json"] = (json.dumps(plan.config, indent=2) + "\n").encode()
    writer.finish(extras | written(about))
    copy_small(plan.folder, folder, REPLACED if plan.words is not None else ())
    return folder


def load(config: str | Path | Mapping[str, Any], seed: int = 0) -> Plan:
    """Reads a mergekit file. One key more is known: ``compat``, which is ``mergekit`` where it is not said, and may be empty for
    the methods as their papers have them.

    Raises:
        ConfigError: a key, method or value that is not known.
        MergeError: models that cannot be read or do not fit each other.
    """
    said = mapping_of(config)
    keys_of(said, TOP, "the merge configuration")
    name = str(said.get("merge_method") or "")
    if name not in METHODS:
        raise ConfigError(f"merge_method {name!r} is not known{nearest(name, METHODS)}; known are: {listing(METHODS)}")
    given = [key for key in ("models", "slices", "modules") if said.get(key)]
    if len(given) != 1:
        raise ConfigError(f"say exactly one of models, slices and modules; this says {listing(given) or 'none'}")
    parts = _modules(said) if given == ["modules"] else {"": said}
    opened: dict[str, Source] = {}
    words = _vocabulary(said, parts, opened)
    readers: list[_Reader] = []
    jobs: list[Job] = []
    for part, module in parts.items():
        reader = _Reader(name, said, module, seed, opened, part if len(parts) > 1 else "", list(parts))
        reader.config = readers[-1].config if readers else {}
        jobs += [reader.models(module["models"])] if module.get("models") else reader.slices(module["slices"])
        readers.append(reader)
    dtype = said.get("out_dtype") or said.get("dtype")
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return Plan(
        jobs, DTYPES.get(str(dtype)), words, said.get("chat_template"), reader.config, reader.home.folder, reader.named(),
        said,
    )  # fmt: skip


def _modules(said: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The modules by name. Raises `ConfigError`."""
    parts = said["modules"]
    if not isinstance(parts, Mapping):
        raise ConfigError(f"modules must be a mapping of names, got {parts!r}")
    for where, module in parts.items():
        keys_of(module, ("slices", "models", "parameters"), f"the module {where}")
        if bool(module.get("models")) == bool(module.get("slices")):
            raise ConfigError(f"the module {where} must say either models or slices")
    return {str(where): module for where, module in parts.items()}


def _vocabulary(
    said: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], opened: dict[str, Source]
) -> Vocabulary | None:
    """The vocabulary that is asked for. Every model that the file names is opened, and read in it from then on."""
    wanted = tokenizer_of(said)
    if not wanted:
        return None
    base = model_of(said["base_model"]) if said.get("base_model") else None
    names = [base] if base else []
    for module in parts.values():
        entries = [*(module.get("models") or []), *(module.get("slices") or [])]
        for entry in entries:
            for source in [entry, *(entry.get("sources") or [])] if isinstance(entry, Mapping) else []:
                given = [source.get(key) for key in ("model", "base_model") if source.get(key)]
                names += [model_of(model) for model in given]
    sources = {name: _opened(name, opened) for name in dict.fromkeys(names)}
    if not sources:
        return None
    made, words = align(sources, base, wanted, model_of)
    opened.update(made)
    return words


def _opened(model: str, opened: dict[str, Source]) -> Source:
    """A model; ``model+adapter`` is one with an adapter on it, where nothing has that name."""
    if model not in opened:
        name, plus, adapter = model.rpartition("+")
        if plus and not Path(model).expanduser().exists():
            opened[model] = source_of(adapter, _opened(name, opened))
        else:
            opened[model] = source_of(model, None)
    return opened[model]


class _Reader:
    """Makes jobs of what a file says of a module: the one that ``part`` names among ``parts``, or all there is where it is empty.
    The models are opened once."""

    def __init__(
        self, name: str, said: Mapping[str, Any], module: Mapping[str, Any], seed: int, opened: dict[str, Source],
        part: str = "", parts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.method, self.name, self.seed, self.part, self.parts = METHODS[name], name, seed, part, parts
        self.levels = (
            [module.get("parameters"), said.get("parameters")] if module is not said else [said.get("parameters")]
        )
        self.base = model_of(said["base_model"]) if said.get("base_model") else None
        self.opened = opened
        self.viewed: dict[str, Source] = {}
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
        for entry in entries_of(entries, "models"):
            keys_of(entry, ("model", "parameters"), "an entry of models")
            sources.append((model_of(entry.get("model")), entry.get("parameters")))
        alone = self.method.base == "listed"  # a base that is not listed has no part in it
        if self.base and not alone and self.base not in (model for model, _ in sources):
            sources.append((self.base, None))
        self.home = self.open(self.base or sources[0][0])
        return self.job([(model, self.open(model), own) for model, own in sources], self.base, [], "models", None)

    def slices(self, entries: Sequence[Mapping[str, Any]]) -> list[Job]:
        """Layers of models, one slice on the other."""
        made, at = [], 0
        found = [self.slice(entry, i) for i, entry in enumerate(entries_of(entries, "slices"))]
        first = self.base or found[0][0][0][0]
        self.home = self.open(first)
        stack = stack_of(self.home)
        for number, (sources, base, own, where) in enumerate(found):
            count = sources[0][3]
            views = []
            for model, settings, start, _ in sources:
                source = self.open(model)
                names = names_of(source, start, count, at, stack, number == 0, number == len(found) - 1, where)
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
        keys_of(entry, ("sources", "base_model", "parameters"), where)
        self.check(entry.get("parameters"), where)
        sources = []
        for source in entries_of(entry.get("sources"), f"sources of {where}"):
            keys_of(source, ("model", "layer_range", "parameters"), f"a source of {where}")
            model, span = model_of(source.get("model")), source.get("layer_range")
            if not isinstance(span, Sequence) or len(span) != 2 or not all(isinstance(n, int) for n in span):
                raise ConfigError(f"layer_range of {model} in {where} must be [first, last + 1], got {span!r}")
            layers = layers_of(self.open(model))
            if not 0 <= span[0] < span[1] <= layers:
                raise ConfigError(
                    f"layer_range {list(span)} of {model} in {where} is not within its {layers} layers, from 0"
                )
            sources.append((model, source.get("parameters"), span[0], span[1] - span[0]))
        if len({count for *_, count in sources}) > 1:
            lengths = listing(str(count) for *_, count in sources)
            raise ConfigError(f"the sources of {where} must have the same number of layers, got {lengths}")
        base = entry.get("base_model")
        return sources, model_of(base) if base else None, entry.get("parameters"), where

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
        keys_of(parameters, known, f"{where} of {self.name}")

    def named(self) -> list[tuple[str | None, Source | None]]:
        """What was opened, the base first; of a model with an adapter the adapter, whose model is there too."""
        others = {name: original(source) for name, source in self.opened.items() if name != self.base}
        return [(self.base, original(self.opened.get(self.base or "")))] + [
            (name if isinstance(source, Checkpoint) else name.rpartition("+")[2], source)
            for name, source in others.items()
        ]

    def open(self, model: str) -> Source:
        """A model, or what the part has of it."""
        source = _opened(model, self.opened)
        if not self.part:
            return source
        if model not in self.viewed:
            names = modules_of(source, self.parts)[self.part]
            self.viewed[model] = View(source, dict(zip(names, names, strict=True)))
        return self.viewed[model]

    def reconfigure(self, parts: list[tuple[str, int, int]], layers: int) -> None:
        """The configuration of the new stack: its number of layers, and what is said about each."""
        whole = self.config or config_of(self.home.folder)
        section = SECTIONS.get(self.part, "")
        config = whole[section] if isinstance(whole.get(section), dict) else whole
        inner = COUNTS if not self.part or config is not whole or self.part == "encoder" else ()
        counts = [*([f"{self.part}_layers", f"num_{self.part}_layers"] if self.part else []), *inner, "depth"]
        key = next((key for key in counts if key in config), None)
        if key is None:
            return
        for name, value in config.items():
            if isinstance(value, list) and len(value) == config[key] and name.startswith("layer"):
                own = [config_of(self.open(model).folder) for model, *_ in parts]
                lists = [(said.get(section) or said).get(name, value) for said in own]
                config[name] = [v for own, (_, at, n) in zip(lists, parts, strict=True) for v in own[at : at + n]]
        config[key] = layers
        self.config = whole
