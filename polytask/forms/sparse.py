"""Sparse changes: a few numbers of a module's parameters move, all others stay. APET, LT-SFT and TR-PTS choose which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Form, Part, Patch, forms
from polytask.core.site import Site

from . import _fewer
from .full import DensePatch, Parameters
from .importance import fisher, largest

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model


class SparsePatch(DensePatch):
    """Numbers ``values`` [k] at the places ``at`` [k] of the module's parameters, flattened one after the other.

    ``at`` ascends; it is empty while every place has a value, which is how forms look for the best places.
    """

    keys = {"at": "sparse.at", "values": "sparse.values"}
    frozen = frozenset({"at"})
    form: Any

    def __init__(self, form: Form, site: Site) -> None:
        super().__init__(form, site)
        self.total = sum(math.prod(shape) for shape in self.shapes.values())
        self.whole = torch.int32 if self.total < 2**31 else torch.int64
        self.hold(None)

    def hold(self, at: Tensor | None) -> None:
        """Takes other places (all of them for None), with zero values there."""
        before = self._parameters.get("values")
        place = None if before is None else before.device
        index = torch.zeros(0, dtype=self.whole) if at is None else at.to(self.whole).sort().values
        self._parameters["at"] = nn.Parameter(index.to(place), requires_grad=False)
        self._parameters["values"] = nn.Parameter(torch.zeros(self.total if at is None else len(at), device=place))

    def start(self, generator: torch.Generator) -> None:
        self.hold(self.form.places(self, generator))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        at = tensors.get("at")
        if at is not None and at.dim() == 1 and len(at):
            self.hold(at)
        super().load(tensors)
        at = self.at
        ascending = len(at) < 2 or bool((at[1:] > at[:-1]).all())
        if at.is_floating_point() or not ascending or (len(at) and not 0 <= at[0] <= at[-1] < self.total):
            raise AdapterError(
                f"the places of a sparse change at {self.site.name!r} must be whole numbers that ascend from 0 to below "
                f"{self.total}; the file is damaged or for another model"
            )

    def deltas(self) -> dict[str, Tensor]:
        at, values = self._parameters["at"], self._parameters["values"]
        assert at is not None and values is not None
        dense = values if not len(at) else values.new_zeros(self.total).index_put((at.long(),), values)
        pieces = dense.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


@dataclass(frozen=True)
class Sparse(Parameters):
    """What sparse forms share."""

    density: float = 0.01

    tensor_names: ClassVar[dict[str, str]] = {"sparse.at": "at", "sparse.values": "values"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"{type(self).__name__}: density must be above 0 and at most 1, got {self.density!r}")

    def patch(self, site: Site) -> Patch:
        return SparsePatch(self, site)

    def places(self, patch: SparsePatch, generator: torch.Generator) -> Tensor | None:
        """Where the values of a fresh patch are; None for everywhere."""
        return None

    def choose(self, adapter: Adapter, at: Mapping[str, Tensor]) -> None:
        """Gives every patch its places; sites without any leave the adapter."""
        for name, patch in list(adapter.patches.items()):
            if not isinstance(patch, SparsePatch):
                continue
            if len(at[name]):
                patch.hold(at[name])
            else:
                del adapter.patches[name]


@forms.register("apet")
@dataclass(frozen=True)
class APET(Sparse):
    """Trains single numbers of the base at random places: ``c(x) = f(x; W + dW) - f(x; W)``, dW zero elsewhere.

    Starts at zero. It says how few numbers are enough for a task: sweep ``count`` or ``density``.

    Args:
        density: the part of each site's parameters that moves, at least 64 numbers.
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.
        count: how many numbers move at each site, in place of ``density``.

    Reference: Su et al., Arbitrary Few Parameters are Good Enough for Adapting Large-scale Pre-trained Language Models,
    arXiv 2306.02320. There the places are drawn over the whole network; here at each site.

    Raises:
        ConfigError: a setting is out of range.
    """

    count: int | None = None

    default_lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "POLYTASK_APET"
    paper: ClassVar[str] = "arXiv 2306.02320"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is not None and not (isinstance(self.count, int) and self.count >= 1):
            raise ConfigError(f"APET: count must be a whole number of at least 1, or None, got {self.count!r}")

    def places(self, patch: SparsePatch, generator: torch.Generator) -> Tensor:
        count = max(64, round(self.density * patch.total)) if self.count is None else self.count
        return torch.randperm(patch.total, generator=generator)[:count]


@forms.register("lt-sft")
@dataclass(frozen=True)
class LTSFT(Sparse):
    """Trains only the numbers of the base that ordinary fine-tuning moves most; files of several tasks add up.

    When learning begins all parameters of its sites are tuned for some epochs, the places that moved most are kept (over
    all sites together: exactly ``density`` of them), everything is set back, and only these places learn. Until then it is
    a dense change. Starts at zero.

    Args:
        density: the part of all the sites' parameters that moves.
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.
        epochs: of the tuning that finds the places.
        lr: the learning rate of that tuning.
        pull: lambda of the penalty ``lambda * mean |change|`` over all the sites' parameters, in both phases.

    Reference: Ansell et al., Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv 2110.07560. Ours keeps
    exactly the number asked for also where changes are equal.

    Raises:
        ConfigError: a setting is out of range.
    """

    epochs: int = 1
    lr: float = 5e-5
    pull: float = 0.0

    default_lr: ClassVar[float] = 5e-4
    peft_type: ClassVar[str] = "POLYTASK_LT_SFT"
    paper: ClassVar[str] = "arXiv 2110.07560"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or not self.lr > 0 or self.pull < 0:
            raise ConfigError(
                "LTSFT: epochs must be at least 1, lr positive and pull not negative, got "
                f"epochs={self.epochs!r}, lr={self.lr!r}, pull={self.pull!r}"
            )

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        patches = {n: p for n, p in adapter.patches.items() if isinstance(p, SparsePatch)}
        heads = [p for head in adapter.heads.values() for p in head.parameters()]
        kept = [p.detach().clone() for p in heads]
        for patch in patches.values():
            patch.hold(None)
        optimiser = torch.optim.AdamW([*(p.values for p in patches.values()), *heads], lr=self.lr, weight_decay=0.0)
        for batch in list(batches) * self.epochs:
            optimiser.zero_grad()
            with torch.enable_grad():
                penalty = self.penalty(adapter)
                loss = batch() if penalty is None else batch() + penalty
            loss.backward()
            optimiser.step()
        moved = [patch.values.detach().abs() for patch in patches.values()]
        count = max(1, round(self.density * sum(len(m) for m in moved)))
        self.choose(adapter, dict(zip(patches, largest(moved, count), strict=True)))
        with torch.no_grad():
            for parameter, value in zip(heads, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    def penalty(self, adapter: Adapter) -> Tensor | None:
        if not self.pull:
            return None
        patches = [p for p in adapter.patches.values() if isinstance(p, SparsePatch)]
        total = sum(patch.total for patch in patches)
        return torch.stack([patch.values.abs().sum() for patch in patches]).sum() * (self.pull / total)


@forms.register("tr-pts")
@dataclass(frozen=True)
class TRPTS(Sparse):
    """Trains, for each output of a layer, the few weights into it that the task's Fisher information is largest for.

    When learning begins ``F = E[(d log p(y|x) / dW)^2]`` is measured; a layer's budget per output grows with its part of
    the largest ``density`` of F over all layers, at least ``fewest`` weights. Without data they are random. Starts at zero.

    Args:
        density: the part of all weights that decides how much each layer gets.
        fewest: weights per output in the layer with the smallest part.
        most: no layer has more than this many times ``fewest``.
        samples: examples that F is measured on.
        keep: the part of an image's tokens that stay after a block: those that the class token looks at most, while the others
            become one, their mean weighted by that attention. All at 1.0. Below 1 the network has fewer tokens on its way, so
            the adapter acts alone on all rows of a batch.
        merges: after how many blocks: those with the fewest trained weights, and never the last. Without data, all.

    Reference: TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning, arXiv 2507.22872, with ``keep``
    0.95. A layer that has none of the largest F gets the smallest budget. In later attentions a merged token counts as
    often as it has tokens in it, which is ours: merging equal tokens then changes nothing.

    Raises:
        ConfigError: a setting is out of range.
    """

    parameters: Literal["weight"] = "weight"
    fewest: int = 1
    most: int = 8
    samples: int = 100
    keep: float = 1.0
    merges: int = 3

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    begin_rows: ClassVar[int | None] = 1
    default_lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "POLYTASK_TR_PTS"
    paper: ClassVar[str] = "arXiv 2507.22872"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters != "weight":
            raise ConfigError(f"TRPTS: parameters must be weight, got {self.parameters!r}")
        if min(self.fewest, self.most, self.samples) < 1:
            raise ConfigError(
                "TRPTS: fewest, most and samples must be at least 1, got "
                f"fewest={self.fewest!r}, most={self.most!r}, samples={self.samples!r}"
            )
        if not 0.0 < self.keep <= 1.0 or self.merges < 1:
            raise ConfigError(
                "TRPTS: keep must be above 0 and at most 1, and merges at least 1, got "
                f"keep={self.keep!r} and merges={self.merges!r}"
            )
        if self.keep < 1.0:
            object.__setattr__(self, "default_sites", f"({type(self).default_sites}){_fewer.WHERE}")
            object.__setattr__(self, "mergeable", False)

    def refuses(self, site: Site) -> str:
        reason = _fewer.refusal(site, self.keep)
        return super().refuses(site) if reason is None else reason

    def patch(self, site: Site) -> Patch:
        return _fewer.patch_at(self, site) if site.kind in ("block", "attention") else super().patch(site)

    def shared(self, sites: Sequence[Site]) -> Part | None:
        if self.keep == 1.0:
            return None
        way = _fewer.Way(self)
        way.first = _fewer.first_of(list(sites))
        return way

    def made(self, model: Model, patches: dict[str, Patch]) -> None:  # type: ignore[override]
        if self.keep < 1.0:
            _fewer.prepare(model, patches)

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        whole = sum(p.numel() for p in model.module.parameters())
        found: dict[str, Any] = {"trained_percent": round(100.0 * adapter.size / whole, 4)}
        if self.keep < 1.0:
            tokens, ratio = _fewer.cost(model, adapter, self.keep)
            found |= {"tokens": tokens, "operations": round(ratio, 4)}
        return found

    def places(self, patch: SparsePatch, generator: torch.Generator) -> Tensor:
        return _per_output(torch.rand(patch.total, generator=generator), patch.site, self.fewest)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        patches = {n: p for n, p in adapter.patches.items() if isinstance(p, SparsePatch)}
        for patch in patches.values():
            patch.hold(None)
        way = adapter.shared
        if way is not None:
            way.off = True  # type: ignore[assignment]  # F is that of the whole image
        try:
            scores = fisher([patch.values for patch in patches.values()], batches[: self.samples])
        finally:
            if way is not None:
                way.off = False  # type: ignore[assignment]
        count = max(1, round(self.density * sum(len(s) for s in scores)))
        parts = [max(1, len(at)) for at in largest(scores, count)]  # how many of the largest each layer has
        budget = [min(self.most * self.fewest, round(self.fewest * part / min(parts))) for part in parts]
        chosen = {
            name: _per_output(score, patch.site, each)
            for (name, patch), score, each in zip(patches.items(), scores, budget, strict=True)
        }
        self.choose(adapter, chosen)
        if self.keep < 1.0:
            _fewer.settle(adapter.patches, self.merges)


def _per_output(scores: Tensor, site: Site, each: int) -> Tensor:
    """The flat places of the ``each`` largest scores of every output of a weight, as it is stored."""
    places = torch.arange(len(scores), device=scores.device)
    if site.transposed:  # [i, o]
        scores, places = scores.view(site.shape).T, places.view(site.shape).T
    else:
        scores, places = scores.view(site.shape[0], -1), places.view(site.shape[0], -1)
    best = scores.topk(min(each, scores.shape[1]), dim=1).indices
    return places.gather(1, best).flatten()
