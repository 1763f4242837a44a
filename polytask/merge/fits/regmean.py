"""RegMean: each linear layer merged by a regression on what goes into it, measured on every model's own task.

Shapes: X [n, d] the n vectors that go into a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.rows import Row
from polytask.merge.fit import Fit, Plan, Tensors, fits
from polytask.merge.pool import Pool, Reader

from .fisher import weights_of


@fits.register("regmean")
@dataclass(frozen=True)
class RegressionMean(Fit):
    """``(sum_i l_i W_i G_i) (sum_i l_i G_i)^-1`` for the weights of linear layers, with the Gram matrix ``G_i = X^T X / n`` of
    what goes into the layer in model i on its own task's inputs; everything else is the models' mean.

    The mean are biases, norms, embeddings, convolutions, weights that an embedding shares, and layers that no input reaches;
    the card names the weights. Sequences of one length are read together, so there is no padding to leave out; class texts of
    dual models alone are as long as the longest. In memory there are d x d numbers for each linear layer and model.

    Args:
        examples: of each model's task, at most. Of candidate answers all are read; tasks of kind generate and lm read their
            own texts.
        reduce: what entries off the diagonals are multiplied by: 1 is the plain regression, 0 weighs each input alone.
        ridge: the share of the summed diagonal that is added to it.
        coefficients: l_i, one for each model; 1 each when empty.
        batch_size: sequences in a forward at most.

    Reference: Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849. Their Gram
    matrices are sums; here they are means, so a task of long texts counts no more than others.

    Raises:
        ConfigError: a setting is out of range.
        MergeError: it is not known which task a model was tuned for.
    """

    examples: int = 256
    reduce: float = 0.95
    ridge: float = 1e-6
    coefficients: tuple[float, ...] = ()
    batch_size: int = 32

    paper: ClassVar[str] = "arXiv 2212.09849"

    def __post_init__(self) -> None:
        self.at_least("examples", 1)
        self.at_least("batch_size", 1)

    def fit(self, pool: Pool) -> Plan:
        weights = weights_of(self.name, self.coefficients, pool)
        layers = linear_layers(pool)
        readers = [pool.reader_of(i) for i in range(len(pool))]
        beside = []
        for i, reader in enumerate(readers):
            grams = self._measured(pool, i, reader, layers)
            beside.append(Tensors({name: gram.cpu() for name, gram in grams.items()}, pool.names[i]))
            pool.say(f"regmean: {pool.names[i]} on {reader.task.name}, {len(grams)} layers")
        settings: dict[str, Any] = {"reduce": self.reduce, "ridge": self.ridge}
        turned = {name: True for name, (_, flag) in layers.items() if flag}
        if turned:
            settings["turned"] = {"tensors": turned, "else": False}
        regressed = [name for name in layers if all(name in own.tensors for own in beside)]
        averaged = [name for name, change in pool.changes.items() if change.base.dim() > 1 and name not in regressed]
        about = {"regressed": len(regressed), "averaged": averaged, "tasks": [r.task.name for r in readers]}
        return Plan("regmean", weights, settings, beside, about)

    @torch.no_grad()
    def _measured(
        self, pool: Pool, model: int, reader: Reader, layers: dict[str, tuple[list[nn.Module], bool]]
    ) -> dict[str, Tensor]:
        """The Gram matrix of each layer that inputs reach, by its weight's name."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        with pool.acting(pool.alone(model)), ExitStack() as stack:
            for name, (modules, _) in layers.items():

                def see(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    x = (args or tuple(kwargs.values()))[0].detach()
                    x = x.reshape(-1, x.shape[-1]).double()
                    sums[name] = sums[name].addmm_(x.mT, x) if name in sums else x.mT @ x
                    counts[name] = counts.get(name, 0) + len(x)

                for module in modules:
                    stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            for rows in even(next(reader.batches(self.examples, answers=False)), self.batch_size):
                reader.out(rows)
        return {name: sums[name] / count for name, count in counts.items() if count}


def linear_layers(pool: Pool) -> dict[str, tuple[list[nn.Module], bool]]:
    """The layers that own each weight that changes, and whether they store it [d, o]; none where others own it too."""
    network = pool.model.module
    sites = {
        network.get_submodule(site.path): site for site in pool.model.sites if site.kind == "linear" and not site.param
    }
    found = {}
    for name in pool.changes:
        owners = pool.holders[name]
        if all(module in sites and parameter == "weight" for module, parameter in owners):
            turned = {sites[module].transposed for module, _ in owners}
            if len(turned) == 1:
                found[name] = [module for module, _ in owners], turned.pop()
    return found


def even(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Batches of sequences of the same length, the scored part's too, each sequence a row of its own; images as they are."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row.pixels is not None:
            groups.setdefault(row.pixels.shape, []).append(row)
        for i, ids in enumerate(row.sequences):
            start = row.starts[i] if row.starts else 0
            single = Row([ids], row.starts[i : i + 1], segments=row.segments[i : i + 1])
            groups.setdefault((len(ids), start), []).append(single)
    for group in groups.values():
        for at in range(0, len(group), size):
            yield group[at : at + size]
