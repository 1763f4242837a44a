"""MaPLe, independent prompts with PromptSRC's regularisers, and MVLPT's unified prompts: learned tokens in both towers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, SiteError
from polytask.core.form import Call, Part, Patch, forms
from polytask.core.model import Model
from polytask.core.site import Site

from ._dual import CONTEXT, DeepPatch, DualTokens, at_least, linear_, shallower, tower
from .prompt import TokensPatch

if TYPE_CHECKING:
    from polytask.core.dual import SimilarityHead
    from polytask.core.head import Seen


@dataclass(frozen=True)
class BothTowers(DualTokens):
    """What forms with tokens in both towers have in common."""

    towers: ClassVar[tuple[str, ...]] = ("text", "image")
    exceptions: ClassVar[Mapping[str, str]] = {**DualTokens.exceptions, **DualTokens.deep}

    def _widths(self, sites: Sequence[Site]) -> tuple[int, int]:
        """Of the text tower and of the image tower. Raises `SiteError` where one is missing."""
        found = {tower(site): site.shape[1] for site in sites}
        if set(found) != {"text", "image"}:
            raise SiteError(f"the form {self.name!r} joins both towers of a dual model; give it both inputs as sites")
        return found["text"], found["image"]


@forms.register("maple")
@dataclass(frozen=True)
class MaPLe(BothTowers):
    """Text tokens in the first blocks, and image tokens that a linear layer of each block makes of them.

    Args:
        length: m, the tokens of a block.
        depth: how many blocks of each tower get tokens of their own; all of the shallower tower's where it has fewer.
        text: words whose vectors the first block's tokens start from.

    Reference: Khattak et al., MaPLe: Multi-modal Prompt Learning, arXiv 2210.03117.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model, or has fewer blocks; rows of a batch with and without tokens.
    """

    length: int = 2
    depth: int = 9
    text: str = CONTEXT

    peft_type: ClassVar[str] = "POLYTASK_MAPLE"
    paper: ClassVar[str] = "arXiv 2210.03117"

    def __post_init__(self) -> None:
        at_least(self, length=self.length, depth=self.depth)

    def fitted(self, model: Model) -> MaPLe:
        return shallower(self, model)  # type: ignore[no-any-return]

    def shared(self, sites: Sequence[Site]) -> Part:
        return Coupled(self, *self._widths(sites))

    def patch(self, site: Site) -> Patch:
        return CoupledPatch(self, site)


class Coupled(Part):
    """P_text [depth, m, t], W [depth, w, t] and b [depth, w]."""

    keys: Mapping[str, str] = {"P_text": "prompts", "W": "coupling.weight", "b": "coupling.bias"}

    def __init__(self, form: MaPLe, text: int, image: int) -> None:
        super().__init__(form)
        self.P_text = nn.Parameter(torch.empty(form.depth, form.length, text))
        self.W, self.b = (
            nn.Parameter(torch.empty(form.depth, image, text)),
            nn.Parameter(torch.empty(form.depth, image)),
        )

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.P_text.normal_(std=0.02, generator=generator)
            linear_(self.W, self.b, generator)

    def tokens(self, side: str) -> Tensor:
        """[depth, m, t] of the text tower or [depth, m, w] of the image tower."""
        if side == "text":
            return self.P_text
        return self.P_text @ self.W.transpose(1, 2) + self.b.unsqueeze(1)


class CoupledPatch(TokensPatch):
    """No tensors of its own."""

    def __init__(self, form: MaPLe | MVLPT, site: Site) -> None:
        super().__init__(form, site)
        self.tokens, self.layers = form.length * form.depth, form.depth

    def virtual(self, call: Call) -> Tensor:
        found: Tensor = self.shared.tokens(tower(self.site))
        return found.flatten(0, 1)


@forms.register("promptsrc")
@dataclass(frozen=True)
class PromptSRC(BothTowers):
    """Independent tokens in both towers, held near the frozen model: its features, its predictions, its average over time.

    Added to the loss of each image: ``a mean|t - t_0| + b mean|v - v_0| + c KL(z_0 || z) / C``, features normalised, where 0
    is the base with ``templates``. What is learned is the average of the epochs' ends with Gaussian weights.

    Args:
        length: m, the tokens of a block.
        depth: how many blocks of each tower get tokens of their own.
        text: words whose vectors the first block's text tokens start from.
        text_weight: a, agreement of the class texts' vectors.
        image_weight: b, agreement of the images' vectors.
        logit_weight: c, agreement of the predictions.
        templates: texts whose averaged vectors are t_0, with ``{}`` where the name goes.
        mu: the middle of the Gaussian weights, as a part of the epochs; None takes the last state instead.
        sigma: their deviation in epochs.

    Reference: Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, arXiv 2307.06948.
    There 60 templates for ImageNet; here a few of our own. What is learned is averaged in fp32, a head's own numbers too,
    and nothing of the base.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model; rows of a batch with and without tokens.
    """

    length: int = 4
    depth: int = 9
    text: str = CONTEXT
    text_weight: float = 25.0
    image_weight: float = 10.0
    logit_weight: float = 1.0
    templates: tuple[str, ...] = (
        "a photo of a {}.", "a picture of the {}.", "a small photo of a {}.", "a blurry photo of the {}.",
        "a bright photo of a {}.", "a dark photo of the {}.", "a close photo of a {}.", "an image of one {}.",
    )  # fmt: skip
    mu: float | None = 0.75
    sigma: float = 1.0

    peft_type: ClassVar[str] = "POLYTASK_PROMPTSRC"
    paper: ClassVar[str] = "arXiv 2307.06948"

    def __post_init__(self) -> None:
        at_least(self, length=self.length, depth=self.depth)
        if min(self.text_weight, self.image_weight, self.logit_weight) < 0:
            raise ConfigError("PromptSRC: text_weight, image_weight and logit_weight must be 0 or more")
        if self.sigma <= 0 or (self.mu is not None and not 0 <= self.mu <= 1):
            raise ConfigError(f"PromptSRC: sigma must be above 0 and mu from 0 to 1, got {self.sigma} and {self.mu}")
        if not self.templates or not all("{}" in t for t in self.templates):
            raise ConfigError("PromptSRC: each of templates must hold {} where the class name goes")

    def fitted(self, model: Model) -> PromptSRC:
        return shallower(self, model)  # type: ignore[no-any-return]

    def patch(self, site: Site) -> Patch:
        return DeepPatch(self, site, self.length, self.depth)

    def averages(self, epochs: int) -> tuple[float, ...] | None:
        if self.mu is None:
            return None
        mu = self.mu * epochs
        weights = [math.exp(-((e - mu) ** 2) / (2 * self.sigma**2)) for e in range(1, epochs + 1)]
        if not sum(weights):  # a very small deviation between two epochs
            weights = [float(e == round(mu)) for e in range(1, epochs + 1)]
        return tuple(w / sum(weights) for w in weights)

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        from polytask.core.dual import Pairs, SimilarityHead

        head, out = seen.head, seen.out
        if not isinstance(head, SimilarityHead) or not isinstance(out, Pairs) or out.texts.dim() != 2:
            return values
        plain = _plain(head.labels, self.templates, head.about)
        with torch.no_grad(), seen.model.using(None):
            base = plain.run(seen.model, plain.collate(seen.model, {"pixel_values": seen.batch["pixel_values"]}))
        assert isinstance(base, Pairs)
        v, t = F.normalize(out.images, dim=-1), F.normalize(out.texts, dim=-1)
        v_0, t_0 = F.normalize(base.images, dim=-1), F.normalize(base.texts, dim=-1)
        z, z_0 = out.logits().float(), base.logits().float()
        values = values + self.text_weight * (t - t_0).abs().mean()
        values = values + self.image_weight * (v - v_0).abs().mean(1)
        agreement = F.kl_div(z.log_softmax(1), z_0.log_softmax(1), log_target=True, reduction="none").sum(1)
        return values + self.logit_weight * agreement / z.shape[1]


@functools.lru_cache(maxsize=8)
def _plain(labels: tuple[str, ...], templates: tuple[str, ...], about: tuple[str, ...]) -> SimilarityHead:
    """The zero-shot head, kept because it keeps its texts' tokens."""
    from polytask.core.dual import SimilarityHead

    return SimilarityHead(labels, templates, about)


@forms.register("mvlpt")
@dataclass(frozen=True)
class MVLPT(BothTowers):
    """One prompt for both towers: their tokens are projected to one width, pass a transformer block together, and return.

    Learned on several source tasks with ``joint`` (each keeps its own class names, so a task's classes do not compete with
    another's), it is the ``start`` of a target task.

    Args:
        length: m, the tokens of a block.
        depth: how many blocks of each tower get tokens of their own.
        inner: width of the common block.
        heads: of its attention.
        text: words whose vectors the first block's text tokens start from.

    Reference: Shen et al., Multitask Vision-Language Prompt Tuning, arXiv 2211.11720. There a task's logits of foreign
    classes are multiplied by zero; here they are not there at all. The block's two outputs start at zero, so the form starts
    as independent prompts, whose own vectors are added to the block's.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no dual model; rows of a batch with and without tokens.
    """

    length: int = 4
    depth: int = 1
    inner: int = 128
    heads: int = 1
    text: str = CONTEXT

    peft_type: ClassVar[str] = "POLYTASK_MVLPT"
    paper: ClassVar[str] = "arXiv 2211.11720"

    def __post_init__(self) -> None:
        at_least(self, length=self.length, depth=self.depth, inner=self.inner, heads=self.heads)
        if self.inner % self.heads:
            raise ConfigError(f"MVLPT: inner must be a multiple of heads, got {self.inner} and {self.heads}")

    def fitted(self, model: Model) -> MVLPT:
        return shallower(self, model)  # type: ignore[no-any-return]

    def shared(self, sites: Sequence[Site]) -> Part:
        return Unified(self, *self._widths(sites))

    def patch(self, site: Site) -> Patch:
        return CoupledPatch(self, site)


class Unified(Part):
    """Both towers' tokens, the projections to and from the common width, and one transformer block."""

    keys: Mapping[str, str] = {
        "P_text": "text", "P_image": "image", "Wt": "from_text", "Wi": "from_image", "Ut": "to_text", "Ui": "to_image",
        "Wqkv": "attention.in", "Wo": "attention.out", "W1": "mlp.in", "W2": "mlp.out",
    }  # fmt: skip

    def __init__(self, form: MVLPT, text: int, image: int) -> None:
        super().__init__(form)
        depth, m, n = form.depth, form.length, form.inner
        shapes = {
            "P_text": (depth, m, text), "P_image": (depth, m, image), "Wt": (n, text), "Wi": (n, image), "Ut": (text, n),
            "Ui": (image, n), "Wqkv": (3 * n, n), "Wo": (n, n), "W1": (4 * n, n), "W2": (n, 4 * n),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, value in self._parameters.items():
                assert value is not None
                if name.startswith("P_"):
                    value.normal_(std=0.02, generator=generator)
                elif name.startswith("U"):
                    value.zero_()
                else:
                    linear_(value, None, generator)

    def tokens(self, side: Literal["text", "image"]) -> Tensor:
        """[depth, m, t] of the text tower or [depth, m, w] of the image tower."""
        p: dict[str, Any] = self._parameters
        m, heads = self.form.length, self.form.heads
        x = torch.cat([F.linear(p["P_text"], p["Wt"]), F.linear(p["P_image"], p["Wi"])], 1)  # [depth, 2m, n]
        normed = F.layer_norm(x, x.shape[-1:])
        qkv = F.linear(normed, p["Wqkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)
        x = x + F.linear(seen, p["Wo"])
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), p["W1"])), p["W2"])
        if side == "text":
            return p["P_text"] + F.linear(x[:, :m], p["Ut"])  # type: ignore[no-any-return]
        return p["P_image"] + F.linear(x[:, m:], p["Ui"])  # type: ignore[no-any-return]
