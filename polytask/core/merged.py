"""Adding an adapter's change to a base's weights, so that a plain model remains."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, listing

if TYPE_CHECKING:
    from .adapter import Adapter
    from .form import Patch
    from .model import Model
    from .site import Site


def merge(adapter: Adapter, model: Model, weight: float, *, in_place: bool, untie: bool) -> Model:
    """See `Adapter.merge_into`. Whatever can be refused is refused before a weight changes."""
    from .model import Model

    adapter.check_base(model)
    module = model.module if in_place else copy.deepcopy(model.module)
    plain = Model(
        module,
        model.processor,
        kind=model.kind,  # type: ignore[arg-type]
        name=model.name,
        source=model.source,
        pooling=model.pooling,
        read_weights=model._read_weights,
    )
    if not in_place:
        plain.detach()
    fits = [(patch, adapter.fit(patch, plain)) for patch in adapter.patches.values()]
    holders = _holders(module)
    for patch, site in fits:
        _check(patch, site, module.get_submodule(site.path), holders, untie)
    # all are bound before the first is asked: what they share may depend on every site
    bound = [(patch.bound(module.get_submodule(site.path), site), site) for patch, site in fits]
    for patch, site in bound:
        target = module.get_submodule(site.path)
        with torch.no_grad():
            for name, delta in _deltas(patch, site).items():
                _add(module, target, site, name, weight * delta)
    return plain


def _holders(root: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by the parameter's id."""
    held: dict[int, list[str]] = {}
    for path, module in root.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                held.setdefault(id(parameter), []).append(path)
    return held


def _deltas(patch: Patch, site: Site) -> dict[str, Tensor]:
    deltas = patch.deltas()
    if deltas is None:
        raise AdapterError(f"the form {patch.form.name!r} at {site.name!r} has no dense change of the weight to merge")
    return deltas


def _names(patch: Patch, target: nn.Module, site: Site) -> list[str]:
    """The parameters that a patch changes, without computing the changes."""
    if not patch.form.mergeable:
        raise AdapterError(f"the form {patch.form.name!r} at {site.name!r} has no dense change of the weight to merge")
    own = [name for name in patch._parameters if name in target._parameters]
    return [site.param] if site.param else own or ["weight"]


def _check(patch: Patch, site: Site, target: nn.Module, holders: dict[int, list[str]], untie: bool) -> None:
    for name in _names(patch, target, site):
        stored = target._parameters.get(name)
        if stored is None:
            raise AdapterError(
                f"{name} of {site.path!r} is computed (a parametrisation), so a change cannot be merged into it"
            )
        if not stored.is_floating_point():
            raise AdapterError(
                f"{name} of {site.path!r} is quantised ({stored.dtype}); load the base unquantised to merge"
            )
        others = [path for path in holders[id(stored)] if path != site.path]
        if others and not untie:
            raise AdapterError(
                f"the weight of {site.path!r} is shared with {listing(others)}, and merging would change it there too. "
                "Pass untie=True to give the site a weight of its own, or leave the adapter attached"
            )


def _add(root: nn.Module, module: nn.Module, site: Site, name: str, delta: Tensor) -> None:
    stored = module._parameters[name]
    assert stored is not None  # checked before
    wide = torch.promote_types(stored.dtype, delta.dtype)
    value = (stored.detach().to(wide) + delta.to(stored.device, wide)).to(stored.dtype)
    shared = any(p is stored for m in root.modules() if m is not module for p in m._parameters.values())
    if not shared:
        stored.copy_(value)
        return
    module._parameters[name] = nn.Parameter(value, requires_grad=stored.requires_grad)
    _untie_config(root)


def _untie_config(root: nn.Module) -> None:
    """Says in the configuration that a decoder's embedding and head differ, so that loading does not tie them."""
    config: Any = getattr(root, "config", None)
    # where a whole family is always tied (T5), the flag means something else, and readers compare the weights
    if getattr(config, "tie_word_embeddings", False) and not getattr(config, "is_encoder_decoder", False):
        config.tie_word_embeddings = False
