"""What forms have in common that state their change of a weight as a matrix: how it is applied and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError
from polytask.core.form import NO_CALL, Call, Patch
from polytask.core.site import Site

CONVOLVE: Sequence[Any] = (F.conv1d, F.conv2d, F.conv3d)


def convolution(patch: Patch) -> Any:
    """The convolution that a patch is attached to. Raises `AdapterError` where it is not attached to one."""
    if not isinstance(patch.base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise AdapterError(
            f"the {patch.form.name!r} at {patch.site.name!r} must be attached to a convolution before it is used"
        )
    return patch.base


def padded(base: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A convolution's input, and the padding that is left to do."""
    if base.padding_mode == "zeros":
        return x, base.padding
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0


class MatrixPatch(Patch):
    """A patch that states its change as `matrix` [o, i] (a kernel flattened into i); the rest follows from it."""

    def matrix(self) -> Tensor:
        """The change as [d_out, everything else]."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        change = self.matrix()
        return change.t() if self.site.transposed else change.reshape(self.site.shape)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        change = self.kept().to(x.dtype)
        if self.site.kind != "conv":
            return F.linear(x, change)
        base = convolution(self)
        x, padding = padded(base, x)
        weight = change.reshape(self.site.shape)
        return CONVOLVE[len(base.kernel_size) - 1](x, weight, None, base.stride, padding, base.dilation, base.groups)

    def kept(self) -> Tensor:
        """`matrix`; as it was computed the last time where no gradients are recorded and no parameter has changed."""
        own = list(self.parameters())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in own):
            return self.matrix()
        key = (torch.is_inference_mode_enabled(), [(p.data_ptr(), p._version) for p in own])
        last = self.__dict__.get("_kept")
        if last is None or last[0] != key:
            last = self.__dict__["_kept"] = (key, self.matrix())
        return last[1]

    def bound(self, base: nn.Module, site: Site) -> Any:
        view = super().bound(base, site)
        view.__dict__.pop("_kept", None)
        return view

    def misfit(self, site: Site) -> str:
        """A file of PEFT's tells d_out and the size of the rest, so a convolution in it looks like a linear layer."""
        mine, other = self.site.shape, site.shape
        if site.kind == "conv" and mine[0] == other[0]:
            flat = self.site.kind == "linear" and mine[1] == math.prod(other[1:])
            # and a kernel of k like one of k times 1
            same = self.site.kind == "conv" and (*mine, 1)[:4] == (*other, 1)[:4]
            if flat or same:
                return ""
        return super().misfit(site)
