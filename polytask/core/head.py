"""Heads: how a task is put to a base and its answer read. Part of the adapter, because each task has its own.

A head says how examples become token sequences, what the base computes for them (its *trunk*: one vector per sequence, or the
likelihood of given tokens), what the loss is, and what is predicted. Heads with the same trunk share one forward.

Shapes: S sequences of a batch (several per row where a row has choices), d the width of a vector, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import AdapterError, ConfigError, ModelError, listing
from .model import Model
from .rows import Row, images, joined, padded, prompted, tokens, windows
from .task import Example, Task

if TYPE_CHECKING:
    from .adapter import Adapter
    from .dual import Pairs
    from .form import Form


Out: TypeAlias = "Tensor | tuple[Tensor, Tensor] | Pairs"


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one forward of a training step has seen of one adapter and one task.

    Attributes:
        model: the base. Nothing acts any more; ``model.using(name)`` lets the adapter act again.
        name: what the adapter is attached as.
        adapter: what learns.
        task: the rows' task, which the adapter has the head of.
        rows: the examples.
        out: what the base computed for the head's trunk.
    """

    model: Model
    name: str
    adapter: Adapter
    task: str
    rows: Sequence[Row]
    out: Out

    @property
    def head(self) -> Head:
        """Of the rows' task."""
        return self.adapter.heads[self.task]

    @property
    def batch(self) -> dict[str, Tensor]:
        """The tensors of the rows, for another forward of the same."""
        return collate(self.model, self.head, self.rows)


class Head(nn.Module):
    """The contract of a head.

    Attributes:
        trunk: ``"features"`` (the base gives [S, d]), ``"likelihood"`` (it gives the negative log-likelihood and the
            number of the scored tokens of each sequence) or ``"similarity"`` (a dual model gives images and class texts).
        lr_factor: its learning rate over the adapter's, where nobody says more.
    """

    name: ClassVar[str] = ""
    trunk: ClassVar[Literal["features", "likelihood", "similarity"]] = "features"
    lr_factor: ClassVar[float] = 1.0

    @property
    def group(self) -> str:
        """Heads with the same one share a forward."""
        return self.trunk

    def collate(self, model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch's tensors with those that the head itself brings."""
        return batch

    def run(self, model: Model, batch: Mapping[str, Tensor]) -> Out:
        """What the base computes for this head."""
        return model.features(batch) if self.trunk == "features" else model.likelihood(batch)

    def settings(self) -> dict[str, Any]:
        """What ``Head.of`` needs to build an empty head of the same kind."""
        raise NotImplementedError

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Head:
        """An empty head from its settings."""
        from .dual import DecoupledHead, SimilarityHead

        chosen = dict(settings)
        kinds = {kind.name: kind for kind in (LinearHead, WordsHead, TextHead, SimilarityHead, DecoupledHead)}
        kind = kinds.get(str(chosen.pop("name", "")))
        if kind is None:
            raise AdapterError(f"the head {settings.get('name')!r} is not known; known are {listing(kinds)}")
        return kind(**chosen)

    def rows(
        self, model: Model, examples: Sequence[Example], *, scoring: bool = False, longest: int | None = None
    ) -> list[Row]:
        """Examples made ready.

        Args:
            model: the base; its tokenizer or image processor is used.
            examples: of this head's task.
            scoring: for predictions (all candidates of an example) instead of for training (the true one).
            longest: tokens kept of a text.
        """
        raise NotImplementedError

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Sum of losses and its divisor for each row, ([B], [B]): the batch's loss is their totals' ratio."""
        raise NotImplementedError

    def predict(self, out: Out, rows: Sequence[Row]) -> list[Any]:
        """One prediction per row."""
        raise NotImplementedError

    def scores(self, out: Out, rows: Sequence[Row]) -> Tensor:
        """Of every class or choice, [B, C], whose softmax are probabilities; -inf where a row has fewer. The rows were made
        with ``scoring=True``.

        Raises:
            ModelError: the task has no classes.
        """
        raise ModelError(
            f"a task of kind {getattr(self, 'task', '?')!r} has no classes to choose from; give one of kind classify or choose"
        )


class LinearHead(Head):
    """A linear layer on pooled vectors, for encoders and image models.

    Args:
        task: ``classify``, ``multilabel``, ``regress`` or ``choose``.
        width: d.
        labels: label names; empty for regress and choose.
        center: what is subtracted from a number to be learned (``regress``).
        spread: what it is then divided by.
    """

    name = "linear"
    trunk = "features"

    def __init__(
        self, task: str, width: int, labels: Sequence[str] = (), center: float = 0.0, spread: float = 1.0
    ) -> None:
        super().__init__()
        self.task, self.width, self.labels = task, width, tuple(labels)
        self.center, self.spread = center, spread
        self.index = {label: i for i, label in enumerate(self.labels)}
        outputs = len(self.labels) if task in ("classify", "multilabel") else 1
        # without PyTorch's own start, which would draw from the program's random numbers
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, width, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def start(self, generator: torch.Generator) -> Self:
        """Small seeded values."""
        with torch.no_grad():
            self.linear.weight.normal_(std=0.02, generator=generator)
            self.linear.bias.zero_()
        return self

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name, "task": self.task, "width": self.width, "labels": list(self.labels),
            "center": self.center, "spread": self.spread,
        }  # fmt: skip

    def rows(
        self, model: Model, examples: Sequence[Example], *, scoring: bool = False, longest: int | None = None
    ) -> list[Row]:
        if examples and examples[0].image is not None:
            pixels = images(model, examples)
            return [Row(pixels=p, target=self._target(e)) for p, e in zip(pixels, examples, strict=True)]
        texts: list[tuple[str, ...]] = []
        counts = []
        for example in examples:
            pairs = [(*example.inputs[:1], c) for c in example.choices] if self.task == "choose" else [example.inputs]
            texts += pairs
            counts.append(len(pairs))
        ids, segments = tokens(model, texts, longest)
        made, at = [], 0
        for example, count in zip(examples, counts, strict=True):
            made.append(Row(ids[at : at + count], [], self._target(example), None, segments[at : at + count]))
            at += count
        return made

    def _target(self, example: Example) -> Any:
        if self.task == "classify":
            return self.index.get(example.target, -100)
        if self.task == "multilabel":
            return [1.0 if label in example.target else 0.0 for label in self.labels]
        return (example.target - self.center) / self.spread if self.task == "regress" else example.target

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        logits = self._logits(out)
        target = [row.target for row in rows]
        if self.task == "classify":
            loss = F.cross_entropy(logits, torch.tensor(target, device=logits.device), reduction="none")
        elif self.task == "multilabel":
            wanted = torch.tensor(target, device=logits.device)
            loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
        elif self.task == "regress":
            loss = (logits.squeeze(1) - torch.tensor(target, device=logits.device, dtype=logits.dtype)) ** 2
        else:
            groups = logits.squeeze(1).split([row.count for row in rows])
            loss = torch.stack([-g.log_softmax(0)[t] for g, t in zip(groups, target, strict=True)])
        return loss, torch.ones_like(loss)

    def predict(self, out: Out, rows: Sequence[Row]) -> list[Any]:
        logits = self._logits(out)
        if self.task == "classify":
            return [self.labels[i] for i in logits.argmax(1).tolist()]
        if self.task == "multilabel":
            return [[self.labels[i] for i in row.nonzero().flatten().tolist()] for row in logits > 0]
        if self.task == "regress":
            return [v * self.spread + self.center for v in logits.squeeze(1).tolist()]
        best: list[int] = self.scores(out, rows).argmax(1).tolist()
        return best

    def scores(self, out: Out, rows: Sequence[Row]) -> Tensor:
        if self.task == "classify":
            return self._logits(out)
        if self.task == "choose":
            return _side_by_side(self._logits(out).squeeze(1), rows)
        return super().scores(out, rows)

    def _logits(self, out: Out) -> Tensor:
        logits: Tensor = self.linear(out.to(self.linear.weight.dtype))  # type: ignore[union-attr]
        return logits


class WordsHead(Head):
    """Chooses among given answers by their likelihood under a causal or seq2seq model. It has no parameters.

    Args:
        task: ``classify`` (the answers are the labels) or ``choose`` (each example brings its own).
        labels: label names, for ``classify``.
        instruction: put before each input.
        per_token: divide a likelihood by the answer's tokens, so that long answers are not at a disadvantage.
    """

    name = "words"
    trunk = "likelihood"

    def __init__(
        self, task: str, labels: Sequence[str] = (), instruction: str = "", per_token: bool | None = None
    ) -> None:
        super().__init__()
        self.task, self.labels, self.instruction = task, tuple(labels), instruction
        self.per_token = task == "choose" if per_token is None else per_token

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name, "task": self.task, "labels": list(self.labels),
            "instruction": self.instruction, "per_token": self.per_token,
        }  # fmt: skip

    def answers(self, example: Example) -> tuple[str, ...]:
        """The candidates of an example."""
        return self.labels if self.task == "classify" else example.choices

    def rows(
        self, model: Model, examples: Sequence[Example], *, scoring: bool = False, longest: int | None = None
    ) -> list[Row]:
        made = []
        for example in examples:
            answers = self.answers(example)
            true = example.target if self.task == "choose" else _position(answers, example.target)
            wanted = answers if scoring or true < 0 else [answers[true]]
            prompt = prompted(self.instruction, example.inputs)
            pairs = [joined(model, prompt, answer, longest) for answer in wanted]
            made.append(Row([ids for ids, _ in pairs], [start for _, start in pairs], true))
        return made

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        nll, count = _likelihood(out)
        return nll, count.to(nll.dtype)

    def predict(self, out: Out, rows: Sequence[Row]) -> list[Any]:
        best = self.scores(out, rows).argmax(1).tolist()
        return best if self.task == "choose" else [self.labels[i] for i in best]

    def scores(self, out: Out, rows: Sequence[Row]) -> Tensor:
        nll, count = _likelihood(out)
        return _side_by_side(-(nll / count.clamp(min=1) if self.per_token else nll), rows)


class TextHead(Head):
    """Writes text (``generate``) or models it (``lm``) with a causal or seq2seq base. It has no parameters.

    Args:
        task: ``generate`` or ``lm``.
        instruction: put before each input.
        longest_answer: tokens written at most.
    """

    name = "text"
    trunk = "likelihood"

    def __init__(self, task: str, instruction: str = "", longest_answer: int = 64) -> None:
        super().__init__()
        self.task, self.instruction, self.longest_answer = task, instruction, longest_answer

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name, "task": self.task, "instruction": self.instruction,
            "longest_answer": self.longest_answer,
        }  # fmt: skip

    def rows(
        self, model: Model, examples: Sequence[Example], *, scoring: bool = False, longest: int | None = None
    ) -> list[Row]:
        made = []
        for example in examples:
            if self.task == "lm":
                made += windows(model, example.inputs[0], longest)
                continue
            prompt = prompted(self.instruction, example.inputs)
            ids, start = joined(model, prompt, str(example.target), longest, end=True)
            made.append(Row([ids], [start], example.target))
        return made

    def loss(self, out: Out, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        nll, count = _likelihood(out)
        return nll, count.to(nll.dtype)

    def predict(self, out: Out, rows: Sequence[Row]) -> list[Any]:
        """For ``lm``: (negative log-likelihood in nats, tokens) of each row."""
        nll, count = _likelihood(out)
        return list(zip(nll.tolist(), count.tolist(), strict=True))

    def write(self, model: Model, rows: Sequence[Row]) -> list[str]:
        """Greedy answers to the rows' prompts."""
        out, start = self.written(model, rows)
        return [text.strip() for text in model.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]

    @torch.no_grad()
    def written(self, model: Model, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """What `write` decodes: token ids [B, T], and where the answers begin."""
        tokenizer = model.tokenizer
        prompts = [row.sequences[0][: row.starts[0]] for row in rows]
        width = max(len(p) for p in prompts)
        pad = tokenizer.pad_token_id or 0
        # decoders continue at the right end, so prompts are padded on the left
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        out = model.module.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=self.longest_answer, do_sample=False, pad_token_id=pad
        )
        return out, 0 if model.kind == "seq2seq" else width


def _side_by_side(values: Tensor, rows: Sequence[Row]) -> Tensor:
    """One value for each sequence, [S], as [B, C]."""
    groups = values.split([row.count for row in rows])
    return nn.utils.rnn.pad_sequence(list(groups), batch_first=True, padding_value=-torch.inf)


def _likelihood(out: Out) -> tuple[Tensor, Tensor]:
    assert isinstance(out, tuple)
    return out


def head_for(model: Model, task: Task, seed: int = 0, form: Form | None = None, kind: str = "auto") -> Head:
    """A fresh head for a task on a base.

    Args:
        model: the base.
        task: what it is for.
        seed: of its start.
        form: of the adapter that it belongs to, which may say how class names are written.
        kind: ``auto``; or for dual models ``similarity`` (the nearest class text, which is their ``auto``), ``decoupled``
            (and a classifier beside it) or ``linear`` (a layer on the images' vectors).

    Raises:
        ConfigError: this kind of base has no such head.
        ModelError: this kind of base cannot do this kind of task.
    """
    if kind not in ("auto", "linear") and model.kind != "dual":
        raise ConfigError(f"the head {kind!r} compares images with class texts, which the {model.kind} model {model.name!r} "
                          "cannot; use auto, or a dual model such as CLIP")  # fmt: skip
    if model.kind == "dual" and task.kind == "classify" and kind != "linear" and task.modality == "image":
        from .dual import similarity_head

        return similarity_head(model, task, seed, form, decoupled=kind == "decoupled")
    if model.kind in ("causal", "seq2seq"):
        if task.kind in ("classify", "choose"):
            return WordsHead(task.kind, task.labels, task.instruction)
        if task.kind in ("generate", "lm"):
            longest = max((len(str(e.target)) for e in task.train), default=64) if task.kind == "generate" else 64
            return TextHead(task.kind, task.instruction, min(256, 8 + longest // 2))
    elif task.kind in ("classify", "multilabel", "regress", "choose"):
        center = spread = 0.0
        if task.kind == "regress":
            values = torch.tensor([e.target for e in task.train], dtype=torch.float64)
            center, spread = float(values.mean()), float(values.std(correction=0))
        head = LinearHead(task.kind, model.width, task.labels, center, spread or 1.0)
        return head.start(torch.Generator().manual_seed(seed))
    able = {"causal": "classify, choose, generate, lm", "seq2seq": "classify, choose, generate"}
    raise ModelError(
        f"the task {task.name!r} is of kind {task.kind!r}, which the {model.kind} model {model.name!r} cannot do; it can do "
        f"{able.get(model.kind, 'classify, multilabel, regress, choose')}"
    )


def _position(answers: Sequence[str], target: Any) -> int:
    return answers.index(target) if target in answers else -1


def collate(model: Model, head: Head, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tensors of a batch, padded to its longest sequence, on the model's device."""
    device, dtype = model.device, model.dtype
    if rows[0].pixels is not None:
        pixels = torch.stack([row.pixels for row in rows if row.pixels is not None])
        name = "pixel_values" if model.kind == "dual" else getattr(model.module, "main_input_name", "pixel_values")
        return head.collate(model, {name: pixels.to(device, dtype)})
    sequences = [s for row in rows for s in row.sequences]
    starts = [s for row in rows for s in row.starts]
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    if head.trunk == "likelihood" and model.kind == "seq2seq":
        left = [s[:at] for s, at in zip(sequences, starts, strict=True)]
        right = [s[at:] for s, at in zip(sequences, starts, strict=True)]
        return {
            "input_ids": padded(left, pad).to(device),
            "attention_mask": padded([[1] * len(s) for s in left], 0).to(device),
            "labels": padded(right, -100).to(device),
        }
    batch = {"input_ids": padded(sequences, pad), "attention_mask": padded([[1] * len(s) for s in sequences], 0)}
    segments = [s for row in rows for s in row.segments]
    if segments and any(any(s) for s in segments):
        batch["token_type_ids"] = padded(segments, 0)
    if head.trunk == "likelihood":
        labels = [[-100] * at + s[at:] for s, at in zip(sequences, starts, strict=True)]
        batch["labels"] = padded(labels, -100)
    return {k: v.to(device) for k, v in batch.items()}


def split(out: Out, counts: Sequence[int]) -> list[Out]:
    """A trunk's result cut into groups of sequences."""
    if isinstance(out, tuple):
        return [(a, b) for a, b in zip(out[0].split(list(counts)), out[1].split(list(counts)), strict=True)]
    return list(out.split(list(counts)))
