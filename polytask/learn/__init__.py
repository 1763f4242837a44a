"""The verb *learn*: a base and tasks in, adapters out. ``polytask.learn(...)`` is `polytask.learn.learner.learn`."""

from __future__ import annotations

from polytask.core.verb import verb

verb(__name__, "learner", "learn")
