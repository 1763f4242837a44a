"""AdaMix: copies of one adapter that are drawn at random while they learn, and are averaged into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.agreement import divergence, row_sums, scores_apart, words
from polytask.core.errors import MixError, SiteError
from polytask.core.form import Call, Form, Part, Patch, Weights
from polytask.core.gate import Gate, Hosts, Router, routers
from polytask.core.head import LinearHead, Seen
from polytask.core.site import Site

LAST = ("B", "up", "up_bias", "s")  # what forms of two factors call their last


@routers.register("adamix")
@dataclass(frozen=True)
class AdaMix(Router):
    """Copies of one adapter: each forward that learns draws one at each site, for its first and its last factor apart; else
    they act as the mean of their parameters. What learning leaves is that mean, one plain adapter of the experts' form.

    A second pass with draws of its own must agree with the first: ``consistency / 2 (KL(p2 || p1) + KL(p1 || p2))`` is added
    to each row's loss, in both terms with no gradient into what is agreed with.

    Args:
        consistency: of that agreement; 0 saves the second pass. Texts count each scored token (the paper takes 100 there).
        share_last: all copies have the last factor in common (LoRA's B, a bottleneck's way up): each uses the mean of all,
            so that copies that start alike stay alike in it.
        share_first: the same for all else. A form of one factor has only this.

    Reference: Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, arXiv 2205.12410. Its code
    keeps a merged weight after it learned on; ours averages anew each time. Copies of a mixture start alike; adapters that are
    given and did not start from one have an average of little meaning.

    Raises:
        MixError: the average of the adapters' parameters has no meaning.
    """

    consistency: float = 1.0
    share_last: bool = True
    share_first: bool = False

    combines: ClassVar[Any] = "parameters"
    trains: ClassVar[Any] = "adapters"
    alike: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2205.12410"

    def __post_init__(self) -> None:
        self.at_least("consistency", 0.0)

    def refuses(self, site: Site, patches: Mapping[str, Patch]) -> str:
        reason = _unaveraged(site, list(patches.values()))
        return f"the router 'adamix' averages parameters, and {reason}" if reason else ""

    def fitted(self, adapters: Mapping[str, Adapter]) -> Router:
        first, *others = adapters.values()
        for name, part in first.parts.items():
            for other in others:
                theirs = other.parts.get(name)
                for key in part.frozen if theirs is not None else ():
                    if not torch.equal(part._parameters[key], theirs._parameters[key]):  # type: ignore[arg-type, union-attr]
                        raise MixError(
                            f"the adapters {first.name!r} and {other.name!r} have another {key} at {name or 'all sites'!r}, "
                            "which does not learn, so that the average of the rest has no meaning; start them with one seed"
                        )
        return self

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return AdaMixGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return Pass(self)

    def loss(self, gates: Sequence[Gate], shared: Pass, seen: Seen, values: Tensor) -> Tensor:
        if not self.consistency or not torch.is_grad_enabled():
            return values
        model, head, batch = seen.model, seen.head, seen.batch

        def said(which: str) -> Any:
            shared.__dict__["which"] = which
            try:
                with model.using(seen.name, tasks=seen.task):
                    return head.run(model, batch) if isinstance(head, LinearHead) else words(seen, batch)[1]
            finally:
                shared.__dict__["which"] = "first"

        if isinstance(head, LinearHead):
            one, two = head._logits(seen.out), head._logits(said("second"))
            there, back = (scores_apart(head, a.detach(), b, seen.rows) for a, b in ((two, one), (one, two)))
        elif head.trunk == "likelihood":
            one, two = said("again"), said("second")
            there, back = (row_sums(divergence(a.detach(), b), batch, seen.rows) for a, b in ((two, one), (one, two)))
        else:
            return values
        return values + 0.5 * self.consistency * (there + back)

    def finish(self, adapter: Adapter) -> Adapter:
        """One adapter with the copies' mean."""
        from polytask.forms.mixture import experts_of

        experts = list(experts_of(adapter).values())
        made = experts[0].copy(adapter.name)
        with torch.no_grad():
            for name, patch in made.patches.items():
                mean = blended([expert.patches[name] for expert in experts if name in expert.patches], {})
                for key, value in patch.named_parameters():
                    value.copy_(mean._parameters[key])  # type: ignore[arg-type]
        made.heads, made.card = adapter.heads, adapter.card
        return made


class Pass(Part):
    """Which pass over the rows runs: the ``first`` one, the first ``again`` with the same draws, or the ``second``."""

    which: str = "first"


class AdaMixGate(Gate):
    """No parameters; the draws of the first pass are kept for its repetition."""

    shared: Pass

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return Weights(self.names, (1.0 / len(self.names),) * len(self.names))

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        patches = [here.patches[name] for name in self.names]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in patches[0].parameters())
        self.note(self.weigh(x, y, call), call)
        return blended(patches, self.draw(patches) if learns else {}).add(x, y, out, 1.0, call)

    def draw(self, patches: Sequence[Patch]) -> dict[str, int]:
        """Which copy each parameter is taken from; what is not named is averaged."""
        which = self.shared.which
        if which == "again":
            return self.__dict__["_drawn"]  # type: ignore[no-any-return]
        first, last = torch.randint(len(patches), (2,)).tolist()  # of the run's own random numbers: its seed decides
        drawn = {} if self.router.share_first else {key: first for key in patches[0]._parameters if key not in LAST}
        if not self.router.share_last:
            drawn |= {key: last for key in patches[0]._parameters if key in LAST}
        if which == "first":
            self.__dict__["_drawn"] = drawn
        return drawn


def blended(patches: Sequence[Patch], drawn: Mapping[str, int]) -> Patch:
    """A view of the first patch whose parameters are another's where it is ``drawn``, and the mean of all elsewhere."""
    first = patches[0]
    own: dict[str, Any] = {}
    for key, value in first._parameters.items():
        if value is None or key in first.frozen or len(patches) == 1:
            own[key] = value
        elif key in drawn:
            own[key] = patches[drawn[key]]._parameters[key]
        else:
            own[key] = torch.stack([patch._parameters[key] for patch in patches]).mean(0)  # type: ignore[misc]
    view: Patch = object.__new__(type(first))
    view.__dict__.update({**first.__dict__, "_parameters": own})
    if "_kept" in view.__dict__:  # what the first patch made of its own parameters
        view.__dict__["_kept"] = None
    return view


def _unaveraged(site: Site, patches: Sequence[Patch]) -> str:
    """Why the mean of the parameters of these patches is not a patch of their kind, or the empty string."""
    if not patches:
        return ""
    first = patches[0]
    odd = next((patch for patch in patches if type(patch) is not type(first) or patch.form != first.form), None)
    if odd is not None:
        return f"the adapters have different forms, {first.form} and {odd.form}"
    name = f"those of the form {first.form.name!r}"
    if first.packs or "subs" in first.__dict__ or any(True for _ in first.children()):
        return f"{name} are not numbers of its own that could be averaged"
    learned = [p for key, p in first.named_parameters() if key not in first.frozen]
    if not all(p.is_floating_point() for p in learned):
        return f"{name} are places, which have no average"
    if type(first.form).shared is not Form.shared and _common(first, site):
        return f"{name} are in part common to all sites"
    return ""


def _common(patch: Patch, site: Site) -> bool:
    """Whether what the sites of an adapter share learns."""
    part = patch.shared
    if part is None:
        try:
            part = patch.form.shared([site])
        except SiteError:  # it needs several sites, which only pass something on to each other
            return False
    return part is not None and any(name not in part.frozen for name, _ in part.named_parameters())
