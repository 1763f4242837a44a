"""A router over adapters that are attached: a mix with a gate at every site, which is saved as one small file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .adapter import Adapter
from .errors import MixError, listing, nearest
from .files import ordered
from .form import NO_CALL, Call, Part, Weights
from .gate import Gate, Router
from .given import by_hash, places_of
from .head import Head
from .mix import Mix
from .site import Site
from .storage import write, writing

if TYPE_CHECKING:
    from .attach import Slot
    from .hub import Hub
    from .model import Model

FORMAT, MARK = 1, "polytask_mix"


class Routing(Mix):
    """Weights by a router, at each site by its gate there. Where no gate is, nothing acts.

    Args:
        router: the settings.
        adapters: by the names that the mix uses.
        gates: by the names of the sites.
        shared: what the gates have in common.
        heads: of tasks that were learned with the router, by task.
        about: where it comes from: plain values, kept in the file.

    Raises:
        MixError: the router cannot weigh the adapters at a site, or there is no adapter.
    """

    def __init__(
        self,
        router: Router,
        adapters: Mapping[str, Adapter],
        gates: Mapping[str, Gate],
        shared: Part | None = None,
        heads: Mapping[str, Head] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.router, self.adapters, self.gates, self.shared = router, dict(adapters), dict(gates), shared
        self.heads, self.about = dict(heads or {}), dict(about or {})
        self.combines, self.rereads = router.combines, router.rereads  # type: ignore[misc]  # as the router says
        if not self.adapters:
            raise MixError("a router needs at least one adapter")

    @classmethod
    def over(
        cls, router: Router, adapters: Mapping[str, Adapter], signs: Mapping[str, Mapping[str, Tensor]]
    ) -> Routing:
        """A routing whose gates are empty but for the adapters' signatures.

        Args:
            router: the settings.
            adapters: by name.
            signs: for each adapter its signature's tensors by site, where the router needs one.

        Raises:
            MixError: the router cannot weigh the adapters at a site, or an adapter has no signature there.
        """
        router = router.fitted(adapters)
        places = places_of(adapters)
        shared = router.shared([site for site, _ in places.values()], tuple(adapters))
        gates = {}
        for name, (site, names) in places.items():
            reason = router.refuses(site, {n: adapters[n].patches[name] for n in names})
            if reason:
                raise MixError(f"{reason} (at {name!r}); leave that site or adapter out, or choose another router")
            gate = router.gate(site, names)
            gate.join(shared)
            if router.signature:
                lacking = [n for n in names if name not in signs.get(n, {}) and "" not in signs.get(n, {})]
                if lacking:
                    raise MixError(
                        f"{listing(lacking)} has no signature {router.signature!r} at {name!r}, which the router "
                        f"{router.name!r} needs; give its task as data, so that it can be made"
                    )
                gate.fill([signs[n][name] if name in signs[n] else signs[n][""] for n in names])
            gates[name] = gate
        router.fill(shared, signs)
        return cls(router, adapters, gates, shared)

    # As a mix

    def names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def begin(self, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        self.router.begin(self.shared, hub, inputs, call)

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        gate = self.gates.get(site.name)
        return Weights((), ()) if gate is None else gate.weigh(x, y, call)

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float] | None:
        gate = self.gates.get(site.name)
        return {} if gate is None else gate.fixed() if self.combines == "outputs" else None

    def combine(self, slot: Slot, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        gate = self.gates.get(slot.site.name)
        return y if gate is None else gate.combine(slot, x, y, y, call)

    def check(self, attached: Collection[str]) -> None:
        missing = [name for name in self.adapters if name not in attached]
        if missing:
            raise MixError(
                f"the router {self.router.name!r} weighs {listing(missing)}, and nothing of that name is attached"
                f"{nearest(missing[0], attached)}; call mix.attach(model) first"
            )

    # Parameters

    @property
    def parts(self) -> dict[str, Part]:
        """The gates by site, and what they share under the empty name."""
        return {**({} if self.shared is None else {"": self.shared}), **self.gates}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the gates, by ``site:name``."""
        for site, part in self.parts.items():
            for name, parameter in part.named_parameters():
                yield f"{site}:{name}", parameter

    @property
    def size(self) -> int:
        """How many numbers its gates hold that are trained, not computed."""
        return sum(
            p.numel() for part in self.parts.values() for n, p in part.named_parameters() if n not in part.frozen
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the router has learned to say of its adapters, as plain values."""
        return self.router.facts(self.adapters, list(self.gates.values()), self.shared)

    # On a base

    def attach(self, model: Model, *, check_base: bool = True) -> Routing:
        """Attaches the adapters that are not attached yet, and moves the gates to the base's device. Returns itself.

        Where an equal adapter has its name there already, that one is used.

        Raises:
            AdapterError: an adapter is for another base, or another one has its name.
        """
        there = model.adapters
        done: list[str] = []
        try:
            for name, adapter in self.adapters.items():
                present = there.get(name)
                if present is not None and present is not adapter and present.hash == adapter.hash:
                    self.adapters[name] = present
                elif present is not adapter:
                    done.append(model.attach(adapter, name, check_base=check_base))
            for part in (*self.parts.values(), *self.heads.values()):
                part.to(model.device)
            self.router.meet(self.shared, model)
        except Exception:
            for name in done:
                model.detach(name)
            raise
        return self

    def detach(self, model: Model) -> None:
        """Takes its adapters away."""
        for name, adapter in self.adapters.items():
            if model.adapters.get(name) is adapter:
                model.detach(name)

    @contextmanager
    def tracing(self, see: Callable[[Gate, Weights, Call], None]) -> Iterator[None]:
        """Tells ``see`` every decision of the gates inside the block."""
        for gate in self.gates.values():
            gate.__dict__["trace"] = see
        try:
            yield
        finally:
            for gate in self.gates.values():
                gate.__dict__.pop("trace", None)

    # Files

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file: settings, gates, heads, and of the adapters their names and hashes.

        Raises:
            StorageError: it cannot be written.
        """
        from safetensors.torch import save as encode

        path = Path(path).expanduser()
        said = {
            "format": FORMAT,
            "router": {"name": self.router.name, **self.router.settings()},
            "adapters": {name: adapter.hash for name, adapter in self.adapters.items()},
            "base": next(iter(self.adapters.values())).card.base,
            "gates": {name: [gate.site.as_dict(), list(gate.names)] for name, gate in self.gates.items()},
            "heads": {task: head.settings() for task, head in self.heads.items()},
            "about": self.about,
        }
        tensors = {f"gate/{name}": value for name, value in self.named_parameters()}
        for task, head in self.heads.items():
            tensors |= {f"head/{task}:{name}": value for name, value in head.state_dict().items()}
        held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        data = encode(held, {"format": "pt", MARK: json.dumps(said, ensure_ascii=False, default=str)})
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, ordered(data))
        return path

    @classmethod
    def load(cls, path: str | Path, adapters: Any, **settings: Any) -> Routing:
        """Reads what `save` wrote.

        Args:
            path: the file.
            adapters: where its adapters are: a `Library`, a mapping by name, a list, or a folder of adapters. They are found
                by their hashes, whatever they are called there.
            settings: of the router that a file cannot hold, as an embedder of texts.

        Raises:
            MixError: the file is none of these, or damaged.
            AdapterError: an adapter is not there.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        try:
            with safe_open(path, framework="pt") as opened:
                said = json.loads((opened.metadata() or {})[MARK])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            router = Router.of({**said["router"], **settings})
            found = by_hash(adapters, said["adapters"])
            places = {name: (Site.from_dict(site), tuple(names)) for name, (site, names) in said["gates"].items()}
            shared = router.shared([site for site, _ in places.values()], tuple(found))
            gates = {name: router.gate(site, names) for name, (site, names) in places.items()}
            for name, part in {**({} if shared is None else {"": shared}), **gates}.items():
                part.load({n: tensors[f"gate/{name}:{n}"] for n in part._parameters})
            for gate in gates.values():
                gate.join(shared)
            heads = {task: Head.of(settings) for task, settings in said["heads"].items()}
            for task, head in heads.items():
                start = f"head/{task}:"
                head.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise MixError(
                f"{path} holds no mix ({type(error).__name__}: {str(error).splitlines()[0]}); write one with "
                "polytask.route(...).save, or `polytask route`"
            ) from error
        return cls(router, found, gates, shared, heads, said["about"])

    def __repr__(self) -> str:
        return f"Routing({self.router}, {len(self.gates)} sites of {listing(self.adapters, 4)})"
