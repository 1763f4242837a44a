"""MoLoRA: experts and a softmax router at each site, which learn together; each token gets all of them, or the best few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from polytask.core.balance import Tally, in_rows, load_balance
from polytask.core.form import Call, Part
from polytask.core.gate import Gate, routers
from polytask.core.gates import LinearGate, TokenRouter
from polytask.core.site import Site

if TYPE_CHECKING:
    from polytask.core.hub import Hub


@routers.register("molora")
@dataclass(frozen=True)
class MoLoRA(TokenRouter):
    """Scores ``W x`` at each site, W [N, i] without a bias; the softmax weighs the experts' outputs.

    Args:
        top_k: how many experts act for a token, their weights summing to one; all where 0.
        temperature: the scores are divided by it.
        deviation: of the normal distribution that W starts from.
        balance: of the load-balancing loss ``sum_e f_e P_e`` that each site adds to a step's: f_e is N times the share of real
            tokens whose chosen experts e is among (the best one where all act), P_e the mean of its probability. None at 0.

    Reference: Zadouri et al., Pushing Mixture of Experts to the Limit, arXiv 2309.05444, where all experts act. Its option of the
    best few leaves their weights below one; ours are the softmax over the chosen. The loss is that of Switch, arXiv 2101.03961;
    ours leaves padding out.
    """

    deviation: float = 0.02
    balance: float = 0.0

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    trains: ClassVar[Any] = "gates and adapters"
    paper: ClassVar[str] = "arXiv 2309.05444"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("deviation", 0.0)
        self.at_least("balance", 0.0)

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return BalancedGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        return Tally(self, names) if self.balance else None

    def begin(self, shared: Tally | None, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        if shared is not None:
            shared.begin()

    def penalty(self, gates: Sequence[Gate], shared: Tally | None) -> Tensor | None:
        told = None if shared is None else shared.take()
        return None if told is None else self.balance * told

    def uneven(self, gate: Gate, scores: Tensor, call: Call) -> Tensor:
        """The loss of one forward at one site.

        Args:
            gate: of the site.
            scores: [..., N].
            call: what this forward knows.
        """
        given, there = in_rows(gate.site, scores, call)
        index = given.topk(min(self.top_k or 1, given.shape[-1]), -1).indices
        return load_balance((given / self.temperature).softmax(-1), index, there)


@routers.register("lora-moe")
@dataclass(frozen=True)
class LoRAMixture(MoLoRA):
    """The sparse mixture of LoRAs of the field: `molora` with the best two experts for each token, and a loss that keeps all
    experts in use.

    Args:
        top_k, temperature, deviation, balance: as for ``molora``.

    Reference: the loss Fedus et al., Switch Transformers, arXiv 2101.03961, with its factor; the defaults are ours.
    """

    top_k: int = 2
    balance: float = 0.01

    paper: ClassVar[str] = "arXiv 2101.03961"


class BalancedGate(LinearGate):
    """W [N, i]; it tells how unevenly the experts are used, where that is to be balanced."""

    shared: Tally | None

    def scores(self, x: Tensor, call: Call) -> Tensor:
        scores = super().scores(x, call)
        if self.shared is not None and self.shared.open and self.W.requires_grad:
            self.shared.tell(self.site.name, self.router.uneven(self, scores, call))
        return scores
