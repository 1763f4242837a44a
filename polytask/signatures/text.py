"""What an adapter's task says of itself, as a vector."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.core.callables import Embedder
from polytask.core.errors import ConfigError, LibraryError
from polytask.core.signature import Signature, Subject, signatures

_COMMON = (
    "a an and are as at be by for from give given in into is it its of on or task text that the this to what which with"
)
_EMPTY = frozenset(re.findall(r"\w+", _COMMON))  # they say nothing of a task


@signatures.register("text")
@dataclass(frozen=True)
class Text(Signature):
    """A vector of the task's words: names, instructions, labels and descriptions, by an embedder where one is given.

    Without one each word, and each run of three letters in it with a third of its weight, adds ``±(1 + ln count)`` at a place
    that its hash says. Words that every task has are left out, since a library that grows has no lasting document frequencies.

    Args:
        dimension: of the hashed vector.

    Shapes: [d], of length one, under the empty name.

    Reference: the hashing trick, arXiv 0902.2206; words, weights and what is left out are ours.

    Raises:
        LibraryError: the embedder gives something else than a vector for each text.
    """

    dimension: int = 256

    def __post_init__(self) -> None:
        if not (isinstance(self.dimension, int) and self.dimension >= 1):
            raise ConfigError(f"text: dimension must be a whole number of at least 1, got {self.dimension!r}")

    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        said = described(subject)
        if not said:
            return None
        return {"": self.vectors([said], subject.embed)[0]}, {"text": said, "by": self.by(subject.embed)}

    def by(self, embed: Embedder | None) -> str:
        """Who makes the vectors: only those of one maker can be compared."""
        return f"words {self.dimension}" if embed is None else str(getattr(embed, "__name__", type(embed).__name__))

    def vectors(self, texts: Sequence[str], embed: Embedder | None = None) -> Tensor:
        """The vectors of some texts, [n, d]: what is looked for is made the same way as what is kept."""
        if embed is None:
            made = torch.stack([self._hashed(text) for text in texts])
        else:
            made = torch.as_tensor(embed(list(texts)), dtype=torch.float32).detach().cpu()
            if made.dim() != 2 or len(made) != len(texts):
                raise LibraryError(
                    f"the embedder gave shape {tuple(made.shape)} for {len(texts)} texts; it must give [{len(texts)}, d]"
                )
        return torch.nn.functional.normalize(made, dim=-1)

    def _hashed(self, text: str) -> Tensor:
        vector = torch.zeros(self.dimension)
        words = Counter(w for w in re.findall(r"[^\W_]+", text.casefold()) if w not in _EMPTY)
        parts = Counter(f"#{p}" for w in words.elements() for p in _threes(w))
        for part, count in (words + parts).items():
            digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
            sign = 1.0 if digest[-1] & 1 else -1.0
            weight = 1.0 / 3.0 if part[0] == "#" else 1.0
            vector[int.from_bytes(digest[:4]) % self.dimension] += sign * weight * (1.0 + math.log(count))
        return vector


def _threes(word: str) -> list[str]:
    return [word[i : i + 3] for i in range(len(word) - 2)]


def described(subject: Subject) -> str:
    """The text of what an adapter learned from; empty where nothing is known."""
    said: list[str] = []
    for task in subject.adapter.card.tasks:
        said += [str(task.get("name", "")), *map(str, task.get("labels", ()))]
    for name, head in subject.adapter.heads.items():
        settings = head.settings()
        said += [name, str(settings.get("instruction", "")), *map(str, settings.get("labels", ()))]
    for given in subject.tasks:
        said += [given.name, given.instruction, given.description, *given.labels]
    return ". ".join(dict.fromkeys(text.strip() for text in said if text.strip()))
