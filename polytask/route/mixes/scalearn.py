"""ScaLearn: how much of each adapter a target task wants, learned as plain scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, MixError
from polytask.core.form import Call, Part, Patch, Weights
from polytask.core.gate import Gate, Hosts, Router, learning, routers
from polytask.core.site import Site
from polytask.route.layers import vectors

SHAPES = ("vector", "scalar")


@routers.register("scalearn")
@dataclass(frozen=True)
class ScaLearn(Router):
    """``out = y + sum_n w_n * z_n``, z_n what adapter n contributes; the scales w need not sum to one or be positive.

    ``vector`` learns one scale for each channel, ``scalar`` (the paper's Uniform) one for each adapter. With ``share`` (the
    paper's ++) all sites have the same: N scales in all in the smallest.

    Args:
        shape: ``vector`` or ``scalar``.
        share: whether all sites have the same scales.
        mean: c, where the scales start: normal with mean ``c / N``.
        deviation: of that normal.
        dropout: of the scales while they learn.

    Reference: Frohmann et al., ScaLearn, arXiv 2310.01217, on bottleneck adapters after the feed-forward, with lr 6e-3. Its
    code calls the shared variants ``per_layer``. Where a site has some of the adapters, N is their number unless shared.

    Raises:
        ConfigError: a setting is out of range.
        MixError: ``vector`` where a site's width is not known, or with ``share`` where widths differ.
    """

    shape: str = "vector"
    share: bool = False
    mean: float = 2.0
    deviation: float = 0.001
    dropout: float = 0.3

    trains: ClassVar[Any] = "gates"
    paper: ClassVar[str] = "arXiv 2310.01217"
    exceptions: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("one", "identical", "images"), "its scales need not sum to one"
    )

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"{self.name}: shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        self.at_least("deviation", 0.0)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{self.name}: dropout must be in [0, 1), got {self.dropout!r}")

    def refuses(self, site: Site, patches: Mapping[str, Patch]) -> str:
        if self.shape == "vector" and not vectors(site):
            return (
                f"the router {self.name!r} scales each channel, and the width of sites of kind {site.kind!r} is not known; "
                "say shape='scalar'"
            )
        return super().refuses(site, patches)

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return ScaleGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        if not self.share:
            return None
        if self.shape == "scalar":
            return Scales(self, names, ())
        widths = sorted({site.d_out for site in sites if vectors(site)})
        if len(widths) > 1:
            raise MixError(
                f"{self.name}: sites of widths {widths} cannot share a scale for each channel; choose sites of one width, "
                "as in sites='down', or shape='scalar'"
            )
        return Scales(self, names, tuple(widths))


class Scales(Part):
    """What all sites share: the scales [N] or [N, d]."""

    def __init__(self, router: ScaLearn, names: Sequence[str], width: tuple[int, ...]) -> None:
        super().__init__(router)
        self.names = tuple(names)
        self.omega = nn.Parameter(torch.zeros(len(names), *width))

    def start(self, generator: torch.Generator) -> None:
        draw(self.omega, self.form, generator)


@torch.no_grad()
def draw(omega: Tensor, router: ScaLearn, generator: torch.Generator) -> None:
    """Fresh scales of N adapters."""
    omega.normal_(router.mean / len(omega), router.deviation, generator=generator)


class ScaleGate(Gate):
    """The scales [N] or [N, d], where they are not shared."""

    def __init__(self, router: ScaLearn, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        if not router.share:
            width = (site.d_out,) if router.shape == "vector" else ()
            self.omega = nn.Parameter(torch.zeros(len(names), *width))

    @property
    def owner(self) -> Any:
        """What holds the scales."""
        return self.shared if self.router.share else self

    def start(self, generator: torch.Generator) -> None:
        if not self.router.share:
            draw(self.omega, self.router, generator)

    def scales(self) -> Tensor:
        """Of this site's adapters; some are dropped while they learn."""
        owner = self.owner
        omega: Tensor = owner.omega
        if owner.names != self.names:
            omega = omega[[owner.names.index(name) for name in self.names]]
        return F.dropout(omega, self.router.dropout, training=learning(owner))

    def fixed(self) -> dict[str, float] | None:
        if self.router.shape == "vector" or learning(self.owner):
            return None
        return dict(zip(self.names, self.scales().tolist(), strict=True))

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        scales = self.scales()
        return Weights(self.names, scales if scales.dim() == 1 else scales.mean(-1))

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        if self.router.shape == "scalar":
            return super().combine(here, x, y, out, call)
        scales = self.scales()
        self.note(Weights(self.names, scales.detach().mean(-1)), call)
        parts = [here.patches[name].contribute(x, y, call) for name in self.names]
        made = sum((scale * part for scale, part in zip(scales[1:], parts[1:], strict=True)), scales[0] * parts[0])
        return out + made.to(out.dtype)
