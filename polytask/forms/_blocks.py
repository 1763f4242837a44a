"""What forms at whole blocks share: the width of the residual stream, which a block does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError
from polytask.core.form import Form, Patch
from polytask.core.site import Site, role_of


def stream_width(block: nn.Module) -> int:
    """The width of what a block returns: of its last layer that writes to the stream, else of its last norm."""
    width = 0
    for path, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.dim() == 2 and role_of(f".{path}") in ("down", "attn_out"):
            width = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
    norms = [m for m in block.modules() if m._parameters.get("weight") is not None and m.weight.dim() == 1]  # type: ignore[operator]
    return width or (len(norms[-1].weight) if norms else 0)  # type: ignore[arg-type]


class BlockPatch(Patch):
    """A patch at a block. Its parameters get their sizes from the block when it is started, from a file when loaded.

    Subclasses give ``sizes`` and say which parameter's dimension is the width.
    """

    wide: ClassVar[tuple[str, int]] = ("", 0)
    channels: int = -1  # where the width lies in what the block returns

    def __init__(self, form: Form, site: Site) -> None:
        super().__init__(form, site)
        for name, shape in self.sizes(0).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter at a stream of ``width``."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of the stream; 0 while it is not known."""
        name, dim = self.wide
        return self._parameters[name].shape[dim]  # type: ignore[union-attr]

    def grow(self) -> None:
        """Gives the parameters the sizes that the block needs, in place."""
        width = stream_width(self.base) if self.base is not None else 0
        if not width:
            raise AdapterError(f"the width of what the block {self.site.name!r} returns cannot be told from its layers")
        for name, shape in self.sizes(width).items():
            self._parameters[name].data = torch.empty(shape)  # type: ignore[union-attr]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        name, dim = self.wide
        if name in tensors and tensors[name].dim() > dim:
            for own, shape in self.sizes(tensors[name].shape[dim]).items():
                self._parameters[own] = nn.Parameter(torch.empty(shape))
        super().load(tensors)

    def bound(self, base: nn.Module, site: Site) -> Self:
        width = stream_width(base)
        if self.width and self.width != width:
            raise AdapterError(
                f"the {self.form.name} at {site.name!r} was made for a stream of {self.width}, and the model's has {width}"
            )
        view: Any = super().bound(base, site)
        convolves = any(isinstance(m, nn.Conv2d) for m in base.modules())
        if convolves and not any(isinstance(m, nn.Linear) for m in base.modules()):
            view.__dict__["channels"] = 1
        return view  # type: ignore[no-any-return]

    def rows(self, y: Tensor) -> Tensor:
        """y with the width last."""
        return y.movedim(self.channels, -1).contiguous()  # torch takes other products for other layouts

    def back(self, change: Tensor) -> Tensor:
        """The reverse of ``rows``."""
        return change.movedim(-1, self.channels)
