"""How an adapter acts without disturbing the model: the module's class is swapped for a subclass while something is attached.

The subclass's ``forward`` calls the original and adds the mix. Names, ``state_dict``, hooks, tied weights, ``generate`` and
pickling see the module as it was; detaching restores the class. Where somebody reads a module's weight without calling it
(``nn.MultiheadAttention``, fused experts), the subclass answers with the weight plus the mix's delta instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import MixError, SiteError, listing
from .form import Bank, Call, Patch
from .mix import Mix
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter

SLOTS = "_polytask_slots"  # module attribute: parameter name ("" for the module itself) -> Slot
SLOT = "_polytask_slot"  # module attribute: the module's own Slot
HUB = "_polytask_hub"  # root attribute


class InactiveSiteWarning(UserWarning):
    """A site of an active adapter was not reached by a forward."""


class Hub:
    """What the attached sites of one model share: which adapters are present, which mix acts, what the call knows."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.slots: dict[str, Slot] = {}
        self.mix: Mix | None = None
        self.call = Call()
        self.given = False  # whether the call was set from outside and is not to be guessed from the inputs
        self.generating = False
        self.unreached: set[str] | None = None  # sites that have not acted yet; None when nobody looks any more

    def set_mix(self, mix: Mix | None) -> None:
        """Makes a mix act. What the banks had prepared for the last one is dropped."""
        if mix is not None:
            mix.check(tuple(self.adapters))
        for slot in self.slots.values():
            slot.forget()
        self.mix = mix
        self.watch()

    def watch(self) -> None:
        """Starts to look for sites that a forward does not reach."""
        if self.mix is None:
            self.unreached = None
            return
        active = set(self.mix.names())
        self.unreached = {name for name, slot in self.slots.items() if not active.isdisjoint(slot.patches)}

    def enter(self, kwargs: dict[str, Any], args: tuple[Any, ...]) -> None:
        """At the start of a forward of the whole model: what the inputs tell about the call."""
        if self.mix is None:
            return
        if not self.given:
            mask = kwargs.get("attention_mask")
            first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0), None)
            rows = None if first is None else first.shape[0]
            self.call = Call(mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, rows=rows)
        rows = self.call.rows
        need = getattr(self.mix, "rows", None)
        if isinstance(need, tuple) and rows is not None and rows != len(need):
            if self.generating and rows % len(need) == 0:
                return
            raise MixError(
                f"the mix has an entry for each of {len(need)} rows, and the batch has {rows}; give one entry per row"
            )

    def leave(self) -> None:
        """At the end of a forward of the whole model: says once which sites of the active adapters did not act."""
        if self.unreached:
            names = sorted(self.unreached)
            warnings.warn(
                f"{len(names)} site(s) of the active adapters were not reached by this forward and changed nothing: "
                f"{listing(names, 6)}. If another module reads their weight without calling them, list them in "
                "Model(..., read_weights=[...]); if this input does not use them, nothing is wrong",
                InactiveSiteWarning,
                stacklevel=4,
            )
        self.unreached = None


class Slot:
    """The adapters at one site of one model."""

    def __init__(self, site: Site, module: nn.Module, hub: Hub) -> None:
        self.site = site
        self.module = module
        self.hub = hub
        self.patches: dict[str, Patch] = {}
        self.names: tuple[str, ...] = ()
        self._banks: tuple[tuple[str, ...], list[Bank]] | None = None
        self._weights: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

    def put(self, name: str, patch: Patch) -> None:
        """Adds an adapter's patch."""
        self.patches[name] = patch.bound(self.module, self.site)
        self.names = tuple(self.patches)
        self.forget()

    def take(self, name: str) -> None:
        """Removes an adapter's patch."""
        del self.patches[name]
        self.names = tuple(self.patches)
        self.forget()

    def forget(self) -> None:
        """Drops everything prepared for the current mix."""
        self._banks = None
        if self._weights:
            self._weights = {}

    def banks(self, names: tuple[str, ...]) -> list[Bank]:
        """The patches of ``names`` in banks, one for each form. Kept until other names are asked for."""
        if self._banks is None or self._banks[0] != names:
            groups: dict[Any, dict[str, Patch]] = {}
            for name in names:
                groups.setdefault((type(self.patches[name]), type(self.patches[name].form)), {})[name] = self.patches[name]
            self._banks = (names, [kind.bank(group) for (kind, _), group in groups.items()])
        return self._banks[1]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The site's output: the base's ``y`` plus the active mix of this site's patches."""
        hub = self.hub
        mix = hub.mix
        if mix is None:
            return y
        if not torch.compiler.is_compiling() and hub.unreached:
            hub.unreached.discard(self.site.name)
        if self.by_weight(mix):
            return y  # the weight already had the change
        return mix.combine(self, x, y, hub.call)

    def by_weight(self, mix: Mix) -> bool:
        """Whether this site's change is made to the weight: where nobody calls the module, or all active patches prefer it."""
        if self.site.read == "weight":
            return True
        if not self._prefer_weight:
            return False
        fixed = mix.fixed(self.site, self.names)
        return fixed is not None and all(self.patches[n].form.acts == "weight" for n, w in fixed.items() if w)

    @property
    def _prefer_weight(self) -> bool:
        return any(patch.form.acts == "weight" for patch in self.patches.values())

    def parameter(self, name: str, stored: Tensor) -> Tensor:
        """What a reader of the module's parameter ``name`` sees: the stored tensor plus the active mix's deltas.

        Raises:
            MixError: the mix depends on the input, which one weight cannot.
            SiteError: a form that has no dense delta acts at a site whose weight is read.
        """
        mix = self.hub.mix
        if mix is None or not self.by_weight(mix):
            return stored
        if self.hub.unreached:
            self.hub.unreached.discard(self.site.name)
        fixed = mix.fixed(self.site, self.names)
        if fixed is None:
            raise MixError(
                f"the weight of site {self.site.name!r} is read without a call, so {mix!r} cannot differ by row or token "
                "there; leave it out of the adapters, or use one adapter at a time"
            )
        active = [(self.patches[n], w) for n, w in fixed.items() if w]
        if not active:
            return stored
        key = (stored, stored._version, *[(id(p), p._version) for patch, _ in active for p in patch.parameters()])
        grad = torch.is_grad_enabled() and any(p.requires_grad for patch, _ in active for p in patch.parameters())
        kept = self._weights.get(name)
        if not grad and kept is not None and len(kept[0]) == len(key) and all(_same(a, b) for a, b in zip(kept[0], key, strict=True)):
            return kept[1]
        changed = stored
        for patch, weight in active:
            deltas = patch.deltas()
            if deltas is None:
                raise SiteError(
                    f"the form {patch.form.name!r} has no dense change of a weight, and the weight of site "
                    f"{self.site.name!r} is read without a call; leave the site out, or use a form that can be merged"
                )
            if name in deltas:
                # in the delta's own precision: a bf16 weight plus a small fp32 change is rounded once, at the end
                changed = changed + weight * deltas[name]
        changed = changed.to(stored.dtype)
        if not grad:
            self._weights[name] = (key, changed)
        return changed


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and bool(a == b))


@functools.cache
def swapped(cls: type[nn.Module], parameters: tuple[str, ...], site: bool, root: bool) -> type[nn.Module]:
    """The subclass of ``cls`` that acts for the slots of a module.

    Args:
        cls: the module's own class.
        parameters: parameters whose readers get the adapted tensor.
        site: whether the module's output is a site.
        root: whether the module is the whole model (it opens and closes a call).
    """
    original: Callable[..., Any] = cls.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if root:
            getattr(self, HUB).enter(kwargs, args)
        out = original(self, *args, **kwargs)
        if site:
            out = adapted(self, args, kwargs, out)
        if root and not torch.compiler.is_compiling():
            getattr(self, HUB).leave()
        return out

    def __reduce_ex__(self: nn.Module, protocol: int) -> Any:  # type: ignore[misc]
        _, _, *rest = object.__reduce_ex__(self, max(2, protocol))  # type: ignore[misc]
        return (_rebuild, (cls, parameters, site, root), *rest)

    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_polytask_class": cls}
    for name in parameters:
        body[name] = property(functools.partial(_read, name))
    if root and hasattr(cls, "generate"):
        body["generate"] = _generating(cls.generate)
    body["__module__"], body["__qualname__"], body["__doc__"] = cls.__module__, cls.__qualname__, cls.__doc__
    return type(cls.__name__, (cls,), body)


def adapted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The output of a called site with its mix added; of a tuple, the first entry is the site's output."""
    x = args[0] if args else next(iter(kwargs.values()))
    slot = getattr(module, SLOT)
    if isinstance(out, tuple):
        return (slot(x, out[0]), *out[1:])
    return slot(x, out)


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...], site: bool, root: bool) -> nn.Module:
    kind = swapped(cls, parameters, site, root)
    return kind.__new__(kind)


def _read(name: str, module: nn.Module) -> Tensor:
    slots: dict[str, Slot] = module.__dict__[SLOTS]
    stored = module._parameters[name]
    slot = slots.get(name) or slots.get("")
    return stored if slot is None or stored is None else slot.parameter(name, stored)  # type: ignore[return-value]


def _generating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hub: Hub = getattr(self, HUB)
        before, hub.generating = hub.generating, True
        try:
            return original(self, *args, **kwargs)
        finally:
            hub.generating = before

    return generate


def refresh(module: nn.Module, hub: Hub | None) -> None:
    """Gives a module the class that its slots need, or its own class back when there are none.

    Args:
        module: a module whose slots have changed.
        hub: the hub when the module is the root of a model with something attached, else None.
    """
    cls: type[nn.Module] = getattr(type(module), "_polytask_class", type(module))
    slots: dict[str, Slot] = module.__dict__.get(SLOTS, {})
    own = slots.get("")
    _restore_forward(module)
    if not slots and hub is None:
        for name in (SLOTS, SLOT, HUB):
            module.__dict__.pop(name, None)
        module.__class__ = cls
        return
    module.__dict__[SLOT] = own
    if hub is not None:
        module.__dict__[HUB] = hub
    read = {name for name in slots if name}
    if own is not None and (own.site.read == "weight" or own._prefer_weight):
        read |= {name for name, p in module._parameters.items() if p is not None}
    called = own is not None and own.site.read == "call"
    module.__class__ = swapped(cls, tuple(sorted(read)), called, hub is not None)
    if called and "forward" in module.__dict__:
        _wrap_forward(module)


def _wrap_forward(module: nn.Module) -> None:
    """A forward set on the instance (accelerate's hooks) hides the class's: it is wrapped, and given back on detach."""
    inner = module.__dict__["forward"]

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return adapted(module, args, kwargs, inner(*args, **kwargs))

    forward._polytask_inner = inner  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward


def _restore_forward(module: nn.Module) -> None:
    inner = getattr(module.__dict__.get("forward"), "_polytask_inner", None)
    if inner is not None:
        module.__dict__["forward"] = inner


@contextmanager
def calling(hub: Hub, call: Call) -> Iterator[None]:
    """Sets what the forwards inside know, where they cannot guess it from the model's inputs."""
    before = (hub.call, hub.given)
    hub.call, hub.given = call, True
    try:
        yield
    finally:
        hub.call, hub.given = before
