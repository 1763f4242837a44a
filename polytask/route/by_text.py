"""Rows beside adapters by what is said of them: the text of a row's task, or its own, against that of each adapter's.

Shapes: B rows, N adapters, d the width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.callables import Embedder
from polytask.core.errors import ConfigError, MixError, ModelError, listing
from polytask.core.form import Call
from polytask.core.gates import RowRouter, RowShared
from polytask.core.hub import Hub
from polytask.core.model import Model
from polytask.core.reading import means, means_of, packed, texts_of
from polytask.core.signature import signatures
from polytask.core.task import Task

BASE, WORDS, GIVEN = "base", "words", "given"
AT_ONCE = 32  # texts in a forward


@dataclass(frozen=True)
class TextRouter(RowRouter):
    """A router that compares texts: give `score` from `cosines`, and `needs` where texts are not always looked at.

    A row's text is that of its task where the call names one (``model.using(mix, tasks=...)``) that `texts` knows, else what
    it reads itself.

    Args:
        texts: what each adapter was taught, by its name, and what further tasks ask for, by theirs. Read off the tasks that
            are given, and off the adapters' heads and cards, where nobody says it.
        embed: what makes vectors of texts: ``base`` (the mean over the tokens of its last hidden states), ``words`` (hashed
            words, for bases that read no texts), or a callable. A file does not hold one: `Routing.load` takes it again.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    embed: Embedder | str = field(default=BASE, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.embed) and self.embed not in (BASE, WORDS, GIVEN):
            raise ConfigError(f"{self.name}: embed must be {BASE}, {WORDS} or a callable, got {self.embed!r}")

    @property
    def needs(self) -> bool:
        """Whether texts are looked at."""
        return True

    def settings(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "texts": dict(self.texts), "embed": GIVEN if callable(self.embed) else self.embed}

    def fitted(self, adapters: Mapping[str, Adapter]) -> Self:
        return self._said({name: _text(adapter) for name, adapter in adapters.items()})

    def informed(self, adapters: Mapping[str, Adapter], tasks: Sequence[Task]) -> Self:
        said = {task.name: text_of(task) for task in tasks}
        own = {name: [t for t in (name, *adapter.tasks) if t in said] for name, adapter in adapters.items()}
        return self._said({**said, **{name: said[known[0]] for name, known in own.items() if known}})

    def _said(self, texts: Mapping[str, str]) -> Self:
        """With further texts, where there is none of that name yet."""
        return replace(self, texts={**texts, **self.texts})

    def meet(self, shared: RowShared, model: Model) -> None:
        if not self.needs:
            return
        if self.embed == GIVEN:
            raise MixError(
                f"this {self.name} was made with an embedder of texts, which its file does not hold; give it again: "
                "Routing.load(file, adapters, embed=...)"
            )
        names, texts = list(self.texts), list(self.texts.values())
        if self.embed == BASE:
            if model.kind == "dual":
                raise MixError(f"{self.name}: the {model.kind} model {model.name!r} reads no texts alone; give embed=")
            try:
                parts = [(text,) for text in texts]
                made = [means(model, texts_of(model, parts[i : i + AT_ONCE])) for i in range(0, len(texts), AT_ONCE)]
            except ModelError as error:
                raise MixError(
                    f"{self.name} reads texts with the base: {error}; or give embed='words' or a callable"
                ) from error
            found = torch.cat(made)
        else:
            found = self._embedded(texts).to(model.device)
        vectors = dict(zip(names, F.normalize(found, dim=1), strict=True))
        shared.__dict__.update(vectors=vectors, tokenizer=model.tokenizer)

    def cosines(self, shared: RowShared, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        """The cosines of each row's text and each adapter's, [B, N]. Raises `MixError` where a row has no text."""
        vectors: Mapping[str, Tensor] | None = shared.__dict__.get("vectors")
        if vectors is None:
            raise MixError(f"{self.name} has not read the adapters' texts yet; call mix.attach(model) first")
        tasks = call.tasks or ()
        if tasks and all(task in vectors for task in tasks):
            rows = torch.stack([vectors[task] for task in tasks])
        else:
            rows = F.normalize(self._read(shared, hub, inputs, call), dim=1)
            known = [i for i, task in enumerate(tasks) if task in vectors]
            if known:
                rows[known] = torch.stack([vectors[tasks[i]] for i in known]).to(rows.device)
        return rows @ torch.stack([vectors[name] for name in shared.names]).to(rows.device).T

    def _read(self, shared: RowShared, hub: Hub, inputs: Mapping[str, Any], call: Call) -> Tensor:
        """Vectors of the rows' own texts, [B, d]."""
        if self.embed == BASE:
            return means_of(hub, inputs, call)
        ids, mask, tokenizer = inputs.get("input_ids"), inputs.get("attention_mask"), shared.__dict__["tokenizer"]
        if ids is None or not hasattr(tokenizer, "batch_decode"):
            raise MixError(
                f"{self.name} finds no text in the rows; say model.using(mix, tasks=...) with tasks whose text is known, which "
                f"are {listing(self.texts)}"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        given = packed({"input_ids": ids, "attention_mask": mask})
        lengths = given["attention_mask"].sum(1).tolist()
        real = [row[:n] for row, n in zip(given["input_ids"].tolist(), lengths, strict=True)]
        return self._embedded(tokenizer.batch_decode(real, skip_special_tokens=True)).to(ids.device)

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        if not callable(self.embed):
            found: Tensor = signatures.make("text").vectors(texts)  # type: ignore[attr-defined]  # of that kind
            return found
        made = torch.as_tensor(self.embed(list(texts)), dtype=torch.float32).detach()
        if made.dim() != 2 or len(made) != len(texts):
            raise MixError(
                f"{self.name}: the embedder gave shape {tuple(made.shape)} for {len(texts)} texts; it must give "
                f"[{len(texts)}, d]"
            )
        return made


def text_of(task: Task) -> str:
    """What a task says of itself: its instruction, else its description, else its name and labels."""
    return task.instruction or task.description or ". ".join([task.name, *task.labels])


def _text(adapter: Adapter) -> str:
    """What an adapter's heads and card say of what it was taught; at least its name."""
    said: list[str] = []
    for head in adapter.heads.values():
        said.append(str(head.settings().get("instruction", "")))
    for task in () if any(said) else adapter.card.tasks:
        said += [str(task.get("name", "")), *map(str, task.get("labels", ()))]
    return ". ".join(dict.fromkeys(text for text in said if text)) or adapter.name
