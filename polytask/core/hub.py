"""What the attached sites of one model share: the adapters, the mix that acts, and what a call knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import MixError, listing
from .form import Call
from .mix import Mix

if TYPE_CHECKING:
    from .adapter import Adapter
    from .attach import Slot

INPUTS = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "input_values",
    "input_features",
)  # fmt: skip
NO_ROWS = ("position_ids", "cache_position")  # inputs whose first dimension need not be the batch


class InactiveSiteWarning(UserWarning):
    """A site of an active adapter was not reached by a forward."""


class Hub:
    """What the attached sites of one model share: which adapters are present, which mix acts, what the call knows."""

    def __init__(self) -> None:
        self.root: nn.Module | None = None  # the whole model, while something is attached
        self.adapters: dict[str, Adapter] = {}
        self.slots: dict[str, Slot] = {}
        self.mix: Mix | None = None
        self.entering: tuple[Adapter, ...] = ()  # active adapters whose forms look at the inputs of a whole forward
        self.call = Call()
        self.given = False  # whether the call was set from outside and is not to be guessed from the inputs
        self.generating = False
        self.crossing: Slot | None = None  # the input of an encoder whose decoder looks at the virtual tokens too
        self.unreached: set[str] | None = None  # sites that have not acted yet; None when nobody looks any more

    def set_mix(self, mix: Mix | None) -> None:
        """Makes a mix act. What the banks had prepared for the last one is dropped."""
        if mix is not None:
            mix.check(self.adapters)
        for slot in self.slots.values():
            slot.forget()
        self.mix = mix
        active = () if mix is None else tuple(self.adapters[name] for name in mix.names())
        self.entering = tuple(adapter for adapter in active if adapter.form.enters)
        self.watch()

    def watch(self) -> None:
        """Starts to look for sites that a forward does not reach."""
        if self.mix is None:
            self.unreached = None
            return
        active = set(self.mix.names())
        self.unreached = {name for name, slot in self.slots.items() if not active.isdisjoint(slot.patches)}

    def enter(self, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> None:
        """At the start of a forward of the whole model: what the inputs tell about the call.

        Raises:
            MixError: the mix or the call has another number of rows than the batch.
        """
        if self.mix is None:
            return
        if not self.given:
            mask = kwargs.get("attention_mask")
            inputs = (*args, *[v for k, v in kwargs.items() if k not in NO_ROWS])
            first = next((v for v in inputs if isinstance(v, Tensor) and v.dim() > 0), None)
            rows = None if first is None else first.shape[0]
            tasks = self.call.tasks
            if tasks is not None and rows is not None and len(tasks) > 1:
                each = self._fits(len(tasks), rows, "the call has a task for")
                tasks = tuple(task for task in tasks for _ in range(each))
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            self.call = Call(tasks, mask, rows, self.call.step).spread()
        need = getattr(self.mix, "rows", None)
        if isinstance(need, tuple) and self.call.rows is not None:
            self._fits(len(need), self.call.rows, "the mix has an entry for")
        self.mix.begin(self, kwargs, self.call)
        for adapter in self.entering:
            adapter.form.enter(adapter, self, kwargs, self.call)

    def read(self, inputs: Mapping[str, Any], call: Call, mix: Mix | None = None) -> Any:
        """What the backbone gives for a forward's inputs while ``mix`` acts, or nothing; of an encoder-decoder its encoder.

        For mixes that look at the whole input before they act. No gradients are recorded, and caches are left alone.
        """
        if self.root is None:
            raise MixError("a mix looks at the whole input, and nothing is attached; call model.attach first")
        backbone = self.backbone
        given = {k: v for k, v in inputs.items() if k in INPUTS and v is not None}
        before = (self.mix, self.entering, self.unreached)
        self.mix, self.entering, self.unreached = mix, (), None  # what the mix reaches is seen afterwards
        try:
            with torch.no_grad(), calling(self, call):
                return backbone(**given)
        finally:
            self.mix, self.entering, self.unreached = before

    @property
    def rereads(self) -> bool:
        """Whether a decoder writes without a cache, as what acts reads the whole text at every token."""
        acting = (self.mix, *(adapter.form for adapter in self.entering))
        return not self.crossed and any(one is not None and one.rereads for one in acting)

    @property
    def crossed(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(getattr(getattr(self.root, "config", None), "is_encoder_decoder", False))

    @property
    def backbone(self) -> Any:
        """What `read` runs."""
        root: Any = self.root
        return root.get_encoder() if self.crossed else getattr(root, "base_model", root)

    def beyond(self) -> frozenset[str]:
        """The sites of a decoder that reads what an encoder gives: their tokens are not those of `read` and of the mask."""
        if not self.crossed:
            return frozenset()
        inside = {*self.backbone.modules()}
        return frozenset(name for name, slot in self.slots.items() if slot.module not in inside)

    def _fits(self, said: int, rows: int, what: str) -> int:
        """How many neighbouring rows of the batch each entry serves: one, or all beams of a row while generating."""
        if said == rows:
            return 1
        if self.generating and rows % said == 0:
            return rows // said
        raise MixError(f"{what} each of {said} rows, and the batch has {rows}; give one entry per row")

    def leave(self) -> None:
        """At the end of a forward of the whole model: says once which sites of the active adapters did not act."""
        if not self.given and not torch.is_grad_enabled():
            # a part of the model that is called alone must not see this mask; a backward that recomputes must
            tasks = self.call.tasks
            one = tasks is not None and len(set(tasks)) == 1  # the next batch may have another number of rows
            self.call = Call(tasks=tasks[:1] if one and tasks else tasks, step=self.call.step)
        if self.unreached:
            names = sorted(self.unreached)
            warnings.warn(
                f"{len(names)} site(s) of the active adapters were not reached by this forward and changed nothing: "
                f"{listing(names, 6)}. If another module reads their weight without calling them, list them in "
                "Model(..., read_weights=[...]); if this input does not use them, nothing is wrong",
                InactiveSiteWarning,
                stacklevel=6,  # the line that called the model
            )
        self.unreached = None


@contextmanager
def calling(hub: Hub, call: Call) -> Iterator[None]:
    """Sets what the forwards inside know, where they cannot guess it from the model's inputs."""
    before = (hub.call, hub.given)
    hub.call, hub.given = call.spread(), True
    try:
        yield
    finally:
        hub.call, hub.given = before
