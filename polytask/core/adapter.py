"""An adapter: what a task taught. Patches by site, heads, and a card that says where it comes from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .errors import AdapterError, listing, nearest
from .form import Form, Part, Patch
from .peft_files import differs, task_type
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
        shared: what the patches share, where the form has such.
    """

    def __init__(
        self,
        form: Form,
        patches: Mapping[str, Patch],
        heads: Mapping[str, Head] | None = None,
        card: Card | None = None,
        name: str = "",
        targets: Sequence[str] = (),
        shared: Part | None = None,
    ) -> None:
        self.form = form
        self.patches = dict(patches)
        self.heads: dict[str, Head] = dict(heads or {})
        self.card = card or Card()
        self.name = name
        self.targets = tuple(targets)
        self._targeted = tuple(self.patches)
        self.shared = shared
        for patch in self.patches.values():
            if type(patch.form) is type(form):
                patch.join(shared)

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
            sites: a selector; the form's own choice when None. Sites that the form cannot act at are left out.
            seed: the same seed gives the same values, at each site independent of which other sites there are.
            name: what it is called.

        Raises:
            SiteError: nothing matches, or nothing that the form can act at.
        """
        chosen = Form.of(form).fitted(model)
        picked = model.select(chosen.default_sites if sites is None else sites)
        fit = [site for site in picked if not chosen.refuses(site)]
        if not fit:
            chosen.require(picked[0])
        shared = chosen.shared(fit)
        if shared is not None:
            shared.start(_generator(seed, ""))
        patches: dict[str, Patch] = {}
        unlike = {}
        for site in fit:
            module = model.module.get_submodule(site.path)
            patch = patches[site.name] = chosen.patch(site)
            patch.join(shared)
            patch.bound(module, site).start(_generator(seed, site.name))
            if chosen.in_peft and (reason := differs(site, module)):
                unlike[site.name] = reason
        chosen.made(model, patches)
        base: dict[str, Any] = {"name": model.name, "source": getattr(model, "source", "") or model.name}
        base |= {"fingerprint": model.fingerprint, "kind": model.kind}
        if chosen.in_peft:
            base["task_type"] = task_type(model.kind, model.module)
        if unlike:
            base["unlike_peft"] = unlike
        targets = _targets(model.sites, list(patches))
        return cls(chosen, patches, card=Card(base=base), name=name, targets=targets, shared=shared).trainable()

    @property
    def short_targets(self) -> tuple[str, ...]:
        """`targets`, as long as the sites are those it was made with."""
        return self.targets if tuple(self.patches) == self._targeted else ()

    # Parameters

    @property
    def parts(self) -> dict[str, Part]:
        """The patches by site, and what they share under the empty name."""
        return {**({} if self.shared is None else {"": self.shared}), **self.patches}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of patches and heads, by ``site:name``, ``:name`` (shared) and ``head/task:name``."""
        for site, part in self.parts.items():
            for name, parameter in part.named_parameters():
                yield f"{site}:{name}", parameter
        for task, head in self.heads.items():
            for name, parameter in head.named_parameters():
                yield f"head/{task}:{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of patches and heads."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def size(self) -> int:
        """How many trained numbers its patches hold."""
        return sum(
            p.numel() for part in self.parts.values() for n, p in part.named_parameters() if n not in part.frozen
        )

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter's value, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the values of `state`, in place: whatever holds the parameters sees them.

        Raises:
            AdapterError: a parameter is missing, unknown, or of another shape.
        """
        own = dict(self.named_parameters())
        if set(own) != set(state):
            raise AdapterError(f"the state has other parameters: {listing(sorted(set(own) ^ set(state)))}")
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise AdapterError(f"{name} is {tuple(own[name].shape)} here and {tuple(value.shape)} in the state")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def trainable(self, flag: bool = True) -> Self:
        """Says whether its parameters take gradients (never those that its form freezes). No model changes."""
        for part in self.parts.values():
            part.trainable(flag)
        for head in self.heads.values():
            head.requires_grad_(flag)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Moves the values; the parameters stay the same objects."""
        for part in self.parts.values():
            part.to(device)
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
        """sha256 of every value that is saved, by name: two adapters that are bit for bit the same have the same hash."""
        digest = hashlib.sha256()
        saved = {f"{site}:{name}": value for site, part in self.parts.items() for name, value in part.stored().items()}
        for task, head in self.heads.items():
            saved |= {f"head/{task}:{name}": value for name, value in head.named_parameters()}
        for name, parameter in sorted(saved.items()):
            digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def head(self) -> Head:
        """The head, where there is exactly one. Raises `AdapterError` else."""
        if len(self.heads) != 1:
            raise AdapterError(f"this adapter has {len(self.heads)} heads ({listing(self.heads)}); use heads[task]")
        return next(iter(self.heads.values()))

    @property
    def schedule(self) -> dict[str, Any]:
        """How it learned, as options of `polytask.learn` (epochs, lr, longest, ...); empty where its card does not say."""
        return dict(self.card.training.get("stage", {}).get("schedule", {}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that it has heads for, and of those on its card."""
        return tuple(dict.fromkeys([*self.heads, *[str(task.get("name")) for task in self.card.tasks]]))

    # Fitting a base

    def check_base(self, model: Model) -> None:
        """Raises `AdapterError` when the adapter was made for a base with other weights."""
        mine = self.card.base.get("fingerprint")
        if mine and mine != model.fingerprint:
            raise AdapterError(
                f"the adapter {self.name!r} was made for the base {self.card.base.get('name')!r} (weights {mine[:8]}), "
                f"and this is {model.name!r} (weights {model.fingerprint[:8]}); load that base, or pass "
                "check_base=False if you know that the adapter fits"
            )

    def fit(self, patch: Patch, model: Model) -> Site:
        """The model's site for a patch. Paths may differ by the prefix of a transformers head model.

        Raises:
            AdapterError: the model has no such site, or a weight of another shape.
        """
        name = patch.site.name
        model.sites  # noqa: B018  fills the index
        prefix = getattr(model.module, "base_model_prefix", "") or ""
        names = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        if name.startswith("*"):  # the file does not name it: the one of its kind, in its layer
            same = [s.name for s in model.sites if (s.kind, s.layer) == (patch.site.kind, patch.site.layer)]
            names = same if len(same) == 1 else []
        for candidate in names:
            site = model._by_name.get(candidate)
            if site is None:
                continue
            reason = patch.misfit(site) or self._foreign_experts(site, model)
            if reason:
                raise AdapterError(f"the adapter {self.name!r} does not fit {model.name!r} at {name!r}: {reason}")
            return site
        raise AdapterError(
            f"the adapter {self.name!r} has a patch for {name!r}, and {model.name!r} has no such site"
            f"{nearest(name, model._by_name)}; it was made for {self.card.base.get('name') or 'another architecture'}"
        )

    def _foreign_experts(self, site: Site, model: Model) -> str:
        """A file of PEFT's does not say which way round its experts are stored; ours are as the model's."""
        if site.kind != "experts" or "fingerprint" in self.card.base:
            return ""
        turned = getattr(model.module.get_submodule(site.path), "is_transposed", False)
        return "PEFT's factors for experts that are stored as [E, d_in, d_out] are not read" if turned else ""

    def merge_into(self, model: Model, weight: float = 1.0, *, in_place: bool = False, untie: bool = False) -> Model:
        """A plain model with this adapter's change added to the weights. Heads are not part of it.

        A change is added in the wider of both types and rounded once, to the weight's own.

        Args:
            model: the base.
            weight: the change's factor.
            in_place: change the given model's weights instead of a copy's.
            untie: where a changed weight is shared with another module, give the site its own instead of refusing.

        Raises:
            AdapterError: a form has no dense change (its name is given), or a weight is shared, computed or quantised.
        """
        from .merged import merge

        return merge(self, model, weight, in_place=in_place, untie=untie)

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


def _generator(seed: int, name: str) -> torch.Generator:
    """Of a site's start: independent of which other sites there are."""
    value = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(value))


def _targets(sites: Sequence[Site], names: list[str]) -> list[str]:
    """The ends of the paths, when these pick exactly ``names`` among the modules that PEFT would look at."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    leaves = [s.name for s in sites if s.kind in ("linear", "conv", "embedding")]
    picked = [n for n in leaves if n.rsplit(".", 1)[-1] in ends]
    return ends if sorted(picked) == sorted(names) else list(names)
