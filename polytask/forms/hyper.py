"""A hypernetwork that all sites share writes the low-rank patch of each, from an embedding of the site and of the task.

Shapes: i = d_in, o = d_out, r rank, e embedding, h hidden, C template width, k = ceil(width of the site / C) templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError, MixError, listing, nearest
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms, per_row
from polytask.core.site import Site

from . import _retriever
from .lora import LoRA, LoRAPatch

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.head import Seen
    from polytask.core.model import Model
    from polytask.core.task import Task


@forms.register("hyper")
@dataclass(frozen=True)
class Hyper(Form):
    """LoRA whose factors are written by one shared network: ``c(x) = s B(z, l) (A(z, l) x)``, ``s = alpha / rank``.

    z is the task's prototype and l the site's embeddings. The network writes templates of ``width`` columns from
    ``LN(W2 relu(W1 [z; l]))``; a site of k times that width has k embeddings, so k templates, which its k x k kernel
    combines into the columns of A (and rows of B). B's part of the network is zero at the start, so it starts as the base.

    Args:
        rank: r, the inner size of both factors.
        alpha: the scale's numerator; twice the rank when None.
        tasks: names of tasks with a prototype each. A row's task chooses its prototype; where the call has no task, their
            mean is used. Without names there is one prototype for all.
        width: C, the columns of a template.
        embedding: e, the size of prototypes and embeddings.
        hidden: h, the size of the network's hidden layer.
        retriever: the size of the hidden layer of a network that turns the bare base's vector of an input into r [e], near
            the prototype of its task; 0 for none. While it learns, the base runs once more without the adapter, and
            ``contrast`` times two losses over ``cos / temperature`` are added: InfoNCE among the inputs of a batch by task,
            and of each input with its prototype. `Hyper.retrieve` and `Hyper.extend` use it.
        features: d of that vector; read off the base when 0.
        contrast: the weight of these losses.
        temperature: what the cosines are divided by.
        exclude: leave an input's own prototype out of the sum that it is compared with, so that the loss has no lower bound
            but that of the cosines.

    Reference: Liu et al., Polyhistor, arXiv 2210.03265 (low-rank generated matrices, templates and kernels per layer), and
    Zhao et al., Prototype-based HyperAdapter, arXiv 2310.11670 (prototypes). Here LoRA's factors are generated in place of
    bottleneck adapters, and kernels start as the identity. The retriever sees the bare base's vectors, so that it can tell the
    task before an adapter acts; ``exclude`` is the authors' code.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    tasks: tuple[str, ...] = ()
    width: int = 256
    embedding: int = 32
    hidden: int = 64
    retriever: int = 0
    features: int = 0
    contrast: float = 0.1
    temperature: float = 0.1
    exclude: bool = True

    peft_type: ClassVar[str] = "POLYTASK_HYPER"
    default_lr: ClassVar[float] = 3e-4
    paper: ClassVar[str] = "arXiv 2210.03265, 2310.11670"
    tensor_names: ClassVar[dict[str, str]] = {
        "hyper.inputs": "inputs", "hyper.outputs": "outputs", "hyper.kernel_in": "kernel_in",
        "hyper.kernel_out": "kernel_out",
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("rank", "width", "embedding", "hidden"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"Hyper: {name} must be a whole number of at least 1, got {value!r}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"Hyper: each of tasks must have a name of its own, got {listing(self.tasks)}")
        if not (isinstance(self.retriever, int) and self.retriever >= 0) or (self.retriever and len(self.tasks) < 2):
            raise ConfigError(
                f"Hyper: retriever must be a whole number, and needs at least two tasks to tell apart; got {self.retriever!r} "
                f"and the tasks {listing(self.tasks) or 'none'}"
            )
        if self.contrast < 0 or not self.temperature > 0:
            raise ConfigError(
                "Hyper: contrast must not be negative and temperature positive, got "
                f"{self.contrast!r} and {self.temperature!r}"
            )

    @property
    def scale(self) -> float:
        """s, the number that the product is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def patch(self, site: Site) -> Patch:
        return HyperPatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return HyperNetwork(self)

    def fitted(self, model: Model) -> Hyper:
        return replace(self, features=model.width) if self.retriever and not self.features else self

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        own: Any = seen.adapter.shared
        if self.retriever and self.contrast and seen.task in self.tasks and torch.is_grad_enabled():
            vectors = _retriever.described(seen.model, seen.batch)
            first = [sum(row.count for row in seen.rows[:i]) for i in range(len(seen.rows))]  # of a row's sequences
            own.waiting.append((seen.task, own.retrieve(vectors[first])))
        return values

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """The two losses over the inputs of the last step's batch."""
        own: Any = adapter.shared
        if not own.waiting:
            return None
        r = torch.cat([vectors for _, vectors in own.waiting])
        places = [self.tasks.index(task) for task, vectors in own.waiting for _ in vectors]
        own.waiting.clear()
        task = torch.tensor(places, device=r.device)
        near = _retriever.prototypes(r, own.prototypes, task, self.temperature, self.exclude)
        return self.contrast * (_retriever.instances(r, task, self.temperature) + near)

    @staticmethod
    def retrieve(model: Model, adapter: Adapter, batch: Mapping[str, Tensor]) -> list[str]:
        """The task of each row of a batch whose tasks nobody told: that of the nearest prototype.

        Example: ``model.using("a", tasks=pt.Hyper.retrieve(model, adapter, batch))``.

        Args:
            model: the base.
            adapter: of this form, with a retriever.
            batch: the tensors that the base takes.

        Raises:
            AdapterError: the adapter has no retriever.
        """
        form = Hyper._with_retriever(adapter)
        own: Any = adapter.shared
        with torch.no_grad():
            near = own.cosines(_retriever.described(model, batch)).argmax(1)
        return [form.tasks[i] for i in near.tolist()]

    @staticmethod
    def extend(model: Model, adapter: Adapter, task: Task, examples: int = 32) -> tuple[Adapter, str]:
        """The adapter with one task more, which starts from the prototype that its examples are nearest to.

        Args:
            model: the base.
            adapter: of this form, with a retriever.
            task: the new one; give the result to `polytask.learn` as ``start``.
            examples: how many of its training examples are looked at.

        Returns:
            The adapter, and the task whose prototype was taken.

        Raises:
            AdapterError: the adapter has no retriever, or has the task already.
        """
        from polytask.core.adapter import Adapter
        from polytask.core.head import collate, head_for

        form = Hyper._with_retriever(adapter)
        if task.name in form.tasks:
            raise AdapterError(f"the adapter {adapter.name!r} has a prototype of the task {task.name!r} already")
        old: Any = adapter.shared
        head = head_for(model, task)
        rows = head.rows(model, task.train[:examples])
        with torch.no_grad():
            vectors = _retriever.described(model, collate(model, head, rows))
            near = int(old.cosines(vectors).mean(0).argmax())
        grown = replace(form, tasks=(*form.tasks, task.name))
        shared = HyperNetwork(grown)
        tensors = {name: value.clone() for name, value in old.stored().items()}
        tensors["prototypes"] = torch.cat([old.prototypes.detach(), old.prototypes.detach()[near, None]])
        shared.load(tensors)
        patches: dict[str, Patch] = {}
        for name, patch in adapter.patches.items():
            patches[name] = grown.patch(patch.site)
            patches[name].load({n: value.clone() for n, value in patch.stored().items()})
        kept = adapter.copy()
        made = Adapter(grown, patches, kept.heads, kept.card, adapter.name, adapter.short_targets, shared)
        made.card.parents = [adapter.hash]
        return made, form.tasks[near]

    @staticmethod
    def _with_retriever(adapter: Adapter) -> Hyper:
        form = adapter.form
        if not isinstance(form, Hyper) or not form.retriever:
            raise AdapterError(
                f"the adapter {adapter.name!r} ({form}) has no retriever; learn 'hyper' with retriever=128"
            )
        return form

    @staticmethod
    def materialise(adapter: Adapter, task: str | None = None) -> Adapter:
        """The LoRA adapter that a hypernetwork writes for a task: the same function, without the network.

        Args:
            adapter: of this form.
            task: one of the form's tasks; None is the mean of their prototypes.

        Raises:
            AdapterError: the adapter is of another form.
            MixError: the form has no such task.
        """
        from polytask.core.adapter import Adapter

        form = adapter.form
        if not isinstance(form, Hyper):
            raise AdapterError(f"the adapter {adapter.name!r} is of the form {form.name!r}; this needs one of 'hyper'")
        target = LoRA(rank=form.rank, alpha=form.scale * form.rank)
        patches: dict[str, Patch] = {}
        for name, patch in adapter.patches.items():
            if isinstance(patch, HyperPatch):
                with torch.no_grad():
                    A, B = patch.factors(task)
                patches[name] = LoRAPatch(target, patch.site)
                patches[name].load({"A": A.contiguous(), "B": B.contiguous()})
        made = Adapter(target, patches, adapter.copy().heads, adapter.copy().card, adapter.name, adapter.short_targets)
        made.card.parents = [adapter.hash]
        return made


class HyperNetwork(Part):
    """Prototypes and the network that writes templates."""

    form: Hyper

    def __init__(self, form: Hyper) -> None:
        super().__init__(form)
        e, h, block = form.embedding, form.hidden, form.rank * form.width
        for name, shape in (
            ("prototypes", (max(1, len(form.tasks)), e)),
            ("first", (h, 2 * e)), ("first_bias", (h,)), ("second", (e, h)), ("second_bias", (e,)),
            ("down", (block, e)), ("down_bias", (block,)), ("up", (block, e)), ("up_bias", (block,)),
        ):  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.waiting: list[tuple[str, Tensor]] = []  # r of the batch that is being learned from, by task
        if form.retriever:
            shapes = {"see": (form.retriever, form.features), "see_bias": (form.retriever,),
                      "tell": (e, form.retriever), "tell_bias": (e,)}  # fmt: skip
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def retrieve(self, vectors: Tensor) -> Tensor:
        """r [n, e] of the base's vectors [n, d]."""
        own: Any = self._parameters
        hidden = F.linear(vectors.to(own["see"].dtype), own["see"], own["see_bias"]).relu()
        return F.linear(hidden, own["tell"], own["tell_bias"])

    def cosines(self, vectors: Tensor) -> Tensor:
        """With each prototype, [n, T]."""
        return F.normalize(self.retrieve(vectors), dim=1) @ F.normalize(self.prototypes, dim=1).T  # type: ignore[arg-type,union-attr]

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                assert parameter is not None
                if name.endswith("bias") or name == "up":
                    parameter.zero_()
                elif name == "prototypes":
                    parameter.normal_(generator=generator)
                else:
                    parameter.normal_(std=max(1, parameter.shape[1]) ** -0.5, generator=generator)
            self.down *= (3 * self.form.width) ** -0.5  # type: ignore[operator]  # A as large as LoRA's

    def prototype(self, task: str | None) -> Tensor:
        """Of a task by its name; their mean for None."""
        if task is None or not self.form.tasks:
            return self.prototypes.mean(0)  # type: ignore[operator]
        if task not in self.form.tasks:
            raise MixError(
                f"the hypernetwork has no prototype of the task {task!r}{nearest(task, self.form.tasks)}; it has: "
                f"{listing(self.form.tasks)}"
            )
        return self.prototypes[self.form.tasks.index(task)]  # type: ignore[index]

    def write(self, embeddings: Tensor, task: str | None, kernel: Tensor | None, which: str) -> Tensor:
        """A factor [r, k*C] of a site with ``embeddings`` [k, e]."""
        form, own = self.form, self._parameters
        z = self.prototype(task).expand(len(embeddings), -1)
        h = F.linear(torch.cat([z, embeddings], 1), own["first"], own["first_bias"]).relu()  # [k, h]
        code = F.layer_norm(F.linear(h, own["second"], own["second_bias"]), (form.embedding,))  # [k, e]
        templates = F.linear(code, own[which], own[f"{which}_bias"])  # [k, r*C]
        if kernel is not None:
            templates = kernel @ templates
        return templates.view(-1, form.rank, form.width).transpose(0, 1).flatten(1)  # [r, k*C]


class HyperPatch(Patch):
    """A site's embeddings and kernels; the factors are written by ``shared``."""

    keys = {n: f"hyper.{n}" for n in ("inputs", "outputs", "kernel_in", "kernel_out")}
    form: Any

    def __init__(self, form: Hyper, site: Site) -> None:
        super().__init__(form, site)
        for size, name, kernel in ((site.d_in, "inputs", "kernel_in"), (site.d_out, "outputs", "kernel_out")):
            k = -(-size // form.width)
            self.register_parameter(name, nn.Parameter(torch.empty(k, form.embedding)))
            if k > 1:
                self.register_parameter(kernel, nn.Parameter(torch.empty(k, k)))
        self._kept: tuple[Any, ...] | None = None

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                assert parameter is not None
                if name.startswith("kernel"):
                    nn.init.eye_(parameter)
                else:
                    parameter.normal_(generator=generator)

    def factors(self, task: str | None = None) -> tuple[Tensor, Tensor]:
        """A [r, i] and B [o, r] for a task; without gradients they are kept until a parameter changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._write(task)
        tensors = [*self._parameters.values(), *self.shared._parameters.values()]
        state = (
            task,
            torch.is_inference_mode_enabled(),
            *[(id(t), t._version) for t in tensors if not t.is_inference()],
        )  # type: ignore[union-attr]
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._write(task), tensors)  # holding them keeps their ids theirs
        return self._kept[1]

    def _write(self, task: str | None) -> tuple[Tensor, Tensor]:
        own, site = self._parameters, self.site
        A = self.shared.write(own["inputs"], task, own.get("kernel_in"), "down")[:, : site.d_in]
        B = self.shared.write(own["outputs"], task, own.get("kernel_out"), "up")[:, : site.d_out]
        return A, B.T

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        tasks = call.tasks if self.form.tasks else None
        if tasks is None or len(set(tasks)) == 1:
            A, B = self.factors(None if tasks is None else tasks[0])
            return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * self.form.scale
        x, y, per = per_row(x, y, len(tasks), self.site.name)
        names = list(dict.fromkeys(tasks))
        written = [self.factors(name) for name in names]
        of = torch.tensor([names.index(task) for task in tasks], device=x.device).repeat_interleave(per)
        A, B = (torch.stack(factors).to(x.dtype)[of] for factors in zip(*written, strict=True))  # [B, r, i], [B, o, r]
        rows = x.reshape(len(x), -1, x.shape[-1])  # [B, T, i]
        done = torch.bmm(torch.bmm(rows, A.transpose(1, 2)), B.transpose(1, 2)) * self.form.scale
        return done.view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        A, B = self.factors()
        product = (B @ A) * self.form.scale
        return product.T if self.site.transposed else product
