"""CoOp and CoCoOp: a learned context before class names, the same for every image or moved by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.form import Call, Form, Patch, forms
from polytask.core.model import Model
from polytask.core.site import Site

from ._dual import CONTEXT, DualTokens, linear_, spaced
from .prompt import TokensPatch

if TYPE_CHECKING:
    from polytask.core.task import Task


@forms.register("coop")
@dataclass(frozen=True)
class CoOp(DualTokens):
    """Learned vectors between the start token and a class's name, in the text tower of a dual model.

    An image's class is the one whose text, ``[start][v_1 ... v_m][name][.][end]``, is nearest. One context serves all
    classes, so a new class needs only its name; with ``per_class`` each class that learns has a context of its own, which can
    tell more classes apart from many examples, and serves no other class.

    Args:
        length: m.
        text: words whose vectors the context starts from; the rest, or all when empty, is normal with deviation 0.02.
        per_class: a context for each class.
        classes: their names; those of the tasks that are learned when empty.

    Reference: Zhou et al., Learning to Prompt for Vision-Language Models, arXiv 2109.01134; the unified and the class-specific
    context, with the class at the end. There SGD learns it; here the optimiser is the learner's.

    Raises:
        ConfigError: a setting is out of range, or nobody said the classes.
        SiteError: the base is no dual model.
        MixError: a forward with ``per_class`` has a class that did not learn, or texts of no class.
    """

    length: int = 16
    text: str = ""
    per_class: bool = False
    classes: tuple[str, ...] = ()

    peft_type: ClassVar[str] = "POLYTASK_COOP"
    paper: ClassVar[str] = "arXiv 2109.01134"
    wants: ClassVar[tuple[str, ...]] = ("classes",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.classes and not self.per_class:
            raise ConfigError("CoOp: classes are for contexts of their own; say per_class=True too, or leave them out")
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"CoOp: a class is named twice among {listing(self.classes)}; say each once")

    def told(self, tasks: Sequence[Task]) -> Form:
        if not self.per_class or self.classes:
            return self
        return replace(self, classes=tuple(dict.fromkeys(label for task in tasks for label in task.labels)))

    def patch(self, site: Site) -> Patch:
        return ClassPatch(self, site) if self.per_class else ContextPatch(self, site)


class ContextPatch(TokensPatch):
    """P [m, d]."""

    def __init__(self, form: Any, site: Site) -> None:
        super().__init__(form, site)
        self.P = nn.Parameter(torch.empty(form.length, self.width))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.P.normal_(std=0.02, generator=generator)

    def virtual(self, call: Call) -> Tensor:
        return self.P


class ClassPatch(ContextPatch):
    """P [C, m, d]: a context for each class."""

    form: CoOp

    def __init__(self, form: CoOp, site: Site) -> None:
        if not form.classes:
            raise ConfigError(
                "CoOp: a context for each class needs their names; say classes=[...], or let it learn a task that has some"
            )
        super().__init__(form, site)
        self.P = nn.Parameter(torch.empty(len(form.classes), form.length, self.width))
        self.places = {name: i for i, name in enumerate(form.classes)}

    def virtual(self, call: Call) -> Tensor:
        names = None if call.other is None else call.other.classes
        if names is None:
            raise MixError(
                "CoOp: contexts of classes act where texts are those of classes, and this forward has others; score a task of "
                "images, or learn one context for all (per_class=False)"
            )
        new = [name for name in names if name not in self.places]
        if new:
            raise MixError(
                f"CoOp: the class {new[0]!r} has no context: those of {listing(self.form.classes)} learned; learn one for all "
                "(per_class=False), which serves new classes too"
            )
        return self.P[[self.places[name] for name in names]]


@forms.register("cocoop")
@dataclass(frozen=True)
class CoCoOp(DualTokens):
    """A learned context that each image moves: ``v_m + W_2 relu(W_1 x)``, x the image's normalised vector.

    Class texts are encoded anew for each image, so a step costs images times classes. Where no image is known (a forward of
    the text tower alone) the context is not moved.

    Args:
        length: m.
        text: words whose vectors the context starts from.
        hidden: width of the small network; a sixteenth of the common space when 0.
        zero: let W_2 start at zero, so that it starts as CoOp; the paper's starts at random.
        space: d of the common space; read off the base when 0.

    Reference: Zhou et al., Conditional Prompt Learning for Vision-Language Models, arXiv 2203.05557.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model.
    """

    length: int = 4
    text: str = CONTEXT
    hidden: int = 0
    zero: bool = False
    space: int = 0

    peft_type: ClassVar[str] = "POLYTASK_COCOOP"
    paper: ClassVar[str] = "arXiv 2203.05557"
    wants: ClassVar[tuple[str, ...]] = ("images",)

    def fitted(self, model: Model) -> Form:
        return spaced(self, model)  # type: ignore[no-any-return]

    def patch(self, site: Site) -> Patch:
        return CoCoOpPatch(self, site)


class CoCoOpPatch(ContextPatch):
    """P [m, t], W1 [h, d], b1 [h], W2 [t, h], b2 [t]."""

    form: CoCoOp

    def __init__(self, form: CoCoOp, site: Site) -> None:
        super().__init__(form, site)
        hidden = form.hidden or max(1, form.space // 16)
        self.W1, self.b1 = nn.Parameter(torch.empty(hidden, form.space)), nn.Parameter(torch.empty(hidden))
        self.W2, self.b2 = nn.Parameter(torch.empty(self.width, hidden)), nn.Parameter(torch.empty(self.width))

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        with torch.no_grad():
            linear_(self.W1, self.b1, generator)
            linear_(self.W2, self.b2, generator)
            if self.form.zero:
                self.W2.zero_()
                self.b2.zero_()

    def virtual(self, call: Call) -> Tensor:
        if call.other is None or call.other.images is None:
            return self.P
        x = F.normalize(call.other.images, dim=-1).to(self.W1.dtype)
        moved = F.linear(F.relu(F.linear(x, self.W1, self.b1)), self.W2, self.b2)  # [R, t]
        return self.P + moved.unsqueeze(1)
