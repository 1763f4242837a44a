"""Registration by definition: a decorated class appears in the API, the command line, the docs and the contract tests."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, Generic, TypeVar

from .errors import ConfigError, listing, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """The methods of one room by the name the field uses.

    The room's modules are imported on first look-up, so a method is one file and nobody keeps a list of them.

    Args:
        what: what an entry is called in messages, as ``"form"``.
        package: the package whose modules register entries, as ``"polytask.forms"``.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self.package = package
        self._items: dict[str, type[T]] = {}
        self._found = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files the class under ``name``; a name is given once."""

        def add(cls: type[T]) -> type[T]:
            other = self._items.get(name)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(f"two classes register the {self.what} {name!r}: {other.__qualname__} and {cls}")
            cls.name = name  # type: ignore[attr-defined]
            self._items[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        self._discover()
        if name not in self._items:
            hint = nearest(name, self._items)
            raise ConfigError(f"no {self.what} is called {name!r}{hint}; there are: {listing(self)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._items))

    def values(self) -> list[type[T]]:
        """The registered classes, by name."""
        return [self[name] for name in self]

    def make(self, spec: str | Mapping[str, Any], default: str = "") -> T:
        """An entry from its name, or from a mapping of its name and settings; entries are dataclasses.

        Args:
            spec: ``"lora"``, or ``{"name": "lora", "rank": 8}``. Lists become tuples.
            default: the name of a mapping that has none.

        Raises:
            ConfigError: an unknown name or setting, with the nearest valid one, or one that lacks.
        """
        chosen = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = str(chosen.pop("name", default))
        if not name:
            article = "an" if self.what[0] in "aeiou" else "a"
            raise ConfigError(f"{article} {self.what} needs a name; there are: {listing(self)}")
        kind: Any = self[name]
        allowed = {f.name: f for f in fields(kind)}
        for key in chosen:
            if key not in allowed:
                raise ConfigError(
                    f"the {self.what} {name!r} has no setting {key!r}{nearest(key, allowed)}; it has: {listing(allowed)}"
                )
        lacking = [n for n, f in allowed.items() if n not in chosen and f.default is f.default_factory is MISSING]
        if lacking:
            raise ConfigError(f"the {self.what} {name!r} needs {listing(lacking)}")
        made: T = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
        return made

    def _discover(self) -> None:
        if self._found:
            return
        self._found = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
