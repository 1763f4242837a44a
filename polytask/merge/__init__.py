"""The verb *merge*: models or adapters in, one of the same kind out. ``polytask.merge(...)`` is `polytask.merge.run.merge`."""

from __future__ import annotations

from polytask.core.verb import verb

verb(__name__, "run", "merge")
