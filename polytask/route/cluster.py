"""Which adapters belong together, by their weights: model-based clustering.

Shapes: N adapters, k groups, i = d_in, o = d_out, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, listing, nearest
from polytask.core.form import Patch

WAYS = ("factors", "changes")


@dataclass(frozen=True)
class Clusters:
    """Groups of adapters.

    Attributes:
        groups: the names, sorted within each group; the groups by their first.
        names: all of them, sorted.
        similarity: the cosines of all pairs, [N, N], in the order of `names`.
        adapters: one for each group that was learned on its tasks, by name; empty where nothing was.
    """

    groups: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    similarity: Tensor
    adapters: dict[str, Adapter] = field(default_factory=dict)


def clusters(
    adapters: Mapping[str, Adapter],
    k: int = 10,
    by: str = "factors",
    *,
    sparsity: float = 0.5,
    components: int = 64,
    seed: int = 42,
) -> Clusters:
    """Groups of adapters whose weights are alike: k-means over the rows of the matrix of their cosines.

    ``factors`` compares all that an adapter has learned, flattened into one vector of which only the largest entries are kept,
    after an SVD that is not centred. That means something for adapters that started from one seed, since ``B A`` is also
    ``(B R^-1) (R A)``. ``changes`` compares what the adapters do to the weights, ``<D_i, D_j> = tr(A_i^T B_i^T B_j A_j)``
    summed over the sites, which no such R alters.

    Args:
        adapters: by name.
        k: how many groups; fewer come out where adapters are the same.
        by: ``factors`` or ``changes``.
        sparsity: the fraction of an adapter's entries that is set to zero; for ``factors``.
        components: of the SVD; more than N changes nothing.
        seed: of the k-means, which is the best of ten.

    Reference: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157: ``factors``,
    with k = 10. ``changes`` is ours.

    Raises:
        ConfigError: a setting is out of range.
        MixError: fewer adapters than groups, or one whose changes cannot be compared.
    """
    if by not in WAYS:
        raise ConfigError(f"mbc: by must be one of {listing(WAYS)}, got {by!r}{nearest(by, WAYS)}")
    for name, value, least in (("k", k, 1), ("components", components, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"mbc: {name} must be a whole number of at least {least}, got {value!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"mbc: sparsity must be in [0, 1), got {sparsity!r}")
    names = sorted(adapters)
    if len(names) < k:
        raise MixError(f"{len(names)} adapters cannot make {k} groups; give more adapters, or a smaller k")
    chosen = {name: adapters[name] for name in names}
    products = gram_of_factors(chosen, sparsity) if by == "factors" else gram_of_changes(chosen)
    cosines = _cosines(products, components)
    found = _grouped(cosines, k, seed)
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, found, strict=True):
        groups.setdefault(group, []).append(name)
    return Clusters(tuple(sorted(map(tuple, groups.values()))), tuple(names), cosines.float())


@torch.no_grad()
def gram_of_factors(adapters: Mapping[str, Adapter], sparsity: float) -> Tensor:
    """The products [N, N] of the adapters' own numbers, all but the largest of each set to zero."""
    flat: list[dict[str, Tensor]] = []
    for adapter in adapters.values():
        own = {
            f"{site}:{key}": value.detach().double().flatten().cpu()
            for site, part in adapter.parts.items()
            for key, value in part.named_parameters()
            if key not in part.frozen and value.is_floating_point()
        }
        sizes = np.concatenate([value.abs().numpy() for value in own.values()])
        bound = float(np.quantile(sizes, sparsity)) if sparsity else 0.0
        flat.append({key: value * (value.abs() >= bound) for key, value in own.items()})
    return _products(flat)


@torch.no_grad()
def gram_of_changes(adapters: Mapping[str, Adapter]) -> Tensor:
    """``<D_i, D_j>`` [N, N] of the changes D of all weights, from the factors where there are such."""
    found = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    sites = dict.fromkeys(site for adapter in adapters.values() for site in adapter.patches)
    for site in sites:
        here = [(i, a.patches[site]) for i, a in enumerate(adapters.values()) if site in a.patches]
        thin = [(i, patch.thin()) for i, patch in here]
        if all(pair is not None for _, pair in thin):
            pairs = [(i, pair[0].double().cpu(), pair[1].double().cpu()) for i, pair in thin if pair is not None]
            for at, (i, B, A) in enumerate(pairs):
                for j, other_B, other_A in pairs[at:]:
                    if (B.shape[0], A.shape[1]) != (other_B.shape[0], other_A.shape[1]):
                        raise MixError(f"the adapters change weights of different shapes at {site!r}")
                    product = float(((B.T @ other_B) * (A @ other_A.T)).sum())
                    found[i, j] += product
                    if i != j:
                        found[j, i] += product
            continue
        dense = [{site: _change(patch)} for _, patch in here]
        place = torch.tensor([i for i, _ in here])
        found[place[:, None], place] += _products(dense)
    return found


def _change(patch: Patch) -> Tensor:
    change = patch.delta() if patch.form.mergeable else None
    if change is None:
        raise MixError(
            f"the form {patch.form.name!r} has no dense change of the weight at {patch.site.name!r} to compare; say by='factors'"
        )
    return change.detach().double().flatten().cpu()


def _products(vectors: list[dict[str, Tensor]]) -> Tensor:
    """Inner products [N, N] of vectors in named pieces; a piece that one lacks is zero there."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for key in dict.fromkeys(key for vector in vectors for key in vector):
        here = [i for i, vector in enumerate(vectors) if key in vector]
        sizes = sorted({len(vectors[i][key]) for i in here})
        if len(sizes) > 1:
            raise MixError(
                f"the adapters have parameters of different sizes at {key!r}: {listing(map(str, sizes))}; give adapters of one "
                "form and rank, or say by='changes'"
            )
        rows, place = torch.stack([vectors[i][key] for i in here]), torch.tensor(here)
        found[place[:, None], place] += rows @ rows.T
    return found


def _cosines(products: Tensor, components: int) -> Tensor:
    """The cosines [N, N] of the vectors with these products, within their ``components`` largest directions."""
    if components < len(products):  # coordinates U S of the SVD, from the products alone
        values, vectors = torch.linalg.eigh(products)
        coordinates = vectors[:, -components:] * values[-components:].clamp_min(0.0).sqrt()
        products = coordinates @ coordinates.T
    size = products.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(size > 0.0, 1.0 / size.clamp_min(1e-300), 0.0)
    return products * scale[:, None] * scale


def _grouped(cosines: Tensor, k: int, seed: int) -> list[int]:
    """The group of each row."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    # what rounding alone tells apart must not be told apart
    rows = cosines.numpy().round(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than groups
        found: list[int] = KMeans(k, n_init=10, random_state=seed).fit_predict(rows).tolist()
    return found
