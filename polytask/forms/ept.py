"""EPT: a short prompt, a low-rank change of the text's own vectors, and a mixture of projections of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Patch, forms
from polytask.core.site import Site

from .prompt import Tokens, TokensPatch


@forms.register("ept")
@dataclass(frozen=True)
class EPT(Tokens):
    """A prompt that is shorter than usual, what is saved spent on the words: ``[P; E(text) + c A B]``, A by position.

    With ``spaces`` above 0 the prompt is fused with what the low-rank part learned (attention of P over A B) and replaced
    by a gated sum of projections into several subspaces (EPT); with 0 it is DePT. At the start both are the prompt alone.

    Args:
        length: m, the number of virtual tokens.
        rank: r, of A [longest, r] and B [r, d].
        longest: how many of a row's tokens are changed; those behind keep their vectors.
        alpha: c = alpha / sqrt(rank).
        spaces: projections in the mixture; 0 leaves fusion and mixture out.
        space_rank: the rank of each projection.

    Reference: Lan et al., Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion, arXiv 2405.11464, over Shi
    and Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, arXiv 2309.05173. The first gives
    neither the attention nor the gate in detail; they are ours, made so that the start is DePT's. Positions count a row's
    real tokens, where DePT counts the columns of inputs padded to one length.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base takes no token ids.
    """

    length: int = 10
    rank: int = 8
    longest: int = 256
    alpha: float = 8.0
    spaces: int = 4
    space_rank: int = 4

    peft_type: ClassVar[str] = "POLYTASK_EPT"
    default_lr: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2405.11464"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "longest", "space_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"EPT: {name} must be at least 1, got {getattr(self, name)}")
        if self.spaces < 0:
            raise ConfigError(f"EPT: spaces must not be negative, got {self.spaces}")

    def patch(self, site: Site) -> Patch:
        return EPTPatch(self, site)


class EPTPatch(TokensPatch):
    """P [m, d], A [longest, r], B [r, d]; for the mixture Q, K, V [d, r], O [r, d], U [n, d, s], W [n, s, d], gate [n, d]."""

    form: EPT
    touches = True

    def __init__(self, form: EPT, site: Site) -> None:
        super().__init__(form, site)
        d, n = self.width, form.spaces
        sizes: dict[str, tuple[int, ...]] = {"P": (form.length, d), "A": (form.longest, form.rank), "B": (form.rank, d)}
        if n:
            sizes |= dict.fromkeys(("Q", "K", "V"), (d, form.rank))
            sizes |= {"O": (form.rank, d), "U": (n, d, form.space_rank), "W": (n, form.space_rank, d), "gate": (n, d)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size)))

    def start(self, generator: torch.Generator) -> None:
        table, d = self.table(), self.width
        with torch.no_grad():
            ids = torch.randint(table.num_embeddings, (self.tokens,), generator=generator)
            self.P.copy_(table(ids.to(table.weight.device)))  # type: ignore[operator,union-attr]
            for name, parameter in self._parameters.items():
                if parameter is not None and name in ("A", "Q", "K", "V", "O", "U", "gate"):
                    fan = self.form.rank if name in ("A", "O") else d
                    parameter.uniform_(-(fan**-0.5), fan**-0.5, generator=generator)
            for name in ("B", "W"):  # nothing is added to the words, so nothing fused, and no projection yet
                if name in self._parameters:
                    self._parameters[name].zero_()  # type: ignore[union-attr]

    def virtual(self, call: Call) -> Tensor:
        p = self._parameters
        P: Tensor = p["P"]  # type: ignore[assignment]
        if not self.form.spaces:
            return P
        words = p["A"] @ p["B"]  # type: ignore[operator]  # [L, d], what the low-rank part knows
        score = (P @ p["Q"]) @ (words @ p["K"]).T / self.form.rank**0.5  # type: ignore[operator]  # [m, L]
        fused = P + score.softmax(-1) @ words @ p["V"] @ p["O"]  # type: ignore[operator]
        gates = F.linear(fused.mean(0), p["gate"]).softmax(0)  # type: ignore[arg-type]  # [n]
        moved = torch.einsum("md,nds,nse->nme", fused, p["U"], p["W"])
        return fused + torch.einsum("n,nme->me", gates, moved)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        own = super().contribute(x, y, call)
        T = x.shape[1]
        if call.mask is not None:  # positions of a row's real tokens, also where the padding is on the left
            place = (call.mask.cumsum(1) - 1)[:, call.past : call.past + T]
            known = (place >= 0) & (place < self.form.longest) & (call.mask[:, call.past : call.past + T] != 0)
        else:
            place = torch.arange(call.past, call.past + T, device=x.device).expand(len(x), T)
            known = place < self.form.longest
        scale = self.form.alpha / self.form.rank**0.5
        change = F.embedding(place.clamp(0, self.form.longest - 1), self.A.to(y.dtype)) @ self.B.to(y.dtype)
        words = F.pad(change * (scale * known[..., None]).to(y.dtype), (0, 2))
        return own + F.pad(words, (0, 0, y.shape[1] - T, 0))
