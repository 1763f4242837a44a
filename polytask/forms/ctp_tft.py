"""Prompts that look across the towers: CTP with TFT, and KAPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Patch, forms
from polytask.core.model import Model
from polytask.core.site import Site

from ._dual import CONTEXT, DualTokens, add_attention, at_least, linear_, look, patched, spaced, start_attention, tower
from .coop import ContextPatch

if TYPE_CHECKING:
    from polytask.core.head import Seen


@dataclass(frozen=True)
class Across(DualTokens):
    """What forms with a context for texts and a change of the images' vectors have in common."""

    towers: ClassVar[tuple[str, ...]] = ("text", "image")
    kinds: ClassVar[tuple[str, ...]] = ("input", "linear")
    default_sites: ClassVar[str] = "kind:input | re:visual_projection$"

    def refuses(self, site: Site) -> str:
        if (site.kind == "input") == (tower(site) == "text"):
            return super().refuses(site)
        return (
            f"the form {self.name!r} acts at the text tower's input and at the projection of images, not {site.shown}"
        )


@forms.register("ctp-tft")
@dataclass(frozen=True)
class CtpTft(Across):
    """Class texts get a context of their own from what the image shows of the class, and images look at the class texts.

    ``prompt_c = v + Att(q = t_c, kv = patches)`` (CTP) and ``x' = x + Att(q = x, kv = all t)`` (TFT), t the base's own vectors
    of the class texts. Class texts are encoded anew for each image.

    Args:
        length: m, the tokens of the context.
        text: words whose vectors the context starts from.
        inner: width of both attentions.
        contrast: weight of the loss that pulls an image and the text of its class together among the batch's (InfoNCE).
        space: d of the common space; read off the base when 0.
        patches: w of the image tower; read off the base when 0.

    Reference: Chen et al., Task-Oriented Multi-Modal Mutual Learning for Vision-Language Models, arXiv 2303.17169. Only the
    mechanism is public; the attentions, their zero start (which is CoOp) and the loss's weight are ours.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model with a projection of images.
    """

    length: int = 4
    text: str = CONTEXT
    inner: int = 64
    contrast: float = 1.0
    space: int = 0
    patches: int = 0

    peft_type: ClassVar[str] = "POLYTASK_CTP_TFT"
    paper: ClassVar[str] = "arXiv 2303.17169"
    wants: ClassVar[tuple[str, ...]] = ("texts", "images")

    def __post_init__(self) -> None:
        at_least(self, length=self.length, inner=self.inner)
        if self.contrast < 0:
            raise ConfigError(f"CtpTft: contrast must be 0 or more, got {self.contrast}")

    def fitted(self, model: Model) -> Any:
        return patched(spaced(self, model), model)

    def patch(self, site: Site) -> Patch:
        return CtpPatch(self, site) if tower(site) == "text" else TftPatch(self, site)

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        from polytask.core.dual import Pairs

        out = seen.out
        if not self.contrast or not isinstance(out, Pairs) or out.texts.dim() != 3:
            return values
        # text j of the batch is what image j made of its class; images of the same class count as right too
        target = torch.tensor([row.target for row in seen.rows], device=values.device)
        own = out.texts[torch.arange(len(target), device=values.device), target]
        scores = F.normalize(out.images, dim=-1) @ F.normalize(own, dim=-1).T * out.scale
        same = (target[:, None] == target[None]).to(scores.dtype)
        wanted = same / same.sum(1, keepdim=True)
        there = -(wanted * scores.log_softmax(1)).sum(1) - (wanted * scores.T.log_softmax(1)).sum(1)
        return values + self.contrast * there / 2


class CtpPatch(ContextPatch):
    """P [m, t] and an attention from class vectors [d] to patches [w], with a result of the tokens' width t."""

    form: CtpTft

    def __init__(self, form: CtpTft, site: Site) -> None:
        super().__init__(form, site)
        add_attention(self, form.space, form.patches, form.inner, self.width)

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        start_attention(self, generator)

    def virtual(self, call: Call) -> Tensor:
        other = call.other
        if other is None or other.images is None or other.texts is None or other.patches is None:
            return self.P
        query = F.normalize(other.texts, dim=-1).to(self.P.dtype)
        moved = look(self, query, other.patches.to(self.P.dtype))  # [R, t]
        return self.P + moved.unsqueeze(1)


class TftPatch(Patch):
    """An attention from an image's vector to the class texts', [d] each, at the projection of images."""

    form: CtpTft

    def __init__(self, form: CtpTft, site: Site) -> None:
        super().__init__(form, site)
        add_attention(self, site.d_out, site.d_out, form.inner)

    def start(self, generator: torch.Generator) -> None:
        start_attention(self, generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if call.other is None or call.other.texts is None:
            return torch.zeros_like(y)
        texts = F.normalize(call.other.texts, dim=-1).to(self.Wq.dtype)  # type: ignore[operator]
        return look(self, y.to(texts.dtype), texts.expand(len(y), -1, -1)).to(y.dtype)


@forms.register("kapt")
@dataclass(frozen=True)
class KAPT(Across):
    """Contexts that read a description of the class, beside key words in the text, and an image head that looks at patches.

    ``prompt_c = v + W_2 gelu(W_1 a_c)`` with a_c the base's vector of the class's description (``about`` in the task), the
    words of it that other descriptions lack in the text itself, and ``x' = x + Att(q = x, kv = patches)`` for images. A class
    without description is CoOp's.

    Args:
        length: m, the tokens of the context.
        text: words whose vectors the context starts from.
        hidden: width of the network from a description to the context.
        inner: width of the attention.
        space: d of the common space; read off the base when 0.
        patches: w of the image tower; read off the base when 0.

    Reference: Kan et al., Knowledge-Aware Prompt Tuning for Generalizable Vision-Language Models, arXiv 2308.11186. Only the
    mechanism is public; both networks, whose outputs start at zero, are ours, and descriptions are the task's.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model with a projection of images.
    """

    length: int = 4
    text: str = CONTEXT
    hidden: int = 64
    inner: int = 64
    space: int = 0
    patches: int = 0

    peft_type: ClassVar[str] = "POLYTASK_KAPT"
    paper: ClassVar[str] = "arXiv 2308.11186"
    template: ClassVar[str] = "{}, {keywords}."
    wants: ClassVar[tuple[str, ...]] = ("about",)

    def __post_init__(self) -> None:
        at_least(self, length=self.length, hidden=self.hidden, inner=self.inner)

    def fitted(self, model: Model) -> Any:
        return patched(spaced(self, model), model)

    def patch(self, site: Site) -> Patch:
        return KnowingPatch(self, site) if tower(site) == "text" else SalientPatch(self, site)


class KnowingPatch(ContextPatch):
    """P [m, t], W1 [h, d], b1 [h], W2 [m t, h]."""

    form: KAPT

    def __init__(self, form: KAPT, site: Site) -> None:
        super().__init__(form, site)
        self.W1, self.b1 = nn.Parameter(torch.empty(form.hidden, form.space)), nn.Parameter(torch.empty(form.hidden))
        self.W2 = nn.Parameter(torch.empty(form.length * self.width, form.hidden))

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        with torch.no_grad():
            linear_(self.W1, self.b1, generator)
            self.W2.zero_()

    def virtual(self, call: Call) -> Tensor:
        if call.other is None or call.other.about is None:
            return self.P
        x = F.normalize(call.other.about, dim=-1).to(self.P.dtype)
        moved = F.linear(F.gelu(F.linear(x, self.W1, self.b1)), self.W2)
        return self.P + moved.unflatten(1, (self.form.length, -1))


class SalientPatch(Patch):
    """An attention from an image's vector [d] to its patches [w]."""

    form: KAPT

    def __init__(self, form: KAPT, site: Site) -> None:
        super().__init__(form, site)
        add_attention(self, site.d_out, form.patches, form.inner)

    def start(self, generator: torch.Generator) -> None:
        start_attention(self, generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if call.other is None or call.other.patches is None:
            return torch.zeros_like(y)
        seen = call.other.patches.to(self.Wq.dtype)  # type: ignore[arg-type]
        return look(self, y.to(seen.dtype), seen).to(y.dtype)
