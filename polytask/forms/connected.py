"""Connected: adapters of the blocks that form one path beside the frozen network.

Shapes: d width of the stream, w of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Bank, Call, Form, Part, Patch, Weights, forms
from polytask.core.site import Site

from ._blocks import BlockPatch
from .bottleneck import Bottleneck, Unit


@forms.register("connected")
@dataclass(frozen=True)
class Connected(Form):
    """A second, trained stream beside the blocks: ``a_l = a_(l-1) + Aside_l(h_l)``, and ``c_l = gamma_l a_l``.

    ``Aside`` is a bottleneck on what block l returns, with a zero up-projection, so that a new one is the base. The
    stream never passes through frozen weights: every ``Aside`` has a trained path to the last block.

    Args:
        reduction: d / w.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.

    Reference: Ma et al., Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information
    Retrieval, arXiv 2208.09847. The paper's exact wiring was not to be had: this is our reading of its idea. Its modules
    inside the layers are another form's; join them with ``union``.

    Raises:
        ConfigError: a setting is out of range.
    """

    reduction: int = 16
    activation: str = "gelu"

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    default_sites: ClassVar[str] = "kind:block"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_CONNECTED"
    paper: ClassVar[str] = "arXiv 2208.09847"

    def __post_init__(self) -> None:
        try:
            self.aside  # noqa: B018  its own settings are checked there
        except ConfigError as error:
            raise ConfigError(str(error).replace("Bottleneck", "Connected")) from None

    @property
    def aside(self) -> Bottleneck:
        """The settings of ``Aside``."""
        return Bottleneck("adapterplus", self.reduction, activation=self.activation, scale=1.0)

    def patch(self, site: Site) -> Patch:
        return ConnectedPatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return Path(self, sites)


class Path(Part):
    """How the blocks follow one another, and how far the stream has come. It has no parameters.

    Attributes:
        before: the site that comes before another one in the same stack; "" before the first.
        stream: a_l by site, of the last forward.
    """

    def __init__(self, form: Connected, sites: Sequence[Site]) -> None:
        super().__init__(form)
        last: dict[str, str] = {}
        self.before: dict[str, str] = {}
        for site in sites:
            stack = site.name.rpartition(".")[0]
            self.before[site.name], last[stack] = last.get(stack, ""), site.name
        self.stream: dict[str, Tensor] = {}

    def empty(self, first: str) -> None:
        """Before the first block of a stack: nothing of the last forward is met."""
        stack = first.rpartition(".")[0]
        for name in [name for name in self.stream if name.rpartition(".")[0] == stack]:
            del self.stream[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": {}}  # what is on its way belongs to one forward


class ConnectedBank(Bank):
    """The streams of all adapters flow for all rows, whatever their weights; what they add is narrowed."""

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        for name, patch in self.patches.items():
            part = patch.contribute(x, y, call)
            out = Bank({name: Ready(patch)}).apply(part, y, out, weights, call)
        return out


class Ready(Patch):
    """Stands for a patch whose contribution is known: the input."""

    def __init__(self, patch: Patch) -> None:
        super().__init__(patch.form, patch.site)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return x


class ConnectedPatch(Unit, BlockPatch):
    """The bottleneck, and gamma [1]."""

    gamma: nn.Parameter
    bank = ConnectedBank
    wide = ("down", 1)

    def __init__(self, form: Connected, site: Site) -> None:
        super().__init__(form, site)
        self.own = site.name  # the model that it is attached to may call it otherwise

    def sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {**self.shapes(width), "gamma": (1,)}

    def start(self, generator: torch.Generator) -> None:
        self.grow()
        self.fill(generator)
        with torch.no_grad():
            self.gamma.fill_(1.0)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        path: Path = self.shared
        before = path.before[self.own]
        if not before:
            path.empty(self.own)
        a = self.back(self.network(self.rows(y)))
        come = path.stream.get(before) if before else None
        if come is not None and come.shape == a.shape:
            a = come + a
        path.stream[self.own] = a
        return self.gamma.to(a.dtype) * a
