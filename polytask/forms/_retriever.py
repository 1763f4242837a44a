"""Which task an input is of, by the nearest prototype: the losses that a retriever learns from, and what it looks at.

Shapes: n inputs, T tasks, e embedding, d width of the base's vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from polytask.core.model import Model


def instances(r: Tensor, task: Tensor, temperature: float) -> Tensor:
    """Supervised InfoNCE among inputs r [n, e]: the mean of ``-log p(j | i)`` over the j of i's task [n], then over i.

    ``p(j | i)`` is a softmax of ``cos / temperature`` over all others. An input alone with its task does not count.
    """
    unit = F.normalize(r, dim=1)
    itself = torch.eye(len(r), dtype=torch.bool, device=r.device)
    scores = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    alike = (task[:, None] == task) & ~itself
    found = scores.log_softmax(1).masked_fill(~alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    return -found.sum() / alike.any(1).sum().clamp(min=1)


def prototypes(r: Tensor, z: Tensor, task: Tensor, temperature: float, exclude: bool = True) -> Tensor:
    """The mean of ``-log(exp(s_own) / sum exp(s))`` with ``s = cos(r, z) / temperature`` for prototypes z [T, e].

    With ``exclude`` the sum is over the prototypes of other tasks only, and the loss may be negative.
    """
    scores = F.normalize(r, dim=1) @ F.normalize(z, dim=1).T / temperature  # [n, T]
    own = scores.gather(1, task[:, None])
    others = scores.scatter(1, task[:, None], -torch.inf) if exclude else scores
    return (others.logsumexp(1) - own.squeeze(1)).mean()


@torch.no_grad()
def described(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """The bare base's vector of each input [n, d]; of a text that goes on with its answer, the part before it."""
    from polytask.core.model import pool

    inputs = {key: value for key, value in batch.items() if key != "labels" and not key.startswith("decoder_")}
    mask = inputs.get("attention_mask")
    with model.using(None):
        if model.kind == "seq2seq":
            return pool(model.module.get_encoder()(**inputs), mask, "mean")  # type: ignore[operator]
        if "labels" in batch and mask is not None:
            before = (mask * (batch["labels"] == -100)).to(mask.dtype)
            inputs["attention_mask"] = torch.where(before.any(1, keepdim=True), before, mask)
        return model.features(inputs)
