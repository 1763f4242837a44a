"""Bottleneck adapters: a small two-layer network after, or beside, the layers of a block.

Shapes: d width of the stream, w width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, MixError, SiteError, listing, nearest
from polytask.core.form import NO_CALL, Bank, Call, Form, Part, Patch, Weights, forms
from polytask.core.site import Site

from ._blocks import BlockPatch

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """A row of settings: where it stands and what it is made of when nobody says otherwise.

    Attributes:
        roles: of the layers after which it stands; a feed-forward's first layers too where it stands beside them.
        beside: it reads the feed-forward's input instead of a layer's output.
        reduction: d / w.
        activation: between both layers.
        scale: of what it adds; ``"channel"`` is learned, one for each channel.
        paper: where it comes from.
    """

    roles: tuple[str, ...]
    beside: bool
    reduction: int
    activation: str
    scale: float | str
    paper: str


FIRST = ("up", "gate_up")
STYLES = {
    "houlsby": Style(("attn_out", "down"), False, 16, "gelu", 1.0, "arXiv 1902.00751"),
    "pfeiffer": Style(("down",), False, 16, "relu", 1.0, "arXiv 2005.00247"),
    "parallel": Style((*FIRST, "down"), True, 2, "relu", 1.0, "arXiv 2110.04366"),
    "scaled-parallel": Style((*FIRST, "down"), True, 2, "relu", 4.0, "arXiv 2110.04366"),
    "adapterplus": Style(("block",), False, 96, "gelu", "channel", "arXiv 2406.06820"),
}


@forms.register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Form):
    """A small network on the stream of a block: ``c = s (W_up f(W_down h + b_down) + b_up)``, zero at the start.

    ``h`` is the output of a layer (``houlsby``: of attention and feed-forward, ``pfeiffer``: of the feed-forward), the
    input of the feed-forward whose output it is added to (``parallel``, ``scaled-parallel``), or a block's output
    (``adapterplus``).

    Args:
        style: the row of settings that the others are taken from where they are None.
        reduction: d / w.
        width: w, instead of a reduction.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.
        scale: s, a number or ``"channel"``: learned, one for each channel.

    Reference: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751; Pfeiffer et al.,
    AdapterFusion, arXiv 2005.00247; He et al., Towards a Unified View of Parameter-Efficient Transfer Learning,
    arXiv 2110.04366; Steitz and Roth, Adapters Strike Back, arXiv 2406.06820. Ours start at exactly zero, where some
    only start near it. The layers' outputs are read before the residual addition; norms after it are not used twice,
    as AdapterHub's ``pfeiffer`` does. Norms are not trained beside it: join it with ``norm`` for that (see ``union``).

    Raises:
        ConfigError: a setting is out of range.
    """

    style: str = "houlsby"
    reduction: int | None = None
    width: int | None = None
    activation: str | None = None
    scale: float | str | None = None

    kinds: ClassVar[tuple[str, ...]] = ("linear", "block")
    default_sites: ClassVar[str] = "attn_out | up | gate_up | down | block"  # the style refuses what is not its own
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_BOTTLENECK"
    paper: ClassVar[str] = "arXiv 1902.00751"

    def __post_init__(self) -> None:
        for name, value, allowed in (("style", self.style, STYLES), ("activation", self.activation, ACTIVATIONS)):
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"Bottleneck: {name} must be one of {listing(allowed)}, got {value!r}{nearest(value, allowed)}"
                )
        for name in ("reduction", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Bottleneck: {name} must be at least 1, got {value!r}")
        if isinstance(self.scale, str) and self.scale != "channel":
            raise ConfigError(f"Bottleneck: scale must be a number or 'channel', got {self.scale!r}")

    @property
    def row(self) -> Style:
        """The settings of the style."""
        return STYLES[self.style]

    @property
    def s(self) -> float | str:
        """The scale, or ``"channel"``."""
        return self.row.scale if self.scale is None else self.scale

    def inner(self, d: int) -> int:
        """w at a stream of width d."""
        return self.width or max(1, d // (self.reduction or self.row.reduction))

    def patch(self, site: Site) -> Patch:
        if site.kind == "block":
            return BlockAdapter(self, site)
        if not self.row.beside:
            return LayerAdapter(self, site)
        return Listener(self, site) if site.role in FIRST else Beside(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason:
            return reason
        row, place = self.row, "block" if site.kind == "block" else site.role
        after = not row.beside and "block" not in row.roles and place not in (*FIRST, "attn_out", "down", "block")
        if place not in row.roles and not after:  # a plain layer that somebody names is as good as another
            return f"the style {self.style!r} of 'bottleneck' stands at {listing(row.roles)}, and {site.name!r} is {place!r}"
        if row.beside and not site.rows:
            return f"site {site.name!r} sees gathered tokens; the style {self.style!r} needs the rows of the batch"
        return ""

    def shared(self, sites: Sequence[Site]) -> Part | None:
        return Heard(self, sites) if self.row.beside else None


class Unit:
    """The network itself, for a patch with ``down``, ``down_bias``, ``up``, ``up_bias`` and perhaps ``s``."""

    form: Any
    _parameters: dict[str, Any]

    @property
    def settings(self) -> Bottleneck:
        """Of the network; a form that has it beside other things says where they are."""
        own: Bottleneck = getattr(self.form, "aside", self.form)
        return own

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        w = self.settings.inner(d)
        own: dict[str, tuple[int, ...]] = {"down": (w, d), "down_bias": (w,), "up": (d, w), "up_bias": (d,)}
        return {**own, "s": (d,)} if self.settings.s == "channel" else own

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        """down Kaiming-uniform, the scales one, everything else zero."""
        for name, own in self._parameters.items():
            own.fill_(1.0 if name == "s" else 0.0)
        down = self._parameters["down"]
        bound = down.shape[1] ** -0.5
        down.uniform_(-bound, bound, generator=generator)

    def network(self, h: Tensor) -> Tensor:
        """What is added, for h [..., d]."""
        own = {name: p.to(h.dtype) for name, p in self._parameters.items()}
        f = ACTIVATIONS[self.settings.activation or self.settings.row.activation]
        out = F.linear(f(F.linear(h, own["down"], own["down_bias"])), own["up"], own["up_bias"])
        scale: Any = own.get("s", self.settings.s)
        return out if isinstance(scale, float) and scale == 1.0 else out * scale


class LayerAdapter(Unit, Patch):
    """After a linear layer: h is the layer's output."""

    def __init__(self, form: Bottleneck, site: Site) -> None:
        Patch.__init__(self, form, site)
        for name, shape in self.shapes(site.d_out).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def start(self, generator: torch.Generator) -> None:
        self.fill(generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return self.network(y)


class BlockAdapter(Unit, BlockPatch):
    """After a block: h is the stream."""

    wide = ("down", 1)

    def sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        return self.shapes(width)

    def start(self, generator: torch.Generator) -> None:
        self.grow()
        self.fill(generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return self.back(self.network(self.rows(y)))


class Heard(Part):
    """What the first layers of the feed-forwards got, until their last layer is reached. It has no parameters.

    Attributes:
        first: the site of the first layer that belongs to a site of a last one.
    """

    def __init__(self, form: Bottleneck, sites: Sequence[Site]) -> None:
        super().__init__(form)
        self.first: dict[str, str] = {}
        last = ""
        for site in sites:
            if site.role in FIRST:
                last = site.name
            elif not last:
                raise SiteError(
                    f"the style {form.style!r} of 'bottleneck' needs the first layer of each feed-forward beside its last, "
                    f"and {site.name!r} is alone; choose both, as in 'up | gate_up | down'"
                )
            else:
                self.first[site.name], last = last, ""
        self.heard: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "heard": {}}  # what is on its way belongs to one forward


class ListenerBank(Bank):
    """Every adapter hears the whole input, whatever its weight."""

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        for patch in self.patches.values():
            patch.contribute(x, y, call)
        return out


class Listener(Patch):
    """At a feed-forward's first layer: remembers its input, adds nothing."""

    bank = ListenerBank

    def __init__(self, form: Bottleneck, site: Site) -> None:
        super().__init__(form, site)
        self.own = site.name  # the model that it is attached to may call it otherwise

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        self.shared.heard[self.own] = x
        return out

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        self.shared.heard[self.own] = x
        return y.new_zeros(()).expand_as(y)


class BesideBank(Bank):
    """As any bank, with the feed-forward's input for the last layer's; it is narrowed to the rows with it."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self.told = [patch.told() for patch in patches.values() if isinstance(patch, Beside)]
        super().__init__(dict(zip(patches, self.told, strict=True)))

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        heard = [h for h in (patch.hear(x) for patch in self.told) if h is not None]  # the same for all
        if not heard:
            raise self.told[0].unheard()
        return super().apply(heard[0], y, out, weights, call)


class Beside(LayerAdapter):
    """At a feed-forward's last layer: h is what its first layer got."""

    bank = BesideBank
    direct = False  # whether x is h already

    def __init__(self, form: Bottleneck, site: Site) -> None:
        super().__init__(form, site)
        self.own = site.name

    def told(self) -> Beside:
        """The same, for a caller that brings h as x."""
        view = self.bound(self.base, self.site)  # type: ignore[arg-type]
        view.__dict__["direct"] = True
        return view

    def hear(self, x: Tensor) -> Tensor | None:
        """h, where it belongs to the same rows and tokens as x."""
        h = self.shared.heard.pop(self.shared.first[self.own], None)
        return h if h is not None and h.shape[:-1] == x.shape[:-1] else None

    def unheard(self) -> MixError:
        return MixError(
            f"the {self.form} at {self.site.name!r} has not got the input of its feed-forward; a mix must let the adapter "
            f"act at {self.shared.first[self.own]!r} too, for the same rows"
        )

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        h = x if self.direct else self.hear(x)
        if h is None:
            raise self.unheard()
        return self.network(h)
