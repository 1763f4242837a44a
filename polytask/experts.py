"""Groups of adapters, and experts for a few examples, from end to end. A door, as `polytask.routing`: it holds no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.callables import Embedder
from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.gate import Router
from polytask.core.given import given
from polytask.core.model import Model
from polytask.core.task import Example, Task, read_tasks
from polytask.route.cluster import Clusters, clusters
from polytask.route.kshot import MOST, Experts, diverse, near, rank, shots_of
from polytask.routing import route, source_of


def mbc(
    source: Any,
    k: int = 10,
    by: str = "factors",
    *,
    sparsity: float = 0.5,
    components: int = 64,
    model: Model | str | None = None,
    data: Sequence[Task] | Task | str | Path | None = None,
    seed: int = 42,
    out: str | Path | None = None,
    **options: Any,
) -> Clusters:
    """Groups of adapters whose weights are alike, and one adapter for each group, learned on all tasks of its members.

    Args:
        source: a `Library`, a mapping or list of adapters, or a folder with a folder for each.
        k: how many groups.
        by: what is compared, ``factors`` (the paper) or ``changes``; see `polytask.route.cluster.clusters`.
        sparsity: the fraction of an adapter's entries that is left out; for ``factors``.
        components: of the SVD.
        model: the base, or what `Model.load` takes; a library's own when None. Only needed to learn.
        data: the members' tasks, by their names or those on their cards; nothing is learned when None.
        seed: of the k-means, and of what is learned.
        out: folder for what is learned, a folder for each group; repeating the call goes on from there.
        options: of `polytask.learn`: form, epochs, lr, ...

    Returns:
        The groups (``.groups``), the cosines (``.similarity`` of ``.names``), and ``.adapters`` by name: ``group0``, ...

    Reference: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157.

    Raises:
        ConfigError: a setting is out of range, or a member's task or the base is missing.
        MixError: fewer adapters than groups, or adapters that cannot be compared.
    """
    source = source_of(source)
    adapters = given(source)
    found = clusters(adapters, k, by, sparsity=sparsity, components=components, seed=seed)
    if data is None:
        if options:
            raise ConfigError(f"mbc has no setting {listing(options)} where nothing is learned; give tasks too (data=)")
        return found
    from polytask.learn.learner import learn  # only here: it takes seconds to import

    base = _base(model, source, "mbc learns an adapter for each group")
    tasks = [data] if isinstance(data, Task) else read_tasks(data) if isinstance(data, str | Path) else list(data)
    learned: dict[str, Adapter] = {}
    for number, group in enumerate(found.groups):
        own = _tasks_of({name: adapters[name] for name in group}, tasks)
        name = f"group{number}"
        learned[name] = learn(
            base, own, joint=len(own) > 1, name=name, seed=seed, out=Path(out) / name if out is not None else None,
            **{"form": adapters[group[0]].form, "progress": False, **options},
        )  # fmt: skip
    return replace(found, adapters=learned)


def kshot_experts(
    model: Model | str,
    adapters: Any,
    shots: Task,
    pool: Task | Sequence[Example] | None = None,
    *,
    k: int | None = None,
    experts: int = 4,
    shortlist: int | None = None,
    weight: float = 0.5,
    examples: int = 1000,
    embed: Embedder | None = None,
    apart: float = 0.1,
    router: Router | str | Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Experts:
    """Experts and data for a task of which there are a few examples: a mixture of the adapters that suit it, which learns on.

    Every adapter answers the shots. Those with the best places by metric and by loss make a shortlist, and of it the experts
    are those that are least alike. They and a fresh router, the best two for each token, learn from the shots and from those
    examples of the pool that are nearest to the shots.

    Args:
        model: the base, or what `Model.load` takes.
        adapters: a `Library`, a mapping or list of adapters, or a folder with a folder for each.
        shots: a task; its training examples are the shots.
        pool: more examples of the same kind, as a task or a list; none when None.
        k: how many of the shots are taken; all when None.
        experts: how many adapters are chosen; all where there are fewer.
        shortlist: of how many; twice the experts when None.
        weight: of the place by metric; the place by loss has the rest.
        examples: to learn from, shots and pool together, before examples are dropped that are close to others.
        embed: texts to vectors; words and their parts, hashed, when None.
        apart: the least cosine distance between examples of the pool.
        router: of the experts; ``molora`` with the best two when None.
        seed: of everything random.
        out: folder for what is learned; repeating the call goes on from there.
        options: of `polytask.learn`: epochs, lr, ...

    Returns:
        The mix (``.mix``), the chosen (``.names``), all of them by rank (``.ranking``), ``.likeness`` and ``.examples``.

    Reference: Yang et al., Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models, arXiv 2408.15915,
    with learning rate 5e-5 and 5 epochs. How metric, loss and diversity are weighed is in no file of its; the mean of both
    places, and diversity only within the shortlist, are ours.

    Raises:
        ConfigError: no shot, or a setting is out of range.
        MixError: an adapter cannot answer the task.
    """
    drawn = shots_of(shots, k)
    short = 2 * experts if shortlist is None else shortlist
    if experts < 1 or not experts <= short <= MOST:
        raise ConfigError(
            f"kshot-experts: experts must be at least 1 and shortlist from experts to {MOST}, got experts={experts!r}, "
            f"shortlist={short!r}"
        )
    if not 0.0 <= weight <= 1.0 or not 0.0 <= apart <= 2.0:
        raise ConfigError(
            f"kshot-experts: weight must be in [0, 1] and apart in [0, 2], got weight={weight!r}, apart={apart!r}"
        )
    source = source_of(adapters)
    base = _base(model, source, "kshot-experts tries the adapters on the shots")
    known = given(source)
    ranking = rank(base, known, shots, drawn, weight=weight, longest=options.get("longest"))
    names, alike = diverse(known, [row.name for row in ranking[:short]], experts)
    more = pool.train if isinstance(pool, Task) else list(pool or ())
    found = near(drawn, more, examples - len(drawn), shots, embed=embed, apart=apart)
    task = replace(shots, train=[*drawn, *found])
    chosen = router if router is not None else {"name": "molora", "top_k": min(2, len(names))}
    mix = route(
        {name: known[name] for name in names}, chosen, model=base, data=task, seed=seed, out=out, train="all",
        **{"epochs": 5, "lr": 5e-5, **options},
    )  # fmt: skip
    return Experts(mix, names, ranking, alike, task.train)


def _base(model: Model | str | None, source: Any, why: str) -> Model:
    base = Model.load(model) if isinstance(model, str) else model or getattr(source, "model", None)
    if base is None:
        raise ConfigError(f"{why}; give the base (model=)")
    return base


def _tasks_of(adapters: dict[str, Adapter], tasks: Sequence[Task]) -> list[Task]:
    """The tasks that adapters were learned from, in the order of their names. Raises `MixError` where one has none."""
    named = {task.name: task for task in tasks}
    found: dict[str, Task] = {}
    for name, adapter in adapters.items():
        of = (name, *adapter.tasks)
        own = [named[task] for task in of if task in named]
        if not own:
            raise MixError(
                f"no task is given for the adapter {name!r}, which was learned from {listing(dict.fromkeys(of))}; give it as data"
            )
        found |= {task.name: task for task in own}
    return [found[name] for name in sorted(found)]
