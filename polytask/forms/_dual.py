"""What forms of dual models (CLIP) share: virtual tokens behind a text's first one and among an image's patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import Call, Part, Patch
from polytask.core.model import Model
from polytask.core.site import TOWERS, Site, stacks

from .prompt import Tokens, TokensPatch

CONTEXT = "a photo of a"  # the words that contexts start from in the papers


def tower(site: Site) -> str:
    """``text`` or ``image``: which tower of a dual model a site of kind ``input`` or ``linear`` belongs to, or ""."""
    path = f".{site.path}"
    if path.endswith(".visual_projection"):
        return "image"
    text, image = TOWERS
    if site.kind != "input":
        return ""
    return "text" if path.endswith(f".{text}") else "image" if path.endswith(f".{image}") else ""


@dataclass(frozen=True)
class DualTokens(Tokens):
    """What forms of virtual tokens in a dual model have in common."""

    towers: ClassVar[tuple[str, ...]] = ("text",)
    template: ClassVar[str] = "{}."
    default_lr: ClassVar[float] = 5e-3
    deep: ClassVar[Mapping[str, str]] = {
        "rows": "prompts that later blocks replace, and image networks, have no place for rows without them"
    }

    def refuses(self, site: Site) -> str:
        if site.kind in self.kinds and tower(site) in self.towers and site.shape:
            return ""
        where = " and ".join(self.towers)
        return f"the form {self.name!r} acts on the {where} tower of a dual model (CLIP), and {site.shown} is not there"

    def made(self, model: Model, patches: Mapping[str, Patch]) -> None:
        """Sets the first tokens of a text's context to the vectors of the form's words."""
        words: str = getattr(self, "text", "")
        if not words or model.tokenizer is None:
            return
        for patch in patches.values():
            if tower(patch.site) != "text":
                continue
            ids = model.tokenizer(words, add_special_tokens=False)["input_ids"][: self.length]
            network: Any = model.module.get_submodule(patch.site.path)
            table = network.get_input_embeddings()
            vectors = table(torch.tensor(ids, device=table.weight.device))
            with torch.no_grad():
                context(patch)[..., : len(ids), :].copy_(vectors)


def context(patch: Patch) -> Tensor:
    """The tokens of the first block, [m, d] or [C, m, d] of C classes, wherever a patch keeps them."""
    own: Any = patch if "P" in patch._parameters else patch.shared
    table: Tensor = own.P if patch is own else own.P_text
    return table[0] if isinstance(patch, DeepPatch) or patch is not own else table


class DeepPatch(TokensPatch):
    """P [depth, m, d]: tokens of the first block, then those that take their place in each later one."""

    def __init__(self, form: Any, site: Site, length: int, depth: int) -> None:
        super().__init__(form, site)
        self.tokens, self.layers = length * depth, depth
        self.P = nn.Parameter(torch.empty(depth, length, self.width))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.P.normal_(std=0.02, generator=generator)

    def virtual(self, call: Call) -> Tensor:
        return self.P.flatten(0, 1)


def spaced(form: Any, model: Model) -> Any:
    """A form with the width of the base's common space in its setting ``space``."""
    return form if form.space else replace(form, space=model.width)


def shallower(form: Any, model: Model) -> Any:
    """A form whose depth is at most the blocks of the shallower tower."""
    towers = [model.module._modules.get(name) for name in TOWERS]
    most = min((len(stacks(t)) for t in towers if t is not None), default=form.depth)
    return form if form.depth <= most else replace(form, depth=most)


def patched(form: Any, model: Model) -> Any:
    """A form with the image tower's width in its setting ``patches``."""
    config = getattr(getattr(model.module, "config", None), "vision_config", None)
    return form if form.patches or config is None else replace(form, patches=int(config.hidden_size))


def at_least(form: object, **settings: int) -> None:
    """Raises `ConfigError` for a setting below 1."""
    for name, value in settings.items():
        if not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{type(form).__name__}: {name} must be a whole number of at least 1, got {value!r}")


def linear_(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """PyTorch's own start of a linear layer, seeded."""
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.uniform_(-bound, bound, generator=generator)
    if bias is not None:
        bias.uniform_(-bound, bound, generator=generator)


def add_attention(part: Part, query: int, key: int, inner: int, out: int | None = None) -> None:
    """Gives a part the matrices of one head of attention.

    Args:
        part: gets Wq [inner, query], Wk and Wv [inner, key] and Wo [out, inner].
        query: width of what looks.
        key: width of what is looked at.
        inner: width that they are compared in.
        out: width of the result; the query's when None.
    """
    shapes = {
        "Wq": (inner, query),
        "Wk": (inner, key),
        "Wv": (inner, key),
        "Wo": (query if out is None else out, inner),
    }
    for name, shape in shapes.items():
        part.register_parameter(name, nn.Parameter(torch.empty(shape)))


def start_attention(part: Any, generator: torch.Generator) -> None:
    """Seeded values; the result is zero."""
    with torch.no_grad():
        for name in ("Wq", "Wk", "Wv"):
            linear_(getattr(part, name), None, generator)
        part.Wo.zero_()


def look(part: Any, query: Tensor, seen: Tensor) -> Tensor:
    """[R, out] from queries [R, q] and what each looks at, [R, n, k]."""
    q, k, v = F.linear(query, part.Wq), F.linear(seen, part.Wk), F.linear(seen, part.Wv)
    weights = torch.softmax((k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5, -1)
    return F.linear((weights.unsqueeze(-2) @ v).squeeze(-2), part.Wo)
