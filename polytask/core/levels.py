"""The best of many vectors for each input, without the product with all: groups of like ones first, then what is in the best.

Shapes: T inputs, N vectors, i their width, G groups of up to S, p of them that an input looks into, k that are found.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .pairs import products

STEPS = 12  # of the power iteration that finds where a group is longest


class Levels:
    """Vectors in about sqrt(N) groups of the same size.

    The groups are the leaves of a tree whose nodes are cut in half along the direction in which their vectors differ most, so
    nothing is drawn, and they differ by one in size at most. What stands for a group is the direction of its mean; unsigned,
    the vectors of a node are turned to one side before it is cut, and the direction in which a group is longest stands for it.

    What is found has its exact product; what lies in none of the p groups is not found. With p = G all are looked at.

    Args:
        vectors: [N, i].
        unsigned: products count without their sign.

    Reference: an inverted file (Sivic and Zisserman, Video Google, ICCV 2003), with the leaves of a principal axis tree (Sproull,
    Refinements to Nearest-Neighbor Searching in k-Dimensional Trees, Algorithmica 1991) in place of clusters of k-means.
    """

    def __init__(self, vectors: Tensor, unsigned: bool = False) -> None:
        self.unsigned = unsigned
        count = len(vectors)
        groups = [torch.arange(count, device=vectors.device)]
        exact = vectors.float()
        while 4 * len(groups) ** 2 <= 2 * count:  # until there are about as many groups as vectors in each
            groups = [half for group in groups for half in self._halves(exact, group)]
        size = max(map(len, groups))
        self.centres = torch.stack([self._centre(exact[group]) for group in groups]).to(vectors.dtype)  # [G, i]
        # number N is nobody's, as is the last group: the way of `pairs`
        self.members = torch.full((len(groups) + 1, size), count, device=vectors.device)  # [G + 1, S]
        for place, group in enumerate(groups):
            self.members[place, : len(group)] = group
        padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        self.stack = padded[self.members]  # [G + 1, S, i]
        self._short = bool((self.members[:-1] == count).any())
        self._count = count

    def __len__(self) -> int:
        """G."""
        return len(self.centres)

    def best(self, x: Tensor, k: int, probe: int) -> tuple[Tensor, Tensor]:
        """The k largest products of each input with a vector in its ``probe`` best groups, and their places.

        Args:
            x: [..., i].
            k: at most ``probe`` times the size of the smallest group.
            probe: p.

        Returns:
            [..., k] each, the largest first.
        """
        flat = x.reshape(-1, x.shape[-1])
        near = self._sized(F.linear(flat, self.centres))
        where = near.topk(min(probe, len(self)), -1).indices  # [T, p]
        found = self._sized(products(flat, self.stack, where))  # [T, p, S]
        members = self.members[where]
        if self._short:
            found = found.masked_fill(members == self._count, -torch.inf)
        top, place = found.flatten(1).topk(k, -1)
        shape = (*x.shape[:-1], k)
        return top.view(shape), members.flatten(1).gather(1, place).view(shape)

    def _sized(self, products: Tensor) -> Tensor:
        return products.abs() if self.unsigned else products

    def _halves(self, vectors: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        own = vectors[group]
        if self.unsigned:  # turned to one side, for their signs say nothing
            own = own * torch.where(own @ _longest(own) < 0, -1.0, 1.0).unsqueeze(1)
        own = own - own.mean(0)
        order = (own @ _longest(own)).argsort(stable=True)
        half = (len(group) + 1) // 2
        return group[order[:half]].sort().values, group[order[half:]].sort().values

    def _centre(self, own: Tensor) -> Tensor:
        return F.normalize(_longest(own) if self.unsigned else own.mean(0), dim=0)


def _longest(rows: Tensor) -> Tensor:
    """The unit direction [i] in which rows [n, i] are longest: their first right singular vector, nearly."""
    start = rows[rows.square().sum(1).argmax()]
    for _ in range(STEPS):
        start = F.normalize(rows.T @ (rows @ F.normalize(start, dim=0)), dim=0)
    return start
