"""MeteoRA: gates that pick the best adapters for each token, and are told while they learn which task it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.form import Call, Part
from polytask.core.gate import Gate, Router, learning, routers, serving
from polytask.core.gates import LinearGate, TokenRouter
from polytask.core.site import Site

if TYPE_CHECKING:
    from polytask.core.hub import Hub


@routers.register("meteora")
@dataclass(frozen=True)
class MeteoRA(TokenRouter):
    """Scores ``l = W x`` at each site, W [N, i] without a bias; the softmax over the best ``l / T`` weighs the outputs.

    While it learns, ``supervision * CE(l, n)`` is added to the loss, n the adapter of the row's task: the mean over all real
    tokens and sites, of the prompt too. Rows of tasks that no adapter serves do not count. With ``top_k=1`` the weight is 1, and
    nothing but this reaches the gates. Its gradient is far longer than ``max_grad_norm``: where batches are of one task each,
    clipping makes the gates forget the other tasks, and ``max_grad_norm=0`` helps.

    Args:
        top_k: how many adapters act for a token; all where 0.
        temperature: T: the paper has 1 for single tasks, and 15 to 30 for texts of 3 to 10 tasks.
        supervision: of the classification's loss.
        deviation: of the normal distribution that W starts from.
        serves: task to adapter; read off the adapters' cards, heads and names when empty.

    Reference: Xu et al., MeteoRA, arXiv 2405.13053. Its code trains the LoRAs too; here ``train="all"`` does.
    """

    top_k: int = 2
    supervision: float = 50.0
    deviation: float = 1.0
    serves: Mapping[str, str] = field(default_factory=dict)

    trains: ClassVar[Any] = "gates"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    paper: ClassVar[str] = "arXiv 2405.13053"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("supervision", "deviation"):
            self.at_least(name, 0.0)

    def fitted(self, adapters: Mapping[str, Adapter]) -> Router:
        return self if self.serves else replace(self, serves=serving(adapters))

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return MeteoraGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return Told(self)

    def begin(self, shared: Told, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        shared.__dict__["sums"] = []
        shared.__dict__["beyond"] = hub.beyond() if torch.is_grad_enabled() else frozenset()

    def penalty(self, gates: Sequence[Gate], shared: Told) -> Tensor | None:
        sums, shared.__dict__["sums"] = shared.sums, []
        tokens = sum(count for _, count in sums)
        return self.supervision * torch.stack([loss for loss, _ in sums]).sum() / tokens if tokens else None


class Told(Part):
    """What the gates of a forward said of the tasks. It has no parameters.

    Attributes:
        sums: of each site the sum of the tokens' losses, and their number.
        beyond: sites that the mask does not lie on.
    """

    sums: Sequence[tuple[Tensor, int]] = ()
    beyond: frozenset[str] = frozenset()

    def __init__(self, router: MeteoRA) -> None:
        super().__init__(router)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sums": []}  # what is on its way belongs to one forward


class MeteoraGate(LinearGate):
    """W [N, i]."""

    shared: Told

    def scores(self, x: Tensor, call: Call) -> Tensor:
        scores = super().scores(x, call)
        if self.router.supervision and call.tasks is not None and self.site.rows and learning(self):
            self.tell(scores, call)
        return scores

    def tell(self, scores: Tensor, call: Call) -> None:
        """Keeps the loss of the classification of the tokens by their rows' tasks."""
        tasks = call.tasks or ()
        if scores.shape[0] % len(tasks):
            return
        logits = scores.reshape(len(tasks), -1, len(self.names))  # [B, T, N]
        serves = [self.router.serves.get(task) for task in tasks]
        own = [self.names.index(name) if name in self.names else -100 for name in serves]
        target = torch.tensor(own, device=scores.device).unsqueeze(1).expand(logits.shape[:2])
        if call.mask is not None and call.mask.shape == target.shape and self.site.name not in self.shared.beyond:
            target = target.masked_fill(call.mask == 0, -100)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        self.shared.__dict__["sums"] = [*self.shared.sums, (loss, int((target != -100).sum()))]
