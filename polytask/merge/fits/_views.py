"""Another view of an example that has the same answer: texts without some of their tokens, images flipped and shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.rows import Row

SHIFT = 8  # an image is shifted by up to this part of its side


def view(row: Row, special: Sequence[int], drop: float, generator: torch.Generator) -> Row:
    """The row seen differently.

    Args:
        row: texts, or an image.
        special: ids that are never left out.
        drop: the chance that a token is left out; the same ones in every candidate of a row, and none of an answer.
        generator: of what is random.
    """
    if row.pixels is not None:
        return replace(row, pixels=_shifted(row.pixels, generator))
    gone = torch.rand(row.length, generator=generator) < drop
    found = [_thinned(row, i, gone, special) for i in range(len(row.sequences))]
    sequences = [[row.sequences[i][at] for at in kept] for i, kept in enumerate(found)]
    segments = [[row.segments[i][at] for at in kept] for i, kept in enumerate(found)] if row.segments else []
    starts = (
        [sum(at < start for at in kept) for kept, start in zip(found, row.starts, strict=True)] if row.starts else []
    )
    return replace(row, sequences=sequences, segments=segments, starts=starts)


def _thinned(row: Row, which: int, gone: Tensor, special: Sequence[int]) -> list[int]:
    """The places of a sequence's tokens that stay."""
    tokens = row.sequences[which]
    if not row.starts:
        kept = [at for at, token in enumerate(tokens) if token in special or not gone[at]]
        return kept if any(tokens[at] not in special for at in kept) else list(range(len(tokens)))
    # a text that an answer follows is counted from its end, where candidates of different lengths agree, and keeps its last token
    start = row.starts[which]
    return [at for at, token in enumerate(tokens) if at >= start - 1 or token in special or not gone[start - 1 - at]]


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[3, H, W] flipped with a chance of one half, and shifted over its own reflection."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    height, width = pixels.shape[-2:]
    up, left = height // SHIFT, width // SHIFT
    wide = F.pad(pixels[None], (left, left, up, up), mode="reflect")[0]
    top, side = (int(torch.randint(0, 2 * most + 1, (), generator=generator)) for most in (up, left))
    return wide[..., top : top + height, side : side + width]
