"""Adapter folders: PEFT's two files with our card and heads beside them.

adapter_config.json          PEFT's schema; ``peft_type`` is PEFT's own where PEFT has the form, else ours
adapter_model.safetensors    ``base_model.model.<path>.<tensor>``
polytask.json                card, sites and the exact form
heads.safetensors            task heads, where there are any
README.md                    a model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Card
from .errors import AdapterError, StorageError, listing, nearest
from .form import Form, Patch, forms
from .head import Head
from .site import Site

CONFIG, WEIGHTS, CARD, HEADS = "adapter_config.json", "adapter_model.safetensors", "polytask.json", "heads.safetensors"
PREFIX = "base_model.model."
FORMAT = 1


def save(adapter: Adapter, folder: Path) -> Path:
    """Writes an adapter. Each file appears whole or not at all; the configuration comes last.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save as encode

    weights: dict[str, Tensor] = {}
    for path, patch in adapter.patches.items():
        for name, parameter in patch.named_parameters():
            weights[f"{PREFIX}{path}.{patch.keys.get(name, name)}"] = parameter.detach().cpu().contiguous()
    heads = {
        f"{task}/{name}": value.detach().cpu().contiguous()
        for task, head in adapter.heads.items()
        for name, value in head.state_dict().items()
    }
    meta = {"format": "pt"}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS, encode(weights, meta))
        if heads:
            write(folder / HEADS, encode(heads, meta))
        else:
            (folder / HEADS).unlink(missing_ok=True)
        write(folder / CARD, _json(_card(adapter)))
        write(folder / "README.md", _readme(adapter).encode())
        write(folder / CONFIG, _json(_config(adapter)))
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a failed write into `StorageError` with advice."""
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno == 28 else "choose a folder that you may write to"
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames, so that a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def _saved_values(adapter: Adapter) -> list[str]:
    """Sites whose patch holds whole parameters beside the form proper: PEFT's ``modules_to_save``."""
    return [s for s, p in adapter.patches.items() if type(p.form) is not type(adapter.form)]


def _config(adapter: Adapter) -> dict[str, Any]:
    extra = _saved_values(adapter)
    own = {s: p for s, p in adapter.patches.items() if s not in extra}
    form = adapter.form
    kind = adapter.card.base.get("kind", "")
    task = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}.get(kind)
    return {
        "peft_type": form.peft_type,
        "task_type": adapter.card.base.get("task_type", task),
        "base_model_name_or_path": adapter.card.base.get("name") or "unknown",
        "revision": adapter.card.base.get("revision"),
        "inference_mode": True,
        "target_modules": [t for t in adapter.targets if t not in extra] or list(own),
        "exclude_modules": None,
        "modules_to_save": extra or None,
        "auto_mapping": None,
        "peft_version": "0.21.2",
        **form.to_peft(own),
    }


def _card(adapter: Adapter) -> dict[str, Any]:
    sites = []
    for patch in adapter.patches.values():
        entry = patch.site.as_dict()
        if patch.form != adapter.form:
            entry["form"] = {"name": patch.form.name, **patch.form.settings()}
        sites.append(entry)
    return {
        "format": FORMAT,
        "name": adapter.name,
        "form": {"name": adapter.form.name, **adapter.form.settings()},
        "targets": list(adapter.targets),
        "sites": sites,
        "heads": {task: head.settings() for task, head in adapter.heads.items()},
        "hash": adapter.hash,
        "card": asdict(adapter.card),
    }


def _readme(adapter: Adapter) -> str:
    card = adapter.card
    tasks = [str(t.get("name")) for t in card.tasks]
    front = {
        "base_model": card.base.get("name") or "unknown",
        "library_name": "peft" if adapter.form.in_peft else "polytask",
        "tags": ["polytask", adapter.form.name, *tasks],
        **({"license": card.licence.lower()} if card.licence else {}),
    }
    lines = [
        "---",
        *[f"{k}: {json.dumps(v)}" for k, v in front.items()],
        "---",
        "",
        f"# {adapter.name or 'adapter'}",
        "",
    ]
    lines += [f"{adapter.form.name} adapter, {adapter.size:,} parameters at {len(adapter.patches)} sites.", ""]
    for task, score in card.metrics.items():
        lines.append(f"- {task}: {score}")
    return "\n".join(lines) + "\n"


def load(path: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Adapter:
    """Reads an adapter folder, ours or PEFT's; see `Adapter.load`."""
    folder = _folder(str(path), revision, subfolder)
    config = _read_json(folder / CONFIG)
    if "peft_type" not in config:
        if "model_class" in config or "config" in config:
            raise AdapterError(f"{folder} is a folder of the AdapterHub library, whose files are not read yet")
        raise AdapterError(f"{folder / CONFIG} has no peft_type, so it does not say what kind of adapter this is")
    by_type = {kind.peft_type: kind for kind in forms.values()}
    if config["peft_type"] not in by_type:
        hint = nearest(str(config["peft_type"]), by_type)
        raise AdapterError(
            f"{folder / CONFIG}: the form {config['peft_type']!r} is not known{hint}; known are {listing(sorted(by_type))}"
        )
    tensors = _read_weights(folder)
    ours = _read_json(folder / CARD) if (folder / CARD).is_file() else None
    return (
        _read_ours(folder, ours, tensors) if ours else _read_peft(folder, config, by_type[config["peft_type"]], tensors)
    )


def _folder(path: str, revision: str | None, subfolder: str | None) -> Path:
    local = Path(path).expanduser()
    inside = local / subfolder if subfolder else local
    if (inside / CONFIG).is_file():
        return inside
    if local.exists():
        found = sorted(p.parent.name for p in inside.glob(f"*/{CONFIG}")) if inside.is_dir() else []
        more = f"; its subfolders {listing(found)} are adapters (use subfolder=)" if found else ""
        raise AdapterError(f"{inside} has no {CONFIG}, so it is not an adapter folder{more}")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        near = nearest(local.name, [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else [])
        raise AdapterError(f"there is no adapter at {path!r}{near}; give a folder or a hub name such as 'org/adapter'")
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"{subfolder}/*" if subfolder else "*"]
        got = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors share no base: no network, no such name, no right
        reason = str(error).strip().split("\n")[0]
        raise AdapterError(f"{path!r} is no folder here, and could not be had from the hub: {reason}") from error
    return got / subfolder if subfolder else got


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file} holds {type(data).__name__} where an object is needed")
    return data


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if file.is_file():
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{file} is damaged or not complete ({error}); copy or download it again") from error
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (folder / name).is_file():
            try:
                return dict(torch.load(folder / name, map_location="cpu", weights_only=True))
            except Exception as error:  # pickle's errors share no base
                raise AdapterError(f"{folder / name} could not be read as plain tensors: {error}") from error
    raise AdapterError(f"{folder} has no {WEIGHTS}; the adapter is not complete")


def _read_ours(folder: Path, ours: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    if ours.get("format", 0) > FORMAT:
        raise AdapterError(f"{folder / CARD} was written by a newer version of polytask; update to read it")
    form = Form.of(ours["form"])
    by_path: dict[str, dict[str, Tensor]] = {}
    patches: dict[str, Patch] = {}
    described = [(Site.from_dict(dict(entry)), entry.get("form")) for entry in ours["sites"]]
    for site, own in described:
        patch = (Form.of(own) if own else form).patch(site)
        for name in patch._parameters:
            key = f"{PREFIX}{site.name}.{patch.keys.get(name, name)}"
            if key in tensors:
                by_path.setdefault(site.name, {})[name] = tensors[key]
        patch.load(by_path.get(site.name, {}))
        patches[site.name] = patch
    known = sum(len(found) for found in by_path.values())
    if known != len(tensors):
        raise AdapterError(f"{folder / WEIGHTS} has {len(tensors)} tensors, and {CARD} describes {known} of them")
    heads = _read_heads(folder, ours.get("heads", {}))
    card = Card.from_dict(ours.get("card", {}))
    return Adapter(form, patches, heads, card, str(ours.get("name", "")), ours.get("targets", ()))


def _read_heads(folder: Path, described: Mapping[str, Any]) -> dict[str, Head]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / HEADS) if (folder / HEADS).is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder / HEADS} is damaged or not complete ({error}); copy it again") from error
    heads = {}
    for task, settings in described.items():
        head = Head.of(settings)
        head.load_state_dict({k.removeprefix(f"{task}/"): v for k, v in tensors.items() if k.startswith(f"{task}/")})
        heads[task] = head
    return heads


def _read_peft(folder: Path, config: Mapping[str, Any], kind: type[Form], tensors: Mapping[str, Tensor]) -> Adapter:
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    saved: dict[str, dict[str, Tensor]] = {}
    names = config.get("modules_to_save") or []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in kind.tensor_names if path.endswith("." + s)), None)
        if suffix is not None:
            site = path[: -len(suffix) - 1]
            found.setdefault(site, {})[kind.tensor_names[suffix]] = tensor
            if "embedding" in suffix:
                embeddings.add(site)
            continue
        owner, _, parameter = path.rpartition(".")
        if parameter not in ("weight", "bias"):
            raise AdapterError(f"{folder / WEIGHTS}: the tensor {key!r} is not one that the form {kind.name!r} has")
        # saved beside the adapter: modules_to_save, or embeddings that were resized
        if names and not any(owner == n or f".{n}." in f".{owner}." for n in names) and "embed" not in owner:
            raise AdapterError(f"{folder / WEIGHTS}: {key!r} is in no module of modules_to_save {listing(names)}")
        saved.setdefault(owner, {})[parameter] = tensor
    patches: dict[str, Patch] = {}
    for path, parts in found.items():
        form = kind.from_peft(config, path)
        try:
            site = kind.infer_site(path, parts, {**config, "_embedding": path in embeddings})
        except KeyError as error:
            raise AdapterError(
                f"{folder / WEIGHTS}: {path!r} lacks its tensor {error}; the file is not complete"
            ) from error
        patch = form.patch(site)
        patch.load(parts)
        patches[path] = patch
    for path, parts in saved.items():
        patches[path] = _saved_module(path, parts)
    if not patches:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensor of the form {kind.name!r}")
    base = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    base["task_type"] = config.get("task_type")
    targets = config.get("target_modules")
    short = list(targets) if isinstance(targets, list) else []
    return Adapter(kind.from_peft(config), patches, card=Card(base=base), name=folder.name, targets=short)


def _saved_module(path: str, parts: Mapping[str, Tensor]) -> Patch:
    """A patch with a module's new parameters, as PEFT's ``modules_to_save`` keeps them."""
    weight = parts.get("weight")
    if weight is None:
        raise AdapterError(f"the saved module {path!r} has a bias and no weight; the file is not complete")
    kind = {1: "norm", 2: "linear"}.get(weight.dim(), "conv")
    if "embed" in path.rsplit(".", 1)[-1]:
        kind = "embedding"
    form = Form.of({"name": "full", "stored": "value"})
    patch = form.patch(Site(path, kind, "other", tuple(weight.shape), bias="bias" in parts))
    patch.load(parts)
    return patch
