"""A sketch of what an adapter changes: similar adapters have similar sketches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.core.change import change_at
from polytask.core.errors import ConfigError
from polytask.core.signature import Signature, Subject, signatures


@signatures.register("sketch")
@dataclass(frozen=True)
class Sketch(Signature):
    """Random products with the changes of all sites: ``s_j = 1/sqrt(k) sum_site u_j^T D_site v_j``, with the same random signs
    u, v for every adapter, so that the cosine of two sketches estimates that of the changes.

    Of thin factors ``D = B A`` it is ``(u B)(A v)``, and D is never formed. What has no dense change is sketched by its
    parameters, which compares it with others of the same form only. Sites go by their names in the adapter.

    Args:
        dimension: k. The estimate's deviation is about ``1/sqrt(k)``, or more where few sites of rank one make the change.
        seed: of the signs.

    Shapes: D [o, i], the sketch [k] in fp32 under the empty name.

    Reference: random projections of rank one; the use for comparing adapters is ours.

    Raises:
        ConfigError: ``dimension`` is below 1.
    """

    dimension: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.dimension, int) and self.dimension >= 1):
            raise ConfigError(f"sketch: dimension must be a whole number of at least 1, got {self.dimension!r}")

    @torch.no_grad()
    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        made = torch.zeros(self.dimension, dtype=torch.float64)
        for name, patch in subject.adapter.patches.items():
            change = change_at(patch, name, subject.model)
            if change is not None:
                made += self._products(name, *change)
                continue
            for part, value in patch.named_parameters():
                matrix = value.detach().reshape(value.shape[0] if value.dim() > 1 else 1, -1)
                made += self._products(f"{name}:{subject.adapter.form.name}:{part}", matrix, None)
        return {"": (made / self.dimension**0.5).float()}, {"dimension": self.dimension, "seed": self.seed}

    def _products(self, key: str, left: Tensor, right: Tensor | None) -> Tensor:
        """u_j^T D v_j for all j, [k]: D is ``left`` [o, i], or ``left`` [o, r] times ``right`` [r, i]."""
        width = (left if right is None else right).shape[1]
        start = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(start) >> 1)
        u = _signs(self.dimension, left.shape[0], draw) @ left.cpu().float()  # [k, r]
        v = _signs(self.dimension, width, draw)  # [k, i]
        v = v if right is None else v @ right.cpu().float().mT  # [k, r]
        return (u.double() * v.double()).sum(1)


def _signs(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=draw, dtype=torch.int8).mul_(2).sub_(1).float()
