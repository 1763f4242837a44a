"""A side network: it reads the frozen base's states at several depths and adds to the last, so no gradient enters the base.

Shapes: B rows, T tokens, d width of a state, r width of the side network, n states that are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, MixError
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms
from polytask.core.site import Site


@forms.register("side")
@dataclass(frozen=True)
class Side(Form):
    """Fuses states of all depths beside the base: ``c(y_L) = U relu(z_L + LN(P sum_l w_l z_l))``, ``z_l = LN(D_l y_l)``.

    ``w = softmax_l(v . (z_L * z_l))`` says how much each depth counts. It reads the outputs y of the norms of a stack,
    cut off from gradients, and adds at the stack's last norm; the sites before it contribute nothing. So a step keeps the
    activations of the side network only. U is zero at the start, so it starts as the base. An encoder and a decoder have
    a side network each.

    Args:
        rank: r, the width of the side network.
        attend: whether each state's tokens are gathered by their likeness to the last state's before they are fused:
            ``(l1(relu(z_L z_l^T)) + 1) z_l``. Every token sees every other, so only for bases that are not causal.

    Reference: Diao et al., UniPT: Universal Parallel Tuning, arXiv 2308.14316. There the states are the blocks' outputs,
    attention is always on, and the result replaces the base's; where stages differ in their tokens ours takes their mean.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 32
    attend: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    default_sites: ClassVar[str] = "norm & !re:(q|k|query|key)_?(norm|layernorm)"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_SIDE"
    default_lr: ClassVar[float] = 1e-3
    paper: ClassVar[str] = "arXiv 2308.14316"
    tensor_names: ClassVar[dict[str, str]] = {"side.down": "down"}

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 2):
            raise ConfigError(f"Side: rank must be a whole number of at least 2, got {self.rank!r}")

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and (len(site.shape) != 1 or site.read != "call" or not site.rows):
            return f"site {site.name!r} is no norm that is called on states of the batch's rows"
        return reason

    def patch(self, site: Site) -> Patch:
        return SidePatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return SideNetwork(self, sites)


def stacks(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of each stack of blocks in the order in which they act, as far as paths tell.

    Sites outside of blocks belong to the stack whose path begins most like theirs (the last such), before its blocks
    where they belong to the embeddings, else after them.
    """

    def place(site: Site) -> str | None:
        found = re.match(r"(.*?)\.?\d+(\.|$)", site.path)
        return found[1] if found else None

    def common(a: str, b: str) -> int:
        pairs = list(zip(a.split("."), b.split("."), strict=False))
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))

    groups: dict[str, list[Site]] = {p: [] for p in map(place, sites) if p is not None} or {"": []}
    early: dict[str, list[Site]] = {p: [] for p in groups}
    late: dict[str, list[Site]] = {p: [] for p in groups}
    for site in sites:
        own = place(site)
        if own is not None:
            groups[own].append(site)
            continue
        nearest = max(reversed(groups), key=lambda p: common(p, site.path))
        (early if re.search(r"emb|patch|pre_", site.path) else late)[nearest].append(site)
    return [early[p] + groups[p] + late[p] for p in groups]


class Beside(Part):
    """What joins the states of each stack, and the states of the forward that runs.

    Attributes:
        stacks: the sites of each stack.
        places: by site, its stack, its position there, and whether it is the last.
        seen: what the sites of a stack have read in the forward that runs, by position; taken away by the last.
    """

    def __init__(self, form: Form, sites: Sequence[Site]) -> None:
        super().__init__(form)
        self.stacks = stacks(sites)
        self.places: dict[str, tuple[int, int, bool]] = {}
        self.seen: dict[int, dict[int, Tensor]] = {}
        for g, stack in enumerate(self.stacks):
            self.places |= {site.name: (g, i, i == len(stack) - 1) for i, site in enumerate(stack)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": {}}  # a copy does not take part in the forward that runs


class SideNetwork(Beside):
    """U, P and v of each stack."""

    def __init__(self, form: Side, sites: Sequence[Site]) -> None:
        super().__init__(form, sites)
        for g, stack in enumerate(self.stacks):
            self.register_parameter(f"up{g}", nn.Parameter(torch.empty(stack[-1].shape[0], form.rank)))
            self.register_parameter(f"join{g}", nn.Parameter(torch.empty(form.rank, form.rank)))
            self.register_parameter(f"ask{g}", nn.Parameter(torch.empty(form.rank)))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                assert parameter is not None
                if name.startswith("up"):
                    parameter.zero_()
                else:
                    parameter.normal_(std=self.form.rank**-0.5, generator=generator)


class Reader(Patch):
    """One state that is read: give ``read`` what it makes of the state, and ``joined`` what the last site adds."""

    form: Any

    def read(self, y: Tensor, seen: dict[int, Tensor]) -> Tensor:
        """What is remembered of a state [..., d] (without gradients), beside what was ``seen`` before it."""
        raise NotImplementedError

    def joined(self, states: list[Tensor], group: int, call: Call) -> Tensor:
        """What is added at the last site [..., d], from all that its stack remembers; the last is its own."""
        raise NotImplementedError

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if self.shared.places[self.site.name][2]:
            return super().add(x, y, out, weight, call)
        self._remember(y)
        return out

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        seen = self._remember(y)
        group, position, last = self.shared.places[self.site.name]
        if not last:
            return y.new_zeros(1).expand_as(y)
        del self.shared.seen[group]
        own = seen[position]
        states = [like(state, own, self.site.name) for _, state in sorted(seen.items())]
        done = self.joined(states, group, call)
        return done.movedim(-1, 1) if self._channels_first(y) else done

    def _remember(self, y: Tensor) -> dict[int, Tensor]:
        group, position, _ = self.shared.places[self.site.name]
        if position == 0:
            self.shared.seen[group] = {}
        seen: dict[int, Tensor] = self.shared.seen.setdefault(group, {})
        y = y.detach()
        seen[position] = self.read(y.movedim(1, -1) if self._channels_first(y) else y, seen)
        return seen

    def _channels_first(self, y: Tensor) -> bool:
        return y.dim() > 2 and (isinstance(self.base, _CHANNELS_FIRST) or y.shape[-1] != self.site.shape[0])


class SidePatch(Reader):
    """D [r, d] of one state."""

    keys = {"down": "side.down"}

    def __init__(self, form: Side, site: Site) -> None:
        super().__init__(form, site)
        self.down = nn.Parameter(torch.empty(form.rank, site.shape[0]))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.down.normal_(std=self.site.shape[0] ** -0.5, generator=generator)

    def read(self, y: Tensor, seen: dict[int, Tensor]) -> Tensor:
        return F.layer_norm(F.linear(y, self.down.to(y.dtype)), (self.form.rank,))

    def joined(self, states: list[Tensor], group: int, call: Call) -> Tensor:
        z, own = states[-1], self.shared._parameters
        up, join, ask = (own[f"{name}{group}"].to(z.dtype) for name in ("up", "join", "ask"))
        if self.form.attend and z.dim() == 3:
            states = [_gathered(state, z, call.mask) for state in states]
        read = torch.stack(states)  # [n, B, T, r]
        weights = ((read * z) @ ask).softmax(0).unsqueeze(-1)
        fused = F.layer_norm(F.linear((weights * read).sum(0), join), (self.form.rank,))
        return F.linear((z + fused).relu(), up)


def like(state: Tensor, z: Tensor, where: str) -> Tensor:
    """A state [B, ..., r] with the tokens of ``z``: as it is, or its mean where its tokens are others.

    Raises:
        MixError: it has other rows.
    """
    if state.shape[0] != z.shape[0]:
        raise MixError(
            f"a network beside the base got {state.shape[0]} rows at one depth and {z.shape[0]} at {where!r}; a mix must "
            "give it the same rows at every site"
        )
    if state.dim() > z.dim():
        state = state.flatten(z.dim() - 1, -2).mean(-2)  # heads of a token
    if state.shape[1:-1] == z.shape[1:-1]:
        return state
    mean = state.flatten(1, -2).mean(1)  # [B, r]
    return mean.view(len(mean), *[1] * (z.dim() - 2), -1).expand(*z.shape[:-1], -1)


def _gathered(state: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    likeness = (z @ state.transpose(1, 2)).relu()  # [B, T, T]
    if mask is not None and mask.shape == z.shape[:2]:
        likeness = likeness * mask[:, None].to(z.dtype)
    return state + F.normalize(likeness, p=1.0, dim=-1, eps=1e-6) @ state


_CHANNELS_FIRST = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
