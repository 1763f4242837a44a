"""What Twin-Merging makes: a shared expert, what each task has beside it, and a router that says how much of each a row needs.

Shapes: B rows, T tasks, d the width of the network's vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.attach import Slot
from polytask.core.errors import AdapterError, MergeError, listing
from polytask.core.form import NO_CALL, Call, Weights
from polytask.core.gate import by_row
from polytask.core.gates import carried
from polytask.core.head import Head
from polytask.core.hub import Hub
from polytask.core.mix import Fixed, Mix, Single
from polytask.core.model import Model, pool
from polytask.core.site import Site
from polytask.core.storage import write, writing

CARD, ROUTER, SHARED = "polytask_twin.json", "router.safetensors", "shared"


class Router(nn.Module):
    """Logits of the tasks [B, T] from vectors [B, d]: d to 2d to 2d to T, with batch norm, leaky ReLU and dropout between.

    Args:
        width: d.
        tasks: T.
        dropout: of the hidden vectors while it learns.
    """

    def __init__(self, width: int, tasks: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.width, self.tasks, self.dropout = width, tasks, dropout
        layers: list[nn.Module] = []
        for d in (width, 2 * width):
            layers += [nn.Linear(d, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(2 * width, tasks))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """``softmax(logits)`` of rows, [B, T]."""
        found: Tensor = self(x.float()).softmax(-1)
        return found


class Routed(Mix):
    """The shared expert on every row with weight 1, and on each row the tasks' own parts with the router's weights.

    At the start of a forward the shared expert alone reads the rows, once more, and the router says ``softmax(logits)``. While
    ``generate`` writes, the weights are those of the prompts.

    Args:
        shared: the name of the shared expert there.
        names: of the tasks' parts, in the order of the router's logits.
        router: what gives the weights.

    Attributes:
        weights: of the last forward's rows, [B, T].
    """

    def __init__(self, shared: str, names: Sequence[str], router: Router) -> None:
        self.shared, self._names, self.router = shared, tuple(names), router
        self.weights: Tensor | None = None
        self._nothing = True  # whether the shared expert acts alone
        self._places: dict[tuple[str, ...], list[int]] = {}

    def names(self) -> tuple[str, ...]:
        return (self.shared, *self._names)

    def begin(self, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        kept = carried(self.weights, hub, inputs, call)
        if kept is not None:
            self.weights = kept
            return
        out = hub.read(inputs, call, Single(self.shared))
        self.weights = self.router.weights(pool(out, inputs.get("attention_mask"), "mean"))
        self._nothing = not bool(self.weights.any())

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float] | None:
        if not self._nothing and any(name in names for name in self._names):
            return None
        return {self.shared: 1.0} if self.shared in names else {}

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        here = tuple(name for name in self._names if name in names)
        if self._nothing or not here or self.weights is None:
            return Weights((), ())
        if here not in self._places:
            self._places[here] = [self._names.index(name) for name in here]
        return by_row(site, here, self.weights[:, self._places[here]], x, y)

    def combine(self, slot: Slot, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        weights = self.weigh(slot.site, slot.names, x, y, call)
        banks = slot.banks(weights.names) if weights.names else []
        # the shared part may be added in place, and the banks still need the base's own output
        out = y if not banks or torch.is_grad_enabled() else y.clone()
        patch = slot.patches.get(self.shared)
        if patch is not None:
            out = patch.add(x, y, out, 1.0, call)
        for bank in banks:
            out = bank.apply(x, y, out, weights, call)
        return out

    def __repr__(self) -> str:
        return f"Routed({self.shared!r} and {listing(self._names, 4)})"


@dataclass
class Twin:
    """A shared expert and what each task has beside it.

    Attributes:
        shared: the shared expert.
        exclusive: what each task has beside it, by name, each with the task's heads.
        router: which of them a row needs.
        about: the router's accuracy on examples that it did not learn from, bytes, and what was left out: plain values.
    """

    shared: Adapter
    exclusive: dict[str, Adapter]
    router: Router
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> dict[str, Head]:
        """Of all tasks."""
        return {task: head for adapter in self.exclusive.values() for task, head in adapter.heads.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all parts and the router."""
        for part in (self.shared, *self.exclusive.values()):
            yield from part.parameters()
        yield from self.router.parameters()

    def attach(self, model: Model, prefix: str = "twin/") -> Routed:
        """Attaches all parts to a base, for ``model.using(mix)`` and `polytask.evaluate`.

        Args:
            model: the base.
            prefix: of the names that the parts have there: ``twin/shared`` and those of the models.

        Raises:
            AdapterError: the base is another one, or a name is taken.
        """
        done: list[str] = []
        try:
            for name, adapter in ((SHARED, self.shared), *self.exclusive.items()):
                done.append(model.attach(adapter, prefix + name))
        except Exception:
            for name in done:
                model.detach(name)
            raise
        self.router.to(model.device)
        return Routed(done[0], done[1:], self.router)

    def detach(self, model: Model, prefix: str = "twin/") -> None:
        """Takes the parts away again."""
        for name in (SHARED, *self.exclusive):
            model.detach(prefix + name)

    def fixed(self, weights: Mapping[str, float], prefix: str = "twin/") -> Fixed:
        """A mix without the router: the shared expert and the named parts with these weights, for all rows."""
        return Fixed({prefix + SHARED: 1.0, **{prefix + name: weight for name, weight in weights.items()}})

    def save(self, folder: str | Path) -> Path:
        """Writes a folder for each part, the router and a card. Raises `StorageError` where that cannot be written."""
        from safetensors.torch import save as encode

        folder = Path(folder).expanduser()
        said = {
            "format": 1,
            "router": {"width": self.router.width, "tasks": self.router.tasks, "dropout": self.router.dropout},
            "exclusive": {name: _folder(i, name) for i, name in enumerate(self.exclusive)},
            "about": self.about,
        }
        self.shared.save(folder / SHARED)
        for i, (name, adapter) in enumerate(self.exclusive.items()):
            adapter.save(folder / _folder(i, name))
        with writing(folder):
            state = {k: v.cpu().contiguous() for k, v in self.router.state_dict().items()}
            write(folder / ROUTER, encode(state))
            write(folder / CARD, (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: Model | None = None) -> Twin:
        """Reads what `save` wrote.

        Args:
            folder: where.
            model: the base, to see at once that all parts are for it.

        Raises:
            MergeError: the folder is none of these, or damaged.
            AdapterError: a part is damaged, or for another base.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        try:
            said = json.loads((folder / CARD).read_text(encoding="utf-8"))
            router = Router(**said["router"])
            router.load_state_dict(load_file(folder / ROUTER))
            places = {str(name): folder / str(place) for name, place in said["exclusive"].items()}
            about = dict(said["about"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise MergeError(
                f"{folder} holds no shared expert with a router ({str(error).splitlines()[0]}); write one with the method twin"
            ) from error
        made = cls(Adapter.load(folder / SHARED), {n: Adapter.load(p) for n, p in places.items()}, router.eval(), about)
        if len(made.exclusive) != router.tasks:
            raise AdapterError(f"{folder} has {len(made.exclusive)} parts, and its router is for {router.tasks}")
        if model is not None:
            for adapter in (made.shared, *made.exclusive.values()):
                adapter.check_base(model)
        return made


def _folder(place: int, name: str) -> str:
    """Where a part lies: under its own name where that can be a folder's."""
    plain = re.fullmatch(r"\w[\w.-]*", name) and name not in (SHARED,)
    return f"exclusive/{name if plain else place}"
