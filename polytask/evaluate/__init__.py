"""The verb *evaluate*: a base, a mix and a task in, a score out. ``polytask.evaluate(...)`` is `evaluator.evaluate`."""

from __future__ import annotations

from polytask.core.verb import verb

verb(__name__, "evaluator", "evaluate")
