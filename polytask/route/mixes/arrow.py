"""Arrow: tokens go where an adapter changes them most, which its weights alone tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.form import Patch
from polytask.core.gate import Gate, routers
from polytask.core.gates import VectorGate, VectorRouter
from polytask.core.model import Model
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.spectrum import spectrum


@routers.register("arrow")
@dataclass(frozen=True)
class Arrow(VectorRouter):
    """Scores ``|v_n . x|``, v_n the input direction that adapter n changes most: the top right singular vector of its change.

    The weights are the softmax of the best scores over the temperature. Nothing is trained, and no data are needed. An adapter
    that changes nothing at a site has v = 0.

    Args:
        top_k: how many adapters act for a token; all where 0.
        temperature: the scores are divided by it.
        probe: see `VectorRouter`.

    Reference: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157, with K = 4.
    Its code mixes the factors; ours, as PEFT's, the outputs. v is exact here: QR of both factors, and an SVD of their r x r core.

    Raises:
        MixError: an adapter's form has no dense change of a weight.
    """

    top_k: int = 4
    temperature: float = 1.0

    signature: ClassVar[str] = "arrow"
    paper: ClassVar[str] = "arXiv 2405.11157"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        return {site: direction(patch, site, model) for site, patch in adapter.patches.items()}

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return ArrowGate(self, site, names)


class ArrowGate(VectorGate):
    """v [N, i]; computed, not trained."""

    unsigned: ClassVar[bool] = True

    def fill(self, signs: Sequence[Tensor]) -> None:
        self.v = nn.Parameter(torch.stack([sign.float() for sign in signs]), requires_grad=False)


def direction(patch: Patch, name: str = "", model: Model | None = None) -> Tensor:
    """The unit vector [i] that a patch's change lengthens most; zero where it changes nothing. In fp32.

    Args:
        patch: it need not be attached.
        name: of its site.
        model: the base, for forms whose change depends on its weights.

    Raises:
        MixError: it has no dense change.
    """
    rows = spectrum(patch, name, model)
    return torch.nn.functional.normalize(rows[0], dim=0) if len(rows) else rows.new_zeros(rows.shape[1])
