"""Adapters from what people give: a library, a mapping, a list, or a folder; by name or by hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .errors import AdapterError, MixError, listing
from .site import Site


def places_of(adapters: Mapping[str, Adapter]) -> dict[str, tuple[Site, tuple[str, ...]]]:
    """The sites where any adapter acts, each with the names of those that do. Raises `MixError` where sites differ."""
    places: dict[str, tuple[Site, list[str]]] = {}
    for name, adapter in adapters.items():
        for place, patch in adapter.patches.items():
            site, names = places.setdefault(place, (patch.site, []))
            reason = patch.misfit(site)
            if reason:
                raise MixError(f"the adapter {name!r} does not fit the others at {place!r}: {reason}")
            names.append(name)
    return {place: (site, tuple(names)) for place, (site, names) in places.items()}


def given(source: Any) -> dict[str, Adapter]:
    """Adapters by name from a library, a mapping, a list, or a folder with a folder for each.

    Raises:
        MixError: there are none, or two have one name.
    """
    if isinstance(source, str | Path):
        source = _folders(Path(source).expanduser())
    if isinstance(source, Mapping):
        found = dict(source)
    else:
        if not isinstance(source, Iterable):
            raise MixError(f"adapters come from a library, a mapping, a list or a folder, not from {source!r}")
        items = list(source)
        found = {adapter.name: adapter for adapter in items}
        if len(found) < len(items) or "" in found:
            raise MixError(
                f"a mix knows adapters by their names, and these have {[a.name for a in items]}; give each a name of its own"
            )
    if not found:
        raise MixError("there is no adapter to route to; give at least one")
    return found


def _folders(folder: Path) -> list[Adapter]:
    from .files import CONFIG

    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise AdapterError(
            f"{folder} holds no folders of adapters; give a library, or the folder that `polytask learn` wrote"
        )
    adapters = []
    for path in found:
        adapter = Adapter.load(path)
        adapter.name = path.name
        adapters.append(adapter)
    return adapters


def by_hash(source: Any, hashes: Mapping[str, str]) -> dict[str, Adapter]:
    """The adapters with these hashes, by the names they have there. Raises `AdapterError` where one is missing."""
    known = getattr(source, "hashes", None)  # a library's index knows them
    if known is None:
        source = given(source)
        known = {name: adapter.hash for name, adapter in source.items()}
    names = {value: name for name, value in known.items()}
    missing = {name: value for name, value in hashes.items() if value not in names}
    if missing:
        name, value = next(iter(missing.items()))
        changed = f"; {name!r} is there, but was changed (hash {known[name][:8]})" if name in known else ""
        raise AdapterError(
            f"the mix weighs {listing(missing)}, and no adapter with that hash ({value[:8]}) is given{changed}; give all that it "
            "was made from"
        )
    return {name: source[names[value]] for name, value in hashes.items()}
