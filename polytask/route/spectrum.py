"""Which directions an adapter's change reads, and how much it lengthens them.

Shapes: i = d_in, o = d_out, r the rank of a change D [o, i].
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.core.change import change_at
from polytask.core.errors import MixError
from polytask.core.form import Patch
from polytask.core.model import Model

LOST = 1e-6  # singular values below that fraction of the largest are rounding errors


@torch.no_grad()
def spectrum(patch: Patch, name: str = "", model: Model | None = None) -> Tensor:
    """``S V^T`` [r, i] of a patch's change, the largest first, in fp32; zero rows are left out. ``|S V^T x| = |D x|``.

    Args:
        patch: it need not be attached.
        name: of its site.
        model: the base, for forms whose change depends on its weights.

    Raises:
        MixError: it has no such change.
    """
    change = change_at(patch, name, model)
    if change is None:
        raise MixError(
            f"the form {patch.form.name!r} has no dense change of the weight at {patch.site.name!r}, which this router "
            "looks at, or one that needs the base (model=); choose another router, or other adapters"
        )
    left, right = (None if factor is None else factor.double().cpu() for factor in change)
    assert left is not None
    if right is None:
        _, size, v = torch.linalg.svd(left, full_matrices=False)
    else:
        basis, core = torch.linalg.qr(right.T)  # A = core^T basis^T
        _, size, v = torch.linalg.svd(torch.linalg.qr(left)[1] @ core.T, full_matrices=False)
        v = v @ basis.T
    found: Tensor = (size[:, None] * v)[size > LOST * size.max()]
    return found.float()
