"""Adapters to a mix that chooses among them, learned where it has to be. A door, as `polytask.jobs`: it holds no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, listing
from polytask.core.files import CONFIG
from polytask.core.gate import Router
from polytask.core.given import given
from polytask.core.model import Model
from polytask.core.routing import Routing
from polytask.core.task import Task, read_tasks
from polytask.forms.mixture import Mixture, experts_of
from polytask.forms.mixtures import mixture_of, routing_of


def route(
    source: Any,
    router: Router | str | Mapping[str, Any] = "arrow",
    *,
    model: Model | str | None = None,
    data: Sequence[Task] | Task | str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    train: str = "",
    **settings: Any,
) -> Routing:
    """A mix that weighs adapters: for each task, row or token, as its router says.

    Args:
        source: a `Library`, a mapping or list of adapters, or a folder with a folder for each; for other routers over the
            experts of a mixture, that mixture, its folder, or its mix.
        router: a router, its name, or a mapping with its settings; ``polytask route list`` shows them.
        model: the base, or what `Model.load` takes; a library's own when None. The adapters are attached to it, so that
            ``model.using(mix)`` works at once.
        data: tasks to learn from, for routers that learn; for those that look at each adapter's own task, the tasks by name.
        seed: of everything random.
        out: folder for what is learned; repeating the call goes on from there.
        train: of a router that can learn with or without the adapters: ``gates`` or ``all``.
        settings: of the router; for routers that learn also of `polytask.learn`: epochs, lr, ...

    Returns:
        The mix. ``mix.save(file)`` writes its gates and the adapters' hashes, `Routing.load` reads them.

    Raises:
        ConfigError: an unknown router or setting, or data or a base are missing.
        MixError: the router cannot weigh the adapters.
    """
    kind = type(Router.of(router)) if not isinstance(router, Router) else type(router)
    own = {name: settings.pop(name) for name in kind.knobs() if name in settings}
    source, former = _inventory(source_of(source))
    chosen = _made(router, own, former)
    adapters = given(source)
    base = Model.load(model) if isinstance(model, str) else model or getattr(source, "model", None)
    tasks = _tasks(data)
    chosen = chosen.informed(adapters, tasks)
    if chosen.trains == "nothing":
        if settings:
            raise ConfigError(
                f"the router {chosen.name!r} has no setting {listing(settings)}; it has: {listing(kind.knobs())}"
            )
        mix = Routing.over(chosen, adapters, _signs(source, adapters, chosen, base, tasks, seed))
        return mix if base is None else mix.attach(base)
    if base is None or not tasks:
        raise ConfigError(f"the router {chosen.name!r} learns; give the base (model=) and tasks to learn from (data=)")
    from polytask.learn.learner import learn  # only here: it takes seconds to import

    adapters = dict(chosen.gathered(adapters))
    mixture = mixture_of(chosen.told([task.name for task in tasks]), adapters, seed, train, name=chosen.name)
    learned: Adapter = learn(
        base, tasks, form=mixture.form, start=mixture, joint=len(tasks) > 1, name=chosen.name, seed=seed, out=out,
        **{"progress": False, **settings},
    )  # fmt: skip
    if not isinstance(learned.form, Mixture):  # learning left one plain adapter, which is the mix
        alone = Routing.over(Router.of("uniform"), {learned.name: learned}, {})
        alone.heads, alone.about = learned.heads, {"training": learned.card.training, "tasks": learned.card.tasks}
        return alone.attach(base)
    return routing_of(learned, adapters if learned.form.train == "gates" else None).attach(base)


def source_of(source: Any) -> Any:
    """A `Library` where a folder has one's index; everything else as it is."""
    if isinstance(source, str | Path):
        from polytask.core.library import Library
        from polytask.core.library.entry import INDEX

        if (Path(source).expanduser() / INDEX).is_file():
            return Library(source)
    return source


def _inventory(source: Any) -> tuple[Any, Router | None]:
    """The experts of a mixture, its folder, or a mix, and what weighed them; everything else as it is."""
    if isinstance(source, Routing):
        return source.adapters, source.router
    if isinstance(source, str | Path) and (Path(source).expanduser() / CONFIG).is_file():
        source = Adapter.load(source)
    if isinstance(source, Adapter) and isinstance(source.form, Mixture):
        return experts_of(source), source.form.router
    return source, None


def _made(router: Router | str | Mapping[str, Any], own: Mapping[str, Any], former: Router | None) -> Router:
    if isinstance(router, Router):
        if own:
            raise ConfigError(f"the router {router.name!r} is given with its settings; say {listing(own)} there")
        return router
    said = {"name": router} if isinstance(router, str) else dict(router)
    knobs = type(Router.of(said)).knobs()
    kept = {} if former is None else {name: value for name, value in former.passed().items() if name in knobs}
    return Router.of({**kept, **said, **own})


def _tasks(data: Any) -> list[Task]:
    if data is None:
        return []
    return [data] if isinstance(data, Task) else read_tasks(data) if isinstance(data, str | Path) else list(data)


def _signs(
    source: Any, adapters: Mapping[str, Adapter], router: Router, base: Model | None, tasks: Sequence[Task], seed: int
) -> dict[str, dict[str, Tensor]]:
    """The signature of each adapter: the library's, or made now (and kept there)."""
    if not router.signature:
        return {}
    named = {task.name: task for task in tasks}
    settings = router.settings()
    how: dict[str, Any] = {name: settings[name] for name in router.signed_by}
    if how:
        how["seed"] = seed
    found = {}
    for name, adapter in adapters.items():
        task = next((named[task] for task in (name, *adapter.tasks) if task in named), None)
        made = _kept(source, name, router.signature, how, task)
        if not made:
            try:
                made = router.sign(adapter, base, task, seed)
            except MixError as error:
                raise MixError(f"the adapter {name!r}: {error}") from error
            if hasattr(source, "sign"):
                source.sign(name, router.signature, made, {"how": how, "task": None if task is None else task.hash})
        found[name] = dict(made)
    return found


def _kept(source: Any, name: str, kind: str, how: Mapping[str, Any], task: Task | None) -> Mapping[str, Tensor] | None:
    """The signature that a library has; where the task is at hand, only one that was made as it would be now."""
    if not hasattr(source, "signature"):
        return None
    about = source.about(name, kind)
    if about is None:
        return None
    if task is not None and (about.get("how", {}) != dict(how) or about.get("task") not in (None, task.hash)):
        return None  # it can be made anew
    found: Mapping[str, Tensor] | None = source.signature(name, kind)
    return found
