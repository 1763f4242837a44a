"""PEFT's own conventions inside an adapter folder: its configuration, its tensor names, its layout for fused experts.

Shapes: E experts, r rank, i = d_in, o = d_out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, listing
from .form import Form, Patch, forms
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter

PREFIX = "base_model.model."
VERSION = "0.21.2"  # the release whose schema is written
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
# PEFT wraps a module once for each adapted parameter, in the order of the parameters, which a file does not tell
EXPERT_ORDER = ("gate_up_proj", "down_proj")


def task_type(kind: str, module: nn.Module) -> str | None:
    """PEFT's name for what a model does; it takes tokens for granted there, so None for every other input."""
    return TASKS.get(kind) if getattr(module, "main_input_name", "") == "input_ids" else None


def own_type(kind: type[Form] | Form) -> str:
    """The ``peft_type`` of an adapter that PEFT could not apply as we do, so that PEFT refuses it."""
    return kind.peft_type if kind.peft_type.startswith("POLYTASK_") else f"POLYTASK_{kind.name.upper()}"


def differs(site: Site, module: nn.Module) -> str:
    """Why PEFT would compute something else than we at a site, or the empty string."""
    if site.kind == "experts":
        if getattr(module, "is_transposed", False):
            return "experts stored as [E, i, o]"
        return "" if site.param in EXPERT_ORDER else f"experts in a parameter called {site.param}"
    if site.read == "weight":
        return "a weight that is read without a call"
    if site.kind != "conv":
        return ""
    if getattr(module, "groups", 1) != 1:
        return "a grouped convolution"
    if any(d != 1 for d in getattr(module, "dilation", ())):
        return "a dilated convolution"
    mode = getattr(module, "padding_mode", "zeros")
    return "" if mode == "zeros" else f"a convolution with padding_mode={mode!r}"


def obstacles(adapter: Adapter) -> list[str]:
    """Why PEFT cannot read an adapter; empty where it can."""
    unlike = adapter.card.base.get("unlike_peft", {})
    found = [f"{site}: {reason}" for site, reason in unlike.items() if site in adapter.patches]
    if not adapter.form.in_peft:
        return [f"PEFT has no form {adapter.form.name!r}", *found]
    own = [(site, p) for site, p in adapter.patches.items() if type(p.form) is type(adapter.form)]
    found += [f"{site}: {reason}" for site, p in own if (reason := adapter.form.unlike_peft(p))]
    if adapter.form.peft_type != "LORA" and any(p.site.kind == "experts" for p in adapter.patches.values()):
        found.append(f"PEFT has no {adapter.form.name!r} for fused experts")
    kind = type(adapter.form)
    other = {p.form.name for p in adapter.patches.values() if type(p.form) is not kind and not is_saved(p)}
    return [*found, *(f"a second form, {name!r}" for name in sorted(other))]


def is_saved(patch: Patch) -> bool:
    """Whether a patch holds a module's own new parameters: PEFT's ``modules_to_save``."""
    return isinstance(patch.form, forms["full"]) and getattr(patch.form, "stored", "") == "value"


def write_config(adapter: Adapter) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter."""
    form, base = adapter.form, adapter.card.base
    saved = [p.site for p in adapter.patches.values() if is_saved(p) and type(p.form) is not type(form)]
    own = {name: patch for name, patch in adapter.patches.items() if patch.site not in saved}
    why = obstacles(adapter)
    wrapped = [name for name, patch in own.items() if patch.site.kind == "experts" and not why]
    names = {site.name for site in saved}
    short = [target for target in adapter.short_targets if target not in names]
    return {
        "peft_type": own_type(form) if why else form.peft_type,
        "task_type": base.get("task_type"),
        "base_model_name_or_path": base.get("source") or base.get("name") or "unknown",
        "revision": base.get("revision"),
        "inference_mode": True,
        "target_modules": short if short and not wrapped else [name for name in own if name not in wrapped],
        **({"target_parameters": wrapped or None} if form.peft_type == "LORA" else {}),  # other forms lack the setting
        "modules_to_save": _saved_names(saved, base.get("modules_to_save") or ()) or None,
        "auto_mapping": None,
        "peft_version": VERSION,
        **form.to_peft(own),
    }


def _saved_names(sites: Sequence[Site], names: Sequence[str]) -> list[str]:
    """The names that the file came with (PEFT adds some by the task, and nested wrappers clash), then what is left."""
    paths = dict.fromkeys(site.path for site in sites)
    used = [name for name in names if any(_inside(path, name) for path in paths)]
    return used + [path for path in paths if not any(_inside(path, name) for name in used)]


def _inside(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def fold(tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Factors at experts as PEFT stores them: A [E, r, i] as [E*r, i], B [E, o, r] as [o, r*E], nested by parameter."""
    done = dict(tensors)
    for site in sites:
        if site.kind != "experts":
            continue
        beside = [s.param for s in sites if s.kind == "experts" and s.path == site.path]
        later = [p for p in beside if EXPERT_ORDER.index(p) > EXPERT_ORDER.index(site.param)]
        place = f"{PREFIX}{site.path}" + ".base_layer" * len(later)
        A = done.pop(f"{PREFIX}{site.name}.lora_A.weight")
        B = done.pop(f"{PREFIX}{site.name}.lora_B.weight")
        done[f"{place}.lora_A.weight"] = A.flatten(0, 1)  # [E*r, i]
        done[f"{place}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1).contiguous()  # [o, r*E]
    return done


def unfold(
    tensors: Mapping[str, Tensor], targets: Sequence[str], rank_of: Callable[[str], int]
) -> tuple[dict[str, Tensor], set[str]]:
    """The reverse of `fold`, and the names of the sites at experts.

    Args:
        tensors: of a file.
        targets: its ``target_parameters``.
        rank_of: the rank at a site.

    Raises:
        AdapterError: several parameters of one module whose order is not known, or a shape that fits no rank.
    """
    done: dict[str, Tensor] = {}
    experts: set[str] = set()
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.*?)((?:\.base_layer)*)\.(lora_[AB]\.weight)", key)
        path, inner, tail = match.groups() if match else ("", "", "")
        ends = {target.rpartition(".")[2] for target in targets if _ends(f"{path}.{target.rpartition('.')[2]}", target)}
        if not ends:
            done[key] = tensor
            continue
        if len(ends) > 1 and not ends <= set(EXPERT_ORDER):
            raise AdapterError(f"the order of the parameters {listing(sorted(ends))} of {path!r} is not known")
        names = [name for name in EXPERT_ORDER if name in ends] if len(ends) > 1 else list(ends)
        depth = inner.count(".base_layer")
        if depth >= len(names):
            raise AdapterError(f"{key!r} is nested deeper than target_parameters {listing(targets)} say")
        name = f"{path}.{names[-1 - depth]}"
        rank = rank_of(name)
        count, rest = divmod(tensor.shape[0] if tail[5] == "A" else tensor.shape[1], rank)
        if rest:
            raise AdapterError(f"{key!r} of shape {tuple(tensor.shape)} does not hold factors of rank {rank}")
        if count > 1:
            experts.add(name)
            if tail[5] == "A":
                tensor = tensor.reshape(count, rank, -1)  # [E, r, i]
            else:
                tensor = tensor.reshape(-1, rank, count).permute(2, 0, 1).contiguous()  # [E, o, r]
        done[f"{PREFIX}{name.removesuffix('.weight')}.{tail}"] = tensor
    return done, experts


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression on the end of the module's path; the first that matches holds."""
    for key, value in (patterns or {}).items():
        if path and re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def pattern_keys(paths: Iterable[str]) -> dict[str, str]:
    """A pattern for each path that matches no other: one that is the end of another's says that it is the whole."""
    paths = list(paths)
    ends = {path[match.end() :] for path in paths for match in re.finditer(r"\.", path)}
    return {path: f"^{path}" if path in ends else path for path in paths}


COMMON = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "modules_to_save", "auto_mapping", "peft_version", "layers_to_transform", "layers_pattern",
    "target_parameters", "fan_in_fan_out", "bias", "init_weights", "runtime_config", "ensure_weight_tying",
})  # fmt: skip


def check_peft(config: Mapping[str, Any], name: str, known: Iterable[str], refused: Mapping[str, str]) -> None:
    """Refuses what a form does not have, and warns of settings that nobody here knows.

    Args:
        config: ``adapter_config.json``.
        name: of the form.
        known: settings that the form reads, or that do not matter once it is trained.
        refused: settings that make it another function, with what they are.
    """
    for key, why in refused.items():
        if config.get(key):
            raise AdapterError(f"this PEFT adapter uses {why} ({key}), which the form {name!r} does not have")
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"this PEFT adapter also trained biases (bias={config['bias']!r}), which the form {name!r} does not have; "
            "merge it with PEFT's merge_and_unload, or train it again with bias='none'"
        )
    read = {*COMMON, *known, *refused}
    unknown = sorted(key for key, value in config.items() if value and key not in read)
    if unknown:
        warnings.warn(
            f"settings of this PEFT adapter that polytask does not know are ignored: {listing(unknown)}; if they "
            "change what it computes, its outputs will differ",
            stacklevel=3,
        )


def read(folder: Path, config: Mapping[str, Any], kind: type[Form], tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter that PEFT wrote. Its sites are inferred from the tensors; the model knows their roles and depths."""
    from .adapter import Adapter, Card

    config, tensors = kind.translated(config, tensors)
    general = kind.from_peft(config)
    packed = kind.packed_sites(config, tensors)
    if packed is not None:
        patches = {site.name: general.patch(site) for site in packed}
        for name, own in kind.unpack(config, tensors, packed).items():
            patches[name].load(own)
        return Adapter(
            general, patches, card=Card(base={"name": config.get("base_model_name_or_path")}), name=folder.name
        )
    targets = config.get("target_parameters") or []
    common = {kind.shared_names[key]: tensors[key] for key in kind.shared_names if key in tensors}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in kind.shared_names}
    tensors, experts = unfold(tensors, targets, lambda name: getattr(kind.from_peft(config, name), "rank", 1))
    found, saved, notes = _sorted_out(folder, config, kind, tensors)
    ends = [key.removeprefix(PREFIX).rpartition(".") for key in tensors]
    embeddings = {path for path, _, name in ends if "_embedding_" in name}
    patches = {}
    for path, parts in found.items():
        marks = {"_embedding": path in embeddings, "_experts": path in experts}
        try:
            site = kind.infer_site(path, parts, {**config, **marks})
        except KeyError as error:
            raise AdapterError(f"{folder}: {path!r} lacks its tensor {error}; the file is not complete") from error
        patch = kind.from_peft(config, path).patch(site)
        patch.load(parts)
        patches[path] = patch
    if not patches:
        raise AdapterError(f"{folder} holds no tensor of the form {kind.name!r}")
    shared = general.shared([patch.site for patch in patches.values()])
    if shared is not None and common:
        shared.load(common)
    elif shared is not None:  # PEFT may leave out what its seed gives again
        shared.start(torch.Generator().manual_seed(int(config.get("projection_prng_key") or 0)))
    for path, parts in saved.items():
        for patch in _saved_module(path, parts):
            patches[patch.site.name] = patch
    kept = ("revision", "task_type", "modules_to_save")
    base = {"name": config.get("base_model_name_or_path"), **{key: config[key] for key in kept if config.get(key)}}
    narrowed = any(config.get(key) for key in ("layers_to_transform", "exclude_modules", "target_parameters"))
    short = config.get("target_modules")
    names = sorted(short) if isinstance(short, list) and not narrowed else []
    card = Card(base=base, notes=notes)
    return Adapter(general, patches, card=card, name=folder.name, targets=names, shared=shared)


_Parts = dict[str, dict[str, Tensor]]


def _sorted_out(
    folder: Path, config: Mapping[str, Any], kind: type[Form], tensors: Mapping[str, Tensor]
) -> tuple[_Parts, _Parts, list[str]]:
    """The form's tensors by path, whole parameters saved beside them by path, and what to note."""
    found: _Parts = {}
    saved: _Parts = {}
    notes = []
    names = config.get("modules_to_save") or []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in kind.tensor_names if path.endswith("." + s)), None)
        owner, _, parameter = path.rpartition(".")
        if suffix is not None:
            found.setdefault(path[: -len(suffix) - 1], {})[kind.tensor_names[suffix]] = tensor
        elif owner.endswith(".base_layer"):
            # with an embedding among its targets PEFT adds a copy of the base's own, which no reader needs
            notes.append(f"{path} in the file is a copy of the base's weight and was not used")
        elif any(_inside(owner, name) for name in names) or (
            parameter == "weight" and re.search(r"embed|lm_head", owner)  # what save_embedding_layers adds
        ):
            saved.setdefault(owner, {})[parameter] = tensor
        else:
            allowed = f" and is in no module of modules_to_save {listing(names)}" if names else ""
            raise AdapterError(f"{folder}: the tensor {key!r} is not one that the form {kind.name!r} has{allowed}")
    return found, saved, notes


def _saved_module(path: str, parts: Mapping[str, Tensor]) -> list[Patch]:
    """Patches with a module's new parameters, as PEFT's ``modules_to_save`` keeps them."""
    form = Form.of({"name": "full", "stored": "value"})
    sites = []
    raw = {name: tensor for name, tensor in parts.items() if name not in ("weight", "bias")}
    for name, tensor in raw.items():
        kind = "experts" if tensor.dim() == 3 and "expert" in path else "parameter"
        sites.append((Site(path, kind, "other", tuple(tensor.shape), param=name), {"value": tensor}))
    plain = {name: tensor for name, tensor in parts.items() if name not in raw}
    if plain:
        weight, bias = plain.get("weight"), plain.get("bias")
        if weight is None:
            raise AdapterError(f"the saved module {path!r} has a bias and no weight; the file is not complete")
        kind = {1: "norm", 2: "linear"}.get(weight.dim(), "conv")
        kind = "embedding" if "embed" in path.rsplit(".", 1)[-1] else kind
        shape = tuple(weight.shape)
        # stored [d_in, d_out] where only the last size can be the bias's
        turned = kind == "linear" and bias is not None and len(bias) == shape[1] != shape[0]
        sites.append((Site(path, kind, "other", shape, transposed=turned, bias=bias is not None), plain))
    patches = []
    for site, tensors in sites:
        patch = form.patch(site)
        patch.load(tensors)
        patches.append(patch)
    return patches
