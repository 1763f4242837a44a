"""GLIDER: what a task asks for as a whole, beside what each token looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.core.form import Call
from polytask.core.gate import Gate, by_row, routers
from polytask.core.gates import RowRouter, RowShared
from polytask.core.hub import Hub
from polytask.core.site import Site
from polytask.route.by_text import TextRouter

from .phatgoose import PhatGoose, PhatGooseGate


@routers.register("glider")
@dataclass(frozen=True)
class Glider(PhatGoose, TextRouter):
    """Scores ``l_n(x) + scale g_n``: PHATGOOSE's score of a token, and the cosine of the texts of the row and of adapter n, which
    is the same at all sites and tokens. While ``generate`` writes, g is that of the prompts.

    Args:
        scale: of the cosines. They are not brought to one size with l, whose size is at most sqrt(i), and lie close together:
            3 moves the scores a little, 100 lets the texts decide. 0 is ``phatgoose`` exactly.
        texts: see `TextRouter`.
        embed: see `TextRouter`.

    Further settings are those of ``phatgoose``.

    Reference: Li et al., Glider: Global and Local Instruction-Driven Expert Router, arXiv 2410.07172, with scale 100 on tasks
    that were learned and 3 on others, set by hand. There a language model writes the instructions, a sentence encoder embeds
    them, and gates learn for 200 steps; here the tasks' own instructions, the base's vectors where no embedder is given, and
    the gates of ``phatgoose``.

    Raises:
        MixError: an adapter has no gate, or a row no text.
    """

    scale: float = 3.0

    paper: ClassVar[str] = "arXiv 2410.07172"
    exceptions: ClassVar[Mapping[str, str]] = {"images": "by itself it reads texts, and images have none"}

    def __post_init__(self) -> None:
        super().__post_init__()
        TextRouter.__post_init__(self)
        self.at_least("scale", 0.0)
        if self.probe and self.scale:
            raise ConfigError("glider: the texts may move any adapter to the front, so all are scored; leave probe out")

    @property
    def needs(self) -> bool:
        return self.scale > 0.0

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return GliderGate(self, site, names)

    def begin(self, shared: RowShared, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        if self.needs:
            RowRouter.begin(self, shared, hub, inputs, call)

    def score(self, shared: RowShared, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        return self.cosines(shared, hub, inputs, call)


class GliderGate(PhatGooseGate):
    """LN(v) [N, i], and of the shared cosines [B, all] the columns of its adapters."""

    shared: RowShared

    def scores(self, x: Tensor, call: Call) -> Tensor:
        local = super().scores(x, call)
        if not self.router.needs:
            return local
        whole = self.shared.of(self.names)
        values = by_row(self.site, self.names, whole, x, local).values
        assert isinstance(values, Tensor)
        values = values.repeat_interleave(max(1, len(local) // len(values)), 0)
        scores: Tensor = local + self.router.scale * values.reshape(len(values), *[1] * (local.dim() - 2), -1)
        return scores
