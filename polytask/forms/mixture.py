"""Experts and their router as one adapter, which learns, is saved and is attached as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import AdapterError, ConfigError, SiteError
from polytask.core.form import NO_CALL, Bank, Call, Form, Part, Patch, forms
from polytask.core.gate import Gate, Router
from polytask.core.site import Site

from . import _poly_files
from .union import Joined

if TYPE_CHECKING:
    from polytask.core.head import Seen
    from polytask.core.hub import Hub
    from polytask.core.model import Model
    from polytask.core.task import Task

TRAINS = ("gates", "all")


@forms.register("mixture")
@dataclass(frozen=True, init=False)
class Mixture(Form):
    """Experts of one form or several, and a router that weighs them: ``c(x) = sum_n w_n(x) c_n(x)``.

    The same routers act as mixes over adapters that are attached (`polytask.route`); here the experts belong to the adapter, so
    that both can learn together.

    Args:
        router: a router, its name, or a mapping with its settings.
        experts: how many, or their names.
        forms: of the experts: a form, its name, or a mapping for all, or a list of one for each.
        train: ``gates`` leaves the experts as they are; ``all``; as the router says when empty.

    Reference: the routers'. ``molora`` is Zadouri et al., Pushing Mixture of Experts to the Limit, arXiv 2309.05444.

    Raises:
        ConfigError: no expert, or two with one name, or forms that are not one for each.
    """

    router: Router
    experts: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()
    train: str = "all"

    kinds: ClassVar[tuple[str, ...]] = (
        "linear", "conv", "embedding", "norm", "experts", "parameter", "attention", "block", "input",
    )  # fmt: skip
    mergeable: ClassVar[bool] = False
    enters: ClassVar[bool] = True

    @property
    def rereads(self) -> bool:
        """As its router does."""
        return self.router.rereads

    peft_type: ClassVar[str] = "POLYTASK_MIXTURE"
    paper: ClassVar[str] = "arXiv 2309.05444"

    def __init__(
        self,
        router: Any = "molora",
        experts: int | Sequence[str] = 4,
        forms: Any = "lora",
        train: str = "",
    ) -> None:
        names = tuple(f"expert{i}" for i in range(experts)) if isinstance(experts, int) else tuple(experts)
        if not names or len({*names}) < len(names):
            raise ConfigError(f"Mixture: experts must be at least one, with names of their own, got {experts!r}")
        each = (forms,) * len(names) if isinstance(forms, Form | str | Mapping) else tuple(forms)
        if len(each) != len(names):
            raise ConfigError(f"Mixture: forms must be one for each of the {len(names)} experts, got {len(each)}")
        chosen = tuple(Form.of(spec) for spec in each)
        made = Router.of(router)
        train = train or ("gates" if made.trains == "gates" else "all")
        if train not in TRAINS:
            raise ConfigError(f"Mixture: train must be one of {', '.join(TRAINS)}, got {train!r}")
        for name, value in (("router", made), ("experts", names), ("forms", chosen), ("train", train)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "default_sites", chosen[0].default_sites)
        object.__setattr__(self, "default_lr", min(own.default_lr for own in chosen))

    def __repr__(self) -> str:
        same = all(form == self.forms[0] for form in self.forms)
        each = f"{len(self.forms)} x {self.forms[0]}" if same else ", ".join(map(str, self.forms))
        return f"Mixture({self.router}, {each})"

    def settings(self) -> dict[str, Any]:
        plain = [{"name": form.name, **form.settings()} for form in self.forms]
        own: Any = plain[0] if all(each == plain[0] for each in plain) else plain
        router = {"name": self.router.name, **self.router.settings()}
        return {"router": router, "experts": list(self.experts), "forms": own, "train": self.train}

    def refuses(self, site: Site) -> str:
        return self.router.refuses(site, {}) or next((r for form in self.forms if (r := form.refuses(site))), "")

    def patch(self, site: Site) -> Patch:
        return MixturePatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part | None:
        parts = {i: form.shared(sites) for i, form in enumerate(self.forms)}
        parts[len(self.forms)] = self.router.shared(sites, self.experts)
        there = {i: part for i, part in parts.items() if part is not None}
        return MixtureShared(self, there) if there else None

    def told(self, tasks: Sequence[Task]) -> Form:
        return _with(self, router=self.router.told([task.name for task in tasks]))

    def enter(self, adapter: Adapter, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        self.router.begin(router_part(adapter), hub, inputs, call)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        for name, expert in experts_of(adapter).items():
            form = self.forms[self.experts.index(name)]
            if self.train == "all" and type(form).begin is not Form.begin:
                form.begin(model, expert, batches)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        return self.router.penalty(gates_of(adapter), router_part(adapter))

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        return self.router.loss(gates_of(seen.adapter), router_part(seen.adapter), seen, values)

    def rate(self, name: str) -> float:
        i, _, own = name.removeprefix("p").partition("_")
        return self.router.rate(own) if int(i) == len(self.forms) else self.forms[int(i)].rate(own)

    def stepped(self, adapter: Adapter) -> None:
        self.router.stepped(gates_of(adapter), router_part(adapter))
        for name, expert in experts_of(adapter).items():
            form = self.forms[self.experts.index(name)]
            if self.train == "all" and type(form).stepped is not Form.stepped:
                form.stepped(expert)

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        return self.router.facts(experts_of(adapter), gates_of(adapter), router_part(adapter))

    def finish(self, adapter: Adapter) -> Adapter:
        return self.router.finish(adapter)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") in (cls.peft_type, _poly_files.KIND)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Form:
        if config.get("peft_type") != _poly_files.KIND:
            return super().from_peft(config, path)
        return cls(**_poly_files.settings(config))

    @classmethod
    def packed_sites(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site] | None:
        return _poly_files.sites(tensors)

    @classmethod
    def unpack(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> dict[str, dict[str, Tensor]]:
        return _poly_files.parts(config, tensors, sites)


def _with(form: Mixture, **changes: Any) -> Mixture:
    said: dict[str, Any] = {"router": form.router, "experts": form.experts, "forms": form.forms, "train": form.train}
    return Mixture(**{**said, **changes})


class _Held(Joined):
    """Parts by the place of their expert, and the router's last."""

    form: Mixture

    def _key(self, i: int, key: str) -> str:
        return f"gate.{key}" if i == len(self.form.forms) else f"{i}.{key}".rstrip(".")

    def _freeze(self) -> None:
        """What does not learn: the experts, where only the gates do."""
        if self.form.train == "gates":
            last = f"p{len(self.form.forms)}_"
            self.frozen = self.frozen | {name for name in self._parameters if not name.startswith(last)}

    def _take(self) -> None:
        super()._take()
        self._freeze()


class MixtureShared(_Held):
    """What the patches of each expert share, and what the gates do."""

    def __init__(self, form: Mixture, subs: Mapping[int, Part]) -> None:
        super().__init__(form)
        self._hold(subs)

    def _key(self, i: int, key: str) -> str:
        return f"base_model.shared.{super()._key(i, key)}"

    def start(self, generator: torch.Generator) -> None:
        for part in self.subs.values():
            part.start(generator)


class MixturePatch(_Held, Patch):
    """The experts' patches at a site, and the gate."""

    form: Mixture

    def __init__(self, form: Mixture, site: Site, patches: Sequence[Patch] = ()) -> None:
        Patch.__init__(self, form, site)
        made = list(patches) or [own.patch(site) for own in form.forms]
        reason = form.router.refuses(site, dict(zip(form.experts, made, strict=True)))
        if reason:
            raise SiteError(f"{reason} (at {site.name!r})")
        for name in ("tokens", "moves", "touches", "layers"):
            if any(getattr(patch, name) != getattr(Patch, name) for patch in made):
                raise SiteError(
                    f"experts that put tokens before a text cannot be weighed together at {site.name!r}; choose another form"
                )
        self._hold({**dict(enumerate(made)), len(made): form.router.gate(site, form.experts)})

    @property
    def gate(self) -> Gate:
        """What weighs the experts."""
        gate: Gate = self.subs[len(self.form.forms)]
        return gate

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The experts' patches by name."""
        return {name: self.subs[i] for i, name in enumerate(self.form.experts)}

    def banks(self, names: tuple[str, ...]) -> list[Bank]:
        """Some of the experts' patches in banks, one for each form. Kept until other names are asked for."""
        kept = self.__dict__.get("_banks")
        if kept is None or kept[0] != names:
            patches = self.patches
            groups: dict[Any, dict[str, Patch]] = {}
            for name in names:
                patch = patches[name]
                groups.setdefault((type(patch), type(patch.form)), {})[name] = patch
            kept = self.__dict__["_banks"] = (names, [kind.bank(group) for (kind, _), group in groups.items()])
        banks: list[Bank] = kept[1]
        return banks

    def start(self, generator: torch.Generator) -> None:
        state = generator.get_state()
        for i, sub in self.subs.items():
            if self.form.router.alike and i < len(self.form.forms):
                generator.set_state(state)
            sub.start(generator)

    def join(self, shared: Part | None) -> None:
        super().join(shared)
        if shared is None:
            return
        assert isinstance(shared, MixtureShared)
        whole = shared.form
        for i, name in enumerate(self.form.experts):  # a site may have some of the experts
            self.subs[i].join(shared.subs.get(whole.experts.index(name)))
        self.gate.join(shared.subs.get(len(whole.forms)))

    def bound(self, base: nn.Module, site: Site) -> Self:
        view = super().bound(base, site)
        last = len(self.form.forms)
        view.__dict__["subs"] = {i: sub if i == last else sub.bound(base, site) for i, sub in self.subs.items()}
        view.__dict__.pop("_banks", None)
        return view

    def misfit(self, site: Site) -> str:
        return next((reason for patch in self.patches.values() if (reason := patch.misfit(site))), "")

    def tensors(self) -> Iterator[Tensor]:
        for patch in self.patches.values():
            yield from patch.tensors()
        yield from self.gate.parameters()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return self.gate.combine(self, x, y, torch.zeros_like(y), call)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if weight != 1.0:
            return super().add(x, y, out, weight, call)
        return self.gate.combine(self, x, y, out, call)


def gates_of(adapter: Adapter) -> list[Gate]:
    """The gates of a mixture, in the order of its sites."""
    return [patch.gate for patch in adapter.patches.values() if isinstance(patch, MixturePatch)]


def router_part(adapter: Adapter) -> Part | None:
    """What the gates of a mixture share."""
    shared = adapter.shared
    return shared.subs.get(len(shared.form.forms)) if isinstance(shared, MixtureShared) else None


def experts_of(adapter: Adapter) -> dict[str, Adapter]:
    """The experts of a mixture as adapters by name; their parameters are the same objects.

    Raises:
        AdapterError: it is no mixture.
    """
    form = adapter.form
    if not isinstance(form, Mixture):
        raise AdapterError(f"the adapter {adapter.name!r} has the form {form.name!r}, and only a mixture has experts")
    found = {}
    for i, name in enumerate(form.experts):
        held = {site: patch.patches for site, patch in adapter.patches.items() if isinstance(patch, MixturePatch)}
        patches = {site: own[name] for site, own in held.items() if name in own}
        shared = adapter.shared.subs.get(i) if isinstance(adapter.shared, MixtureShared) else None
        card = Card(base=dict(adapter.card.base), tasks=list(adapter.card.tasks), versions=dict(adapter.card.versions))
        card.training = {"mixture": form.router.name, "expert": name}
        found[name] = Adapter(form.forms[i], patches, card=card, name=name, shared=shared)
    return found
