"""A form made of forms: several act together as one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError, SiteError, listing
from polytask.core.form import NO_CALL, Bank, Call, Form, Part, Patch, Weights, forms
from polytask.core.select import parse
from polytask.core.site import Site

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model

# He et al.'s mix-and-match adapter
MAM: tuple[Any, ...] = (
    {"name": "prefix", "gated": True},
    {"name": "bottleneck", "style": "scaled-parallel"},
)


@forms.register("union")
@dataclass(frozen=True, init=False)
class Union(Form):
    """Several forms as one adapter: at each site those that take it, and their contributions are added.

    ``Union("lora", {"name": "norm"})`` is trained, saved, attached and mixed as one. Without arguments it is the
    mix-and-match adapter: a prefix in every attention and a scaled parallel adapter at every feed-forward.

    Args:
        parts: forms, their names, or mappings with their settings (``forms`` in a configuration).
        sites: for each part a selector of where it may act; its own default where empty.

    Reference: the parts'; He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366,
    for the default. Its prefix has a gate here, so that it starts as the base.

    Raises:
        ConfigError: no part, or selectors that are not one for each part.
    """

    forms: tuple[Form, ...] = ()
    sites: tuple[str, ...] = ()
    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (
        "linear", "conv", "embedding", "norm", "experts", "parameter", "attention", "block", "input",
    )  # fmt: skip
    peft_type: ClassVar[str] = "POLYTASK_UNION"
    paper: ClassVar[str] = "arXiv 2110.04366"

    def __init__(self, *parts: Any, forms: Sequence[Any] = (), sites: Sequence[str] = ()) -> None:
        if parts and forms:
            raise ConfigError("Union: give the parts as arguments or as forms=, not both")
        chosen = tuple(Form.of(part) for part in (*parts, *forms) or MAM)
        if sites and len(sites) != len(chosen):
            raise ConfigError(
                f"Union: sites must be one selector for each of the {len(chosen)} parts, got {len(sites)}"
            )
        for name, value in (("forms", chosen), ("sites", tuple(sites))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "mergeable", all(form.mergeable for form in chosen))
        object.__setattr__(self, "default_sites", " | ".join(f"({self.where(i)})" for i in range(len(chosen))))

    def where(self, i: int) -> str:
        """The selector of part i."""
        return (self.sites[i] if self.sites else "") or self.forms[i].default_sites

    def at(self, site: Site) -> list[int]:
        """The parts that act at ``site``."""
        return [i for i, form in enumerate(self.forms) if not form.refuses(site) and parse(self.where(i))(site)]

    def settings(self) -> dict[str, Any]:
        parts = [{"name": form.name, **form.settings()} for form in self.forms]
        return {"forms": parts, "sites": list(self.sites)}

    def refuses(self, site: Site) -> str:
        if self.at(site):
            return ""
        return f"no part of the union ({listing(form.name for form in self.forms)}) acts at {site.name!r} ({site.kind})"

    def patch(self, site: Site) -> Patch:
        return UnionPatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part | None:
        own = [[site for site in sites if i in self.at(site)] for i in range(len(self.forms))]
        for i, found in enumerate(own):
            if not found and self.sites and self.sites[i]:
                raise SiteError(f"no site for {self.forms[i].name!r}, the part of the union at {self.sites[i]!r}")
        parts = {i: form.shared(own[i]) for i, form in enumerate(self.forms) if own[i]}
        there = {i: part for i, part in parts.items() if part is not None}
        return UnionPart(self, there) if there else None

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        for i, form in enumerate(self.forms):
            if type(form).begin is not Form.begin:
                form.begin(model, self._part(adapter, i), batches)

    def stepped(self, adapter: Adapter) -> None:
        for i, form in enumerate(self.forms):
            if type(form).stepped is not Form.stepped:
                form.stepped(self._part(adapter, i))

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        return {
            f"{form.name}, {name}": value
            for i, form in enumerate(self.forms)
            if type(form).measured is not Form.measured
            for name, value in form.measured(model, self._part(adapter, i)).items()
        }

    def finish(self, adapter: Adapter) -> Adapter:
        """What remains once it has learned: each part's own."""
        from polytask.core.adapter import Adapter

        done = [form.finish(self._part(adapter, i)) for i, form in enumerate(self.forms)]
        if all(part.form == form for part, form in zip(done, self.forms, strict=True)):
            return adapter
        plain = Union(*[part.form for part in done], sites=self.sites)
        patches = {}
        for name, patch in adapter.patches.items():
            patches[name] = plain.patch(patch.site)
            patches[name].load(_flat({i: done[i].patches[name] for i in subs(patch)}))
        shared = plain.shared([patch.site for patch in patches.values()])
        if shared is not None:
            shared.load(_flat({i: part.shared for i, part in enumerate(done) if part.shared is not None}))
        return Adapter(plain, patches, adapter.heads, replace(adapter.card), adapter.name, adapter.targets, shared)

    def _part(self, adapter: Adapter, i: int) -> Adapter:
        """Part i of an adapter as an adapter; the parameters are the same objects."""
        from polytask.core.adapter import Adapter

        patches = {name: subs(patch)[i] for name, patch in adapter.patches.items() if i in subs(patch)}
        shared = None if adapter.shared is None else subs(adapter.shared).get(i)
        return Adapter(self.forms[i], patches, name=adapter.name, shared=shared)


def _flat(parts: Mapping[int, Any]) -> dict[str, Tensor]:
    return {f"p{i}_{name}": p.detach() for i, part in parts.items() for name, p in part.named_parameters()}


def subs(part: Part) -> dict[int, Any]:
    """The parts of a joined one, by their place in the form."""
    assert isinstance(part, Joined)
    return part.subs


class Joined(Part):
    """Parts side by side: their parameters are its own too, as ``p0_A``."""

    subs: dict[int, Any]

    def _hold(self, subs: Mapping[int, Part]) -> None:
        self.__dict__["subs"] = dict(subs)  # past nn.Module.__setattr__: what they hold is held here
        self.keys = {}
        self._take()

    def _take(self) -> None:
        frozen = set()
        for i, part in self.subs.items():
            for name, parameter in part._parameters.items():
                self._parameters[f"p{i}_{name}"] = parameter
                self.keys = {**self.keys, f"p{i}_{name}": self._key(i, part.keys.get(name, name))}
            frozen |= {f"p{i}_{name}" for name in part.frozen}
        self.frozen = frozenset(frozen)

    def _key(self, i: int, key: str) -> str:
        return f"{i}.{key}".rstrip(".")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for i, part in self.subs.items():
            start = f"p{i}_"
            part.load({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
        self._take()
        super().load(tensors)  # says what is missing or unknown
        for i, part in self.subs.items():
            for name in part._parameters:
                part._parameters[name] = self._parameters[f"p{i}_{name}"]


class UnionPart(Joined):
    """What the patches of each part share."""

    def __init__(self, form: Union, subs: Mapping[int, Part]) -> None:
        super().__init__(form)
        self._hold(subs)

    def _key(self, i: int, key: str) -> str:
        return f"base_model.shared.{i}.{key}"

    def start(self, generator: torch.Generator) -> None:
        for part in self.subs.values():
            part.start(generator)


class UnionBank(Bank):
    """A bank for each part."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        super().__init__(patches)
        groups: dict[Any, dict[str, Patch]] = {}
        for name, patch in patches.items():
            seen: dict[Any, int] = {}
            for sub in subs(patch).values():
                kind = (type(sub), type(sub.form))
                groups.setdefault((*kind, seen.setdefault(kind, 0)), {})[name] = sub
                seen[kind] += 1
        self.banks = [kind.bank(group) for (kind, _, _), group in groups.items()]

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        if out is y and len(self.banks) > 1 and not torch.is_grad_enabled():
            out = y.clone()  # a bank may add in place
        for bank in self.banks:
            out = bank.apply(x, y, out, weights, call)
        return out

    def forget(self) -> None:
        for bank in self.banks:
            bank.forget()


class UnionPatch(Joined, Patch):
    """The patches of the parts that act at a site."""

    bank = UnionBank
    form: Union

    def __init__(self, form: Union, site: Site) -> None:
        Patch.__init__(self, form, site)
        self._hold({i: form.forms[i].patch(site) for i in form.at(site)})
        for name in ("tokens", "moves", "touches", "layers"):
            setattr(self, name, max(getattr(sub, name) for sub in self.subs.values()))

    def start(self, generator: torch.Generator) -> None:
        for sub in self.subs.values():
            sub.start(generator)

    def join(self, shared: Part | None) -> None:
        super().join(shared)
        for i, sub in self.subs.items():
            sub.join(None if shared is None else subs(shared).get(i))

    def bound(self, base: nn.Module, site: Site) -> Self:
        view = super().bound(base, site)
        view.__dict__["subs"] = {i: sub.bound(base, site) for i, sub in self.subs.items()}
        return view

    def misfit(self, site: Site) -> str:
        return next((reason for sub in self.subs.values() if (reason := sub.misfit(site))), "")

    def tensors(self) -> Iterator[Tensor]:
        for sub in self.subs.values():
            yield from sub.tensors()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        parts = [sub.contribute(x, y, call) for sub in self.subs.values()]
        total: Tensor = sum(parts[1:], parts[0])
        return total

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if out is y and len(self.subs) > 1 and not torch.is_grad_enabled():
            out = y.clone()  # a part may add in place, and the next one needs the base's own output
        for sub in self.subs.values():
            out = sub.add(x, y, out, weight, call)
        return out

    def deltas(self) -> dict[str, Tensor] | None:
        total: dict[str, Tensor] = {}
        for sub in self.subs.values():
            changes = sub.deltas()
            if changes is None:
                return None
            for name, change in changes.items():
                total[name] = total[name] + change if name in total else change
        return total

    def delta(self) -> Tensor | None:
        return (self.deltas() or {}).get(self.site.param or "weight")
