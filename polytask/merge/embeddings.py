"""Embeddings in another vocabulary: rows are read from where their token has one.

Shapes: V rows of the result. What has a row for each token is found by name (`ENDINGS`) and by its number of rows, which must be
the vocabulary's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polytask.core.errors import MergeError, listing

from .lowrank import LowRank
from .source import Source, config_of
from .values import Layers

ENDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight", "tok_embeddings.weight",
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "embed_out.bias", "lm_head.decoder.weight", "lm_head.decoder.bias",
    "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias", "final_logits_bias", "proj_out.weight",
)  # fmt: skip
ZERO, MEAN, FILL = -1, -2, -3  # in place of a model's number: zeros, the mean of the owners, the mean of all rows


@dataclass(frozen=True)
class Rows:
    """Where each row of one model's embeddings comes from.

    Attributes:
        model: its number, or `ZERO`, `MEAN`, `FILL`, [V].
        row: the row there, [V].
        owners: (model, row) of all that have the token, for the rows that are a `MEAN`.
    """

    model: Tensor
    row: Tensor
    owners: Mapping[int, Sequence[tuple[int, int]]]


class Remapped(Source):
    """A model with its embeddings in another vocabulary.

    Args:
        source: the model.
        names: of what has a row for each token.
        rows: where these come from.
        fellows: all models, which lend the rows that this one lacks.
    """

    def __init__(self, source: Source, names: Sequence[str], rows: Rows, fellows: Sequence[Source]) -> None:
        self.source, self.names, self.rows, self.fellows = source, set(names), rows, fellows
        self.name, self.folder, self.tied = source.name, source.folder, source.tied
        self._filling: dict[str, Tensor] = {}
        size = len(rows.model)
        self._shapes = {n: (size, *s[1:]) if n in self.names else s for n, s in source.shapes.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self.names:
            return self.source.read(name, start, stop)
        first, last, _ = slice(start, stop).indices(self._shapes[name][0])
        last = max(first, last)
        out = self._lent(name, first, last)
        filled = self.rows.model[first:last] == FILL
        if bool(filled.any()):
            out[filled] = self._mean(name)
        return out

    def _lent(self, name: str, first: int, last: int) -> Tensor:
        """The rows from the models, in fp32; zeros where there is none."""
        out = torch.zeros(last - first, *self._shapes[name][1:])
        model, row = self.rows.model[first:last], self.rows.row[first:last]
        for number in model.unique().tolist():
            if number >= 0:
                at = (model == number).nonzero().flatten()
                out[at] = picked(self.fellows[number], name, row[at])
        for place in (model == MEAN).nonzero().flatten().tolist():
            owners = self.rows.owners[first + place]
            out[place] = sum(self.fellows[m].read(name, r, r + 1)[0].float() for m, r in owners) / len(owners)
        return out

    def _mean(self, name: str) -> Tensor:
        """Of all rows that belong to a token: what the others are filled with."""
        if name not in self._filling:
            size, step = self._shapes[name][0], 4096
            total = torch.zeros(self._shapes[name][1:], dtype=torch.float64)
            for first in range(0, size, step):
                total += self._lent(name, first, min(size, first + step)).sum(0, dtype=torch.float64)
            self._filling[name] = (total / int((self.rows.model != FILL).sum())).float()
        return self._filling[name]


def original(source: Source | None) -> Source | None:
    """What is read in another vocabulary or with a low rank, as it is stored; other sources as they are."""
    while isinstance(source, Remapped | LowRank):
        source = source.source
    return source


def picked(source: Source, name: str, rows: Tensor) -> Tensor:
    """Single rows of a tensor, in fp32; those that follow each other are read at once."""
    wanted, place = rows.unique(return_inverse=True)
    cuts = [0, *((wanted.diff() > 1).nonzero().flatten() + 1).tolist(), len(wanted)]
    parts = [source.read(name, int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in zip(cuts, cuts[1:], strict=False)]
    return torch.cat(parts)[place].float()


def embeddings(source: Source) -> tuple[list[str], int]:
    """The names of what has a row for each token, and the rows. Raises `MergeError` where that is not clear."""
    config = config_of(source.folder)
    found = {n: s[0] for n, s in source.shapes.items() if s and n.endswith(ENDINGS)}
    size = (
        config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or next(iter(found.values()), 0)
    )
    names = [name for name, rows in found.items() if rows == size]
    if not names:
        there = listing((f"{n} with {r} rows" for n, r in found.items()), 4) or "nothing that is called like one"
        raise MergeError(f"{source.name} has no embeddings of its {size} tokens that can be moved; it has {there}")
    places = Layers(source.shapes)
    other = [
        name
        for name, shape in source.shapes.items()
        if len(shape) == 2 and shape[0] == size and name not in found and places.place(name) is None
        and not any(part in name for part in ("position", "wpe", ".0."))
    ]  # fmt: skip
    if other:
        raise MergeError(
            f"{listing(other, 4)} of {source.name} has as many rows as the vocabulary ({size}), and it is not known whether "
            "they are its tokens; merge models with the same tokenizer, without tokenizer="
        )
    return names, int(size)


def common(models: Sequence[Source], whole: Sequence[tuple[list[str], int]]) -> list[str]:
    """The tensors with a row for each token, which all models must have in one width."""
    first, (names, _) = models[0], whole[0]
    for model, (own, _) in zip(models[1:], whole[1:], strict=True):
        if set(own) != set(names):
            more = f"{first.name} has {listing(names)} and {model.name} has {listing(own)}"
            raise MergeError(f"the embeddings differ in names: {more}; tie both models' or neither's")
        for name in names:
            a, b = first.shapes[name][1:], model.shapes[name][1:]
            if a != b:
                raise MergeError(
                    f"{name} has rows of {listing(map(str, b)) or 'one number'} in {model.name} and of "
                    f"{listing(map(str, a)) or 'one number'} in {first.name}; only the number of rows may differ"
                )
    return names
