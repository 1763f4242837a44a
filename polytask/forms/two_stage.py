"""Two-stage tuning: first the norms take up the task's distribution, then the channels that matter for it are tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Form, Patch, forms
from polytask.core.site import Site

from .full import FullPatch
from .importance import gradients, largest
from .sparse import SparsePatch

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model


@forms.register("two-stage")
@dataclass(frozen=True)
class TwoStage(Form):
    """Tunes the norms, and of the other layers only the outputs (channels) that a Taylor score finds important.

    When learning begins the norms' scale and shift (and the heads) are tuned for some epochs; then each output c of each
    layer is scored by ``sum over batches |sum over tokens a_c dL/da_c|``, and the weights into the best ``density`` of all
    outputs are what else learns. Until then it is a dense change. Starts at zero.

    Args:
        density: the part of all the layers' outputs whose weights move.
        epochs: of the first stage.
        lr: the learning rate of the first stage.

    Reference: Revisit Parameter-Efficient Transfer Learning: A Two-Stage Paradigm, arXiv 2303.07910. Only the abstract
    was at hand: the score's sums and the tuning of a channel's weights are ours; the norms go on learning.

    Raises:
        ConfigError: a setting is out of range.
    """

    density: float = 0.05
    epochs: int = 1
    lr: float = 1e-3

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")
    default_sites: ClassVar[str] = "linear | norm"
    acts: ClassVar[str] = "weight"
    default_lr: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "POLYTASK_TWO_STAGE"
    paper: ClassVar[str] = "arXiv 2303.07910"
    tensor_names: ClassVar[dict[str, str]] = {
        "delta.weight": "weight", "delta.bias": "bias", "sparse.at": "at", "sparse.values": "values",
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"TwoStage: density must be above 0 and at most 1, got {self.density!r}")
        if self.epochs < 1 or not self.lr > 0:
            raise ConfigError(
                f"TwoStage: epochs must be at least 1 and lr positive, got epochs={self.epochs!r}, lr={self.lr!r}"
            )

    def patch(self, site: Site) -> Patch:
        return FullPatch(self, site) if site.kind == "norm" else ChannelPatch(self, site)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        norms = [p for patch in adapter.patches.values() if isinstance(patch, FullPatch) for p in patch.parameters()]
        layers = {n: patch for n, patch in adapter.patches.items() if isinstance(patch, ChannelPatch)}
        if not norms or not layers:
            raise AdapterError(f"the form {self.name!r} needs norms and linear layers or convolutions among its sites")
        heads = [p for head in adapter.heads.values() for p in head.parameters()]
        optimiser = torch.optim.AdamW([*norms, *heads], lr=self.lr, weight_decay=0.0)
        for batch in list(batches) * self.epochs:
            optimiser.zero_grad()
            with torch.enable_grad():
                batch().backward()
            optimiser.step()
        for parameter in adapter.parameters():
            parameter.grad = None
        for name, at in channels(model, adapter, layers, batches, self.density).items():
            if len(at):
                layers[name].hold(at)
            else:
                del adapter.patches[name]


class ChannelPatch(SparsePatch):
    """Weights and biases of some outputs of a layer."""

    def start(self, generator: torch.Generator) -> None:
        self.hold(None)

    def outputs(self) -> Tensor:
        """The output that each place of the flattened weight (and bias) belongs to."""
        shape = self.shapes["weight"]
        along = torch.arange(self.site.d_out if self.site.kind == "linear" else shape[0])
        weight = along if self.site.transposed else along.view(-1, *[1] * (len(shape) - 1))  # of [i, o] or [o, ...]
        return torch.cat([weight.expand(shape).reshape(-1), *([along] if "bias" in self.shapes else [])])


def channels(
    model: Model,
    adapter: Adapter,
    layers: dict[str, ChannelPatch],
    batches: Sequence[Callable[[], Tensor]],
    density: float,
) -> dict[str, Tensor]:
    """The places of the weights into the best outputs, by site.

    ``sum over tokens a_c dL/da_c`` is ``<W_c, dL/dW_c> + b_c dL/db_c``, so no activation is looked at.
    """
    owners, stored, scores = [], [], []
    for patch in layers.values():
        module = model.module.get_submodule(adapter.fit(patch, model).path)
        owners.append(patch.outputs().to(patch.values.device))
        stored.append(torch.cat([module._parameters[n].detach().reshape(-1) for n in patch.shapes]))  # type: ignore[union-attr]
        scores.append(torch.zeros(int(owners[-1].max()) + 1, device=patch.values.device))
    for found in gradients([patch.values for patch in layers.values()], batches):
        for score, owner, value, gradient in zip(scores, owners, stored, found, strict=True):
            score += torch.zeros_like(score).index_add(0, owner, value.to(gradient.dtype) * gradient).abs()
    count = max(1, round(density * sum(len(score) for score in scores)))
    best = largest(scores, count)
    return {n: torch.isin(owner, at).nonzero().flatten() for n, owner, at in zip(layers, owners, best, strict=True)}
