"""What a router did: weights by site and token, the load of each adapter, the entropy, and how often the task's own one led.

Shapes: B rows, T tokens, N adapters of the mix, S sites with a gate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.form import Call, Weights
from polytask.core.gate import Gate, serving
from polytask.core.head import TextHead, collate, head_for
from polytask.core.model import Model
from polytask.core.routing import Routing
from polytask.core.storage import write, writing
from polytask.core.task import Task

FILE = "trace.json"


@dataclass
class Trace:
    """What was seen of a mix; everything is plain values.

    Attributes:
        router: its name and settings.
        adapters: the names, in the order of every list below.
        sites: the sites with a gate, in order.
        load: for each site each adapter's share of all weight, [S][N].
        entropy: for each site the mean entropy of a token's weights, in nats; of ``log N`` at most.
        tasks: for each task each adapter's share of all weight, over all sites.
        agreement: for each task how often the adapter of the task had the largest weight at a token; None where no adapter is
            that task's.
        chance: what picking any adapter would agree.
        examples: for one example of each task its tokens and their weights, [S][T][N]; ``prompt`` is how many of them the model
            did not write itself.
        facts: what the router tells of itself, such as which adapters a task uses.
    """

    router: dict[str, Any]
    adapters: list[str]
    sites: list[str] = field(default_factory=list)
    load: list[list[float]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    tasks: dict[str, list[float]] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    chance: float = 0.0
    examples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def save(self, folder: str | Path) -> Path:
        """Writes ``trace.json``. Raises `StorageError`."""
        folder = Path(folder).expanduser()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / FILE, (json.dumps(self.as_dict(), ensure_ascii=False) + "\n").encode())
        return folder

    def text(self) -> str:
        """A few lines for a terminal."""
        most = math.log(max(2, len(self.adapters)))
        mean = sum(self.entropy) / max(1, len(self.entropy))
        lines = [
            f"{self.router['name']} over {len(self.adapters)} adapters at {len(self.sites)} sites; mean entropy {mean:.3f} of at "
            f"most {most:.3f} nats"
        ]
        for task, shares in self.tasks.items():
            top = sorted(zip(shares, self.adapters, strict=True), reverse=True)[:3]
            own = self.agreement[task]
            said = (
                "no adapter of its own"
                if own is None
                else f"its own leads at {own:.0%} of tokens (chance {self.chance:.0%})"
            )
            lines.append(f"{task}: {', '.join(f'{name} {share:.2f}' for share, name in top)}; {said}")
        lines += [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in self.facts.items()]
        return "\n".join(lines)


class _Sums:
    """Adds up decisions, in fp64."""

    def __init__(self, names: Sequence[str], sites: Sequence[str]) -> None:
        self.names, self.sites = list(names), list(sites)
        n, s = len(names), len(sites)
        self.load, self.count, self.entropy = (
            torch.zeros(s, n).double(),
            torch.zeros(s).double(),
            torch.zeros(s).double(),
        )
        self.own = torch.zeros(2).double()  # agreed, of

    def add(self, site: str, weights: Tensor, own: int | None) -> None:
        """Weights [M, N] of M tokens."""
        place = self.sites.index(site)
        shares = weights.double().clamp(min=0)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
        self.load[place] += weights.double().sum(0)
        self.entropy[place] -= torch.special.xlogy(shares, shares).sum()
        self.count[place] += len(weights)
        if own is not None:
            best = weights.max(-1).values
            first = (weights[:, own] >= best) & (best > 0)
            self.own += torch.tensor([float((first / (weights == best[:, None]).sum(-1)).sum()), float(len(weights))])


@torch.no_grad()
def trace(
    model: Model, mix: Routing, tasks: Sequence[Task], *, split: str = "test", examples: int = 16, longest: int = 96,
    write: bool = False,
) -> Trace:  # fmt: skip
    """Runs a mix over some examples of tasks and sees every decision.

    Args:
        model: the base; the mix's adapters are attached to it.
        mix: what `polytask.route` gives.
        tasks: which examples.
        split: of the tasks.
        examples: of each task.
        longest: tokens kept of a text.
        write: let the model write its own answers, where a task asks for text; else it reads the given ones.

    Raises:
        ConfigError: a task has no such examples, or ``write`` and none asks for text.
        MixError: nothing was decided.
    """
    names, sites = list(mix.adapters), list(mix.gates)
    serves = serving(mix.adapters)
    everything = _Sums(names, sites)
    made = Trace({"name": mix.router.name, **mix.router.settings()}, names, chance=1.0 / len(names))
    made.facts = dict(mix.facts)
    if write and not any(task.kind == "generate" for task in tasks):
        raise ConfigError(f"none of {listing([task.name for task in tasks])} asks for text; trace without write")
    for task in tasks:
        rows = getattr(task, split)[:examples]
        if not rows:
            raise ConfigError(f"the task {task.name!r} has no examples in {split}; choose another split")
        own = names.index(serves[task.name]) if task.name in serves else None
        sums, kept = _Sums(names, sites), _Seen(names)
        head = head_for(model, task)
        for number, row in enumerate(head.rows(model, rows, longest=longest)):
            batch = collate(model, head, [row])
            writes = write and isinstance(head, TextHead) and task.kind == "generate"
            seen = _Written(names, 1 if model.kind == "seq2seq" else row.starts[0]) if writes else _Seen(names)
            with mix.tracing(seen), model.using(mix, tasks=task.name):
                if writes and isinstance(head, TextHead):
                    text, start = head.written(model, [row])
                    if start:  # the last token is not read any more
                        batch = {"input_ids": text[:, :-1]}
                else:
                    head.run(model, batch)
            for site, weights in seen.tokens().items():
                sums.add(site, weights, own)
            if number == 0:
                kept = seen
                made.examples.append({"task": task.name, **_words(model, batch)})
                if writes and start:
                    made.examples[-1]["prompt"] = start
        made.examples[-1] |= {"sites": list(kept.found), "weights": _rounded(kept.tokens())}
        made.tasks[task.name] = (sums.load.sum(0) / sums.load.sum().clamp(min=1e-12)).tolist()
        made.agreement[task.name] = None if own is None else float(sums.own[0] / sums.own[1].clamp(min=1))
        everything.load += sums.load
        everything.entropy += sums.entropy
        everything.count += sums.count
    used = [i for i in range(len(sites)) if everything.count[i] > 0]
    if not used:
        raise MixError(
            f"no gate of {listing(sites, 3)} was reached by these tasks; the adapters may act where they do not"
        )
    made.sites = [sites[i] for i in used]
    total = everything.load.sum(1, keepdim=True).clamp(min=1e-12)
    made.load = [(everything.load[i] / total[i]).tolist() for i in used]
    made.entropy = [float(everything.entropy[i] / everything.count[i]) for i in used]
    return made


class _Seen:
    """The decisions of one forward of one example: for each site the weights of its real tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.found: dict[str, Tensor] = {}

    def __call__(self, gate: Gate, weights: Weights, call: Call) -> None:
        full = self.full(weights)
        mask = call.mask
        if mask is not None and mask.numel() == len(full):
            full = full[mask.flatten().bool().cpu()]
        elif call.rows and len(full) == call.rows and mask is not None:  # one decision for a row: its tokens share it
            full = full.repeat_interleave(mask.sum(1).long().cpu(), 0)
        self.found[gate.site.name] = full  # of a site that acts several times in a forward, the last

    def full(self, weights: Weights) -> Tensor:
        """The weights of all adapters: [M, N] of M tokens or rows, or [1, N]."""
        dense = weights.dense().detach().float().cpu()
        full = torch.zeros(*dense.shape[:-1], len(self.names))
        full[..., [self.names.index(name) for name in weights.names]] = dense
        return full.reshape(-1, len(self.names)) if full.dim() > 1 else full[None]

    def tokens(self) -> dict[str, Tensor]:
        """[M, N] by site; a decision that holds for everything counts for each token."""
        most = max((len(weights) for weights in self.found.values()), default=1)
        return {site: w.expand(most, -1) if len(w) == 1 else w for site, w in self.found.items()}


class _Written(_Seen):
    """The decisions while one text is written: those of its prompt, and of each token that follows.

    Args:
        names: of the adapters.
        prompt: how many tokens the first step reads.
    """

    def __init__(self, names: Sequence[str], prompt: int) -> None:
        super().__init__(names)
        self.prompt = prompt
        self.steps: dict[str, list[Tensor]] = {}

    def __call__(self, gate: Gate, weights: Weights, call: Call) -> None:
        self.steps.setdefault(gate.site.name, []).append(self.full(weights))

    def tokens(self) -> dict[str, Tensor]:
        for site, steps in self.steps.items():
            if len(steps[-1]) > 1:  # written without a cache: the last step reads everything
                self.found[site] = steps[-1]
            else:
                first = steps[0].expand(self.prompt, -1) if len(steps[0]) == 1 else steps[0]
                self.found[site] = torch.cat([first, *steps[1:]])
        return super().tokens()


def _words(model: Model, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The tokens of the first sequence as text."""
    ids = batch.get("input_ids")
    if ids is None:
        return {"tokens": []}
    mask = batch.get("attention_mask")
    own = ids[0] if mask is None else ids[0][mask[0].bool()]
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {"tokens": [str(i) for i in own.tolist()]}
    return {"tokens": [tokenizer.decode([i]).strip() or "\u2423" for i in own.tolist()]}


def _rounded(found: dict[str, Tensor]) -> list[Any]:
    return [[[round(v, 4) for v in token] for token in weights.tolist()] for weights in found.values()]
