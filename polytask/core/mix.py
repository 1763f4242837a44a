"""Mixes: the weights ``w_n`` over the attached adapters, at each site, for each row or token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import MixError, listing, nearest
from .form import NO_CALL, Bank, Call, Weights

if TYPE_CHECKING:
    from .attach import Slot
    from .hub import Hub
    from .site import Site


def act(
    banks: Sequence[Bank], combines: str, weights: Weights, x: Tensor, y: Tensor, out: Tensor, call: Call
) -> Tensor:
    """``out`` plus what weighted patches contribute: outputs are added up, or parameters averaged first."""
    # a bank may add in place where no gradients are recorded, and the next one still needs the base's own output
    out = out if out is not y or len(banks) < 2 or torch.is_grad_enabled() else y.clone()
    for bank in banks:
        step = bank.apply if combines == "outputs" else bank.average
        out = step(x, y, out, weights, call)
    return out


class Mix(ABC):
    """Weights over the attached adapters. Subclass it and give ``names`` and ``weigh``; the rest follows.

    Attributes:
        combines: ``"outputs"`` adds the weighted contributions; ``"parameters"`` averages the adapters' parameters with
            the weights first and applies the average once. The two differ for every form that is a product of factors.
        rereads: whether every forward reads the whole text anew, so that a decoder writes without a cache.
    """

    combines: ClassVar[Literal["outputs", "parameters"]] = "outputs"
    rereads: ClassVar[bool] = False

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The adapters that this mix may use."""

    @abstractmethod
    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        """The weights at one site.

        Args:
            site: where.
            names: the attached adapters that have a patch there; the result weighs some or all of these.
            x: the site's input.
            y: the base's own output there.
            call: what this forward knows.
        """

    def begin(self, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:  # noqa: B027
        """Called at the start of each forward of the whole model, and of ``generate``, before any site acts.

        Args:
            hub: what is attached; ``hub.generating`` says whether ``generate`` goes on with what it began.
            inputs: the forward's arguments by name.
            call: what this forward knows.
        """

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float] | None:
        """The weights at a site where they do not depend on the input, else None. What acts on a weight needs them."""
        return None

    def combine(self, slot: Slot, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        """The site's output. A mix that looks at the contributions themselves overrides this."""
        weights = self.weigh(slot.site, slot.names, x, y, call)
        return act(slot.banks(weights.names), self.combines, weights, x, y, y, call)

    def check(self, attached: Collection[str]) -> None:
        """Raises `MixError` when the mix names an adapter that is not attached."""
        for name in self.names():
            if name not in attached:
                there = (
                    f"attached are: {listing(attached)}" if attached else "nothing is attached; call model.attach first"
                )
                raise MixError(f"no adapter {name!r} is attached{nearest(name, attached)}; {there}")

    @staticmethod
    def of(spec: MixLike) -> Mix | None:
        """A mix from what people write: a name, a mapping of weights, a list with an entry per row, a mix, or None."""
        if spec is None or isinstance(spec, Mix):
            return spec
        if isinstance(spec, str):
            return Single(spec)
        if isinstance(spec, Mapping):
            return Fixed(spec)
        return PerRow(spec)


class Single(Mix):
    """One adapter, with weight 1.

    Args:
        name: the adapter's name in the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        return Weights((self.name,), (1.0,)) if self.name in names else Weights((), ())

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float]:
        return {self.name: 1.0} if self.name in names else {}

    def combine(self, slot: Slot, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        patch = slot.patches.get(self.name)  # the common case goes straight to the patch
        return y if patch is None else patch.add(x, y, y, 1.0, call)

    def __repr__(self) -> str:
        return f"Single({self.name!r})"


class Fixed(Mix):
    """Numbers per adapter, the same at every site and for every input.

    Args:
        weights: adapter name to weight. They need not sum to one; zero leaves an adapter out.
        combines: ``"outputs"`` (the default) or ``"parameters"``.
    """

    def __init__(self, weights: Mapping[str, float], combines: Literal["outputs", "parameters"] = "outputs") -> None:
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.combines = combines  # type: ignore[misc]  # an instance may choose
        self._plans: dict[tuple[str, ...], Weights] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        plan = self._plans.get(names)
        if plan is None:
            here = tuple(n for n in self.weights if n in names and self.weights[n] != 0.0)
            plan = self._plans[names] = Weights(here, tuple(self.weights[n] for n in here))
        return plan

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float] | None:
        return {n: w for n, w in self.weights.items() if n in names} if self.combines == "outputs" else None

    def __repr__(self) -> str:
        return f"Fixed({self.weights!r})"


class PerRow(Mix):
    """Each row of the batch has its own adapter, its own weighted adapters, or none.

    Args:
        rows: one entry per row of the batch: an adapter's name, a mapping of names to weights, or None for the bare
            base. While ``generate`` runs with beams, each entry serves all beams of its row.
        combines: ``"outputs"`` (the default) or ``"parameters"``.
    """

    def __init__(
        self,
        rows: Sequence[str | Mapping[str, float] | None],
        combines: Literal["outputs", "parameters"] = "outputs",
    ) -> None:
        self.rows: tuple[dict[str, float], ...] = tuple(
            {} if row is None else {row: 1.0} if isinstance(row, str) else {n: float(w) for n, w in row.items()}
            for row in rows
        )
        if not self.rows:
            raise MixError("PerRow needs at least one row")
        self.combines = combines  # type: ignore[misc]  # an instance may choose
        self._names = tuple(dict.fromkeys(name for row in self.rows for name in row))
        self._plans: dict[tuple[tuple[str, ...], torch.device], Weights] = {}
        self._fixed: dict[tuple[str, ...], dict[str, float] | None] = {}

    def names(self) -> tuple[str, ...]:
        return self._names

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        if not site.rows or x.dim() < 2:
            same = self.fixed(site, names)
            if same is None:
                raise MixError(
                    f"site {site.name!r} does not see the rows of the batch in its first dimension, so it cannot serve "
                    "a different adapter per row; leave it out of the adapters, or use one adapter at a time"
                )
            return Weights(tuple(same), tuple(same.values()))
        key = (names, y.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(names, y.device)
        return plan

    def _plan(self, names: tuple[str, ...], device: torch.device) -> Weights:
        there = set(names)
        here = tuple(n for n in self._names if n in there)
        place = {n: i for i, n in enumerate(here)}
        picks = tuple(tuple((n, w) for n, w in row.items() if n in place and w != 0.0) for row in self.rows)
        k = max(1, max(len(row) for row in picks))
        index = [[place[n] for n, _ in row] + [0] * (k - len(row)) for row in picks]
        values = [[w for _, w in row] + [0.0] * (k - len(row)) for row in picks]
        return Weights(here, torch.tensor(values, device=device), torch.tensor(index, device=device), picks)

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float] | None:
        if self.combines != "outputs":
            return None
        if names not in self._fixed:
            here = [{n: w for n, w in row.items() if n in names} for row in self.rows]
            self._fixed[names] = here[0] if all(row == here[0] for row in here) else None
        return self._fixed[names]

    def __repr__(self) -> str:
        return f"PerRow({len(self.rows)} rows of {listing(self._names, 4)})"


MixLike = Mix | str | Mapping[str, float] | Sequence[str | Mapping[str, float] | None] | None
