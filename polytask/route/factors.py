"""Averages of the factors of LoRAs: by heads for each row, and once for all.

Shapes: B rows, H heads, N adapters, r rank, i = d_in, o = d_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import MixError
from polytask.core.form import Patch, per_row


def by_heads(patches: Sequence[Any], values: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """``out`` plus what LoRAs give whose factors are averaged with weights for each head.

    Args:
        patches: N plain ones, of one rank, at a linear site.
        values: [B, H, N] or [H, N].
        x: [B, ..., i].
        out: [B, ..., o].

    Raises:
        MixError: their ranks differ.
    """
    site, heads = patches[0].site.name, values.shape[-2]
    plain = [patch.plain() if hasattr(patch, "plain") else patch for patch in patches]
    ranks = sorted({len(patch.A) for patch in plain})
    if len(ranks) > 1:
        raise MixError(f"LoRAs of the ranks {ranks} cannot be averaged at {site!r}; use a mix that combines outputs")
    if plain[0].form.dropout and patches[0].dropping:  # the average is one LoRA, and draws one mask
        x = F.dropout(x, plain[0].form.dropout, training=True)
    A = torch.stack([p.A.unflatten(1, (heads, -1)) for p in plain]).to(out.dtype)  # [N, r, H, i/H]
    B = torch.stack([(p.B * p.form.scale).unflatten(0, (heads, -1)) for p in plain]).to(out.dtype)  # [N, H, o/H, r]
    A = torch.einsum("...hn,nrhd->...rhd", values, A).flatten(-2)  # [..., r, i]
    B = torch.einsum("...hn,nhdr->...hdr", values, B).flatten(-3, -2)  # [..., o, r]
    if values.dim() == 2:
        return out + F.linear(F.linear(x.to(A.dtype), A), B)
    x, out, _ = per_row(x, out, len(values), site)
    h = torch.bmm(x.reshape(len(values), -1, x.shape[-1]).to(A.dtype), A.transpose(1, 2))  # [B, T, r]
    return out + torch.bmm(h, B.transpose(1, 2)).view(out.shape)


@torch.no_grad()
def mean_of(adapters: Mapping[str, Adapter]) -> Adapter:
    """One LoRA whose factors are the means of those of several: ``A = mean A_n``, ``s B = mean s_n B_n``.

    Where an adapter has no patch, the mean is that of the others.

    Raises:
        MixError: an adapter is no LoRA, or their ranks differ.
    """
    patches: dict[str, Patch] = {}
    for place in dict.fromkeys(place for adapter in adapters.values() for place in adapter.patches):
        own = {name: adapter.patches[place] for name, adapter in adapters.items() if place in adapter.patches}
        thin = {name: patch.thin() for name, patch in own.items()}
        odd = [name for name, pair in thin.items() if pair is None]
        if odd:
            raise MixError(f"the factors of LoRAs are averaged, and {odd[0]!r} is none at {place!r}")
        pairs = [pair for pair in thin.values() if pair is not None]
        if len({len(A) for _, A in pairs}) > 1:
            each = ", ".join(f"{name} ({pair[1].shape[0]})" for name, pair in thin.items() if pair is not None)
            raise MixError(f"LoRAs of different rank cannot be averaged at {place!r}: {each}")
        first = next(iter(own.values()))
        form = _plain(first.form)
        patch = patches[place] = form.patch(first.site)
        B = torch.stack([B for B, _ in pairs]).mean(0) / form.scale
        A = torch.stack([A for _, A in pairs]).mean(0)
        patch.load({"A": A.reshape(patch.A.shape), "B": B.reshape(patch.B.shape)})
    one = next(iter(adapters.values()))
    card = Card(base=dict(one.card.base), parents=[adapter.hash for adapter in adapters.values()])
    return Adapter(_plain(one.form), patches, card=card, name="mean")


def _plain(form: Any) -> Any:
    """The plain LoRA of a form whose patches have thin factors."""
    return form.in_file
