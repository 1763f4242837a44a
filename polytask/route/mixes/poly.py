"""Polytropon and its kin: an inventory of skills that tasks share, and for each task how much of each it takes.

Shapes: B rows, T tasks, H heads, N skills, r rank, i = d_in, o = d_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.by_task import check_tasks, places
from polytask.core.errors import ConfigError
from polytask.core.form import Call, Part, Patch, Weights
from polytask.core.gate import Gate, Hosts, Router, by_row, routers
from polytask.core.mix import act
from polytask.core.site import Site
from polytask.route.by_task import block_of
from polytask.route.factors import by_heads, mean_of

BOUND, EPS = 1e-3, 1e-12


@routers.register("poly")
@dataclass(frozen=True)
class Poly(Router):
    """Each task takes its share of each skill: ``w = p / sum(p)``, ``p = sigmoid(Z_task)``; the skills' factors are averaged.

    While it learns, ``p = sigmoid(Z_task + ln u - ln(1 - u))`` with u uniform, drawn for each row and site, so that skills are
    switched on and off. Rows of other tasks, and rows without one, take all skills alike.

    Args:
        tasks: those with a row of Z; those that are learned when empty. With none at all there is one row, for everything.
        share: what has a Z of its own: each site (``finegrained``), each block (``layer``), or the model (``all``).
        noise: whether skills are switched at random while it learns.

    Reference: Ponti et al., Combining Modular Skills in Multitask Learning, arXiv 2202.13914. As there, Z starts uniformly within
    0.001 and learns at 100 times the rate. Skills keep their own scale (alpha / r), where the authors' code has 1 / r; the prior
    over Z is left out.

    Raises:
        ConfigError: a setting is out of range.
    """

    tasks: tuple[str, ...] = ()
    share: Literal["finegrained", "layer", "all"] = "finegrained"
    noise: bool = True

    combines: ClassVar[Any] = "parameters"
    reads: ClassVar[Any] = "task"
    trains: ClassVar[Any] = "gates and adapters"
    paper: ClassVar[str] = "arXiv 2202.13914"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks) if not isinstance(self.tasks, str) else self.tasks)
        check_tasks(self.name, self.tasks)
        if self.share not in ("finegrained", "layer", "all"):
            raise ConfigError(f"{self.name}: share must be one of finegrained, layer, all, got {self.share!r}")

    @property
    def blocks(self) -> int:
        """H."""
        return 1

    def passed(self) -> dict[str, Any]:
        return {"share": self.share, "heads": self.blocks}

    def told(self, tasks: Sequence[str]) -> Router:
        return self if self.tasks else replace(self, tasks=tuple(tasks))

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return SkillGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        return None if self.share == "finegrained" else SkillShared(self, sites, names)

    def rate(self, name: str) -> float:
        return 100.0

    def logits(self, skills: int) -> nn.Parameter:
        """An empty Z [T, H, N]."""
        return nn.Parameter(torch.zeros(max(1, len(self.tasks)), self.blocks, skills))

    def facts(self, adapters: Mapping[str, Adapter], gates: Sequence[Any], shared: Any) -> dict[str, Any]:
        found = {}
        for i, task in enumerate(self.tasks or ("all",)):
            sums = dict.fromkeys(adapters, 0.0)
            for gate in gates:
                shares = gate.shares(gate.logits[i]).detach().mean(0)
                for name, value in zip(gate.names, shares.tolist(), strict=True):
                    sums[name] += value / len(gates)
            found[task] = {name: round(value, 4) for name, value in sums.items()}
        return {"shares of the skills": found}


@routers.register("mhr")
@dataclass(frozen=True)
class MHR(Poly):
    """As ``poly``, with shares for each of H heads: each skill's factors are split in H blocks of inputs and of outputs.

    Head q averages the blocks ``A^q`` [r, i / H] and ``B^q`` [o / H, r] with its own w; the rank is common to all.

    Args:
        tasks, share, noise: as for ``poly``.
        heads: H, which must divide the inputs and outputs of a site; 1 is ``poly``.

    Reference: Caccia et al., Multi-Head Adapter Routing for Cross-Task Generalization, arXiv 2211.03831, which has 64 heads on
    models of width 2048 and more, rank 1, and as its default no noise.

    Raises:
        ConfigError: a setting is out of range.
        MixError: the heads do not divide a site, or an adapter there is no plain LoRA.
    """

    heads: int = 8

    paper: ClassVar[str] = "arXiv 2211.03831"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("heads", 1, whole=True)

    @property
    def blocks(self) -> int:
        return self.heads

    def refuses(self, site: Site, patches: Mapping[str, Patch]) -> str:
        reason = super().refuses(site, patches)
        if reason or self.heads == 1:
            return reason
        if site.kind != "linear":
            return f"the router {self.name!r} with {self.heads} heads splits linear layers, not sites of kind {site.kind!r}"
        if site.d_in % self.heads or site.d_out % self.heads:
            return f"the {self.heads} heads of the router {self.name!r} do not divide {site.d_in} inputs and {site.d_out} outputs"
        odd = [name for name, patch in patches.items() if patch.thin() is None]
        return f"the router {self.name!r} splits the factors of LoRAs, and {odd[0]!r} is none" if odd else ""


@routers.register("mhr-z")
@dataclass(frozen=True)
class MHRZ(MHR):
    """New tasks on an inventory whose skills stay as they are: only fresh rows of Z learn.

    Give `polytask.route` a mixture that ``poly`` or ``mhr`` learned (or its folder, or its mix), or adapters, and the new tasks.
    Its heads, and what shares a Z, are the inventory's.

    Args:
        tasks, share, noise, heads: as for ``mhr``.

    Reference: Caccia et al., arXiv 2211.03831.

    Raises:
        ConfigError: as for ``mhr``.
    """

    trains: ClassVar[Any] = "gates"


@routers.register("mhr-mu")
@dataclass(frozen=True)
class MHRMu(Router):
    """New tasks from the middle of an inventory: all skills alike, ``w = 1 / N``, which then learn.

    `polytask.route` averages the factors first, so that one adapter of the size of one skill, ``mean``, learns and is left; a
    mixture that starts fresh learns all of its skills.

    Reference: Caccia et al., arXiv 2211.03831, whose authors keep the N skills while they learn. Both start as the same function.

    Raises:
        MixError: adapters that are no LoRAs of one rank.
    """

    combines: ClassVar[Any] = "parameters"
    trains: ClassVar[Any] = "adapters"
    paper: ClassVar[str] = "arXiv 2211.03831"

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return MeanGate(self, site, names)

    def gathered(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
        return {"mean": mean_of(adapters)}


class SkillShared(Part):
    """Z [T, H, N] of each block, or of the model."""

    def __init__(self, router: Poly, sites: Sequence[Site], names: Sequence[str]) -> None:
        super().__init__(router)
        self.router, self.names = router, tuple(names)
        for site in sites:
            self.register_parameter(self.key(site), router.logits(len(names)))

    def key(self, site: Site) -> str:
        """The name of the site's Z."""
        return "Z" if self.router.share == "all" else f"Z-{block_of(site)}"

    def start(self, generator: torch.Generator) -> None:
        _scatter(self, generator)


class SkillGate(Gate):
    """Z [T, H, N], where no other site shares it."""

    router: Poly
    shared: SkillShared | None

    def __init__(self, router: Poly, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        if router.share == "finegrained":
            self.Z = router.logits(len(names))

    def start(self, generator: torch.Generator) -> None:
        _scatter(self, generator)

    @property
    def logits(self) -> Tensor:
        """Z [T, H, N] of this site's skills."""
        if self.shared is None:
            return self.Z
        whole = self.shared._parameters[self.shared.key(self.site)]
        assert whole is not None
        return whole[..., [self.shared.names.index(name) for name in self.names]]

    @staticmethod
    def shares(z: Tensor) -> Tensor:
        """w [..., N] from logits."""
        p = torch.sigmoid(z.float())
        return p / (p.sum(-1, keepdim=True) + EPS)

    def values(self, x: Tensor, call: Call, noisy: bool = False) -> Tensor:
        """w for the rows, [B, H, N], or [H, N] where all have the same."""
        Z = self.logits
        found = places(self.router.tasks, call) if self.router.tasks else 0
        found = -1 if found is None else found
        if noisy and isinstance(found, int) and self.site.rows and x.dim() > 1:
            found = [found] * (call.rows or len(x))
        table = torch.cat([Z, Z.new_zeros(1, *Z.shape[1:])])  # the last row is all others'
        z = table[found]
        if noisy:
            u = torch.rand_like(z).clamp(EPS, 1.0 - 1e-7)
            known = torch.tensor(found, device=z.device).ge(0).view(-1, 1, 1) if isinstance(found, list) else found >= 0
            z = z + (u.log() - (-u).log1p()) * known
        return self.shares(z)

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return self._weights(self.values(x, call), x, y)

    def _weights(self, values: Tensor, x: Tensor, y: Tensor) -> Weights:
        """What the heads have in the mean."""
        mean = values.mean(-2)
        if mean.dim() == 1:
            return Weights(self.names, mean.to(y.device, y.dtype if y.is_floating_point() else torch.float32))
        return by_row(self.site, self.names, mean, x, y)

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        patches = [here.patches[name] for name in self.names]
        noisy = self.router.noise and torch.is_grad_enabled() and patches[0].dropping and self.logits.requires_grad
        values = self.values(x, call, noisy)
        weights = self._weights(values, x, y)
        self.note(weights, call)
        if values.shape[-2] == 1:
            return act(here.banks(self.names), "parameters", weights, x, y, out, call)
        return by_heads(patches, values.to(y.dtype), x, out)


class MeanGate(Gate):
    """No parameters."""

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return Weights(self.names, (1.0 / len(self.names),) * len(self.names))


@torch.no_grad()
def _scatter(part: Part, generator: torch.Generator) -> None:
    for value in part.parameters():
        value.uniform_(-BOUND, BOUND, generator=generator)
