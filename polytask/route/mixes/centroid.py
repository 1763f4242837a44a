"""Token-level adaptation: while a text is written, the adapters whose data are like it so far weigh more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.form import Call
from polytask.core.gate import routers
from polytask.core.gates import RowRouter, goes_on
from polytask.core.hub import Hub
from polytask.core.model import Model
from polytask.core.reading import means_of, packed
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.by_data import Kept, centroids


@routers.register("centroid")
@dataclass(frozen=True)
class Centroid(RowRouter):
    """Weights ``softmax_n(cos(e, e_n) / temperature)``, the same at all sites; the adapters' parameters are averaged with them.

    e is the mean over the text so far of the bare base's last hidden states, and e_n the mean of that over adapter n's data.
    While a text is written the base reads it again after every ``every`` tokens, and the weights stay as they are in between.
    What is in a cache was computed with the weights of its time. Beams change places in a cache, so they keep the weights of
    their prompt.

    Args:
        every: k, how many tokens are written between two readings.
        temperature: the cosines are divided by it.

    Reference: Belofsky, Token-Level Adaptation of LoRA Adapters for Downstream Task Generalization, arXiv 2311.10847, with
    k = 2 best. There a sentence encoder embeds the text; the base as the encoder, the temperature and reading the source
    together with what is written in an encoder-decoder are ours.

    Raises:
        MixError: an adapter's data are not given.
    """

    every: int = 2
    temperature: float = 0.1

    combines: ClassVar[Literal["outputs", "parameters"]] = "parameters"
    signature: ClassVar[str] = "data"
    paper: ClassVar[str] = "arXiv 2311.10847"

    def __post_init__(self) -> None:
        self.at_least("every", 1, whole=True)
        if not self.temperature > 0.0:
            raise ConfigError(f"centroid: temperature must be above 0, got {self.temperature!r}")

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        return centroids(self.name, adapter, model, data)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Kept:
        return Kept(self, names)

    def fill(self, shared: Kept, signs: Mapping[str, Mapping[str, Tensor]]) -> None:
        shared.fill([signs[name][""].mean(0, keepdim=True) for name in shared.names])

    def begin(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        text: Text | None = shared.__dict__.get("text")
        if text is not None and (hub.generating or goes_on(inputs)):
            if not text.grow(inputs) or text.new < self.every:
                super().begin(shared, hub, inputs, call)
                return
            text.new = 0
            inputs = text.inputs
        else:
            shared.__dict__["text"] = Text(inputs)
        shared.__dict__["weights"] = self.score(shared, hub, inputs, call)

    def score(self, shared: Kept, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        scores = shared.near(means_of(hub, inputs, call))
        shared.__dict__["scores"] = scores
        return (scores / self.temperature).softmax(1)


class Text:
    """What the rows of a batch read and have written so far.

    Args:
        inputs: of the first forward.

    Attributes:
        inputs: the tokens so far, as a forward takes them.
        new: tokens since the last reading.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.prompt = ids
        self.mask = torch.ones_like(ids) if ids is not None and (mask is None or mask.shape != ids.shape) else mask
        self.wrote: Tensor | None = None
        self.new = 0

    def grow(self, inputs: Mapping[str, Any]) -> bool:
        """Takes up what a further forward brings; False where the rows are not those of before, or nothing can be known."""
        if self.prompt is None:
            return False
        decoder = inputs.get("decoder_input_ids")
        ids = decoder if decoder is not None else inputs.get("input_ids")
        if ids is None or len(ids) != len(self.prompt):
            return False
        if goes_on(inputs):  # what is not in the cache yet
            own = ids if self.wrote is None else torch.cat([self.wrote, ids], 1)
        else:  # the whole text again
            own = ids[:, 1 if decoder is not None else self.prompt.shape[1] :]  # a decoder begins with a token for that
        self.new += own.shape[1] - (0 if self.wrote is None else self.wrote.shape[1])
        self.wrote = own
        return True

    @property
    def inputs(self) -> dict[str, Tensor]:
        ids, wrote = self.prompt, self.wrote
        assert ids is not None and self.mask is not None and wrote is not None
        mask = torch.cat([self.mask, torch.ones_like(wrote)], 1)
        return packed({"input_ids": torch.cat([ids, wrote], 1), "attention_mask": mask})
