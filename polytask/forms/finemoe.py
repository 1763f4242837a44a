"""A feed-forward as a mixture of many narrow experts, cut from the base's own: fine segments, some of them always on.

Shapes: T tokens, d width of the stream, f width of the feed-forward, w = f / m of an expert, E = m N experts, R = E - shared of
them routed, k = m K - shared chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.balance import Tally, in_rows, load_balance
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms
from polytask.core.site import Site

from ._feedforward import FeedForwards, First, GateLayer, weight_of
from .bottleneck import FIRST, Beside

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.hub import Hub
    from polytask.core.model import Model

ACTIVATION = ("hidden_act", "hidden_activation", "dense_act_fn", "activation_function", "activation")  # in configs


@forms.register("finemoe")
@dataclass(frozen=True)
class FineMoE(Form):
    """In place of a feed-forward, ``sum_shared F_i(x) + sum_chosen g_i F_i(x)``: as many numbers as N dense ones, of which a
    token uses as many as K have.

    Each expert is a segment of f / m hidden units of the base's own feed-forward. The shared ones are the first segments; the
    routed ones are copies of the others, whose rows in the router start the same, so that a token chooses whole copies. The
    weights g are the softmax over all routed experts, taken at the k best and scaled to sum to ``m - shared``: so it starts as
    the base, up to rounding. What it adds is the difference to the base, which is computed too.

    Args:
        experts: N.
        k: K.
        m: segments of a dense feed-forward.
        shared_experts: that every token uses, below m; the other segments' number, ``m - shared``, must divide both
            ``m (N - 1)`` and ``m (K - 1)``.
        balance: of the load-balancing loss of each row, ``sum_i f_i P_i``, that each feed-forward adds to a step's.
        activation: of the feed-forward, by transformers' name; read off the base when empty.
        gated: whether the feed-forward has a gate; read off the base.
        bias: whether its first layer has a bias; read off the base. That of its last stays the base's.

    Reference: Dai et al., DeepSeekMoE, arXiv 2401.06066; Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055. DeepSeek does
    not scale the chosen weights, which would change what the base gives at the start, and counts padding in the loss. Router
    rows that are the same for the segments of a copy are from He et al., Upcycling Large Language Models into Mixture of
    Experts, arXiv 2410.07524.

    Raises:
        ConfigError: a setting is out of range, or the base does not say its activation.
        SiteError: a feed-forward of which only a part is chosen, or whose width m does not divide.
    """

    experts: int = 4
    k: int = 2
    m: int = 2
    shared_experts: int = 1
    balance: float = 0.01
    activation: str = ""
    gated: bool = False
    bias: bool = False

    default_sites: ClassVar[str] = "up | gate | gate_up | down"
    mergeable: ClassVar[bool] = False
    enters: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4
    peft_type: ClassVar[str] = "POLYTASK_FINEMOE"
    paper: ClassVar[str] = "arXiv 2401.06066"
    exceptions: ClassVar[Mapping[str, str]] = {
        "start": "the sum over segments is rounded otherwise than the base's one product; its own test allows for that"
    }

    def __post_init__(self) -> None:
        for name, least in (("experts", 1), ("k", 1), ("m", 1), ("shared_experts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"FineMoE: {name} must be a whole number of at least {least}, got {value!r}")
        if self.k > self.experts:
            raise ConfigError(f"FineMoE: k must be at most experts ({self.experts}), got {self.k!r}")
        if self.balance < 0.0:
            raise ConfigError(f"FineMoE: balance must be at least 0, got {self.balance!r}")
        able = [
            s for s in range(self.m)
            if self.m * (self.experts - 1) % (self.m - s) == 0 == self.m * (self.k - 1) % (self.m - s)
        ]  # fmt: skip
        if self.shared_experts not in able:
            raise ConfigError(
                f"FineMoE: with m={self.m}, experts={self.experts} and k={self.k}, shared_experts must be one of {able}, so that "
                f"the routed experts are whole copies of the other segments; got {self.shared_experts!r}"
            )

    @property
    def segments(self) -> int:
        """Segments of the dense feed-forward that are routed."""
        return self.m - self.shared_experts

    @property
    def routed(self) -> int:
        """R."""
        return self.m * self.experts - self.shared_experts

    @property
    def chosen(self) -> int:
        """k: routed experts that a token uses."""
        return self.m * self.k - self.shared_experts

    def fitted(self, model: Model) -> Form:
        config = getattr(model.module, "config", None)
        places = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
        said = next((v for c in places for n in ACTIVATION if isinstance(v := getattr(c, n, None), str)), "")
        first = [site for site in model.sites if site.kind == "linear" and site.role in FIRST]
        if not (self.activation or said):
            raise ConfigError(
                f"the base {model.name!r} does not say the activation of its feed-forwards; say it (activation='gelu')"
            )
        return replace(
            self,
            activation=self.activation or said,
            gated=any(site.role in ("gate", "gate_up") for site in model.sites),
            bias=any(site.bias for site in first),
        )

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason:
            return reason
        if site.role not in (*FIRST, "gate", "down") or not site.rows or site.read != "call":
            return f"'finemoe' stands in for feed-forwards whose layers see the rows of the batch, and {site.name!r} is none's"
        if site.role == "down" and site.d_in % self.m:
            return f"'finemoe' cuts feed-forwards into {self.m} segments, and {site.name!r} has {site.d_in} units; say another m"
        return ""

    def patch(self, site: Site) -> Patch:
        if site.role == "down":
            return Experts(self, site)
        return First(self, site) if site.role in FIRST else GateLayer(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return FeedForwards(self, sites)

    def made(self, model: Model, patches: Mapping[str, Patch]) -> None:
        for patch in patches.values():
            patch.shared.weights.clear()

    def enter(self, adapter: Adapter, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        assert isinstance(adapter.shared, Tally)
        adapter.shared.begin()

    def penalty(self, adapter: Adapter) -> Tensor | None:
        assert isinstance(adapter.shared, Tally)
        told = adapter.shared.take()
        return None if told is None or not self.balance else self.balance * told


class Experts(Beside):
    """At a feed-forward's last layer. up [E, w, d] (and up_bias [E, w], gate [E, w, d], gate_bias), down [E, d, w], router
    [R, d]; the shared experts come first."""

    form: Any
    down: nn.Parameter
    router: nn.Parameter

    def __init__(self, form: FineMoE, site: Site) -> None:
        Patch.__init__(self, form, site)
        self.own = site.name
        count, d, w = form.m * form.experts, site.d_out, site.d_in // form.m
        shapes: dict[str, tuple[int, ...]] = {"up": (count, w, d), "down": (count, d, w), "router": (form.routed, d)}
        for name in ("up", "gate") if form.gated else ("up",):
            shapes[name] = (count, w, d)
            if form.bias:
                shapes[f"{name}_bias"] = (count, w)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        form, shared = self.form, self.shared
        layers = {"up": shared.weights[shared.first[self.own]]}
        if form.gated:
            if self.own in shared.gates:
                layers["gate"] = shared.weights[shared.gates[self.own]]
            else:  # both in one layer, the gate first
                weight, bias = layers["up"]
                halves = (None, None) if bias is None else bias.chunk(2)
                layers = {n: (w, b) for n, w, b in zip(("gate", "up"), weight.chunk(2), halves, strict=True)}
        copies = form.routed // form.segments
        rest = list(range(form.shared_experts, form.m))
        order = torch.tensor([*range(form.shared_experts), *rest * copies])  # the segment of each expert
        own = dict(self.named_parameters())
        for name, (weight, bias) in layers.items():
            own[name].copy_(weight.unflatten(0, (form.m, -1))[order])
            if form.bias:
                own[f"{name}_bias"].copy_(torch.zeros(()) if bias is None else bias.view(form.m, -1)[order])
        down, _ = weight_of(self)
        self.down.copy_(down.unflatten(1, (form.m, -1)).transpose(0, 1)[order])
        bound = self.site.d_out**-0.5
        rows = torch.empty(copies, self.site.d_out).uniform_(-bound, bound, generator=generator)
        self.router.copy_(rows.repeat_interleave(form.segments, 0))

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        h = x if self.direct else self.hear(x)
        if h is None:
            raise self.unheard()
        bias = getattr(self.base, "bias", None)
        out = self.network(h, call)
        return out - (y if bias is None else y - bias.to(y.dtype))

    def network(self, h: Tensor, call: Call = NO_CALL) -> Tensor:
        """What the experts give for the feed-forward's input [..., d]."""
        form, flat = self.form, h.reshape(-1, h.shape[-1])
        values, index = self.route(h, call)
        values, index = values.reshape(-1, form.chosen).to(h.dtype), index.reshape(-1, form.chosen)
        out = torch.zeros_like(flat)
        for expert in range(form.shared_experts):
            out = out + self.expert(expert, flat)
        for expert in range(form.routed):
            token, place = (index == expert).nonzero(as_tuple=True)
            if len(token):
                part = self.expert(form.shared_experts + expert, flat[token]) * values[token, place, None]
                out = out.index_add(0, token, part)
        return out.view(h.shape)

    def route(self, h: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The weights of the chosen and which they are, [..., k] twice."""
        form = self.form
        scores = F.linear(h.float(), self.router.float())
        probabilities = scores.softmax(-1)
        top, index = probabilities.topk(form.chosen, -1)
        if form.balance and self.shared.open and self.router.requires_grad:
            given, there = in_rows(self.site, probabilities, call)
            self.shared.tell(
                self.own, load_balance(given, index.reshape(*given.shape[:2], -1), there, by_sequence=True)
            )
        return top * (form.segments / top.sum(-1, keepdim=True)), index

    def expert(self, i: int, h: Tensor) -> Tensor:
        """What expert i gives for inputs [T, d]."""
        from transformers.activations import ACT2FN

        act = ACT2FN[self.form.activation]
        own = {name: p[i].to(h.dtype) for name, p in self.named_parameters() if name != "router"}
        inner = F.linear(h, own["up"], own.get("up_bias"))
        hidden = act(F.linear(h, own["gate"], own.get("gate_bias"))) * inner if self.form.gated else act(inner)
        return F.linear(hidden, own["down"])
