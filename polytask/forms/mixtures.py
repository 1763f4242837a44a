"""A mixture of adapters that are there already, and the router of a mixture as a mix over adapters."""

from __future__ import annotations

from collections.abc import Mapping

from polytask.core.adapter import Adapter, Card, _generator
from polytask.core.errors import MixError
from polytask.core.form import Patch
from polytask.core.gate import Router
from polytask.core.given import places_of
from polytask.core.routing import Routing

from .mixture import Mixture, MixturePatch, MixtureShared, _with, experts_of, router_part


def mixture_of(
    router: Router, adapters: Mapping[str, Adapter], seed: int = 0, train: str = "", name: str = ""
) -> Adapter:
    """A mixture whose experts are given adapters, with fresh gates. It shares their parameters.

    Args:
        router: the settings.
        adapters: by name.
        seed: of the gates.
        train: as `Mixture` takes it.
        name: what it is called.

    Raises:
        SiteError: the router cannot weigh them at a site.
        MixError: their sites do not fit each other.
    """
    router = router.fitted(adapters)
    places = places_of(adapters)
    own = [adapter.form for adapter in adapters.values()]
    form = Mixture(router, tuple(adapters), forms=own, train=train)
    shared = form.shared([site for site, _ in places.values()])
    if isinstance(shared, MixtureShared):
        for i, adapter in enumerate(adapters.values()):
            if adapter.shared is not None:
                shared.subs[i] = adapter.shared
        router_own = shared.subs.get(len(own))
        if router_own is not None:
            router_own.start(_generator(seed, ""))
        shared._take()
    patches: dict[str, Patch] = {}
    for place, (site, names) in places.items():
        held = [adapters[n].patches[place] for n in names]
        here = _with(form, experts=names, forms=[patch.form for patch in held])
        patch = MixturePatch(form if here == form else here, site, held)
        patch.gate.start(_generator(seed, place))
        patches[place] = patch
    first = next(iter(adapters.values()))
    card = Card(base=dict(first.card.base), parents=[adapter.hash for adapter in adapters.values()])
    return Adapter(form, patches, card=card, name=name, shared=shared).trainable()


def routing_of(adapter: Adapter, adapters: Mapping[str, Adapter] | None = None) -> Routing:
    """The router of a mixture as a mix over adapters.

    Args:
        adapter: a mixture.
        adapters: the experts, where they are there already; those of the mixture when None.

    Raises:
        AdapterError: it is no mixture.
        MixError: an expert is missing.
    """
    own = experts_of(adapter)
    chosen = own if adapters is None else {name: adapters[name] for name in own if name in adapters}
    if len(chosen) < len(own):
        raise MixError(f"the experts of {adapter.name!r} are {', '.join(own)}, and not all of them are given")
    form = adapter.form
    assert isinstance(form, Mixture)
    gates = {site: patch.gate for site, patch in adapter.patches.items() if isinstance(patch, MixturePatch)}
    about = {"training": adapter.card.training, "tasks": adapter.card.tasks}
    return Routing(form.router, chosen, gates, router_part(adapter), adapter.heads, about)
