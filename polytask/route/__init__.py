"""The verb *route*: adapters, and a little data or none, in; a mix that chooses among them out.

``polytask.route(...)`` is `polytask.routing.route`, which may learn.
"""

from __future__ import annotations

from polytask.core.verb import verb

verb(__name__, "polytask.routing", "route")
