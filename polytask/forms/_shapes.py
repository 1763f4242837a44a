"""What forms with a dense change of a weight have in common: how it is applied, kept, and read from files of PEFT's."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, listing
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


class DensePatch(Patch):
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


def pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression on the end of the module's path; the first that matches holds."""
    for key, value in (patterns or {}).items():
        if path and re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def pattern_keys(paths: Iterable[str]) -> dict[str, str]:
    """A pattern for each path that matches no other: one that is the end of another's says that it is the whole."""
    paths = list(paths)
    ends = {path[match.end() :] for path in paths for match in re.finditer(r"\.", path)}
    return {path: f"^{path}" if path in ends else path for path in paths}


COMMON = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "modules_to_save", "auto_mapping", "peft_version", "layers_to_transform", "layers_pattern",
    "target_parameters", "fan_in_fan_out", "bias", "init_weights", "runtime_config", "ensure_weight_tying",
})  # fmt: skip


def check_peft(config: Mapping[str, Any], name: str, known: Iterable[str], refused: Mapping[str, str]) -> None:
    """Refuses what a form does not have, and warns of settings that nobody here knows.

    Args:
        config: ``adapter_config.json``.
        name: of the form.
        known: settings that the form reads, or that do not matter once it is trained.
        refused: settings that make it another function, with what they are.
    """
    for key, why in refused.items():
        if config.get(key):
            raise AdapterError(f"this PEFT adapter uses {why} ({key}), which the form {name!r} does not have")
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"this PEFT adapter also trained biases (bias={config['bias']!r}), which the form {name!r} does not have; "
            "merge it with PEFT's merge_and_unload, or train it again with bias='none'"
        )
    read = {*COMMON, *known, *refused}
    unknown = sorted(key for key, value in config.items() if value and key not in read)
    if unknown:
        warnings.warn(
            f"settings of this PEFT adapter that polytask does not know are ignored: {listing(unknown)}; if they "
            "change what it computes, its outputs will differ",
            stacklevel=3,
        )
