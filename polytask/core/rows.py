"""Examples made ready for a base: texts as token ids, images as pixels, within what the base can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import DataError, ModelError
from .model import Model
from .task import Example

LONGEST = 512  # tokens of a text that are read when neither the caller nor the model says less


@dataclass(slots=True)
class Row:
    """An example made ready for a base.

    Attributes:
        sequences: token ids, one list per sequence (choices, or candidate labels).
        starts: where the scored tokens of each sequence start, for likelihoods.
        target: what the head compares with.
        pixels: an image's tensor instead of sequences.
        segments: token types of each sequence, where the tokenizer gives them.
    """

    sequences: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    target: Any = None
    pixels: Tensor | None = None
    segments: list[list[int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max((len(s) for s in self.sequences), default=1)

    @property
    def count(self) -> int:
        """How many sequences the row takes in a batch."""
        return max(1, len(self.sequences))


def prompted(instruction: str, inputs: Sequence[str]) -> str:
    """The instruction, an empty line, the inputs: what a generative base reads before the answer."""
    return "\n\n".join([*([instruction] if instruction else []), "\n".join(inputs)]) + "\n"


def limit(model: Model, longest: int | None) -> int:
    """Tokens of a text that are read: what was asked for, what the model can take, and `LONGEST`, whichever is least."""
    config = getattr(model.module, "config", None)
    config = getattr(config, "text_config", None) or config
    bounds = [longest or LONGEST, getattr(model.tokenizer, "model_max_length", LONGEST)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa's positions start behind the padding token
        bounds.append(
            positions - (2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0)
        )
    return int(min(bounds))


def tokens(
    model: Model, texts: Sequence[tuple[str, ...]], longest: int | None, loses: str = "right"
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and token types of one text or a pair each, truncated on the side that is named and not padded."""
    tokenizer = _tokenizer(model)
    if not texts:
        return [], []
    first = [t[0] for t in texts]
    second = [" ".join(t[1:]) for t in texts] if len(texts[0]) > 1 else None
    tokenizer.truncation_side = loses
    out = tokenizer(first, second, truncation=True, max_length=limit(model, longest), padding=False)
    return out["input_ids"], out.get("token_type_ids", [])


def joined(model: Model, prompt: str, answer: str, longest: int | None, end: bool = False) -> tuple[list[int], int]:
    """Ids of a prompt followed by an answer, and where the answer starts. Too long a prompt loses its beginning."""
    tokenizer = _tokenizer(model)
    room = limit(model, longest)
    left = tokenizer(prompt, add_special_tokens=model.kind == "seq2seq")["input_ids"]
    if model.kind == "causal" and tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        left = [tokenizer.bos_token_id, *left]
    right = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and (end or model.kind == "seq2seq"):
        right = [*right, tokenizer.eos_token_id]
    right = right[: room // 2] if model.kind == "causal" else right[:room]
    keep = room - len(right) if model.kind == "causal" else room
    left = left[-keep:]
    return left + right, len(left)


def windows(model: Model, text: str, longest: int | None) -> list[Row]:
    """A text of any length in windows the model can take, each token scored once."""
    tokenizer = _tokenizer(model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit(model, longest)
    made = []
    for at in range(0, max(len(ids) - 1, 1), room - 1):
        piece = ids[at : at + room]  # overlaps by one token, which is read and not scored
        if len(piece) > 1:
            made.append(Row([piece], [1], None))
    if not made:
        raise DataError(f"a text of {len(ids)} tokens cannot be modelled; at least two are needed: {text[:40]!r}")
    return made


def _tokenizer(model: Model) -> Any:
    if model.kind == "image":
        raise ModelError(f"the image model {model.name!r} cannot read texts; give a task with images, or another base")
    if model.tokenizer is None or not callable(model.tokenizer):
        raise ModelError(f"the model {model.name!r} has no tokenizer; give one: Model(module, processor=tokenizer)")
    return model.tokenizer


def images(model: Model, examples: Sequence[Example]) -> list[Tensor]:
    """Image tensors [3, H, W]: by the model's processor where it has one, else the pixels divided by 255.

    Raises `ModelError` when the model reads texts only.
    """
    from transformers import PreTrainedTokenizerBase

    if isinstance(model.processor, PreTrainedTokenizerBase):
        raise ModelError(
            f"the {model.kind} model {model.name!r} reads texts and cannot read images; give a task with texts, or an image base"
        )
    if model.processor is None:
        import numpy as np

        arrays = [torch.from_numpy(np.asarray(e.pixels()).copy()) for e in examples]
        return [a.permute(2, 0, 1).float() / 255.0 for a in arrays]
    made: list[Tensor] = []
    for at in range(0, len(examples), 64):
        pixels = [e.pixels() for e in examples[at : at + 64]]
        made += list(model.processor(images=pixels, return_tensors="pt")["pixel_values"])
    return made


def padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[S, longest] with ``fill`` on the right."""
    width = max(len(values) for values in lists)
    return torch.tensor([[*values, *[fill] * (width - len(values))] for values in lists])
