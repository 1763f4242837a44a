"""Dual models: an image tower and a text tower whose vectors are compared, and heads that choose among class texts.

Shapes: B images, C classes, R text rows, n patches, d width of the common space, w and t the towers' own widths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError, MixError, ModelError
from .form import Call, Other
from .head import Head, Out
from .hub import calling
from .mix import PerRow
from .rows import Row, images, padded, tokens

if TYPE_CHECKING:
    from .form import Form
    from .model import Model
    from .task import Example, Task

TEMPLATE = "a photo of a {}."  # CLIP's own for a class that nobody says more of


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """What a dual model computes of images and class texts.

    Attributes:
        images: [B, d], not normalised.
        texts: [C, d], or [B, C, d] where each image has class texts of its own; not normalised.
        scale: what cosines are multiplied by.
        bias: what is added then.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def logits(self) -> Tensor:
        """[B, C]: the scaled cosines."""
        images, texts = F.normalize(self.images, dim=-1), F.normalize(self.texts, dim=-1)
        cosines = images @ texts.T if texts.dim() == 2 else (texts @ images.unsqueeze(2)).squeeze(2)
        logits = cosines * self.scale
        return logits if self.bias is None else logits + self.bias

    def split(self, counts: Sequence[int]) -> list[Pairs]:
        """Groups of images."""
        images = self.images.split(list(counts))
        texts = self.texts.split(list(counts)) if self.texts.dim() == 3 else [self.texts] * len(images)
        return [replace(self, images=i, texts=t) for i, t in zip(images, texts, strict=True)]


def image_features(model: Model, pixels: Tensor, call: Call, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The images' vectors [B, d] and their patches [B, n, w], as the vision tower leaves them, under the mix that acts.

    Args:
        model: a dual model.
        pixels: [B, 3, H, W].
        call: what the forward knows.
        texts: [C, d], the base's class vectors, for patches of the image tower that look at them.
    """
    module: Any = model.module
    with calling(model._hub, replace(call, other=None if texts is None else Other(texts=texts[None]))):
        out = module.vision_model(pixel_values=pixels)
        hidden, pooled = out.last_hidden_state, out.pooler_output
        patches = hidden[:, hidden.shape[1] - _patches(module, hidden) :]
        model._hub.call = replace(model._hub.call, other=Other(None if texts is None else texts[None], None, patches))
        projection = getattr(module, "visual_projection", None)
        return (pooled if projection is None else projection(pooled)), patches


def _patches(module: Any, hidden: Tensor) -> int:
    embeddings = module.vision_model.embeddings
    return int(getattr(embeddings, "num_patches", hidden.shape[1]))


def text_features(model: Model, texts: Mapping[str, Tensor], call: Call) -> Tensor:
    """The texts' vectors [R, d], under the mix that acts."""
    module: Any = model.module
    with calling(model._hub, replace(call, mask=texts.get("attention_mask"), rows=len(texts["input_ids"]))):
        pooled = module.text_model(**texts).pooler_output
        projection = getattr(module, "text_projection", None)
        return pooled if projection is None else projection(pooled)  # type: ignore[no-any-return]


def similarity(
    model: Model,
    batch: Mapping[str, Tensor],
    templates: int = 1,
    call: Call | None = None,
    classes: Sequence[str] | None = None,
) -> Pairs:
    """Images and class texts in the common space, under the mix that acts now.

    The texts are encoded once for a batch; once for each different entry where the mix or the tasks differ between its rows;
    and once for each image where a form makes texts of the images (``Form.wants``).

    Args:
        model: a dual model.
        batch: ``pixel_values`` [B, 3, H, W] and the texts' ``input_ids`` and ``attention_mask``, [C * templates, T], the
            texts of a class being neighbours.
        templates: texts per class; the mean of their normalised vectors is the class's.
        call: what the forward knows; by default its tasks.
        classes: the classes' names, for forms with something for each.
    """
    hub, pixels = model._hub, batch["pixel_values"]
    texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
    B, mix = len(pixels), hub.mix
    known = replace(call or Call(tasks=hub.call.tasks), rows=B).spread()
    active = [hub.adapters[name].form for name in (mix.names() if mix is not None else ())]
    wants = {what for form in active for what in form.wants}
    frozen = _frozen(model, texts, templates) if "texts" in wants else None
    about = None
    if "about" in wants and "about_input_ids" in batch:
        about = _frozen(model, {k: batch[f"about_{k}"] for k in texts}, 1)
    images, patches = image_features(model, pixels, known, frozen)
    # rows of texts: (entry of the mix, task) of the image that they belong to
    entries: list[Any] = list(mix.rows) if isinstance(mix, PerRow) else [None] * B
    tasks: list[Any] = list(known.tasks) if known.tasks is not None else [None] * B
    if len(entries) != B or len(tasks) != B:
        raise MixError(
            f"the mix or the call has {len(entries)} entries and {len(tasks)} tasks, and there are {B} images"
        )
    keys: list[Any] = [
        (i if "images" in wants else None, tuple(sorted(e.items())) if e is not None else None, t)
        for i, (e, t) in enumerate(zip(entries, tasks, strict=True))
    ]
    groups = list(dict.fromkeys(keys))
    first = [keys.index(key) for key in groups]
    count = len(texts["input_ids"])
    many = {k: v.repeat(len(groups), *[1] * (v.dim() - 1)) for k, v in texts.items()}
    each = [i for i in first for _ in range(count)]
    own = tuple(tasks[i] for i in each) if known.tasks is not None else None
    other = None
    if wants:
        index = torch.tensor(each, device=images.device) if "images" in wants else None

        def each_text(vectors: Tensor | None) -> Tensor | None:
            return None if vectors is None else vectors.repeat_interleave(templates, 0).repeat(len(groups), 1)

        image, seen = (None, None) if index is None else (images[index], patches[index])
        names = None if classes is None else tuple(c for c in classes for _ in range(templates)) * len(groups)
        other = Other(each_text(frozen), image, seen, each_text(about), names)
    with _rows_of(model, [entries[i] for i in each] if isinstance(mix, PerRow) else None):
        found = text_features(model, many, Call(tasks=own, step=known.step, other=other))
    made = _classes(found, templates).unflatten(0, (len(groups), -1))
    where = [groups.index(key) for key in keys]
    encoded = made[0] if len(groups) == 1 else made if where == list(range(B)) else made[where]
    module: Any = model.module
    return Pairs(images, encoded, module.logit_scale.exp(), getattr(module, "logit_bias", None))


@contextmanager
def _rows_of(model: Model, rows: list[Any] | None) -> Iterator[None]:
    """The mix of the texts: the images' own, or their entries for the texts' rows."""
    if rows is None:
        yield
        return
    mix = model._hub.mix
    assert isinstance(mix, PerRow)
    with model.using(PerRow(rows, mix.combines)):
        yield


def _classes(vectors: Tensor, templates: int) -> Tensor:
    """[R, d] to a vector per class: of several templates, the mean of the normalised ones."""
    if templates == 1:
        return vectors
    found: Tensor = F.normalize(vectors, dim=-1).unflatten(0, (-1, templates)).mean(1)
    return found


@torch.no_grad()
def _frozen(model: Model, texts: Mapping[str, Tensor], templates: int) -> Tensor:
    """What the base alone makes of the class texts, [C, d]."""
    with model.using(None):
        found = text_features(model, texts, Call())
    return _classes(found, templates)


def similarity_head(model: Model, task: Task, seed: int, form: Form | None, decoupled: bool) -> SimilarityHead:
    """A head of class texts for a task: the form's template, else the task's instruction where it has a ``{}``."""
    template = form.template if form is not None and form.template else ""
    template = template or (task.instruction if "{}" in task.instruction else TEMPLATE)
    about = [task.about[label] for label in task.labels] if task.about else []
    if not decoupled:
        return SimilarityHead(task.labels, (template,), about)
    head = DecoupledHead(task.labels, (template,), about, model.width)
    return head.start(torch.Generator().manual_seed(seed))


def keywords(about: Sequence[str], names: Sequence[str], count: int = 3) -> list[str]:
    """The words of each description that few others have, long ones first, without the class's own; in their order."""
    words = [[w for w in re.findall(r"[a-z]+", text.lower()) if len(w) > 3] for text in about]
    spread = Counter(w for own in words for w in set(own))
    found = []
    for own, name in zip(words, names, strict=True):
        there = [w for w in dict.fromkeys(own) if w not in name.lower()]
        best = set(sorted(there, key=lambda w: (spread[w], -len(w), there.index(w)))[:count])
        found.append(", ".join(w for w in there if w in best))
    return found


def _said(template: str, name: str, words: str) -> str:
    return template.replace("{}", name).replace("{keywords}", words) if words else (
        template.replace(", {keywords}", "").replace("{keywords}", "").replace("{}", name)
    )  # fmt: skip


def _tokens(model: Model, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as padded ids and their mask, [R, T]."""
    ids, _ = tokens(model, [(text,) for text in texts], None)
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    mask = padded([[1] * len(s) for s in ids], 0)
    return {"input_ids": padded(ids, pad).to(model.device), "attention_mask": mask.to(model.device)}


class SimilarityHead(Head):
    """Chooses the class whose text is nearest to the image. It has no parameters: new classes need only names.

    Args:
        labels: class names, which are put into the templates with ``_`` and ``-`` read as spaces.
        templates: texts with ``{}`` where the name goes; several are averaged (normalised vectors first). ``{keywords}``
            is where words of the description go, and goes away with its comma where there is none.
        about: a description for each label, for templates with ``{keywords}`` and forms that read it; empty for none.
    """

    name = "similarity"
    trunk = "similarity"

    def __init__(
        self, labels: Sequence[str], templates: Sequence[str] = (TEMPLATE,), about: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.labels, self.templates, self.about = tuple(labels), tuple(templates), tuple(about)
        self.index = {label: i for i, label in enumerate(self.labels)}
        if not self.templates or not all("{}" in t for t in self.templates):
            raise ConfigError(f"a template must hold {{}} where the class name goes, got {self.templates!r}")
        if self.about and len(self.about) != len(self.labels):
            raise ConfigError(f"there are {len(self.about)} descriptions for {len(self.labels)} classes; give one each")
        self._texts: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def group(self) -> str:
        return f"{self.name} {self.labels} {self.templates} {self.about}"

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name, "labels": list(self.labels), "templates": list(self.templates), "about": list(self.about)
        }  # fmt: skip

    def rows(
        self, model: Model, examples: Sequence[Example], *, scoring: bool = False, longest: int | None = None
    ) -> list[Row]:
        if examples and examples[0].image is None:
            raise ModelError(f"the dual model {model.name!r} compares images with class texts, and the task has texts")
        pixels = images(model, examples) if examples else []
        return [Row(pixels=p, target=self.index.get(e.target, -100)) for p, e in zip(pixels, examples, strict=True)]

    def collate(self, model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, **self.texts(model)}

    def texts(self, model: Model) -> dict[str, Tensor]:
        """The class texts' tokens, [C * templates, T], and the descriptions', [C, T'], on the model's device."""
        key = (model.processor, model.device)
        if self._texts is None or self._texts[0] != key:
            names = [label.replace("_", " ").replace("-", " ") for label in self.labels]
            words = keywords(self.about, names) if self.about else [""] * len(names)
            made = _tokens(model, [_said(t, n, w) for n, w in zip(names, words, strict=True) for t in self.templates])
            if self.about:
                made |= {f"about_{k}": v for k, v in _tokens(model, self.about).items()}
            self._texts = (key, made)
        return self._texts[1]

    def run(self, model: Model, batch: Mapping[str, Tensor]) -> Out:
        return similarity(model, batch, len(self.templates), classes=self.labels)

    def logits(self, out: Out) -> Tensor:
        """[B, C]."""
        assert isinstance(out, Pairs)
        return out.logits()

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        logits = self.logits(out).float()
        target = torch.tensor([row.target for row in rows], device=logits.device)
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, torch.ones_like(loss)

    def predict(self, out: Out, rows: Sequence[Row]) -> list[Any]:
        return [self.labels[i] for i in self.logits(out).argmax(1).tolist()]

    def scores(self, out: Out, rows: Sequence[Row]) -> Tensor:
        return self.logits(out).float()


class DecoupledHead(SimilarityHead):
    """The nearest class text, and beside it a classifier on channel-wise scaled features for the classes it learned (DePT).

    ``z = scale cos(v, t)`` is the first head, which new classes use alone. The second is one linear layer on
    ``g_v o v + b_v`` for images and ``g_t o t + b_t`` for class texts, of vectors that are not normalised; texts are its
    training examples too. Loss: ``(1 - l) CE(z) + l CE(second)``, prediction: ``(1 - l) z + l second``.

    Args:
        labels: as for `SimilarityHead`.
        templates: as for `SimilarityHead`.
        about: as for `SimilarityHead`.
        width: d.
        share: l.

    Reference: Zhang et al., DePT: Decoupled Prompt Tuning, arXiv 2309.07439. There the second head's learning rate is 6.5
    times the prompt's (`lr_factor`); the second loss is the mean over the images and their classes' texts.
    """

    name = "decoupled"
    lr_factor: ClassVar[float] = 6.5

    def __init__(
        self, labels: Sequence[str], templates: Sequence[str] = (TEMPLATE,), about: Sequence[str] = (), width: int = 0,
        share: float = 0.7,
    ) -> None:  # fmt: skip
        super().__init__(labels, templates, about)
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of the second head must lie between 0 and 1, got {share}")
        self.width, self.share = width, share
        self.scale_v, self.shift_v = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.scale_t, self.shift_t = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, width, len(self.labels))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def group(self) -> str:
        return f"{self.name} {id(self)}"

    def start(self, generator: torch.Generator) -> Self:
        """Small seeded values of the classifier; the scales stay 1."""
        with torch.no_grad():
            self.linear.weight.normal_(std=0.02, generator=generator)
        return self

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "width": self.width, "share": self.share}

    def second(self, vectors: Tensor, side: Literal["v", "t"]) -> Tensor:
        """The classifier on images' (``v``) or texts' (``t``) vectors [..., d]: [..., C]."""
        scale, shift = (self.scale_v, self.shift_v) if side == "v" else (self.scale_t, self.shift_t)
        found: Tensor = self.linear(vectors.to(scale.dtype) * scale + shift)
        return found

    def logits(self, out: Out) -> Tensor:
        assert isinstance(out, Pairs)
        return (1 - self.share) * out.logits() + self.share * self.second(out.images, "v")

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        assert isinstance(out, Pairs)
        first = out.logits().float()
        target = torch.tensor([row.target for row in rows], device=first.device)
        own = out.texts[target] if out.texts.dim() == 2 else out.texts[torch.arange(len(target)), target]
        images, texts = self.second(out.images, "v"), self.second(own, "t")
        second = [F.cross_entropy(logits, target, reduction="none") for logits in (images, texts)]
        loss = (1 - self.share) * F.cross_entropy(first, target, reduction="none") + self.share * (
            second[0] + second[1]
        ) / 2
        return loss, torch.ones_like(loss)
