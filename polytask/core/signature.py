"""Signatures: what is kept beside an adapter so that it can be found and compared without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .errors import LibraryError
from .registry import Registry

if TYPE_CHECKING:
    from .adapter import Adapter
    from .callables import Embedder
    from .model import Model
    from .task import Task

ABOUT = "about"


@dataclass(frozen=True)
class Subject:
    """What a signature can be computed from; what is not at hand is None or empty.

    Attributes:
        adapter: whose it is.
        model: its base.
        tasks: what it learned from.
        embed: makes vectors of texts.
    """

    adapter: Adapter
    model: Model | None = None
    tasks: Sequence[Task] = ()
    embed: Embedder | None = None


@dataclass(frozen=True)
class Signature:
    """The settings of a kind of signature: a frozen dataclass, registered with ``@signatures.register("name")``.

    It is computed for every adapter that comes into a library, where what it needs is at hand.

    Attributes:
        name: what the kind is called (set by the decorator).
    """

    name: ClassVar[str] = ""

    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors by site (under the empty name what is of the whole adapter), and what they were computed from as plain
        values; None where something needed is not at hand."""
        raise NotImplementedError


signatures: Registry[Signature] = Registry("signature", "polytask.signatures")


def encoded(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A signature as a file."""
    from safetensors.torch import save

    from .files import ordered

    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    said = json.dumps(about, ensure_ascii=False, sort_keys=True, default=str)
    return ordered(save(held, {"format": "pt", ABOUT: said}))


def decoded(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse. Raises `LibraryError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise LibraryError(f"{file} is damaged or not complete ({error}); sign the adapter again") from error
