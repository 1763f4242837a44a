"""BayesPrompt's start of a prompt: particles of the distribution that the task's texts have in the space of word vectors.

Shapes: N examples, n particles, K Gaussians, d features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask.core.errors import DataError

if TYPE_CHECKING:
    from polytask.core.model import Model

MOST = 64  # particles, unless the prompt is longer
WIDE = 1024  # features beyond which the Gaussians' covariances are diagonal
FLOOR = 1e-3  # of the kernel's bandwidth


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians.

    Attributes:
        weights: [K], adding up to 1.
        means: [K, d].
        roots: of the precisions, ``roots roots^T``: [K, d, d], or [K, d] where they are diagonal.
    """

    weights: Tensor
    means: Tensor
    roots: Tensor

    @classmethod
    def fit(cls, x: Tensor, components: int, seed: int, floor: float = 0.1) -> Mixture:
        """Fitted to rows [N, d] by expectation and maximisation; ``floor`` is added to every variance."""
        from sklearn.mixture import GaussianMixture

        kind = "full" if x.shape[1] <= WIDE else "diag"
        model = GaussianMixture(
            min(components, len(x)), covariance_type=kind, reg_covar=floor, random_state=seed % 2**32
        ).fit(x.double().numpy())
        found = (model.weights_, model.means_, model.precisions_cholesky_)
        return cls(*(torch.from_numpy(value).to(x.dtype) for value in found))

    def score(self, x: Tensor) -> Tensor:
        """The gradient of the log density at x [n, d]; the responsibilities come from a log-sum-exp, so none is lost."""
        away = x[:, None] - self.means  # [n, K, d]
        if self.roots.dim() == 2:
            z, log_det = away * self.roots, self.roots.log().sum(1)
            back = -z * self.roots
        else:
            z = torch.einsum("nkd,kde->nke", away, self.roots)
            log_det = self.roots.diagonal(dim1=1, dim2=2).log().sum(1)
            back = -torch.einsum("nke,kde->nkd", z, self.roots)
        of = (self.weights.log() + log_det - z.square().sum(2) / 2).softmax(1)  # responsibilities [n, K]
        return (of[..., None] * back).sum(1)


def direction(x: Tensor, score: Tensor, bandwidth: float | None = None) -> Tensor:
    """Where Stein variational gradient descent moves particles x [n, d]: up the density, and apart from one another.

    ``(1/n) sum_j K_ij (score_j + (x_i - x_j) / h^2)`` with a Gaussian kernel. h is by the median of the squared distances,
    and at least `FLOOR`: that of one particle, or of equal ones, is zero.
    """
    squares = torch.cdist(x, x).square()
    h = bandwidth or max(FLOOR, math.sqrt(0.5 * float(squares.median()) / math.log(len(x) + 1)))
    kernel = (-squares / (2 * h * h)).exp()
    apart = kernel.sum(1, keepdim=True) * x - kernel @ x  # sum_j K_ij (x_i - x_j)
    return (kernel @ score + apart / (h * h)) / len(x)


def steer(x: Tensor, mixture: Mixture, steps: int = 300, size: float = 0.02, memory: float = 0.9) -> Tensor:
    """Particles x [n, d] after so many steps, each scaled by a decaying mean of squared directions (AdaGrad with decay)."""
    mean = torch.zeros_like(x)
    for step in range(steps):
        towards = direction(x, mixture.score(x))
        mean = memory * mean + (1 - memory) * towards.square() if step else towards.square()
        x = x + size * towards / (mean.sqrt() + 1e-6)
    return x


def drawn(features: Tensor, length: int, components: int, seed: int) -> Tensor:
    """Vectors [length, d] for a prompt: particles that began at some examples and moved to stand for all of them.

    Examples are measured from their mean, in units of their mean deviation, so that the variance's floor means the same for
    every table. Each particle is taken once before any is taken again.
    """
    centre = features.mean(0)
    unit = (features - centre).square().mean().sqrt().clamp_min(torch.finfo(features.dtype).tiny)
    x = (features - centre) / unit
    generator = torch.Generator().manual_seed(seed)
    begin = x[torch.randperm(len(x), generator=generator)[: max(MOST, length)]]
    particles = steer(begin, Mixture.fit(x, components, seed)) * unit + centre
    turns = [torch.randperm(len(particles), generator=generator) for _ in range(-(-length // len(particles)))]
    return particles[torch.cat(turns)[:length]]


def features(model: Model, table: nn.Module, batches: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The mean vector in the ``table`` of words of each example that the batches read, [N, d]."""
    found: list[Tensor] = []
    for batch in batches:
        with torch.no_grad(), _first(model, table) as read:
            batch()
        if not read:
            raise DataError("the start 'bayes' found no token ids in the batches; use init='vocabulary'")
        vectors, mask = read[0]
        real = mask[..., None].to(vectors.dtype)
        found.append(((vectors * real).sum(1) / real.sum(1).clamp_min(1)).float().cpu())
    return torch.cat(found)


@contextmanager
def _first(model: Model, table: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The first word vectors [B, T, d] that a forward looks up, with their mask."""
    read: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if not read and out.dim() == 3:
            mask = model._hub.call.mask
            whole = mask is None or mask.shape != out.shape[:2]
            read.append((out.detach(), out.new_ones(out.shape[:2]) if whole else mask))  # type: ignore[arg-type]

    handle = table.register_forward_hook(look)
    try:
        yield read
    finally:
        handle.remove()


def seed_of(values: Tensor) -> int:
    """A seed from values that were drawn with one."""
    data = values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest())
