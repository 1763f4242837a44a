"""What an adapter changes at a site as a matrix that multiplies x from the left: thin factors where it has them, else dense.

Shapes: D [o, i] (kernels flattened into i, experts into o); B [o, r], A [r, i] with D = B A.
"""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from .errors import AdapterError, SiteError
from .form import Patch
from .model import Model

Change = tuple[Tensor, Tensor | None]  # (B, A), or (D, None)


def change_at(patch: Patch, name: str, model: Model | None = None) -> Change | None:
    """The change of a patch; None where it has none, or depends on a base that is not given.

    Args:
        patch: it need not be attached.
        name: of its site.
        model: the base, for forms whose change depends on its weights.
    """
    thin = patch.thin()
    if thin is not None:
        return thin
    if patch.base is None and model is not None:
        with suppress(SiteError):  # an adapter of another model
            site = model.site(name)
            patch = patch.bound(model.module.get_submodule(site.path), site)
    try:
        delta = patch.delta()
    except (AdapterError, AttributeError):  # it needs the base's weights
        return None
    if delta is None:
        return None
    if delta.dim() == 2 and (patch.site.kind == "embedding" or patch.site.transposed):
        return delta.T, None
    if delta.dim() < 2:
        return delta.reshape(1, -1), None
    return (delta.flatten(0, 1) if patch.site.kind == "experts" else delta.flatten(1)), None
