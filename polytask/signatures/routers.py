"""What routers need to know of an adapter: made when it comes into a library, so that a mix needs no data later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polytask.core.errors import MixError
from polytask.core.gate import Router
from polytask.core.signature import Signature, Subject, signatures


@signatures.register("arrow")
@dataclass(frozen=True)
class Arrow(Signature):
    """The input direction that each site's change lengthens most, from the weights alone; see `polytask.route.mixes.arrow`.

    Shapes: [i] by site.
    """

    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return _signed(Router.of("arrow"), subject, {})


@signatures.register("phatgoose")
@dataclass(frozen=True)
class PhatGoose(Signature):
    """A gate at each site that learned from the adapter's own task; see `polytask.route.mixes.phatgoose`. It takes some hundred
    forwards, and needs the base and one task.

    Shapes: [i] by site.
    """

    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if subject.model is None or len(subject.tasks) != 1:
            return None
        router = Router.of("phatgoose")
        settings = router.settings()
        how = {name: settings[name] for name in router.signed_by} | {"seed": 0}
        return _signed(router, subject, {"how": how, "task": subject.tasks[0].hash})


def _signed(router: Router, subject: Subject, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    task = subject.tasks[0] if subject.tasks else None
    try:
        return router.sign(subject.adapter, subject.model, task), about
    except MixError:  # a form or a site that it cannot weigh
        return None
