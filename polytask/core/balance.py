"""How evenly experts are used, as something that learning can minimise.

Shapes: B rows, T tokens, E experts, k chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .form import Call, Part
from .site import Site

FORWARDS = 4  # a step runs one for each kind of head; more that nobody asks about are forgotten


class Tally(Part):
    """What the routers of one adapter, or of one mix, told of the forwards of a step. It has no parameters.

    A forward that is computed again for its backward tells nothing: the step has asked by then.

    Args:
        form: the settings that it belongs to.
        names: the experts.
    """

    def __init__(self, form: Any, names: Sequence[str] = ()) -> None:
        super().__init__(form)
        self.names = tuple(names)
        self._told: dict[str, deque[Tensor]] = {}
        self._open = False

    def begin(self) -> None:
        """A forward of the whole model starts."""
        self.__dict__["_open"] = True

    @property
    def open(self) -> bool:
        """Whether a forward that learns runs, so that somebody will ask."""
        return self._open and torch.is_grad_enabled()

    def tell(self, site: str, loss: Tensor) -> None:
        """Keeps one forward's loss of one site."""
        self._told.setdefault(site, deque(maxlen=FORWARDS)).append(loss)

    def take(self) -> Tensor | None:
        """The sum over the sites, each the mean of its forwards since the last time; None where nobody told anything."""
        told, self.__dict__["_told"], self.__dict__["_open"] = self._told, {}, False
        found = [torch.stack(list(losses)).mean() for losses in told.values()]
        return torch.stack(found).sum() if found else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_told": {}}  # graphs belong to one step


def real(mask: Tensor | None, tokens: Sequence[int], device: torch.device) -> Tensor:
    """1.0 at the tokens [B, T] that are no padding, where the mask is about these; 1.0 everywhere else."""
    if mask is None or tuple(mask.shape) != tuple(tokens):
        return torch.ones(*tokens, device=device)
    return (mask != 0).to(device, torch.float32)


def in_rows(site: Site, values: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """What a router gave for each token, as [B, T, E], with 1.0 at the tokens that are no padding, [B, T].

    Args:
        site: where; one that does not see the rows of the batch has one row.
        values: [..., E], with the rows first.
        call: what this forward knows.
    """
    lead = values.shape[0] if values.dim() > 1 else 1
    rows = call.rows if call.rows and site.rows and lead % call.rows == 0 else lead if site.rows else 1
    flat = values.reshape(rows, -1, values.shape[-1])
    return flat, real(call.mask, flat.shape[:2], values.device)


def load_balance(
    probabilities: Tensor, index: Tensor, there: Tensor | None = None, *, by_sequence: bool = False
) -> Tensor:
    """``sum_e f_e P_e``: f_e = E / k times the share of the tokens' choices that fell on e, P_e its mean probability.

    It is 1 where all P_e are 1 / E, whatever f, and where all f_e are 1. No gradient goes through f.

    Args:
        probabilities: the softmax over all experts, [B, T, E].
        index: the chosen, [B, T, k].
        there: 1.0 at the tokens that count, [B, T]; all when None.
        by_sequence: take f and P of each row, and the mean of the rows; else of all tokens at once.

    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961; for each sequence Dai et al., DeepSeekMoE, arXiv 2401.06066.
    """
    probabilities = probabilities.float()
    experts, k = probabilities.shape[-1], index.shape[-1]
    there = torch.ones_like(probabilities[..., 0]) if there is None else there
    hits = torch.zeros_like(probabilities).scatter_add_(-1, index, torch.ones_like(index, dtype=probabilities.dtype))
    dims = (1,) if by_sequence else (0, 1)
    count = there.sum(dims).clamp_min(1.0).unsqueeze(-1)
    f = (hits * there[..., None]).sum(dims).detach() * (experts / k) / count
    P = (probabilities * there[..., None]).sum(dims) / count
    each: Tensor = (f * P).sum(-1)
    if not by_sequence:
        return each
    alive = (there.sum(1) > 0).to(each.dtype)
    return (each * alive).sum() / alive.sum().clamp_min(1.0)


def variation(Z: Tensor) -> Tensor:
    """``Var(Z) / Mean(Z)^2`` over all entries, the variance with n - 1; zero for a single entry."""
    if Z.numel() < 2:
        return Z.sum() * 0.0
    Z = Z.float()
    return Z.var() / (Z.mean().square() + 1e-10)
