"""Small networks inside gates: linear layers with ReLU and dropout between them, as parameters of a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.form import Part
from polytask.core.gate import learning
from polytask.core.site import Site

READS = ("query", "key", "value", "qkv", "up", "gate", "gate_up")  # layers that read the stream of a block
WRITES = ("attn_out", "down")


def grow(part: Part, widths: Sequence[int]) -> None:
    """Gives a part the empty parameters W0 [widths[1], widths[0]], b0 [widths[1]], W1, and so on."""
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        part.register_parameter(f"W{i}", nn.Parameter(torch.zeros(after, before)))
        part.register_parameter(f"b{i}", nn.Parameter(torch.zeros(after)))


@torch.no_grad()
def fill(part: Part, generator: torch.Generator) -> None:
    """Values as ``nn.Linear`` starts with: uniform within one over the root of a layer's inputs."""
    for i in range(len(part._parameters) // 2):
        W, b = part.get_parameter(f"W{i}"), part.get_parameter(f"b{i}")
        for own in (W, b):
            own.uniform_(-(W.shape[1] ** -0.5), W.shape[1] ** -0.5, generator=generator)


def through(part: Part, x: Tensor, dropout: float = 0.0) -> Tensor:
    """[..., widths[0]] to [..., widths[-1]], in the parameters' precision; dropout while they learn."""
    last = len(part._parameters) // 2 - 1
    x = x.to(part.get_parameter("W0").dtype)
    for i in range(last + 1):
        x = F.linear(x, part.get_parameter(f"W{i}"), part.get_parameter(f"b{i}"))
        if i < last:
            x = F.dropout(F.relu(x), dropout, training=learning(part))
    return x


def stream(sites: Iterable[Site]) -> int:
    """The width of the vectors between the blocks, from layers that read or write them; 0 where none does."""
    for site in sites:
        if site.kind == "linear" and site.role in READS:
            return site.d_in
        if site.kind == "linear" and site.role in WRITES:
            return site.d_out
    return 0


def vectors(site: Site) -> bool:
    """Whether a site gives one vector of a known width, ``site.d_out``, for each token."""
    return site.kind in ("linear", "embedding", "norm")
