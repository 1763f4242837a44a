"""LEVI: the base's states at many depths, each beside a small model of the task that knows nothing else, averaged.

Shapes: B rows, T tokens, d width of a state, s width of the small model, r width of what is made of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Call, Form, Part, Patch, forms
from polytask.core.site import Site

from .side import Beside, Reader, Side, like


@forms.register("levi")
@dataclass(frozen=True)
class LEVI(Form):
    """An ensemble over depths: ``c(y_L) = U sum_l w_l relu(M_l [y_l; z])``, z a small model's view of the embeddings.

    ``z = relu(S_2 relu(S_1 y_0))`` is started at random and learns from the task alone, so that what the base has learned
    too specially can be outvoted; ``w = softmax(depth)`` is learned per stack. It reads and adds where `Side` does, and
    the base keeps no activations either. U is zero at the start, so it starts as the base.

    Args:
        rank: r, the width of what is made of a state.
        width: s, the width of the small model.

    Reference: Roh et al., LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views, arXiv 2402.04644,
    where each depth predicts and is scored by itself; here their sum is added to the last state. The small model sees one
    token at a time, so it is causal.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 32
    width: int = 64

    kinds: ClassVar[tuple[str, ...]] = Side.kinds
    default_sites: ClassVar[str] = Side.default_sites
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_LEVI"
    default_lr: ClassVar[float] = 1e-3
    paper: ClassVar[str] = "arXiv 2402.04644"
    tensor_names: ClassVar[dict[str, str]] = {"levi.own": "own", "levi.small": "small"}

    def __post_init__(self) -> None:
        for name in ("rank", "width"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"LEVI: {name} must be a whole number of at least 1, got {value!r}")

    def refuses(self, site: Site) -> str:
        return super().refuses(site) or Side().refuses(site)

    def patch(self, site: Site) -> Patch:
        return LEVIPatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return LEVINetwork(self, sites)


class LEVINetwork(Beside):
    """The small model, U and the depths' weights of each stack."""

    def __init__(self, form: LEVI, sites: Sequence[Site]) -> None:
        super().__init__(form, sites)
        for g, stack in enumerate(self.stacks):
            self.register_parameter(f"first{g}", nn.Parameter(torch.empty(form.width, stack[0].shape[0])))
            self.register_parameter(f"second{g}", nn.Parameter(torch.empty(form.width, form.width)))
            self.register_parameter(f"up{g}", nn.Parameter(torch.empty(stack[-1].shape[0], form.rank)))
            self.register_parameter(f"depth{g}", nn.Parameter(torch.empty(len(stack))))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                assert parameter is not None
                if name.startswith(("up", "depth")):
                    parameter.zero_()
                else:
                    parameter.normal_(std=(2.0 / parameter.shape[1]) ** 0.5, generator=generator)

    def weights(self) -> dict[str, float]:
        """How much each site counts in its stack."""
        found = {}
        for g, stack in enumerate(self.stacks):
            shares = self._parameters[f"depth{g}"].detach().softmax(0)  # type: ignore[union-attr]
            found |= {site.name: share for site, share in zip(stack, shares.tolist(), strict=True)}
        return found


class LEVIPatch(Reader):
    """M_l, as its part for the state [r, d] and its part for the small model [r, s]."""

    keys = {"own": "levi.own", "small": "levi.small"}

    def __init__(self, form: LEVI, site: Site) -> None:
        super().__init__(form, site)
        self.own = nn.Parameter(torch.empty(form.rank, site.shape[0]))
        self.small = nn.Parameter(torch.empty(form.rank, form.width))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for parameter in (self.own, self.small):
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)

    def read(self, y: Tensor, seen: dict[int, Tensor]) -> Tensor:
        group, position, _ = self.shared.places[self.site.name]
        if position == 0:
            first, second = (self.shared._parameters[f"{n}{group}"].to(y.dtype) for n in ("first", "second"))
            seen[SMALL] = F.linear(F.linear(y, first).relu(), second).relu()
        elif SMALL not in seen:
            raise AdapterError(
                f"{self.site.name!r} was reached before the first site of its stack, which LEVI starts from"
            )
        view = like(seen[SMALL], y, self.site.name)
        return (F.linear(y, self.own.to(y.dtype)) + F.linear(view, self.small.to(y.dtype))).relu()

    def joined(self, states: list[Tensor], group: int, call: Call) -> Tensor:
        up, depth = (self.shared._parameters[f"{n}{group}"].to(states[-1].dtype) for n in ("up", "depth"))
        weights = depth.softmax(0)
        states = states[1:]  # past the small model's
        if len(states) != len(weights):
            raise AdapterError(
                f"LEVI at {self.site.name!r} joins {len(weights)} depths, and this forward reached {len(states)}"
            )
        total = sum(weight * state for weight, state in zip(weights, states, strict=True))
        return F.linear(total, up)  # type: ignore[arg-type]


SMALL = -1  # what the small model says is kept like a state, before the first
