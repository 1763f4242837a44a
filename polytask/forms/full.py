"""Full: a dense change of a module's parameters, so that ordinary fine-tuning is a form too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@dataclass(frozen=True)
class Parameters(Form):
    """What forms have in common that change a module's own parameters, wherever there are any.

    Args:
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.
    """

    parameters: Literal["all", "weight", "bias"] = "all"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm", "experts", "parameter")
    acts: ClassVar[str] = "weight"
    default_lr: ClassVar[float] = 1e-4
    tensor_names: ClassVar[dict[str, str]] = {"delta.weight": "weight", "delta.bias": "bias", "delta": "value"}

    def __post_init__(self) -> None:
        self.among("parameters", ("all", "weight", "bias"))

    def among(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raises `ConfigError` for a setting that is not one of these."""
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{type(self).__name__}: {name} must be one of {', '.join(allowed)}, got {value!r}")

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and self.parameters == "bias" and not site.bias:
            return f"site {site.name!r} has no bias"
        return reason


@forms.register("full")
@dataclass(frozen=True)
class Full(Parameters):
    """A dense change of every parameter of a module: ``c(x) = f(x; W + dW) - f(x; W)``.

    Starts at zero. The base's weights stay where they are: the change is a tensor of its own, so several fully tuned
    models share one base, and can be mixed like any other adapters. Acts on linear layers, convolutions, embeddings,
    norms and raw parameters. Where every row of the batch has the same weights it is added to the weight, which costs
    one addition.

    Which parts of the network move is said by ``sites``, as for every form: ``sites="norm"`` tunes the norms,
    ``sites="depth>=0.5"`` the upper half, and with ``parameters="bias"`` only biases change.

    Args:
        parameters: ``"all"`` of a module's parameters, ``"weight"``, or ``"bias"`` only.
        stored: ``"delta"`` keeps the change; ``"value"`` keeps the new parameters themselves, as a checkpoint of
            PEFT's ``modules_to_save`` does.

    Raises:
        ConfigError: a setting is out of range.
    """

    stored: Literal["delta", "value"] = "delta"

    peft_type: ClassVar[str] = "POLYTASK_FULL"
    paper: ClassVar[str] = "fine-tuning"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.among("stored", ("delta", "value"))

    def patch(self, site: Site) -> Patch:
        return FullPatch(self, site)


class DensePatch(Patch):
    """What changes parameters of a module by tensors of their shapes: give ``deltas``, the rest follows.

    Attributes:
        shapes: the parameters that it changes, by their names in the module.
    """

    def __init__(self, form: Form, site: Site) -> None:
        super().__init__(form, site)
        parameters = getattr(form, "parameters", "all")
        self.shapes: dict[str, tuple[int, ...]] = {}
        if site.param:
            self.shapes[site.param] = site.shape
            return
        if parameters != "bias":
            self.shapes["weight"] = site.shape
        if parameters != "weight" and site.bias:
            width = site.shape if site.kind == "norm" else (site.d_out if site.kind == "linear" else site.shape[0],)
            self.shapes["bias"] = width

    def misfit(self, site: Site) -> str:
        """The shape as stored decides: a file of PEFT's does not tell a linear layer from an embedding."""
        mine, other = self.site.shape, site.shape
        return "" if mine == other else f"it was made for a weight of shape {mine}, and the model's is {other}"

    def bound(self, base: nn.Module, site: Site) -> Self:
        for name in self.shapes:
            if base._parameters.get(name) is None:
                raise AdapterError(
                    f"{name} of {site.path!r} is computed (a parametrisation) or missing, so a {type(self.form).__name__} "
                    "change cannot act on it; leave the site out, or use a form that acts on outputs"
                )
        return super().bound(base, site)

    def deltas(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def delta(self) -> Tensor | None:
        return self.deltas().get(self.site.param or "weight")

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        base = self._base()
        if getattr(base, "max_norm", None) is not None:
            raise AdapterError(f"the embedding {self.site.name!r} has max_norm, so its weight is not read as a sum")
        if self.site.read == "weight":
            raise AdapterError(f"site {self.site.name!r} is not called; this change acts on its weight there")
        stored = {n: p for n, p in base._parameters.items() if p is not None}
        # the original class: the swapped one would add the adapters again
        plain = _Plain(base)
        deltas = {f"inner.{n}": d.to(stored[n].dtype) for n, d in self.deltas().items()}
        zeros = {f"inner.{n}": torch.zeros_like(p) for n, p in stored.items()}
        # each of these modules is affine in its parameters, so the change is f(dW) - f(0); f(0) is 0 but for some norms
        changed = functional_call(plain, {**zeros, **deltas}, (x,))
        if self.site.kind in ("linear", "conv", "embedding"):
            return changed
        return changed - functional_call(plain, zeros, (x,))

    def _base(self) -> nn.Module:
        if self.base is None:
            raise AdapterError(f"the change at {self.site.name!r} must be attached to a model before it is used")
        return self.base


class FullPatch(DensePatch):
    """One tensor per parameter of the module, of the parameter's shape."""

    def __init__(self, form: Form, site: Site) -> None:
        super().__init__(form, site)
        self.values = getattr(form, "stored", "delta") == "value"  # the new parameters themselves
        self.keys = {}
        for target, shape in self.shapes.items():
            name = "value" if site.param else target  # a raw parameter's name is its site's already
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            own = "" if site.param else target
            self.keys = {**self.keys, name: own if self.values else f"delta.{own}".removesuffix(".")}

    def start(self, generator: torch.Generator) -> None:
        """Zero for a change; for stored values there is nothing to start from but the base, so they need `load`."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def instead(self, name: str) -> Tensor | None:
        return self._parameters.get("value" if self.site.param else name) if self.values else None

    def deltas(self) -> dict[str, Tensor]:
        changes = {}
        for name, own in self._parameters.items():
            target = self.site.param or name
            if self.values:
                stored = self._base()._parameters[target]
                changes[target] = own - stored.detach().to(own.dtype)  # type: ignore[union-attr,operator]
            else:
                changes[target] = own  # type: ignore[assignment]
        return changes


class _Plain(nn.Module):
    """A module seen as its own class, without what is attached to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        cls: Any = getattr(type(module), "_polytask_class", type(module))
        inner = cls.__new__(cls)
        inner.__dict__.update(module.__dict__)
        inner.__dict__["_parameters"] = dict(module._parameters)
        inner.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
        inner.__dict__.pop("forward", None)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner.forward(x)  # past the base's hooks, which have seen this call
        return out
