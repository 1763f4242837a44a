"""Visual prompts: learned tokens among an image's patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Patch, forms
from polytask.core.site import Site

from .prompt import Tokens, TokensPatch


@forms.register("visual-prompt")
@dataclass(frozen=True)
class VisualPrompt(Tokens):
    """Learned tokens between an image's class token and its patches (VPT), for vision transformers.

    Shallow: they enter the first block and are carried on. Deep: each of the first ``depth`` blocks gets tokens of its own,
    in the place of what the block before made of them. They have no positions, and are taken away from the outputs.

    Args:
        length: m, the tokens of a block.
        depth: how many blocks get tokens of their own; 1 is VPT-shallow, the number of blocks VPT-deep.

    Reference: Jia et al., Visual Prompt Tuning, arXiv 2203.12119; the start is uniform as there. Without the paper's
    projection from narrower tokens.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base is no image network with a class token; rows of a batch with and without tokens.
    """

    length: int = 5
    depth: int = 1

    peft_type: ClassVar[str] = "POLYTASK_VISUAL_PROMPT"
    default_lr: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2203.12119"
    exceptions: ClassVar[Mapping[str, str]] = {
        **Tokens.exceptions,
        "rows": "an image network has no mask for tokens, so rows with and without them cannot share a batch",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.depth, int) and self.depth >= 1):
            raise ConfigError(f"VisualPrompt: depth must be a whole number of at least 1, got {self.depth!r}")

    def patch(self, site: Site) -> Patch:
        return VisualPromptPatch(self, site)

    def refuses(self, site: Site) -> str:
        if site.kind == "input" and (not site.shape or site.shape[0]):
            return f"{site.shown} takes no images with a class token, so there is no place for visual prompts"
        return "" if site.kind == "input" else super().refuses(site)


class VisualPromptPatch(TokensPatch):
    """P [depth, m, d]."""

    form: VisualPrompt

    def __init__(self, form: VisualPrompt, site: Site) -> None:
        super().__init__(form, site)
        self.tokens, self.layers = form.length * form.depth, form.depth
        self.P = nn.Parameter(torch.empty(form.depth, form.length, self.width))

    def start(self, generator: torch.Generator) -> None:
        size = getattr(getattr(self.base, "config", None), "patch_size", 16)
        size = size[0] if isinstance(size, tuple | list) else size
        bound = math.sqrt(6 / (3 * size**2 + self.width))
        with torch.no_grad():
            self.P.uniform_(-bound, bound, generator=generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if y.shape[1] - x.shape[1] != self.tokens:
            return y.new_zeros(y.shape)  # another prompt of the mix is longer or deeper; the site says what that means
        own = F.pad(self.P.flatten(0, 1).to(y.dtype), (0, 1), value=1.0)
        return F.pad(own, (0, 1, 0, x.shape[1])).expand(y.shape)
