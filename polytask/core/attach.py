"""How an adapter acts without disturbing the model: a module's class is swapped for a subclass while it has adapters.

The subclass's ``forward`` calls the original and adds the mix. Names, ``state_dict``, hooks, tied weights, ``generate``
and pickling see the module as it was; detaching restores the class. Where somebody reads a module's weight without
calling it (``nn.MultiheadAttention``, fused experts), the subclass answers with the weight plus the mix's delta.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MixError, SiteError
from .form import Bank, Call, Patch
from .hub import Hub
from .mix import Mix
from .site import Site
from .tokens import Inserted, config_of

SLOTS = "_polytask_slots"  # module attribute: parameter name ("" for the module itself) -> Slot
SLOT = "_polytask_slot"  # module attribute: the module's own Slot
HUB = "_polytask_hub"  # root attribute


class Slot:
    """The adapters at one site of one model."""

    def __init__(self, site: Site, module: nn.Module, hub: Hub) -> None:
        self.site = site
        self.module = module
        self.hub = hub
        self.patches: dict[str, Patch] = {}
        self._names: tuple[str, ...] | None = ()
        self.acted = False  # whether the module's last call added the mix; `_outer` asks
        self.acting = Counter(
            output=0, weight=0, around=0
        )  # how many patches act in which way; counted, as there may be hundreds
        self._banks: tuple[tuple[str, ...], list[Bank]] | None = None
        self._weights: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

    def put(self, name: str, patch: Patch) -> None:
        """Adds an adapter's patch."""
        if name in self.patches:
            self.take(name)
        self.patches[name] = patch.bound(self.module, self.site)
        self.acting[patch.acts] += 1
        self._changed()

    def take(self, name: str) -> None:
        """Removes an adapter's patch."""
        self.acting[self.patches.pop(name).acts] -= 1
        self._changed()

    def _changed(self) -> None:
        self._names = None
        self.forget()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters here; the same object until they change."""
        if self._names is None:  # made when it is asked for: attaching a thousand must not copy all names each time
            self._names = tuple(self.patches)
        return self._names

    @property
    def reads(self) -> tuple[str, ...]:
        """The module's own parameters whose readers must see the adapted tensor."""
        if self.site.param:
            return (self.site.param,)
        if self.site.read == "call" and not self.acting["weight"]:
            return ()
        return tuple(n for n, p in self.module._parameters.items() if p is not None)

    def forget(self) -> None:
        """Drops everything prepared for the current mix."""
        self._banks = None
        if self._weights:
            self._weights = {}

    def banks(self, names: tuple[str, ...]) -> list[Bank]:
        """The patches of ``names`` in banks, one for each form. Kept until other names are asked for."""
        # mostly the very same names; a thousand are not compared at each site
        if self._banks is None or (self._banks[0] is not names and self._banks[0] != names):
            groups: dict[Any, dict[str, Patch]] = {}
            for name in names:
                patch = self.patches[name]
                groups.setdefault((type(patch), type(patch.form)), {})[name] = patch
            self._banks = (names, [kind.bank(group) for (kind, _), group in groups.items()])
        return self._banks[1]

    def __call__(self, x: Tensor, y: Tensor, call: Call | None = None) -> Tensor:
        """The site's output: the base's ``y`` plus the active mix of this site's patches."""
        hub = self.hub
        mix = hub.mix
        if mix is None:
            return y
        if not torch.compiler.is_compiling() and hub.unreached:
            hub.unreached.discard(self.site.name)
        if self.by_weight(mix):
            return y  # the weight already had the change
        return mix.combine(self, x, y, call or hub.call)

    def by_weight(self, mix: Mix) -> bool:
        """Whether the change is made to the weight: nobody calls the module, or all active patches prefer it."""
        if self.site.read == "weight":
            return True
        if not self.acting["weight"]:
            return False
        fixed = mix.fixed(self.site, self.names)
        return fixed is not None and all(self.patches[n].acts == "weight" for n, w in fixed.items() if w)

    def alone(self) -> Patch | None:
        """The patch that acts here with weight 1 and no other beside it, where it acts around the module."""
        mix = self.hub.mix
        if mix is None or self.site.read == "weight":
            return None
        fixed = mix.fixed(self.site, self.names)
        active = [(n, w) for n, w in fixed.items() if w] if fixed is not None else []
        if len(active) != 1 or active[0][1] != 1.0 or self.patches[active[0][0]].acts != "around":
            return None
        if not torch.compiler.is_compiling() and self.hub.unreached:
            self.hub.unreached.discard(self.site.name)
        return self.patches[active[0][0]]

    def parameter(self, name: str, stored: Tensor) -> Tensor:
        """What a reader of the module's parameter ``name`` sees: the stored tensor plus the active mix's deltas.

        Raises:
            MixError: the mix depends on the input, which one weight cannot.
            SiteError: a form that has no dense delta acts at a site whose weight is read.
        """
        mix = self.hub.mix
        if mix is None or not self.by_weight(mix):
            return stored
        compiling = torch.compiler.is_compiling()
        if not compiling and self.hub.unreached:
            self.hub.unreached.discard(self.site.name)
        active = self._active(mix)
        if not active:
            return stored
        own = [p for patch, _ in active for p in patch.tensors()]
        if compiling or (torch.is_grad_enabled() and any(t.requires_grad for t in (stored, *own))):
            return self._sum(name, stored, active)  # a graph serves one backward
        # a tensor made in inference mode must not be met by a later forward that records gradients
        key = (torch.is_inference_mode_enabled(), *[v for t in (stored, *own) for v in (t, _version(t))])
        kept = self._weights.get(name)
        if kept is None or len(kept[0]) != len(key) or not all(map(_same, kept[0], key)):
            kept = self._weights[name] = (key, self._sum(name, stored, active))
        return kept[1]

    def _active(self, mix: Mix) -> list[tuple[Patch, float]]:
        if not any(name in self.patches for name in mix.names()):
            return []
        fixed = mix.fixed(self.site, self.names)
        if fixed is None:
            raise MixError(
                f"the weight of site {self.site.name!r} is read without a call, so only a mix of outputs with the "
                f"same weights for every row and token can act there, and {mix!r} is not of that kind; leave the site "
                "out of the adapters, or use one adapter at a time"
            )
        return [(self.patches[n], w) for n, w in fixed.items() if w]

    def _sum(self, name: str, stored: Tensor, active: list[tuple[Patch, float]]) -> Tensor:
        if len(active) == 1 and active[0][1] == 1.0 and (own := active[0][0].instead(name)) is not None:
            return own.to(stored.dtype)
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
        return changed.to(stored.dtype)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and bool(a == b))


@functools.cache
def swapped(cls: type[nn.Module], parameters: tuple[str, ...], site: str, root: bool) -> type[nn.Module]:
    """The subclass of ``cls`` that acts for the slots of a module.

    Args:
        cls: the module's own class.
        parameters: parameters whose readers get the adapted tensor.
        site: where the module is a site: at its ``output``, ``around`` its forward, inside its ``attention``, at its
            ``input``, or nowhere ("").
        root: whether the module is the whole model (it opens and closes a call).
    """
    original: Callable[..., Any] = cls.forward
    order = tuple(inspect.signature(original).parameters)[1:] if root else ()

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if root:
            args, kwargs = _enter(self, order, args, kwargs)
        if site == "around":
            out = _around(self, original, args, kwargs)
        elif site == "input":
            inserted = Inserted(self.__dict__[SLOT], self)
            with inserted:
                out = inserted.leave(original(self, **inserted.enter(args, kwargs)))
        else:
            out = original(self, *args, **kwargs)
        if site == "output":
            out = adapted(self, args, kwargs, out)
        if root:
            _leave(self)
        return out

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        parts: Any = object.__reduce_ex__(self, max(2, protocol))
        return (_rebuild, (cls, parameters, site, root), *parts[2:])

    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": __reduce_ex__}
    body["_polytask_class"], body["_polytask_order"] = cls, order
    for name in parameters:
        body[name] = property(functools.partial(_read, name))
    if site == "attention":
        body["config"] = property(config_of)
    if root and hasattr(cls, "generate"):
        body["generate"] = _generating(cls.generate)
    body["__module__"], body["__qualname__"], body["__doc__"] = cls.__module__, cls.__qualname__, cls.__doc__
    return type(cls.__name__, (cls,), body)


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _enter(module: nn.Module, order: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    hub: Hub | None = module.__dict__.get(HUB)
    if hub is None:
        return args, kwargs
    given = {**dict(zip(order, args, strict=False)), **kwargs} if args else kwargs
    hub.enter(given, args)
    return (args, kwargs) if hub.crossing is None else ((), Inserted.cross(hub.crossing, given))


def _leave(module: nn.Module) -> None:
    hub: Hub | None = module.__dict__.get(HUB)
    if hub is not None and not torch.compiler.is_compiling():
        hub.leave()


def adapted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The output of a called site with its mix added; of a tuple, the first entry is the site's output."""
    slot: Slot | None = module.__dict__.get(SLOT)
    if slot is None:  # a hook that was set on the instance meanwhile still calls this after detaching
        return out
    slot.acted = True
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(out, tuple):
        return (slot(x, out[0]), *out[1:])
    return slot(x, out)


def _around(module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a site where a patch may choose the input that the base's own forward runs on."""
    slot: Slot | None = module.__dict__.get(SLOT)
    patch = None if slot is None else slot.alone()
    if slot is None or patch is None:
        return adapted(module, args, kwargs, original(module, *args, **kwargs))
    slot.acted = True
    if args:
        return patch.around(lambda x: original(module, x, *args[1:], **kwargs), args[0], slot.hub.call)
    first = next(iter(kwargs))
    return patch.around(lambda x: original(module, **{**kwargs, first: x}), kwargs[first], slot.hub.call)


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...], site: str, root: bool) -> nn.Module:
    kind = swapped(cls, parameters, site, root)  # type: ignore[arg-type]  # classes can be hashed
    return kind.__new__(kind)


def _read(name: str, module: nn.Module) -> Tensor | None:
    stored = module._parameters[name]
    slots: dict[str, Slot] = module.__dict__.get(SLOTS, {})
    slot = slots.get(name) or slots.get("")
    if slot is None or stored is None:
        return stored
    try:
        return slot.parameter(name, stored)
    except AttributeError as error:
        # out of a property it would be taken for a missing attribute, and nn.Module would answer with the bare weight
        raise RuntimeError(f"the adapters at site {slot.site.name!r} failed: {error}") from error


def _generating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hub: Hub | None = self.__dict__.get(HUB)
        if hub is None:
            return original(self, *args, **kwargs)
        before = (hub.generating, hub.call)
        main = getattr(self, "main_input_name", None)
        given = {str(main): args[0], **kwargs} if args and main else kwargs
        hub.enter(given, args)  # the parts that generate calls by themselves (an encoder) know the call too
        hub.generating = True
        if hub.rereads:
            kwargs = {"use_cache": False, **kwargs}
        try:
            return original(self, *args, **kwargs)
        finally:
            hub.generating, hub.call = before

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
    inner = module.__dict__.get("forward")
    if isinstance(inner, functools.partial) and inner.func is _outer:
        module.__dict__["forward"] = inner.args[2]
    for name in (SLOTS, SLOT, HUB):
        module.__dict__.pop(name, None)
    if not slots and hub is None:
        module.__class__ = cls
        return
    if slots:
        module.__dict__[SLOTS] = slots
    if own is not None:
        module.__dict__[SLOT] = own
    if hub is not None:
        module.__dict__[HUB] = hub
    reads = tuple(sorted({name for slot in slots.values() for name in slot.reads}))
    called = own is not None and own.site.read == "call"
    where = own.site.kind if own is not None and own.site.kind in ("attention", "input") else "output" if called else ""
    called = where == "output"
    if called and own is not None and own.acting["around"]:
        where = "around"
    kind = swapped(cls, reads, where, hub is not None)  # type: ignore[arg-type]  # classes can be hashed
    module.__class__ = kind
    if "forward" in module.__dict__ and (called or hub is not None):
        # a forward set on the instance (accelerate's hooks) hides the class's: it is wrapped, and given back on detach.
        # A partial, so that copies of the module wrap their own.
        outer = functools.partial(_outer, module, kind._polytask_order, module.__dict__["forward"])  # type: ignore[attr-defined]
        module.__dict__["forward"] = functools.update_wrapper(outer, outer.args[2])


def _outer(module: nn.Module, order: tuple[str, ...], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _enter(module, order, args, kwargs)
    slot: Slot | None = module.__dict__.get(SLOT)
    if slot is not None:
        slot.acted = False
    out = inner(*args, **kwargs)
    output = slot is not None and slot.site.kind not in ("attention", "input")
    # the inner one may have been set after attaching, and call the class's
    if output and slot is not None and not slot.acted:
        out = adapted(module, args, kwargs, out)
    _leave(module)
    return out


def train_sites(hub: Hub, names: Sequence[str]) -> None:
    """Puts only the modules of these adapters' sites in training mode: their dropout is on while the base's is off.

    Norms with running statistics keep their mode: training would change the base.
    """
    for slot in hub.slots.values():
        if slot.site.kind in ("linear", "conv", "embedding") and not slot.patches.keys().isdisjoint(names):
            slot.module.training = True
