"""MixDA: domain adapters beside a feed-forward layer that is weighed itself, and how they learn without changing other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.core.form import Call, Part, Weights, per_row
from polytask.core.gate import Gate, Hosts, Router, by_row, routers
from polytask.core.gates import goes_on
from polytask.core.mix import act
from polytask.core.rows import padded, tokens
from polytask.core.site import Site
from polytask.route.layers import fill, grow, through

if TYPE_CHECKING:
    from polytask.core.head import Seen
    from polytask.core.hub import Hub


@routers.register("mixda")
@dataclass(frozen=True)
class MixDA(Router):
    """``out = g_0 y + sum_n g_n c_n``, so ``y + sum_n g_n c_n + (g_0 - 1) y``: the base's own output is weighed too.

    ``g = softmax(f(x))``, f three layers that read the site's input at the row's last real token: each site weighs each row. A
    fresh gate starts near the base and not at it: g_0 is about ``e^lean / (e^lean + N)``.

    How a domain's adapter learns (the paper's first stage): ``polytask.learn`` with the form ``{"name": "mixture", "router":
    {"name": "mixda", "old": "general.txt"}, "experts": ["law"], "forms": ..., "train": "all"}`` adds ``keep`` times the mean
    squared change of the sites' outputs on texts of other domains; `experts_of` then gives the adapter. The second stage is
    ``polytask.route``, which trains gates only.

    Args:
        width: of the layers of f.
        dropout: between them, while they learn.
        lean: the bias of g_0's logit at the start.
        old: a file with a text in each line, for the first stage; none where empty.
        keep: of the squared change on these.

    Reference: Diao et al., Mixture-of-Domain-Adapters, arXiv 2306.05406, at the output of the feed-forward in two layers. Its
    code reads the last token even where that is padding, and has no bias. Decoders whose tokens the mask does not cover are
    weighed by their first token; while ``generate`` writes, the weights are those of the prompt.

    Raises:
        ConfigError: a setting is out of range, or there are no old texts, or the base cannot read them.
        MixError: a site does not see the rows of the batch.
    """

    width: int = 768
    dropout: float = 0.2
    lean: float = 4.0
    old: str = ""
    keep: float = 1.0

    reads: ClassVar[Any] = "row"
    trains: ClassVar[Any] = "gates"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    paper: ClassVar[str] = "arXiv 2306.05406"
    exceptions: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("one", "identical", "images"), "a part of the weight is the base's own output's"
    )

    def __post_init__(self) -> None:
        self.at_least("width", 1, whole=True)
        self.at_least("keep", 0.0)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{self.name}: dropout must be in [0, 1), got {self.dropout!r}")

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return DomainGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return Forward(self)

    def begin(self, shared: Forward, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        own = shared.__dict__
        own["goes_on"] = hub.generating or goes_on(inputs)
        own["number"] = shared.number if own["goes_on"] else shared.number + 1
        own["beyond"] = hub.beyond()

    def loss(self, gates: Sequence[Gate], shared: Forward, seen: Seen, values: Tensor) -> Tensor:
        if not self.old or not self.keep or not torch.is_grad_enabled():
            return values
        model = seen.model
        if model.kind not in ("encoder", "causal"):
            raise ConfigError(
                f"{self.name}: old texts are read by encoders and causal models, and the base is {model.kind!r}"
            )
        found = lines(self.old)
        at = sum(
            sum(sequence) for row in seen.rows for sequence in row.sequences
        )  # by the batch alone: a run can go on
        drawn = [(found[(at + i) % len(found)],) for i in range(len(seen.rows))]
        ids, _ = tokens(model, drawn, max(row.length for row in seen.rows))
        pad = getattr(model.tokenizer, "pad_token_id", None) or 0
        batch = {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
        shared.__dict__["changes"] = []
        try:
            with model.using(seen.name, tasks=seen.task):
                model.features({name: tensor.to(model.device) for name, tensor in batch.items()})
            change = torch.stack(list(shared.changes or ())).mean()
        finally:
            shared.__dict__["changes"] = None
        _, parts = seen.head.loss(seen.out, seen.rows)  # what the sum of the rows' losses is divided by
        return values + self.keep * change * parts.to(values.dtype)


@lru_cache(maxsize=8)
def lines(path: str) -> tuple[str, ...]:
    """The texts of a file, one in each line. Raises `ConfigError` where there are none."""
    try:
        found = tuple(line for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"mixda: the old texts {path!r} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"mixda: {path!r} holds no text; write one in each line")
    return found


class Forward(Part):
    """What the gates know of the forward that runs. It has no parameters.

    Attributes:
        number: of the texts: it stays while a text is continued.
        goes_on: whether one is.
        beyond: sites that the mask does not lie on.
        changes: the mean squared change of each site's output, while somebody asks.
    """

    number: int = 0
    goes_on: bool = False
    beyond: frozenset[str] = frozenset()
    changes: Sequence[Tensor] | None = None

    def __init__(self, router: MixDA) -> None:
        super().__init__(router)


class DomainGate(Gate):
    """f: W0, b0, ..., the last [N + 1], the base's own last."""

    shared: Forward

    def __init__(self, router: MixDA, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        grow(self, [site.d_in, router.width, router.width, len(names) + 1])

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        fill(self, generator)
        self.get_parameter("b2")[-1] += self.router.lean

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def real(self, shape: torch.Size, call: Call) -> Tensor | None:
        """The mask of tokens [B, T], where it lies on this site's."""
        fits = call.mask is not None and call.mask.shape == shape and self.site.name not in self.shared.beyond
        return call.mask if fits else None

    def domains(self, x: Tensor, call: Call) -> Tensor:
        """g [B, N + 1] of the rows of x."""
        kept = self.__dict__.get("_kept")
        if kept is not None and self.shared.goes_on and kept[0] == self.shared.number and len(x) % len(kept[1]) == 0:
            found: Tensor = kept[1].repeat_interleave(len(x) // len(kept[1]), 0)
            return found
        rows = call.rows if call.rows and len(x) % call.rows == 0 else len(x)
        seen = x.reshape(rows, -1, x.shape[-1])
        mask = self.real(seen.shape[:2], call)
        if mask is not None:
            place = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            last = seen[torch.arange(rows, device=x.device), place]
        else:
            last = seen[:, 0 if call.mask is not None else -1]
        g = through(self, last, self.router.dropout).softmax(-1)
        self.__dict__["_kept"] = (self.shared.number, g) if self.shared.goes_on else None
        return g

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return by_row(self.site, self.names, self.domains(x, call)[:, :-1], x, y)

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        g = self.domains(x, call)
        weights = by_row(self.site, self.names, g[:, :-1], x, y)
        self.note(weights, call)
        _, whole, each = per_row(x, y, len(g), self.site.name)
        less = (g[:, -1] - 1.0).repeat_interleave(each, 0).to(y.dtype)
        change = less.reshape(-1, *[1] * (whole.dim() - 1)) * whole  # before anything is added to y in place
        made = act(here.banks(weights.names), self.router.combines, weights, x, y, out, call) + change
        if self.shared.changes is not None:
            self.shared.__dict__["changes"] = [*self.shared.changes, self.changed(made - y, call)]
        return made

    def changed(self, change: Tensor, call: Call) -> Tensor:
        """The mean square over the real tokens."""
        mask = self.real(change.shape[:2], call)
        square = change.float().square()
        return square.mean() if mask is None else square[mask.bool()].mean()
