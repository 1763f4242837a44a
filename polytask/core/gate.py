"""What chooses among adapters: a router's settings, and its gates at the sites.

A router acts in two places. `polytask.core.routing.Routing` is a mix over adapters that are attached; the form ``mixture`` is one
adapter that holds its experts and their router, and learns. The gates are the same.

Shapes: B rows, T tokens, i = d_in, N adapters at a site, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .errors import ConfigError, MixError
from .form import Bank, Call, Part, Patch, Weights, per_row
from .mix import act
from .registry import Registry

if TYPE_CHECKING:
    from .adapter import Adapter
    from .head import Seen
    from .hub import Hub
    from .model import Model
    from .site import Site
    from .task import Task


class Hosts(Protocol):
    """Several patches at one site: a slot of a model, or the experts of a mixture."""

    @property
    def patches(self) -> Mapping[str, Patch]:
        """By name."""

    def banks(self, names: tuple[str, ...]) -> list[Bank]:
        """Some of them in banks, one for each form."""


def chosen(scores: Tensor, k: int = 0, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """The softmax over the k best scores.

    Args:
        scores: [..., N].
        k: how many; all where 0 or not below N.
        temperature: the scores are divided by it.

    Returns:
        Weights [..., k] that sum to one and positions [..., k]; weights [..., N] and None where all are taken.
    """
    index = None
    if 0 < k < scores.shape[-1]:
        scores, index = scores.topk(k, -1)
    return (scores if temperature == 1.0 else scores / temperature).softmax(-1), index


def by_row(site: Site, names: tuple[str, ...], values: Tensor, x: Tensor, y: Tensor) -> Weights:
    """The weights [B, N] of the rows of the batch at a site. Raises `MixError` where the site does not see rows."""
    if not site.rows or x.dim() < 2:
        raise MixError(
            f"site {site.name!r} does not see the rows of the batch in its first dimension, so it cannot serve different "
            "adapters in each row; leave it out of the adapters"
        )
    per_row(x, y, len(values), site.name)
    return Weights(names, values.to(y.device, y.dtype if y.is_floating_point() else torch.float32))


def learning(part: Part) -> bool:
    """Whether gradients of a part's parameters are recorded: dropout inside gates is on then, as they see no module's mode."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())


def serving(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Which adapter each task is for: those on its card, of its heads, and of its own name."""
    found: dict[str, str] = {}
    for name, adapter in adapters.items():
        for task in (name, *adapter.tasks):
            found.setdefault(task, name)
    return {task: name if task not in adapters else task for task, name in found.items()}


class Gate(Part):
    """What says at one site how much each adapter acts there. Its parameters are trained, computed, or none.

    Attributes:
        router: the settings.
        site: where.
        names: the N adapters that have a patch there.
        shared: what all gates of a mix have in common, where the router has such.
        trace: is told each decision (gate, weights, call), where somebody looks.
    """

    router: Any
    site: Site
    shared: Any = None
    trace: Callable[[Gate, Weights, Call], None] | None = None

    def __init__(self, router: Router, site: Site, names: Sequence[str]) -> None:
        super().__init__(router)
        self.router, self.site, self.names = router, site, tuple(names)

    def join(self, shared: Part | None) -> None:
        """Gives the gate what all gates share."""
        self.__dict__["shared"] = shared  # past nn.Module.__setattr__: it is not the gate's own

    def fill(self, signs: Sequence[Tensor]) -> None:
        """Sets its values from the signatures of its adapters, in the order of `names`."""

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        """The weights of some or all of `names` for an input.

        Args:
            x: the site's input, [..., i].
            y: the base's own output there.
            call: what this forward knows.
        """
        raise NotImplementedError

    def fixed(self) -> dict[str, float] | None:
        """The weights where they never depend on the input, else None."""
        return None

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        """``out`` plus what its adapters contribute; ``out`` is ``y`` itself where nothing else acts, and may be changed in
        place where no gradients are recorded. A gate that looks at the contributions overrides this, and tells `note`."""
        weights = self.weigh(x, y, call)
        self.note(weights, call)
        return act(here.banks(weights.names), self.router.combines, weights, x, y, out, call)

    def note(self, weights: Weights, call: Call) -> None:
        """Tells whoever looks what was decided."""
        if self.trace is not None:
            self.trace(self, weights, call)


@dataclass(frozen=True)
class Router:
    """The settings of a way to weigh adapters. It is a frozen dataclass, registered with ``@routers.register("name")``.

    Attributes:
        name: what the field calls it (set by the decorator).
        paper: the reference shown by ``polytask route list``.
        combines: ``outputs`` or ``parameters``, as `polytask.core.mix.Mix`.
        reads: what its weights depend on: nothing, the task or the whole input of a row, each token, or what the adapters
            contribute themselves.
        trains: what learns: nothing, its gates beside frozen adapters, the adapters, or both.
        kinds: the kinds of site where it can weigh adapters; any where empty.
        signature: the kind of signature of an adapter that it needs; none where empty.
        signed_by: the settings that such a signature depends on.
        rereads: as of `polytask.core.mix.Mix`.
        alike: whether experts that start fresh start as copies of one.
        exceptions: checks of the contract suite that do not hold for it, each with the reason.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    combines: ClassVar[Literal["outputs", "parameters"]] = "outputs"
    reads: ClassVar[Literal["nothing", "task", "row", "token", "contributions"]] = "nothing"
    trains: ClassVar[Literal["nothing", "gates", "adapters", "gates and adapters"]] = "nothing"
    kinds: ClassVar[tuple[str, ...]] = ()
    signature: ClassVar[str] = ""
    signed_by: ClassVar[tuple[str, ...]] = ()
    rereads: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    exceptions: ClassVar[Mapping[str, str]] = {}

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        """An empty gate for the adapters that have a patch at ``site``."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        """What the gates share, empty as they are; None where each has all that it needs."""
        return None

    def begin(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        """Called at the start of each forward of the whole model, before any site acts.

        Args:
            shared: what `shared` made.
            hub: what is attached; `Hub.read` runs the base beforehand.
            inputs: the forward's arguments by name.
            call: what this forward knows.
        """

    def refuses(self, site: Site, patches: Mapping[str, Patch]) -> str:
        """Why it cannot weigh these patches at a site, or the empty string."""
        if self.kinds and site.kind not in self.kinds:
            return f"the router {self.name!r} weighs each token, which sites of kind {site.kind!r} do not see"
        if self.combines == "parameters" and (
            odd := [n for n, p in patches.items() if type(p).bank.average is Bank.average]
        ):
            return f"the router {self.name!r} averages parameters, and the form of {odd[0]!r} has no meaningful average"
        return ""

    def fitted(self, adapters: Mapping[str, Adapter]) -> Router:
        """This router with the settings that it reads off the adapters when nobody says them."""
        return self

    def informed(self, adapters: Mapping[str, Adapter], tasks: Sequence[Task]) -> Router:
        """This router with what it takes from the tasks that are at hand, such as what they say of themselves."""
        return self

    def fill(self, shared: Any, signs: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sets what the gates share from the signatures of all adapters, and may refuse one. Raises `MixError`."""

    def meet(self, shared: Any, model: Model) -> None:
        """Called when the mix is attached to a base: for what needs its tokenizer."""

    # Signatures

    def sign(self, adapter: Adapter, model: Model | None, data: Task | None, seed: int = 0) -> dict[str, Tensor]:
        """What the router needs to know of one adapter, by the names of the sites; ``""`` for the whole.

        Raises:
            MixError: it needs a base or data that are not given.
        """
        return {}

    # Learning, in a mixture

    def told(self, tasks: Sequence[str]) -> Router:
        """This router with the names of the tasks that are learned, where it has parts for each."""
        return self

    def rate(self, name: str) -> float:
        """The learning rate of its parameters called ``name`` over the adapter's."""
        return 1.0

    def penalty(self, gates: Sequence[Gate], shared: Any) -> Tensor | None:
        """What is added to the loss of each step; None for nothing."""
        return None

    def loss(self, gates: Sequence[Gate], shared: Any, seen: Seen, values: Tensor) -> Tensor:
        """Each row's loss [B] from the ``values`` [B] that the objective gave."""
        return values

    def stepped(self, gates: Sequence[Gate], shared: Any) -> None:
        """Called after each step of the optimiser."""

    def passed(self) -> dict[str, Any]:
        """The settings that a router takes over which is put on the experts of a mixture that this one weighed."""
        return {}

    def gathered(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
        """What becomes of given adapters before they are put into a mixture that learns."""
        return adapters

    def finish(self, adapter: Adapter) -> Adapter:
        """What learning leaves of a mixture."""
        return adapter

    def facts(self, adapters: Mapping[str, Adapter], gates: Sequence[Gate], shared: Any) -> dict[str, Any]:
        """What it has learned to say of its adapters, as plain values: kept in a mixture's card."""
        return {}

    # Settings

    def settings(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def knobs(cls) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, spec: Router | str | Mapping[str, Any]) -> Router:
        """A router from a router, its name, or a mapping ``{"name": "arrow", "top_k": 2}``. Raises `ConfigError`."""
        return spec if isinstance(spec, Router) else routers.make(spec)

    def at_least(self, name: str, least: float, whole: bool = False) -> None:
        """Raises `ConfigError` for a setting below the least value."""
        value = getattr(self, name)
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            number = "a whole number of at least" if whole else "at least"
            raise ConfigError(f"{self.name}: {name} must be {number} {least}, got {value!r}")


routers: Registry[Router] = Registry("router", "polytask.route.mixes")
