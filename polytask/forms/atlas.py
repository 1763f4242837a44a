"""aTLAS as a form: coefficients of the changes that other adapters make, or of random directions."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError, listing
from polytask.core.form import Form, Patch, forms
from polytask.core.site import Site

from .full import DensePatch

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model


@forms.register("atlas")
@dataclass(frozen=True)
class Atlas(Form):
    """A few numbers that say how much of given changes a weight gets: ``dW = sum_n c_n * t_n``, c learned and t not.

    t are the dense changes of other adapters of the base, read from their folders. With ``blocks`` = K the entries of a matrix
    are divided at random into K groups of one size, each with coefficients of its own (aTLAS x K); other tensors have one for
    each change. Starts at zero. Without vectors t are ``count`` random directions, normal with the variance ``1 / n`` where a row
    of the tensor has n entries.

    A file holds the coefficients, the vectors' folders and their hashes: loading it reads the vectors again and refuses others.
    The seed of the adapter decides nothing here, so that all adapters with the same settings have the same groups and directions.

    Args:
        vectors: folders or hub names of adapters whose forms have dense changes.
        blocks: K.
        count: how many random directions there are where no vectors are given.
        seed: of the groups and directions.
        hashes: of the vectors; read off them when empty.

    Reference: Zhang et al., Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, arXiv 2407.02880. Its code
    leaves out what is no matrix where K > 1. Random directions are ours, in the spirit of NOLA (arXiv 2310.02556), and learn at a
    tenth of the rate.

    Raises:
        ConfigError: a setting is out of range.
    """

    vectors: tuple[str, ...] = ()
    blocks: int = 1
    count: int = 8
    seed: int = 0
    hashes: tuple[str, ...] = ()

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm", "experts", "parameter")
    acts: ClassVar[str] = "weight"
    default_lr: ClassVar[float] = 1e-1
    peft_type: ClassVar[str] = "POLYTASK_ATLAS"
    paper: ClassVar[str] = "arXiv 2407.02880"

    def __post_init__(self) -> None:
        if isinstance(self.vectors, str):
            raise ConfigError(f"Atlas: vectors must be a list of folders, got {self.vectors!r}")
        object.__setattr__(self, "vectors", tuple(str(path) for path in self.vectors))
        for name in ("blocks", "count"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Atlas: {name} must be a whole number of at least 1, got {value!r}")
        if self.hashes and len(self.hashes) != len(self.vectors):
            raise ConfigError(
                f"Atlas: there are {len(self.hashes)} hashes of {len(self.vectors)} vectors; leave them out"
            )
        if self.vectors:  # wherever they change something
            object.__setattr__(self, "default_sites", " | ".join(f"kind:{kind}" for kind in self.kinds))

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # nothing in it changes, and the vectors may be large

    @cached_property
    def pool(self) -> tuple[Adapter, ...]:
        """The vectors, read when they are first needed. Raises `AdapterError` where one is missing or another than before."""
        from polytask.core.adapter import Adapter

        found = []
        for i, path in enumerate(self.vectors):
            try:
                adapter = Adapter.load(path)
            except AdapterError as error:
                raise AdapterError(
                    f"the vector {path!r} cannot be read, and an adapter of the form 'atlas' is coefficients of its vectors; put "
                    f"it back there ({error})"
                ) from error
            if not adapter.form.mergeable:
                raise AdapterError(
                    f"the vector {path!r} has the form {adapter.form.name!r}, which has no dense change of a weight; leave it out"
                )
            if self.hashes and adapter.hash != self.hashes[i]:
                raise AdapterError(
                    f"the vector {path!r} was changed: its hash is {adapter.hash[:8]}, and these coefficients are for "
                    f"{self.hashes[i][:8]}; bring the adapter of then back, or learn them again"
                )
            found.append(adapter)
        return tuple(found)

    @property
    def size(self) -> int:
        """N, how many changes there are."""
        return len(self.vectors) or self.count

    def fitted(self, model: Model) -> Form:
        for adapter in self.pool:
            adapter.check_base(model)
        made = replace(self, hashes=tuple(adapter.hash for adapter in self.pool))
        made.__dict__["pool"] = self.pool
        return made

    def patch(self, site: Site) -> Patch:
        return AtlasPatch(self, site)

    def rate(self, name: str) -> float:
        return 1.0 if self.vectors else 0.1

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and not self.moves(site):
            return f"none of the vectors ({listing(self.vectors, 4)}) changes {site.name!r}"
        return reason

    def moves(self, site: Site) -> tuple[str, ...]:
        """The parameters of a site that change."""
        if not self.vectors:
            return (site.param or "weight",)
        there = [adapter.patches[site.name] for adapter in self.pool if site.name in adapter.patches]
        moved = {name for patch in there for name in _moved(patch)}
        return tuple(name for name in ([site.param] if site.param else ["weight", "bias"]) if name in moved)


def _moved(patch: Patch) -> list[str]:
    """The parameters that a patch may change."""
    if isinstance(patch, DensePatch):
        return list(patch.shapes)
    site = patch.site
    both = site.bias and not site.param and type(patch).deltas is not Patch.deltas
    return ["weight", "bias"] if both else [site.param or "weight"]


class AtlasPatch(DensePatch):
    """c [N, K] of each parameter that is a matrix, and [N, 1] of others."""

    form: Atlas

    def __init__(self, form: Atlas, site: Site) -> None:
        super().__init__(form, site)
        self.shapes = {name: self.shapes[name] for name in form.moves(site)}
        self.place = site.name  # a model may call the site otherwise; directions are those of this name
        self.keys = {}
        for target, shape in self.shapes.items():
            name = "value" if site.param else target
            self.register_parameter(name, nn.Parameter(torch.zeros(form.size, form.blocks if len(shape) == 2 else 1)))
            self.keys = {**self.keys, name: f"atlas.{'' if site.param else target}".removesuffix(".")}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def bound(self, base: nn.Module, site: Site) -> Self:
        view = super().bound(base, site)
        view.__dict__["_kept"] = None  # what vectors change may depend on the base
        return view

    def deltas(self) -> dict[str, Tensor]:
        made = {}
        for target, (changes, groups) in self._changes().items():
            c = self.get_parameter("value" if self.site.param else target).to(changes.dtype)
            if groups is None:
                made[target] = torch.tensordot(c[:, 0], changes, 1)
            else:
                made[target] = (c.index_select(1, groups) * changes.flatten(1)).sum(0).view(changes.shape[1:])
        return made

    def _changes(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """t [N, ...] of each parameter, and the groups of a matrix's entries where there are several; kept while it is bound."""
        device = next(self.parameters()).device
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != device:
            with torch.inference_mode(False), torch.no_grad():  # gradients may pass through them later
                found = self._given() if self.form.vectors else self._drawn()
                kept = device, {name: (t.to(device), self._groups(name, t)) for name, t in found.items()}
            if self.base is not None:
                self.__dict__["_kept"] = kept
        return kept[1]

    def _given(self) -> dict[str, Tensor]:
        """What the vectors change; zero where one has no patch."""
        device = next(self.parameters()).device
        base = nn.Module()  # the base's own parameters: where adapters are attached, it answers with what acts on them
        base._parameters.update({} if self.base is None else self.base._parameters)
        rows: list[dict[str, Tensor]] = []
        for adapter in self.form.pool:
            patch = adapter.patches.get(self.place)
            if patch is None:
                rows.append({})
                continue
            adapter.to(device)
            reason = patch.misfit(self.site)
            if reason:
                raise AdapterError(f"the vector {adapter.name!r} does not fit at {self.site.name!r}: {reason}")
            rows.append((patch if self.base is None else patch.bound(base, self.site)).deltas() or {})
        return {
            name: torch.stack([row[name].float() if name in row else torch.zeros(shape, device=device) for row in rows])
            for name, shape in self.shapes.items()
        }

    def _drawn(self) -> dict[str, Tensor]:
        """Random directions."""
        return {
            name: torch.randn(self.form.size, *shape, generator=self._generator(name)) / math.prod(shape[1:]) ** 0.5
            for name, shape in self.shapes.items()
        }

    def _groups(self, name: str, changes: Tensor) -> Tensor | None:
        """The group of each entry of a matrix, [o i]; None where all are one."""
        count = changes[0].numel()
        if changes.dim() != 3 or self.form.blocks == 1:
            return None
        order = torch.randperm(count, generator=self._generator(f"{name}\0groups"))
        groups = torch.empty(count, dtype=torch.int32)
        groups[order] = torch.arange(count, dtype=torch.int32) % self.form.blocks
        return groups.to(next(self.parameters()).device)

    def _generator(self, what: str) -> torch.Generator:
        key = hashlib.blake2b(f"{self.form.seed}\0{self.place}\0{what}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key))
