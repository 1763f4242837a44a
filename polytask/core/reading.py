"""What a base reads of examples, and one vector of what it makes of them.

Shapes: B rows, T tokens, d the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import MixError
from .form import Call
from .hub import INPUTS, Hub, calling
from .model import Model, pool
from .rows import images, padded, prompted, tokens
from .task import Example, Task

MOVED = ("input_ids", "token_type_ids", "attention_mask")  # what `packed` moves along the tokens


def inputs_of(model: Model, task: Task, examples: Sequence[Example], longest: int | None = None) -> dict[str, Tensor]:
    """What the base reads of some examples: images, texts, or prompts for bases that write, of ``longest`` tokens at most (of
    a prompt the last ones, as where it learns). Raises `ModelError`."""
    if task.modality == "image":
        name = "pixel_values" if model.kind == "dual" else getattr(model.module, "main_input_name", "pixel_values")
        return {name: torch.stack(images(model, examples)).to(model.device, model.dtype)}
    generative = model.kind in ("causal", "seq2seq")
    texts = [(prompted(task.instruction, e.inputs),) if generative else e.inputs for e in examples]
    return texts_of(model, texts, longest, "left" if generative else "right")


def texts_of(
    model: Model, texts: Sequence[tuple[str, ...]], longest: int | None = None, loses: str = "right"
) -> dict[str, Tensor]:
    """The tensors of texts, or of pairs, cut as in `rows.tokens` and padded on the right. Raises `ModelError` where the base
    cannot read texts."""
    ids, types = tokens(model, texts, longest, loses)
    fill = getattr(model.tokenizer, "pad_token_id", None) or 0
    batch = {"input_ids": padded(ids, fill), "attention_mask": padded([[1] * len(i) for i in ids], 0)}
    if any(any(t) for t in types):
        batch["token_type_ids"] = padded(types, 0)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def means(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over each row's real tokens of the bare base's last hidden states, [B, d] in fp32; of an encoder-decoder the
    encoder's."""
    if model.kind == "seq2seq":
        backbone: Any = model.module.get_encoder()  # type: ignore[operator]
    else:
        backbone = getattr(model.module, "base_model", model.module)
    mask, rows = batch.get("attention_mask"), len(next(iter(batch.values())))
    with torch.no_grad(), model.using(None), calling(model._hub, Call(mask=mask, rows=rows)):
        given = {name: batch[name] for name in INPUTS if name in batch}
        return pool(backbone(**given), mask, "mean").float()


def means_of(hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
    """`means` of the inputs of a forward, for mixes that look at the whole input before they act. Raises `MixError`."""
    given = packed({name: inputs[name] for name in INPUTS if inputs.get(name) is not None})
    if not given:
        raise MixError(
            f"the mix reads the whole input with the base, and found none of {', '.join(INPUTS)} in this forward; give the "
            "model one of those"
        )
    return pool(hub.read(given, call), given.get("attention_mask"), "mean").float()


def packed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with each row's real tokens first, as `texts_of` makes them: where the padding was does not matter then."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is None or ids is None or mask.shape != ids.shape or bool(mask.all()):
        return dict(inputs)
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    moved = {
        name: value.gather(1, order) for name, value in inputs.items() if name in MOVED and value.shape == ids.shape
    }
    kept = {name: value for name, value in inputs.items() if name not in (*MOVED, "position_ids")}
    return {**kept, **moved}
