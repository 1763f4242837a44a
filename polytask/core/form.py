"""The one equation: ``out = y + sum_n w_n * c_n(x, y)``. What an adapter contributes, and how several act together.

Shapes: B rows of the batch, T tokens, i = d_in, o = d_out, N adapters, k adapters chosen per row or token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .errors import AdapterError, MixError, SiteError, listing
from .registry import Registry

if TYPE_CHECKING:
    from .adapter import Adapter
    from .head import Seen
    from .hub import Hub
    from .model import Model
    from .site import Site
    from .task import Task
    from .tokens import Heads

ALIGNED = 64  # bytes: where PyTorch puts the tensors that it makes on a CPU


@dataclass(frozen=True, slots=True, eq=False)
class Other:
    """What a dual model knows of the other side, for patches that look at both images and texts.

    Attributes:
        texts: the base's own vectors of the class texts: of a text its class's, [R, d]; of images all of them, [1, C, d].
        images: the vector of the image that a text is made for, [R, d]; None at the image tower, and where no form asks.
        patches: the last hidden states of that image's patches, [R, n, w]; at the image tower's end of each image, [B, n, w].
        about: the base's own vector of the description of a text's class, [R, d].
        classes: the name of a text's class, R of them.
    """

    texts: Tensor | None = None
    images: Tensor | None = None
    patches: Tensor | None = None
    about: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def take(self, index: Tensor) -> Other:
        """The same for the rows in ``index``."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[index]

        names = None if self.classes is None else tuple(self.classes[i] for i in index.tolist())
        return Other(some(self.texts), some(self.images), some(self.patches), some(self.about), names)


@dataclass(frozen=True, slots=True)
class Call:
    """What one forward knows beside its tensors. It travels with the forward; nothing is global.

    Attributes:
        tasks: the task of each row, or None.
        mask: [B, T], 1 at real tokens, or None when all are real.
        rows: B of the model's input, or None when only a part of the model was called.
        step: the optimiser step, or None outside training.
        heads: what an attention works on, for patches at sites of kind ``attention``; None elsewhere.
        past: tokens of the text that are in a cache already, for patches at the input.
        other: what a dual model knows of the other side; None elsewhere.
    """

    tasks: tuple[str, ...] | None = None
    mask: Tensor | None = None
    rows: int | None = None
    step: int | None = None
    heads: Heads | None = None
    past: int = 0
    other: Other | None = None

    def spread(self) -> Call:
        """The same call with the one task that all rows have written out for each."""
        if self.tasks is None or len(self.tasks) != 1 or not self.rows:
            return self
        return replace(self, tasks=self.tasks * self.rows)

    def take(self, index: Tensor, of: int) -> Call:
        """The same call narrowed to the entries in ``index`` [n] of ``of`` that a site sees.

        What belongs to the rows of the batch stays whole where a site sees something else than rows (windows, pieces).
        """
        heads = None if self.heads is None else self.heads.take(index)
        if self.rows != of:
            return replace(self, heads=heads)
        return Call(
            tasks=None if self.tasks is None else tuple(self.tasks[i] for i in index.tolist()),
            mask=None if self.mask is None else self.mask[index],
            rows=len(index),
            step=self.step,
            heads=heads,
            past=self.past,
            other=None if self.other is None else self.other.take(index),
        )


NO_CALL = Call()


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The weights of some adapters at one site, at any grain.

    Attributes:
        names: the N adapters that are weighted; each has a patch at the site.
        values: a tuple of N floats (the same for every input), or a tensor: [N], [B, N] or [B, T, N] when ``index`` is
            None, else [B, k] or [B, T, k].
        index: positions in ``names`` that ``values`` weigh, [B, k] or [B, T, k]; None means all N in order.
        picks: for each row the names and weights that ``index`` and ``values`` hold, as plain values, where the mix
            knows them without looking at the input; None else.
    """

    names: tuple[str, ...]
    values: tuple[float, ...] | Tensor
    index: Tensor | None = None
    picks: tuple[tuple[tuple[str, float], ...], ...] | None = None

    @property
    def fixed(self) -> tuple[float, ...] | None:
        """The N weights as floats when they do not depend on the input."""
        return self.values if isinstance(self.values, tuple) else None

    def dense(self) -> Tensor:
        """The weights as [..., N]."""
        if isinstance(self.values, tuple):
            return torch.tensor(self.values)
        if self.index is None:
            return self.values
        full = self.values.new_zeros(*self.values.shape[:-1], len(self.names))
        return full.scatter_add(-1, self.index.to(self.values.device), self.values)


def per_row(x: Tensor, y: Tensor, rows: int, site: str) -> tuple[Tensor, Tensor, int]:
    """Lines a site's input up with the rows of the batch: returns x, y and how many leading entries belong to one row.

    A module may see a row several times (windows of an image, tokens flattened into the batch): row-major, so each row
    owns ``x.shape[0] / rows`` neighbours. A leading dimension of 1 is shared by the rows and is repeated for them.

    Raises:
        MixError: the leading dimension is not a multiple of ``rows``.
    """
    lead = x.shape[0]
    if lead == 1 and rows > 1:
        return x.expand(rows, *x.shape[1:]), y.expand(rows, *y.shape[1:]), 1
    if lead % rows:
        raise MixError(
            f"site {site!r} got a leading dimension of {lead}, which is not a multiple of the {rows} rows of the mix; "
            "give one entry per row of the batch, or leave this site out of the adapters"
        )
    return x, y, lead // rows


class Bank:
    """Several patches of one form at one site, applied together. This one loops; a form may bring a faster one.

    Args:
        patches: bound patches by adapter name.
    """

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self.patches = dict(patches)

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        """``out + sum_n w_n c_n(x, y)`` over this bank's patches.

        Args:
            x: the site's input, leading dimension B (or a multiple of it).
            y: the base's own output there.
            out: what other banks have added up so far (``y`` for the first).
            weights: over at least the names of this bank; other names are not looked at.
            call: what this forward knows.
        """
        if weights.fixed is not None:
            for name, weight in zip(weights.names, weights.fixed, strict=True):
                if name in self.patches and weight != 0.0:
                    out = self.patches[name].add(x, y, out, weight, call)
            return out
        values = weights.dense().to(y.dtype if y.is_floating_point() else torch.float32)
        grain = values.dim() - 1  # 0: the whole batch, 1: rows, 2: tokens
        if grain == 1:
            x, y, per = per_row(x, y, values.shape[0], next(iter(self.patches.values())).site.name)
            values = values.repeat_interleave(per, 0) if per > 1 else values
            out = out.expand_as(y)
        for column, name in enumerate(weights.names):
            if name in self.patches:
                out = self._one(self.patches[name], x, y, out, values[..., column], call)
        return out

    @staticmethod
    def _one(patch: Patch, x: Tensor, y: Tensor, out: Tensor, weight: Tensor, call: Call) -> Tensor:
        if weight.dim() == 1 and not weight.requires_grad:
            rows = weight.nonzero().squeeze(-1)
            if len(rows) == 0:
                return out
            if len(rows) < len(weight):  # a row that does not use this adapter costs nothing
                part = patch.contribute(x[rows], y[rows], call.take(rows, len(weight)))
                return out.index_add(0, rows, (part * _trail(weight[rows], part)).to(out.dtype))
        part = patch.contribute(x, y, call)
        return out + (part * _trail(weight, part)).to(out.dtype)

    def average(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        """As ``apply``, but the patches' parameters are averaged first and applied once (``combines = "parameters"``).

        Raises:
            MixError: the form has no meaningful average of its parameters.
        """
        form = next(iter(self.patches.values())).form
        raise MixError(f"the form {form.name!r} cannot be mixed by its parameters; use a mix that combines outputs")

    def forget(self) -> None:
        """Drops whatever was cached for the current weights."""


def _trail(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(*weight.shape, *[1] * (like.dim() - weight.dim()))


class Part(nn.Module):
    """Tensors of an adapter: those at one site (`Patch`), or those that its sites share.

    Attributes:
        keys: parameter name to its name in a file (``{"A": "lora_A.weight"}``): after the site's path for a patch, the
            whole name for what is shared.
        frozen: names of parameters that are saved and never trained.
        packs: what `stored` gives in place of the parameters, by name; empty where it gives the parameters.
    """

    keys: Mapping[str, str] = {}
    frozen: frozenset[str] = frozenset()
    packs: tuple[str, ...] = ()
    form: Any  # a form, or a router
    site: Site | None = None

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def start(self, generator: torch.Generator) -> None:
        """Sets fresh values."""

    def stored(self) -> dict[str, Tensor]:
        """What goes into a file, by name: the parameters. What packs them names its tensors in `packs`, and unpacks them
        in `load`, where one may be left out."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values of a file (by parameter name), without copying those that lie as memory of its own would.

        Raises:
            AdapterError: a tensor is missing, not asked for, or has another shape.
        """
        where = f"at {self.site.name!r}" if self.site is not None else "that its sites share"
        missing = sorted(set(self._parameters) - set(tensors))
        extra = sorted(set(tensors) - set(self._parameters))
        if missing or extra:
            raise AdapterError(
                f"the adapter's tensors {where} do not match the form {self.form.name!r}: "
                + "; ".join(f"{what} {listing(n)}" for what, n in (("missing", missing), ("unknown", extra)) if n)
            )
        for name, tensor in tensors.items():
            want = self._parameters[name]
            if want is None or tuple(want.shape) != tuple(tensor.shape):
                shape = None if want is None else tuple(want.shape)
                raise AdapterError(
                    f"{name} {where} has shape {tuple(tensor.shape)} in the file, "
                    f"but {self.form} needs {shape} there; the file is for another model or another form"
                )
            if tensor.data_ptr() % ALIGNED:  # a product of it may be rounded otherwise than before it was saved
                tensor = tensor.clone()
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def trainable(self, flag: bool = True) -> None:
        """Says which of its parameters take gradients: all but the frozen ones, or none."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(flag and name not in self.frozen)


class Patch(Part):
    """One adapter at one site.

    A patch that is attached is a *bound* copy: it shares the parameters and sees the module it acts on as ``base``, so
    an adapter can be attached to several models and attaching never changes it. Dropout follows the base's train/eval
    mode.

    Attributes:
        form: the settings it was built from.
        site: where it acts.
        base: the module it is attached to, None while it is not.
        shared: the tensors that all patches of the adapter share, where its form has such.
        tokens: m, how many virtual tokens it puts before a text, at sites of kind ``input``.
        moves: by how many positions it moves a row's tokens there without putting any before them.
        touches: whether it changes the vectors of a text's own tokens there.
        layers: how many blocks its virtual tokens are for, at the input of an image network.
    """

    bank: ClassVar[type[Bank]] = Bank
    base: nn.Module | None = None
    shared: Any = None
    tokens: int = 0
    moves: int = 0
    touches: bool = False
    layers: int = 1
    site: Site

    def __init__(self, form: Form, site: Site) -> None:
        super().__init__(form)
        self.site = site

    @property
    def acts(self) -> str:
        """How it acts at its site: as its form says, where it does not say otherwise."""
        return str(self.form.acts)

    def start(self, generator: torch.Generator) -> None:
        """Sets fresh values; ``base`` and ``shared`` are there already.

        The patch contributes exactly zero afterwards unless its form says otherwise.
        """

    def join(self, shared: Part | None) -> None:
        """Gives the patch what all patches of its adapter share."""
        self.__dict__["shared"] = shared  # past nn.Module.__setattr__: it is not the patch's own

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that what it contributes depends on: its own and the shared ones."""
        yield from self.parameters()
        if self.shared is not None:
            yield from self.shared.parameters()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        """What this adapter adds at its site: c(x, y), of the shape of ``y``."""
        raise AdapterError(f"the form {self.form.name!r} does not say what it contributes at {self.site.name!r}")

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        """``out + weight * c(x, y)``; a form may fuse the two."""
        part = self.contribute(x, y, call)
        return out + (part if weight == 1.0 else weight * part).to(out.dtype)

    def around(self, run: Callable[[Tensor], Tensor], x: Tensor, call: Call = NO_CALL) -> Tensor:
        """``y + c(x, y)`` from one run of the base, ``y = run(x)``: a patch may give it another input.

        Only asked of forms with ``acts = "around"``, where the patch acts alone with weight 1.
        """
        y = run(x)
        return self.add(x, y, y, 1.0, call)

    def delta(self) -> Tensor | None:
        """The dense change of the site's weight, in the weight's own layout; None where it is not linear in x."""
        return None

    def thin(self) -> tuple[Tensor, Tensor] | None:
        """The change as thin factors, B [o, r] and A [r, i] with ``B A`` the change of a matrix [o, i] (kernels flattened into
        i, in the layout that multiplies x from the left); None where it has none, or one for each expert."""
        return None

    def deltas(self) -> dict[str, Tensor] | None:
        """The change of each parameter of the site's module by its name; None where there is no such change."""
        delta = self.delta()
        return None if delta is None else {self.site.param or "weight": delta}

    def instead(self, name: str) -> Tensor | None:
        """What stands in place of the module's parameter ``name`` where the patch acts alone with weight 1.

        Only asked of a patch that has `deltas`; None where it holds changes, not values.
        """
        return None

    def bound(self, base: nn.Module, site: Site) -> Self:
        """A view of this patch (the same parameter objects) that acts on ``base``, the module of ``site``."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        # past nn.Module.__setattr__: the base is not a child of its adapter
        view.__dict__.update(base=base, site=site)
        return view

    def misfit(self, site: Site) -> str:
        """Why this patch cannot act at a model's ``site``, or the empty string."""
        mine = self.site
        if mine.kind != site.kind:
            return f"it was made for a site of kind {mine.kind!r}, and the model has {site.kind!r} there"
        if mine.kind in ("linear", "embedding") and len(site.shape) == 2 == len(mine.shape):
            same = (mine.d_in, mine.d_out) == (site.d_in, site.d_out)
        else:
            same = mine.shape == site.shape
        return "" if same else f"it was made for a weight of shape {mine.shape}, and the model's is {site.shape}"

    @property
    def dropping(self) -> bool:
        """Whether dropout is on: while the module this patch acts on is in training mode."""
        return self.base.training if self.base is not None else False


@dataclass(frozen=True)
class Form:
    """The settings of a kind of adapter. It builds a `Patch` for a site.

    A form is a frozen dataclass, registered with ``@forms.register("name")``. Class attributes say where it can act:

    Attributes:
        name: what the field calls it (set by the decorator).
        kinds: the kinds of site it can act at.
        default_sites: the selector used when none is given.
        acts: ``"output"`` adds to a module's output; ``"weight"`` prefers to change the weight that the module reads,
            which saves a second product; ``"around"`` prefers to choose the base's input (see `Patch.around`), which
            saves one too. All give the same function.
        peft_type: the ``peft_type`` written into files: PEFT's own where PEFT has the form.
        default_lr: the peak learning rate that suits it with AdamW.
        paper: the reference shown by ``polytask forms``.
        template: how this form writes a class's name, where a dual model reads it: ``"{}."`` for forms that learn the
            context; the task's own way when empty.
        wants: what this form's patches look at of a dual model's other side, any of ``"texts"``, ``"images"`` (a text is then
            encoded for each image) and ``"about"``; see `Other`.
        begin_rows: how many examples each batch of ``begin`` has; as many as a step's when None.
        enters: whether `enter` is to be called.
        routes: whether a router inside chooses among its parts, so that ``polytask route list`` shows it too.
        exceptions: checks of the forms' contract suite that do not hold for it, each with the reason.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    default_sites: ClassVar[str] = "linear"
    acts: ClassVar[str] = "output"
    peft_type: ClassVar[str] = ""
    in_peft: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    paper: ClassVar[str] = ""
    exceptions: ClassVar[Mapping[str, str]] = {}
    begin_rows: ClassVar[int | None] = None
    enters: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    template: ClassVar[str] = ""
    wants: ClassVar[tuple[str, ...]] = ()

    @property
    def rereads(self) -> bool:
        """As of `polytask.core.mix.Mix`."""
        return False

    def fitted(self, model: Model) -> Form:
        """This form with the settings that it reads off a base when nobody says them (widths, for instance)."""
        return self

    def patch(self, site: Site) -> Patch:
        """An empty patch for ``site``; its values come from ``start`` or ``load``."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site]) -> Part | None:
        """What the patches at ``sites`` share, empty as they are; None where each has all that it needs."""
        return None

    def made(self, model: Model, patches: Mapping[str, Patch]) -> None:
        """A start that looks at the whole model (its tokenizer): called once fresh patches have started."""

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        """A start that looks at data: called once by `polytask.learn`, on a fresh adapter that is attached and acts.

        Args:
            model: the base.
            adapter: what was started by ``Patch.start``.
            batches: each runs the forward of one batch of training examples and returns its mean loss.
        """

    def told(self, tasks: Sequence[Task]) -> Form:
        """This form with the names of the tasks that are learned, or of their classes, where it has parts for each and nobody
        said them."""
        return self

    def enter(self, adapter: Adapter, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        """Called at the start of each forward of a whole model where an adapter of this form may act; see `Mix.begin`."""

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """What is added to the loss of each step while an adapter of this form learns, a number; None for nothing."""
        return None

    def averages(self, epochs: int) -> tuple[float, ...] | None:
        """The weights of the ends of the epochs whose average is what is learned; None where the last or best state is."""
        return None

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        """Each row's loss while an adapter of this form learns, [B], from the ``values`` [B] that the objective gave.

        Forms that learn from more than the answer add to them: agreement with the base or with a teacher, for instance.
        """
        return values

    def beside(self, model: Model, adapter: Adapter) -> AbstractContextManager[None]:
        """What is there while an adapter of this form learns, such as adapters that it learns from, attached as well."""
        return nullcontext()

    def rate(self, name: str) -> float:
        """The learning rate of the parameters called ``name`` over the adapter's."""
        return 1.0

    def stepped(self, adapter: Adapter) -> None:
        """Called by `polytask.learn` after each step of the optimiser, on an adapter that learns."""

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        """What is found out about an adapter that has learned, by name: kept in its card and printed. Before `finish`."""
        return {}

    def refuses(self, site: Site) -> str:
        """Why this form cannot act at ``site``, or the empty string."""
        if site.kind in self.kinds:
            return ""
        return f"the form {self.name!r} acts at sites of kind {listing(self.kinds)}, and {site.name!r} is {site.kind!r}"

    def require(self, site: Site) -> None:
        """Raises `SiteError` where the form cannot act at ``site``."""
        reason = self.refuses(site)
        if reason:
            raise SiteError(reason)

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, for a card or a configuration."""
        return asdict(self)

    @classmethod
    def of(cls, spec: Form | str | Mapping[str, Any]) -> Form:
        """A form from a form, its name, or a mapping ``{"name": "lora", "rank": 8}``.

        Raises:
            ConfigError: an unknown form or setting, with the nearest valid name.
        """
        return spec if isinstance(spec, Form) else forms.make(spec, default="lora")

    def finish(self, adapter: Adapter) -> Adapter:
        """What learning leaves: the adapter, or one without what only helped to learn it."""
        return adapter

    # Files: how the settings are written to and read from ``adapter_config.json``. A form that PEFT has overrides it.

    tensor_names: ClassVar[dict[str, str]] = {}  # a tensor's name in a file, after the site's path, to its parameter
    shared_names: ClassVar[dict[str, str]] = {}  # the whole name of a shared tensor in PEFT's file, to its parameter

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        """The form's part of ``adapter_config.json`` for an adapter with these patches."""
        return {"settings": self.settings()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Form:
        """The form at the site ``path`` that ``adapter_config.json`` describes; the general one for an empty path."""
        return cls.of({"name": cls.name, **config.get("settings", {})})

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an ``adapter_config.json`` of PEFT's is of this form, where several have one ``peft_type``."""
        return config.get("peft_type") == cls.peft_type

    @classmethod
    def translated(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """A file of PEFT's in the form's own spelling, where PEFT has several for what is one function here."""
        return config, tensors

    def unlike_peft(self, patch: Patch) -> str:
        """Why PEFT could not apply a patch of an adapter of this form as we do, or the empty string."""
        return ""

    def pack(self, patches: Mapping[str, Patch]) -> dict[str, Tensor] | None:
        """The tensors of a file by whole name, where they do not lie there site by site."""
        return None

    @classmethod
    def unpack(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> dict[str, dict[str, Tensor]]:
        """The reverse of `pack`: tensors by site and parameter."""
        raise NotImplementedError

    @classmethod
    def packed_sites(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site] | None:
        """The sites of a packed file of PEFT's, which names none: ``*`` and a name that says what to look for."""
        return None

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensors where no card describes it. Raises `AdapterError` when the form cannot tell."""
        raise AdapterError(
            f"the file does not say what kind of site {path!r} is, and the form {cls.name!r} cannot tell"
        )


forms: Registry[Form] = Registry("form", "polytask.forms")
