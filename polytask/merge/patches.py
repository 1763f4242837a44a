"""Patches from what was merged: of thin factors, and of dense changes.

Shapes: A [r, i], B [o, r], as `polytask.merge.factors` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polytask.core.form import Form, Patch
from polytask.core.site import Site
from polytask.forms.factored import FactoredPatch
from polytask.forms.full import DensePatch
from polytask.forms.lora import LoRA, LoRAPatch
from polytask.forms.sparse import LTSFT, SparsePatch

from .factors import ranks_of


def lora_patch(site: Site, A: Tensor, B: Tensor) -> LoRAPatch:
    """A LoRA whose change is B A. Its tensors are its own."""
    rank = A.shape[ranks_of(site)[0]]
    patch = LoRAPatch(LoRA(rank=rank, alpha=float(rank)), site)
    patch.load({"A": _own(A), "B": _own(B)})
    return patch


def factors_of(patch: Patch) -> tuple[Tensor, Tensor] | None:
    """A and s B in fp32, of a patch that is a LoRA; None else."""
    if isinstance(patch, FactoredPatch) and type(patch).delta is FactoredPatch.delta:
        patch = patch.plain()
    if not isinstance(patch, LoRAPatch) or type(patch).delta is not LoRAPatch.delta:
        return None
    return patch.A.detach().float().cpu(), patch.B.detach().float().cpu() * patch.form.scale


def dense_patch(form: Form, site: Site, merged: Mapping[str, Tensor]) -> Patch | None:
    """A dense or sparse change: of every parameter that the form changes at the site, those that lack are zero. None for a sparse
    one of nothing."""
    form.require(site)
    patch = form.patch(site)
    assert isinstance(patch, DensePatch)
    values = {n: merged[n].float() if n in merged else torch.zeros(shape) for n, shape in patch.shapes.items()}
    if not isinstance(patch, SparsePatch):
        patch.load({"value" if site.param else n: _own(v) for n, v in values.items()})
        return patch
    flat = torch.cat([value.flatten() for value in values.values()])
    at = flat.nonzero().flatten()
    if not len(at):
        return None
    patch.load({"at": at.to(patch.whole), "values": flat[at]})
    return patch


def general_form(patches: Sequence[Patch]) -> Form:
    """The form that describes most: the LoRA of the largest rank; the sparse one with its density."""
    form = patches[0].form
    if isinstance(form, LoRA):
        return max((p.form for p in patches if isinstance(p.form, LoRA)), key=lambda f: f.rank)
    if isinstance(form, LTSFT):
        sparse = [p for p in patches if isinstance(p, SparsePatch)]
        moved = sum(patch.get_parameter("at").numel() for patch in sparse)
        form = LTSFT(parameters=form.parameters, density=moved / sum(patch.total for patch in sparse))
        for patch in sparse:
            patch.form = form
    general: Form = form
    return general


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous().clone()
