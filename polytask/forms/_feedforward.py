"""The layers of a feed-forward that belong together, for forms that stand in for the whole of it.

Shapes: i = d_in, o = d_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polytask.core.balance import Tally
from polytask.core.errors import SiteError
from polytask.core.form import NO_CALL, Call, Patch
from polytask.core.site import Site

from .bottleneck import FIRST, Listener


class FeedForwards(Tally):
    """Which layers belong together, and what a forward has told so far. It has no parameters.

    Attributes:
        first: the site of the first layer that belongs to a site of a last one.
        gates: the site of the gate, where that is a layer of its own.
        heard: what first layers got, until their last one is reached.
        weights: of the layers before the last, [o, i], and their biases, while the experts start.
    """

    def __init__(self, form: Any, sites: Sequence[Site]) -> None:
        super().__init__(form)
        self.first: dict[str, str] = {}
        self.gates: dict[str, str] = {}
        self.heard: dict[str, Tensor] = {}
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        first = gate = ""
        for site in sites:
            if site.role == "gate":
                gate = site.name
            elif site.role in FIRST:
                first = site.name
            elif not first:
                raise SiteError(
                    f"{form.name!r} needs all layers of a feed-forward, and {site.name!r} is without its first; choose all, as "
                    "'up | gate | gate_up | down'"
                )
            else:
                self.first[site.name], first = first, ""
                if gate:
                    self.gates[site.name], gate = gate, ""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "heard": {}, "weights": {}}


def weight_of(patch: Patch) -> tuple[Tensor, Tensor | None]:
    """The weight of the patch's module as [o, i], and its bias."""
    own: Any = patch.base
    weight: Tensor = own._parameters["weight"].detach()
    if not weight.is_floating_point():
        raise SiteError(
            f"{patch.form.name!r} copies weights, and those of {patch.site.name!r} are quantised; give a base that is not"
        )
    bias = own._parameters.get("bias")
    return weight.T if patch.site.transposed else weight, None if bias is None else bias.detach()


class First(Listener):
    """At a feed-forward's first layer: remembers its input, and its weight while the experts start."""

    def __init__(self, form: Any, site: Site) -> None:
        super().__init__(form, site)

    def start(self, generator: torch.Generator) -> None:
        self.shared.weights[self.own] = weight_of(self)


class GateLayer(Patch):
    """At a feed-forward's gate: its weight while the experts start. It adds nothing."""

    def start(self, generator: torch.Generator) -> None:
        self.shared.weights[self.site.name] = weight_of(self)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        return out

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return y.new_zeros(()).expand_as(y)
