"""Prompts for one model from prompts of another, without data of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import AdapterError, ModelError
from polytask.core.form import Form
from polytask.core.model import Model


@dataclass(frozen=True)
class Source:
    """A learned prompt and the model that it was learned with."""

    adapter: Adapter
    model: Model


def transfer_prompt(
    sources: Source | tuple[Adapter, Model] | Sequence[tuple[Adapter, Model]],
    target: Model,
    *,
    anchors: int = 8192,
    keep: int = 8192,
    steps: int = 2000,
    lr: float = 5e-3,
    seed: int = 0,
) -> Adapter:
    """A prompt for ``target`` that lies to the words of its vocabulary as the sources lie to theirs.

    Each source vector is written as its cosines to anchors, the tokens that both vocabularies have; the largest ``keep`` of
    them are to be matched by the cosines of the vectors searched for, which are brought to the mean and deviation of the
    target's table at each step. Several sources share the anchors of all, and their losses are averaged.

    Args:
        sources: (adapter of the form ``prompt``, its model), or several of one length.
        target: the model that gets the prompt; another width and another vocabulary are meant.
        anchors: at most so many, drawn at random.
        keep: cosines that count for each vector, the largest by size; the others are masked.
        steps: of Adam.
        lr: of Adam.
        seed: of the anchors and the start.

    Returns:
        An adapter of the form ``prompt`` for ``target``; ``card.training`` has the loss at the end.

    Reference: Wu et al., Zero-Shot Continuous Prompt Transfer: Generalizing Task Semantics Across Language Models,
    arXiv 2310.01691. Its code picks the best step on validation data of the task; here the last step is taken, so nothing
    of the task is seen. There, with two sources, the mask of one serves both; here each has its own.

    Raises:
        AdapterError: a source is no prompt, or lengths differ.
        ModelError: a model without a tokenizer, or fewer than 16 tokens in common.
    """
    given = [sources] if isinstance(sources, Source) or isinstance(sources[0], Adapter) else list(sources)
    pairs = [pair if isinstance(pair, Source) else Source(*pair) for pair in given]  # type: ignore[misc]
    vectors = [_prompt(source.adapter) for source in pairs]
    if len({len(v) for v in vectors}) > 1:
        raise AdapterError(f"the sources have {[len(v) for v in vectors]} virtual tokens; they must have as many each")
    generator = torch.Generator().manual_seed(seed)
    words = _common([*(source.model for source in pairs), target])
    words = [words[i] for i in torch.randperm(len(words), generator=generator)[:anchors].tolist()]
    goals = []
    for source, own in zip(pairs, vectors, strict=True):
        code = F.normalize(own, dim=1) @ F.normalize(_rows(source.model, words), dim=1).T  # [m, N]
        mask = torch.zeros_like(code)
        mask.scatter_(1, code.abs().topk(min(keep, code.shape[1])).indices, 1.0)
        goals.append((code * mask, mask))
    table = _table(target).weight.detach().float()
    mean, spread = table.mean(), table.std()
    ours = F.normalize(_rows(target, words), dim=1)  # [N, d]
    raw = torch.empty(len(vectors[0]), table.shape[1])
    torch.nn.init.xavier_normal_(raw, generator=generator)
    raw.requires_grad_(True)
    search = torch.optim.Adam([raw], lr=lr)

    def standard() -> Tensor:
        return (raw - raw.mean()) / raw.std() * spread + mean

    loss = torch.zeros(())
    with torch.enable_grad():
        for _ in range(steps):
            code = F.normalize(standard(), dim=1) @ ours.T
            loss = torch.stack(
                [1 - F.cosine_similarity(code * mask, goal, dim=1).mean() for goal, mask in goals]
            ).mean()
            search.zero_grad()
            loss.backward()
            search.step()
    form = Form.of({"name": "prompt", "length": len(raw)})
    made = Adapter.new(target, form, seed=seed, name=pairs[0].adapter.name)
    made.load_state({name: standard().detach() for name in made.state()})
    training = {"transferred": float(loss.detach()), "anchors": len(words), "steps": steps}
    card = Card(base=made.card.base, parents=[source.adapter.hash for source in pairs], training=training)
    made.card = replace(card, tasks=pairs[0].adapter.card.tasks)
    return made.trainable(False)


def _prompt(adapter: Adapter) -> Tensor:
    own = next(iter(adapter.patches.values()))
    if adapter.form.name != "prompt":
        raise AdapterError(
            f"the adapter {adapter.name!r} has the form {adapter.form.name!r}; only prompts are transferred"
        )
    vectors: Any = own.P
    return torch.as_tensor(vectors).detach().float()


def _table(model: Model) -> Any:
    return model.module.get_input_embeddings()  # type: ignore[operator]


def _rows(model: Model, words: Sequence[str]) -> Tensor:
    vocabulary = model.processor.get_vocab()
    ids = torch.tensor([vocabulary[word] for word in words], device=model.device)
    return _table(model)(ids).detach().float().cpu()


def _common(models: Sequence[Model]) -> list[str]:
    found: set[str] | None = None
    for model in models:
        if not hasattr(model.processor, "get_vocab"):
            raise ModelError(f"the model {model.name!r} has no tokenizer, whose tokens are the anchors")
        special = set(getattr(model.processor, "all_special_tokens", ()))
        own = set(model.processor.get_vocab()) - special
        found = own if found is None else found & own
    words = sorted(found or ())
    if len(words) < 16:
        raise ModelError(f"the vocabularies have only {len(words)} tokens in common; at least 16 are needed as anchors")
    return words
