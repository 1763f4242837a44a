"""One-line protocols for what is not ours to build: a local model, a remote API and a scripted stand-in look the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Writer(Protocol):
    """A model that writes text: prompts in, one continuation each out."""

    def __call__(self, prompts: Sequence[str], /) -> list[str]: ...


@runtime_checkable
class Judge(Protocol):
    """Scores answers to prompts, one number each; higher is better."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], /) -> list[float]: ...


@runtime_checkable
class Embedder(Protocol):
    """Texts in, an array [len(texts), dim] out."""

    def __call__(self, texts: Sequence[str], /) -> Any: ...


@runtime_checkable
class Retriever(Protocol):
    """A query and k in, at most k (passage, score) pairs out, best first."""

    def __call__(self, query: str, k: int, /) -> list[tuple[str, float]]: ...


@runtime_checkable
class Environment(Protocol):
    """An action in; observation, reward and whether the episode has ended out."""

    def __call__(self, action: Any, /) -> tuple[Any, float, bool]: ...
