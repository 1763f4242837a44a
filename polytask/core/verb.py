"""A room named like its verb: ``polytask.learn`` is the package and can be called like the function in it."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any


def verb(package: str, module: str, function: str) -> None:
    """Makes a package callable: the call goes to ``module.function``, which is imported on first use.

    The module is one of the package, or has a name with dots: a door that joins verbs.

    Both spellings stay right whatever was imported first: ``pt.learn(model, task)`` and ``from polytask.learn import plan``.
    """

    class Verb(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._function(*args, **kwargs)

        @functools.cached_property
        def _function(self) -> Any:
            return getattr(importlib.import_module(module if "." in module else f"{package}.{module}"), function)

        @property
        def __wrapped__(self) -> Any:  # help() and inspect.signature show the function
            return self._function

    sys.modules[package].__class__ = Verb
