"""LoRA whose two factors are computed from other parameters: starts that subtract, gates on ranks, cores between them.

Such a patch states its factors once; it acts, merges and is served as the plain LoRA that they make.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.form import NO_CALL, Bank, Call, Patch, Weights

from .lora import LoRA, LoRABank, LoRAPatch


class FactoredBank(Bank):
    """Serves the plain LoRAs of its patches; they are kept while no parameter changes and no gradients are recorded."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        super().__init__(patches)
        self._tensors = [tensor for patch in self.patches.values() for tensor in patch.parameters()]
        self._kept: tuple[Any, LoRABank] | None = None

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        return self._plain().apply(x, y, out, weights, call)

    def average(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        return self._plain().average(x, y, out, weights, call)

    def forget(self) -> None:
        self._kept = None

    def _plain(self) -> LoRABank:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._make()  # a graph serves one backward
        try:
            key = (torch.is_inference_mode_enabled(), *[t._version for t in self._tensors])
        except RuntimeError:  # made in inference mode: such tensors do not say when they change
            return self._make()
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._make())
        return self._kept[1]

    def _make(self) -> LoRABank:
        return LoRABank(
            {name: patch.plain() for name, patch in self.patches.items() if isinstance(patch, FactoredPatch)}
        )


class FactoredPatch(LoRAPatch):
    """A LoRA that says what its factors are; everything else follows from them."""

    bank: ClassVar[type[Bank]] = FactoredBank  # type: ignore[assignment]

    def factors(self) -> tuple[Tensor, Tensor, LoRA]:
        """A, B and the plain form whose rank and scale they have."""
        raise NotImplementedError

    def plain(self) -> LoRAPatch:
        """A view of it as a plain LoRA, through which gradients flow."""
        A, B, form = self.factors()
        view: LoRAPatch = object.__new__(LoRAPatch)
        view.__dict__.update(self.__dict__)
        view.__dict__.update(_parameters={"A": A, "B": B}, form=form)
        return view

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return self.plain().contribute(x, y, call)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        return self.plain().add(x, y, out, weight, call)

    def delta(self) -> Tensor:
        return self.plain().delta()

    def thin(self) -> tuple[Tensor, Tensor] | None:
        return self.plain().thin() if type(self).delta is FactoredPatch.delta else None
