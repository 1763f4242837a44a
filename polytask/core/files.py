"""Adapter folders: PEFT's two files with our card and heads beside them.

adapter_config.json          PEFT's schema; ``peft_type`` is PEFT's own where PEFT can apply the adapter, else ours
adapter_model.safetensors    ``base_model.model.<path>.<tensor>``; or ``compressed.safetensors``, see `polytask.core.packed`
polytask.json                card, sites and the exact form
heads.safetensors            task heads, where there are any
README.md                    a model card
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import packed, peft_files
from .adapter import Adapter, Card
from .errors import AdapterError, listing, nearest
from .form import ALIGNED, Form, Part, Patch, forms
from .head import Head
from .peft_files import PREFIX
from .site import Site
from .storage import write_together, writing

CONFIG, WEIGHTS, CARD, HEADS = "adapter_config.json", "adapter_model.safetensors", "polytask.json", "heads.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
FORMAT = 1
MARK = "polytask"  # in the weights' metadata: the adapter's hash, which the card repeats


def save(adapter: Adapter, folder: Path) -> Path:
    """Writes an adapter. A reader sees the old files or the new ones; when writing fails the old ones stay.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save as encode

    config = peft_files.write_config(adapter)
    sites = [patch.site for patch in adapter.patches.values()]
    weights = {
        _key(path, part, name): tensor for path, part in adapter.parts.items() for name, tensor in part.stored().items()
    }
    weights = adapter.form.pack(adapter.patches) or weights
    if config.get("target_parameters"):
        weights = peft_files.fold(weights, sites)
    heads = {
        f"{task}/{name}": value.detach()
        for task, head in adapter.heads.items()
        for name, value in head.state_dict().items()
    }
    card = _card(adapter)
    meta = {"format": "pt", MARK: card["hash"]}
    files = {WEIGHTS: ordered(encode(_apart(weights), meta))}
    if heads:
        files[HEADS] = ordered(encode(_apart(heads), meta))
    files |= {CARD: _json(card), "README.md": _readme(adapter).encode(), CONFIG: _json(config)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, files)
        (folder / packed.FILE).unlink(missing_ok=True)
        if not heads:
            (folder / HEADS).unlink(missing_ok=True)
    return folder


def _key(path: str, part: Part, name: str) -> str:
    if part.site is None:
        return part.keys.get(name, f"base_model.shared.{name}")
    return f"{PREFIX}{path}.{part.keys.get(name, name)}".removesuffix(".")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous, as safetensors wants them; parameters that share memory are written each."""
    seen: set[int] = set()
    done = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        done[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return done


def ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order, which the library writes in any: the same adapter gives the same bytes.

    Its tensors begin where a line of memory does, so that those of a whole number of lines are mapped and not copied.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    size = -(-(8 + len(text)) // ALIGNED) * ALIGNED - 8
    return b"".join((size.to_bytes(8, "little"), text.ljust(size), memoryview(data)[8 + length :]))


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n").encode()


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
        "targets": list(adapter.short_targets),
        "sites": sites,
        "heads": {task: head.settings() for task, head in adapter.heads.items()},
        "hash": adapter.hash,
        "card": asdict(adapter.card),
    }


def _readme(adapter: Adapter) -> str:
    card = adapter.card
    base = str(card.base.get("source") or card.base.get("name") or "unknown")
    tasks = [str(task.get("name")) for task in card.tasks]
    front = {
        "base_model": base,
        "library_name": "polytask" if peft_files.obstacles(adapter) else "peft",
        "tags": [f"base_model:adapter:{base}", adapter.form.name, "polytask", *tasks],
        **({"license": card.licence.lower()} if card.licence else {}),
    }
    lines = ["---", *[f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items()], "---", ""]
    lines += [f"# {adapter.name or 'adapter'}", ""]
    count = f"{adapter.size:,} parameters at {len(adapter.patches)} sites"
    lines += [f"{adapter.form.name} adapter of {base}: {count}.", ""]
    lines += [f"- {task}: {score}" for task, score in card.metrics.items()]
    lines += ["", *card.notes] if card.notes and card.metrics else card.notes
    return "\n".join(lines) + "\n"


def load(path: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Adapter:
    """Reads an adapter folder, ours or PEFT's; see `Adapter.load`."""
    folder = _folder(str(path), revision, subfolder)
    config = _read_json(folder / CONFIG)
    kind = _kind(folder, config)
    ours = _read_json(folder / CARD) if (folder / CARD).is_file() else None
    tensors, mark = _read_weights(folder)
    foreign = config["peft_type"] != peft_files.own_type(kind)
    if ours is not None and not mark and foreign:
        warnings.warn(
            f"{folder}: the weights were written by another program than {CARD} beside them, so that file and the "
            "heads are not used; delete it to be rid of this warning",
            stacklevel=3,
        )
        ours = None
    if ours is None and not foreign:
        raise AdapterError(f"{folder} has no {CARD}, without which an adapter of this form is not complete")
    if ours is not None and mark and mark != ours.get("hash"):
        raise AdapterError(
            f"{folder}: {WEIGHTS} and {CARD} are of different saves (one was interrupted); save or copy it again"
        )
    try:
        if ours is None:
            return peft_files.read(folder, config, kind, tensors)
        return _read_ours(folder, config, ours, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        file = folder / (CONFIG if ours is None else CARD)
        raise AdapterError(f"{file} is damaged or not of this kind: {type(error).__name__} {error}") from error


def _kind(folder: Path, config: Mapping[str, Any]) -> type[Form]:
    """The form that a configuration names."""
    name = config.get("peft_type")
    if name is None:
        if "model_class" in config or "architecture" in (config.get("config") or {}):
            raise AdapterError(
                f"{folder} was written by the AdapterHub library (adapters), whose files polytask does not read; it "
                "reads those of PEFT and its own, so train the adapter again, or save a merged model with that library"
            )
        raise AdapterError(f"{folder / CONFIG} has no peft_type, so it does not say what kind of adapter this is")
    found = [kind for kind in forms.values() if name == peft_files.own_type(kind) or kind.reads(config)]
    if not found:
        known = sorted({t for kind in forms.values() for t in (kind.peft_type, peft_files.own_type(kind))})
        hint = nearest(str(name), known)
        raise AdapterError(f"{folder / CONFIG}: the form {name!r} is not known{hint}; known are {listing(known)}")
    return found[0]


def _folder(path: str, revision: str | None, subfolder: str | None) -> Path:
    local = Path(path).expanduser()
    inside = local / subfolder if subfolder else local
    if (inside / CONFIG).is_file():
        return inside
    if local.exists():
        found = sorted(p.parent.name for p in local.glob(f"*/{CONFIG}")) if local.is_dir() else []
        more = f"; its subfolders {listing(found)} are adapters (use subfolder=)" if found else ""
        raise AdapterError(f"{inside} has no {CONFIG}, so it is not an adapter folder{more}")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        near = nearest(local.name, [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else [])
        raise AdapterError(f"there is no adapter at {path!r}{near}; give a folder or a hub name such as 'org/adapter'")
    return _from_hub(path, revision, subfolder)


def _from_hub(name: str, revision: str | None, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{f}" if subfolder else f for f in (CONFIG, WEIGHTS, packed.FILE, CARD, HEADS, *PICKLED)]
    try:
        got = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's errors share no base: no network, no such name, no right
        reason = str(error).strip().split("\n")[0]
        raise AdapterError(
            f"{name!r} is no folder here, and could not be had from the hub: {reason or type(error).__name__}. Check "
            "the name and the network, or give the folder of a copy"
        ) from error
    folder = got / subfolder if subfolder else got
    if not (folder / CONFIG).is_file():
        where = f" in {subfolder!r}" if subfolder else ""
        raise AdapterError(f"{name!r} on the hub has no {CONFIG}{where}, so it is not an adapter")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file} holds {type(data).__name__} where an object is needed")
    return data


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, and the hash that we left in it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(file, framework="pt") as opened:
            mark = str((opened.metadata() or {}).get(MARK, ""))
        return dict(load_file(file)), mark
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or not complete ({error}); copy or download it again") from error


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    if (folder / WEIGHTS).is_file():
        return _read_tensors(folder / WEIGHTS)
    if (folder / packed.FILE).is_file():
        try:
            held, said = packed.read(folder / packed.FILE)
        except ValueError as error:
            raise AdapterError(f"{error}; copy or download it again") from error
        whole = {name: packed.decode(t) if isinstance(t, packed.Ternary) else t for name, t in held.items()}
        return whole, said.get(MARK, "")
    file = next((folder / name for name in PICKLED if (folder / name).is_file()), None)
    if file is None:
        raise AdapterError(f"{folder} has no {WEIGHTS}; the adapter is not complete")
    reason = "it does not hold tensors by name"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
            return tensors, ""
    except Exception as error:  # pickle's errors share no base
        reason = str(error).strip().split("\n")[0]
        raise AdapterError(f"{file} is refused; it is damaged, or reading it would run code: {reason}") from error
    raise AdapterError(f"{file} is refused: {reason}")


def _read_ours(
    folder: Path, config: Mapping[str, Any], ours: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Adapter:
    if ours.get("format", 0) > FORMAT:
        raise AdapterError(
            f"{folder / CARD} was written by a newer version of polytask (format {ours['format']}; this one reads "
            f"{FORMAT}); update polytask to read it"
        )
    form = Form.of(ours["form"])
    described = [(Site.from_dict(entry), entry.get("form")) for entry in ours["sites"]]
    if config.get("target_parameters"):
        ranks = {site.name: getattr(Form.of(own) if own else form, "rank", 1) for site, own in described}
        tensors, _ = peft_files.unfold(tensors, config["target_parameters"], ranks.__getitem__)
    patches: dict[str, Patch] = {}
    known = 0
    shared = form.shared([site for site, own in described if not own or own["name"] == form.name])
    parts: list[tuple[str, Part]] = [] if shared is None else [("", shared)]
    for site, own in described:
        patches[site.name] = (Form.of(own) if own else form).patch(site)
        parts.append((site.name, patches[site.name]))
    if form.pack(patches) is not None:
        for path, found in form.unpack(config, tensors, [site for site, _ in described]).items():
            patches[path].load(found)
        parts, known = [], len(tensors)
    for path, part in parts:
        keys = {name: _key(path, part, name) for name in part.packs or part._parameters}
        found = {name: tensors[key] for name, key in keys.items() if key in tensors}
        part.load(found)
        known += len(found)
    if known != len(tensors):
        raise AdapterError(f"{folder / WEIGHTS} has {len(tensors)} tensors, and {CARD} describes {known} of them")
    heads = _read_heads(folder, ours)
    card = Card.from_dict(ours.get("card", {}))
    return Adapter(form, patches, heads, card, str(ours.get("name", "")), ours.get("targets", ()), shared)


def _read_heads(folder: Path, ours: Mapping[str, Any]) -> dict[str, Head]:
    described: Mapping[str, Any] = ours.get("heads", {})
    tensors, mark = _read_tensors(folder / HEADS) if (folder / HEADS).is_file() else ({}, "")
    if mark and mark != ours.get("hash"):
        raise AdapterError(f"{folder}: {HEADS} and {CARD} are of different saves; save or copy the adapter again")
    heads = {}
    for task, settings in described.items():
        head = Head.of(settings)
        own = {k.removeprefix(f"{task}/"): v for k, v in tensors.items() if k.startswith(f"{task}/")}
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise AdapterError(f"{folder / HEADS} does not fit the head of {task!r}: {error}") from error
        heads[task] = head
    return heads
