"""LoRA-FA: LoRA whose random factor stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from polytask.core.errors import ConfigError
from polytask.core.form import Patch, forms
from polytask.core.site import Site

from .lora import PLAIN_STARTS, LoRA, LoRAPatch


@forms.register("lora-fa")
@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA that trains only the factor that starts at zero: ``c(x) = s B (A x)`` with A frozen.

    Half the parameters and no stored input for A's gradient; A keeps its random values, so the change lives in the
    space that they span. At embeddings, where A starts at zero, B is the frozen one. The file is a LoRA's, and PEFT
    reads it as such; a file of PEFT's is read as the form ``"lora"``.

    Args:
        rank, alpha, dropout, scaling: as for `LoRA`.
        init: ``"zero-B"``, ``"gaussian"`` or ``"random"``, as for `LoRA`.

    Reference: Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, arXiv
    2308.03303. The random factor starts as in `LoRA` (Kaiming-uniform), where the paper has a normal distribution.

    Raises:
        ConfigError: a setting is out of range.
    """

    paper: ClassVar[str] = "arXiv 2308.03303"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in PLAIN_STARTS:
            raise ConfigError(f"LoRAFA: init must be one of {', '.join(PLAIN_STARTS)}, got {self.init!r}")

    def patch(self, site: Site) -> Patch:
        return LoRAFAPatch(self, site)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return False  # PEFT's files do not say which factor was trained


class LoRAFAPatch(LoRAPatch):
    """A and B as in LoRA; one of them is frozen."""

    def __init__(self, form: LoRAFA, site: Site) -> None:
        super().__init__(form, site)
        self.frozen = frozenset({"B" if site.kind == "embedding" else "A"})
