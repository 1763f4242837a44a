"""CoOp and CoCoOp: a learned context before class names, the same for every image or moved by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.form import Call, Form, Patch, forms
from polytask.core.model import Model
from polytask.core.site import Site

from ._dual import CONTEXT, DualTokens, linear_, spaced
from .prompt import TokensPatch


@forms.register("coop")
@dataclass(frozen=True)
class CoOp(DualTokens):
    """Learned vectors between the start token and a class's name, in the text tower of a dual model.

    An image's class is the one whose text, ``[start][v_1 ... v_m][name][.][end]``, is nearest. One context serves all
    classes, so a new class needs only its name.

    Args:
        length: m.
        text: words whose vectors the context starts from; the rest, or all when empty, is normal with deviation 0.02.

    Reference: Zhou et al., Learning to Prompt for Vision-Language Models, arXiv 2109.01134; the shared context with the
    class at the end. There SGD learns it; here the optimiser is the learner's.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model.
    """

    length: int = 16
    text: str = ""

    peft_type: ClassVar[str] = "POLYTASK_COOP"
    paper: ClassVar[str] = "arXiv 2109.01134"

    def patch(self, site: Site) -> Patch:
        return ContextPatch(self, site)


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
