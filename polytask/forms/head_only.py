"""Nothing but a head: the base as it is, with what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from polytask.core.form import NO_CALL, Bank, Call, Form, Patch, Weights, forms
from polytask.core.site import KINDS, Site


@forms.register("head-only")
@dataclass(frozen=True)
class HeadOnly(Form):
    """Changes nothing, ``c = 0``: learning trains a task's head on the frozen base, and no other number.

    It is the other end of `full`, and what the sizes of a search come down to when all are zero (see `polytask.search`).

    Reference: linear probing; Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier Probes,
    arXiv 1610.01644. Only the last layer's vectors are read here.
    """

    kinds: ClassVar[tuple[str, ...]] = tuple(kind for kind in KINDS if kind != "input")
    default_sites: ClassVar[str] = "block & layer==0"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_HEAD_ONLY"
    paper: ClassVar[str] = "arXiv 1610.01644"
    exceptions: ClassVar[Mapping[str, str]] = {
        "gradient": "it has no parameters to move",
        "merge": "it changes nothing, attached or merged",
        "stack": "two of what changes nothing are no other than one",
    }

    def patch(self, site: Site) -> Patch:
        return NothingPatch(self, site)


class NothingBank(Bank):
    """Leaves everything as it is."""

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        return out


class NothingPatch(Patch):
    """Adds nothing, and costs nothing."""

    bank = NothingBank

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return y.new_zeros(()).expand_as(y)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        return out
