"""Rules that use another rule, which a setting names: ``"ties"``, or ``{"name": "ties", "density": 0.1}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytask.core.errors import ConfigError
from polytask.merge.rule import Rule, rules


class Nested(Rule):
    """What such rules share: the rule inside decides about models, weights and settings of single models.

    Attributes:
        inner: the rule's name, or a mapping of its name and settings.
        rule: that rule.
    """

    inner: Any
    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.inner, str | Mapping):
            raise ConfigError(
                f"{self.name}: inner must be the name of a merge method, or a mapping of its name and settings, got "
                f"{self.inner!r}"
            )
        rule = rules.make(self.inner)
        kept: dict[str, Any] = {
            "rule": rule,
            **{key: getattr(rule, key) for key in ("each", "weighted", "least", "most")},
        }
        for key, value in {**kept, **{key: getattr(rule, key) for key in rule.each}}.items():
            object.__setattr__(self, key, value)  # what follows from a setting of a frozen class
        if rule.ends:
            raise ConfigError(
                f"{self.name}: inner must be a rule that merges differences to a base, and {rule.name} goes from one model to "
                "another"
            )
