"""An adapter: what a task taught. Patches by site, heads, and a card that says where it comes from."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .errors import AdapterError, listing, nearest
from .form import Form, Patch
from .select import Selector
from .site import Site

if TYPE_CHECKING:
    from .head import Head
    from .model import Model


@dataclass
class Card:
    """Where an adapter comes from. It is written beside the weights as ``polytask.json``.

    Attributes:
        base: name of the base and its fingerprint.
        tasks: summaries of what it learned from (name, kind, labels, data hash, sizes).
        metrics: scores by task, as measured when it was made.
        training: how it was made: steps, seconds, precision, seed and the recipe.
        parents: hashes of the adapters it was made from.
        licence: of the adapter; ``""`` when nobody said.
        versions: of the libraries that wrote it.
        notes: anything a reader should know.
    """

    base: dict[str, Any] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    licence: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Card:
        """The reverse; keys of later versions are left out."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


class Adapter:
    """Patches by site, heads by task, and a card. Made by `Adapter.new`, `polytask.learn` or `Adapter.load`.

    Args:
        form: the form most of the patches have; a patch's own form may differ (a rank per site).
        patches: by site name, in the order of the sites.
        heads: by task name.
        card: where it comes from.
        name: what it is called when no other name is given.
        targets: short names that pick exactly these sites in the base, for files; the full names when empty.
    """

    def __init__(
        self,
        form: Form,
        patches: Mapping[str, Patch],
        heads: Mapping[str, Head] | None = None,
        card: Card | None = None,
        name: str = "",
        targets: Sequence[str] = (),
    ) -> None:
        self.form = form
        self.patches = dict(patches)
        self.heads: dict[str, Head] = dict(heads or {})
        self.card = card or Card()
        self.name = name
        self.targets = tuple(targets)

    @classmethod
    def new(
        cls,
        model: Model,
        form: Form | str | Mapping[str, Any] = "lora",
        sites: Selector | None = None,
        seed: int = 0,
        name: str = "",
    ) -> Self:
        """A fresh adapter for a model. It is not attached.

        Args:
            model: the base.
            form: a form, its name, or a mapping with its settings.
            sites: a selector; the form's own choice when None. Sites of a kind that the form cannot act at are left out.
            seed: the same seed gives the same values, at each site independent of which other sites there are.
            name: what it is called.

        Raises:
            SiteError: nothing matches, or nothing that the form can act at.
        """
        chosen = Form.of(form)
        picked = model.select(chosen.default_sites if sites is None else sites)
        fit = [site for site in picked if not chosen.refuses(site)]
        if not fit:
            chosen.require(picked[0])
        patches: dict[str, Patch] = {}
        for site in fit:
            patch = chosen.patch(site)
            patch.start(torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(site.name.encode())))
            patches[site.name] = patch
        card = Card(base={"name": model.name, "fingerprint": model.fingerprint, "kind": model.kind})
        return cls(chosen, patches, card=card, name=name, targets=_targets(model.sites, list(patches)))

    # Parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of patches and heads, by ``site:name`` and ``head/task:name``."""
        for site, patch in self.patches.items():
            for name, parameter in patch.named_parameters():
                yield f"{site}:{name}", parameter
        for task, head in self.heads.items():
            for name, parameter in head.named_parameters():
                yield f"head/{task}:{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of patches and heads."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def size(self) -> int:
        """How many numbers its patches hold."""
        return sum(p.numel() for patch in self.patches.values() for p in patch.parameters())

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter's value, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the values of `state`, in place: whatever holds the parameters sees them."""
        own = dict(self.named_parameters())
        if set(own) != set(state):
            raise AdapterError(f"the state has other parameters: {listing(sorted(set(own) ^ set(state)))}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def trainable(self, flag: bool = True) -> Self:
        """Says whether its parameters take gradients. Nothing else of any model changes."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Moves the values; the parameters stay the same objects."""
        for patch in self.patches.values():
            patch.to(device)
        for head in self.heads.values():
            head.to(device)
        return self

    def copy(self, name: str = "") -> Adapter:
        """An independent copy."""
        other = copy.deepcopy(self)
        other.name = name or self.name
        return other

    @property
    def hash(self) -> str:
        """sha256 of every value, by name: two adapters that are bit for bit the same have the same hash."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters(), key=lambda item: item[0]):
            digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def head(self) -> Head:
        """The head, where there is exactly one. Raises `AdapterError` else."""
        if len(self.heads) != 1:
            raise AdapterError(f"this adapter has {len(self.heads)} heads ({listing(self.heads)}); use heads[task]")
        return next(iter(self.heads.values()))

    # Fitting a base

    def check_base(self, model: Model) -> None:
        """Raises `AdapterError` when the adapter was made for a base with other weights."""
        mine = self.card.base.get("fingerprint")
        if mine and mine != model.fingerprint:
            raise AdapterError(
                f"the adapter {self.name!r} was made for the base {self.card.base.get('name')!r} (weights {mine[:8]}), and "
                f"this is {model.name!r} (weights {model.fingerprint[:8]}); load that base, or pass check_base=False if "
                "you know that the adapter fits"
            )

    def fit(self, patch: Patch, model: Model) -> Site:
        """The model's site for a patch. Paths may differ by the prefix of a transformers head model.

        Raises:
            AdapterError: the model has no such site, or a weight of another shape.
        """
        name = patch.site.name
        model.sites  # noqa: B018  fills the index
        prefix = getattr(model.module, "base_model_prefix", "") or ""
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            site = model._by_name.get(candidate)
            if site is None:
                continue
            reason = patch.misfit(site)
            if reason:
                raise AdapterError(f"the adapter {self.name!r} does not fit {model.name!r} at {name!r}: {reason}")
            return site
        raise AdapterError(
            f"the adapter {self.name!r} has a patch for {name!r}, and {model.name!r} has no such site"
            f"{nearest(name, model._by_name)}; it was made for {self.card.base.get('name') or 'another architecture'}"
        )

    def merge_into(self, model: Model, weight: float = 1.0, *, in_place: bool = False, untie: bool = False) -> Model:
        """A plain model with this adapter's change added to the weights. Heads are not part of it.

        Args:
            model: the base.
            weight: the change's factor.
            in_place: change the given model's weights instead of a copy's.
            untie: where a changed weight is shared with another module, give the site its own instead of refusing.

        Raises:
            AdapterError: a form has no dense change (its name is given), or a weight is shared or computed.
        """
        from .model import Model

        self.check_base(model)
        module = model.module if in_place else copy.deepcopy(model.module)
        plain = Model(module, model.processor, kind=model.kind, name=model.name, pooling=model.pooling)  # type: ignore[arg-type]
        if not in_place:
            plain.detach()
        merged = [(site, *self._merged(plain, site, patch)) for patch in self.patches.values() for site in [self.fit(patch, plain)]]
        for site, target, deltas in merged:
            for name, delta in deltas.items():
                _add_to(plain.module, target, site, name, weight * delta, untie)
        return plain

    def _merged(self, model: Model, site: Site, patch: Patch) -> tuple[nn.Module, dict[str, Tensor]]:
        target = model.module.get_submodule(site.path)
        with torch.no_grad():
            deltas = patch.bound(target, site).deltas()
        if deltas is None:
            raise AdapterError(f"the form {patch.form.name!r} at {site.name!r} has no dense change of the weight to merge")
        return target, {n: d.clone() for n, d in deltas.items()}

    # Files

    def save(self, path: str | Path) -> Path:
        """Writes a folder that PEFT can read where PEFT has the form; see `polytask.core.files`."""
        from .files import save

        return save(self, Path(path))

    @classmethod
    def load(
        cls, path: str | Path, *, revision: str | None = None, subfolder: str | None = None, trainable: bool = False
    ) -> Adapter:
        """An adapter from a folder or a hub name, ours or PEFT's. Loading executes nothing.

        Args:
            path: a folder, or a hub name such as ``org/adapter``.
            revision: branch, tag or commit of a hub name.
            subfolder: the folder inside.
            trainable: whether its parameters take gradients.

        Raises:
            AdapterError: it is not an adapter, is damaged, or has a form that is not known.
        """
        from .files import load

        return load(path, revision=revision, subfolder=subfolder).trainable(trainable)

    def __repr__(self) -> str:
        heads = f", heads: {listing(self.heads)}" if self.heads else ""
        return f"Adapter({self.name!r}, {self.form}, {len(self.patches)} sites, {self.size:,} parameters{heads})"


def _targets(sites: Sequence[Site], names: list[str]) -> list[str]:
    """The ends of the paths, when these pick exactly ``names`` among the modules that PEFT would look at."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    leaves = [s.name for s in sites if s.kind in ("linear", "conv", "embedding")]
    picked = [n for n in leaves if n.rsplit(".", 1)[-1] in ends]
    return ends if sorted(picked) == sorted(names) else list(names)


def _add_to(root: nn.Module, module: nn.Module, site: Site, name: str, delta: Tensor, untie: bool) -> None:
    stored = module._parameters.get(name)
    if stored is None:
        raise AdapterError(f"{name} of {site.path!r} is computed (a parametrisation), so a change cannot be merged into it")
    others = [
        path for path, other in root.named_modules()
        if other is not module and any(p is stored for p in other._parameters.values())
    ]  # fmt: skip
    value = (stored.detach().to(delta.dtype) + delta.to(stored.device)).to(stored.dtype)
    if not others:
        with torch.no_grad():
            stored.copy_(value)
        return
    if not untie:
        raise AdapterError(
            f"the weight of {site.path!r} is shared with {listing(others)}, which the adapter does not change; merging "
            "would change both. Pass untie=True to give the site a weight of its own, or leave the adapter attached"
        )
    module._parameters[name] = nn.Parameter(value, requires_grad=stored.requires_grad)
    config = getattr(root, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
