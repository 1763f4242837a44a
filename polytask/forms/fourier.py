"""FourierFT: a change of a weight by a few entries of its spectrum.

Shapes: o = d_out, i = d_in, n entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Form, Patch, forms
from polytask.core.peft_files import check_peft
from polytask.core.site import Site

from ._shapes import MatrixPatch


@forms.register("fourier")
@dataclass(frozen=True)
class Fourier(Form):
    """A dense change from n numbers: ``dW = scaling * Re(ifft2(S))``, S zero but for n trained entries at random places.

    The places [o, i] follow from a seed and the shape, and are not stored. Starts at zero by default; the change is
    dense, so it is added to the weight where all rows of a batch have the same adapters.

    Args:
        entries: n; all o * i where there are fewer.
        scaling: the multiplier; the transform itself divides by o * i.
        seed: of the places. Sites of equal shape have the same ones.
        init: ``"zero"``, or ``"normal"`` as in the paper, which does not start as the base.

    Reference: Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003. The places
    are drawn as in PEFT; ours starts at zero unless asked otherwise.

    Raises:
        ConfigError: a setting is out of range.
    """

    entries: int = 1000
    scaling: float = 150.0
    seed: int = 777
    init: Literal["zero", "normal"] = "zero"

    acts: ClassVar[str] = "weight"
    peft_type: ClassVar[str] = "FOURIERFT"
    in_peft: ClassVar[bool] = True
    default_lr: ClassVar[float] = 5e-2
    paper: ClassVar[str] = "arXiv 2405.03003"
    tensor_names: ClassVar[dict[str, str]] = {"fourierft_spectrum": "spectrum"}

    def __post_init__(self) -> None:
        if not (isinstance(self.entries, int) and self.entries >= 1):
            raise ConfigError(f"Fourier: entries must be a whole number of at least 1, got {self.entries!r}")
        if self.init not in ("zero", "normal"):
            raise ConfigError(f"Fourier: init must be one of zero, normal, got {self.init!r}")

    def patch(self, site: Site) -> Patch:
        return FourierPatch(self, site)

    def unlike_peft(self, patch: Patch) -> str:
        mine, other = (self.scaling, self.seed), (patch.form.scaling, patch.form.seed)
        return "" if mine == other else "settings that differ from site to site"

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        counts = {path: len(p.spectrum) for path, p in patches.items() if isinstance(p, FourierPatch)}
        other = {path: n for path, n in counts.items() if n != self.entries}
        for path in other:  # PEFT takes a pattern for the end of a longer path, and has no way to say that it is not
            clash = next((p for p, n in counts.items() if p.endswith(f".{path}") and n != counts[path]), None)
            if clash:
                raise AdapterError(
                    f"PEFT's file cannot say that {path!r} has {counts[path]} entries and {clash!r} {counts[clash]}; "
                    "use the same number for both, or leave one out"
                )
        return {
            "n_frequency": self.entries, "scaling": self.scaling, "random_loc_seed": self.seed, "bias": "none",
            "n_frequency_pattern": other, "fan_in_fan_out": any(p.site.transposed for p in patches.values()),
            "init_weights": self.init == "zero", "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Fourier:
        if not path:
            check_peft(config, cls.name, ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"), {})
        if config.get("random_loc_seed", 777) is None:
            raise AdapterError("this PEFT adapter has no random_loc_seed, so nobody knows where its entries lie")
        return cls(
            entries=int(config.get("n_frequency", 1000)),
            scaling=float(config.get("scaling", 150.0)),
            seed=int(config.get("random_loc_seed", 777)),
            init="zero" if config.get("init_weights") else "normal",
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The file tells neither size of the weight: [0, n] stands for one of any shape with n entries."""
        turned = bool(config.get("fan_in_fan_out"))
        return Site(path, "linear", "other", (0, len(tensors["spectrum"])), transposed=turned)


class FourierPatch(MatrixPatch):
    """The n trained entries of the spectrum."""

    keys = {"spectrum": "fourierft_spectrum"}
    form: Fourier

    def __init__(self, form: Fourier, site: Site) -> None:
        super().__init__(form, site)
        count = site.shape[1] if not site.shape[0] else min(form.entries, site.d_in * site.d_out)
        self.spectrum = nn.Parameter(torch.empty(count))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            if self.form.init == "zero":
                self.spectrum.zero_()
            else:
                self.spectrum.normal_(generator=generator)

    def misfit(self, site: Site) -> str:
        if self.site.shape[0] or site.kind != "linear" or len(site.shape) != 2:
            return super().misfit(site)
        room = site.d_in * site.d_out
        return "" if len(self.spectrum) <= room else f"it has {len(self.spectrum)} entries, and the weight has {room}"

    def bound(self, base: nn.Module, site: Site) -> Self:
        view = super().bound(base, site)
        view.__dict__.pop("_places", None)
        return view

    def matrix(self) -> Tensor:
        o, i = self.site.d_out, self.site.d_in
        values = self.spectrum.float() * (self.form.scaling / 2)
        place, source = self._half()
        # Re(ifft2(S)) is the transform of S made symmetric, of which the half with i // 2 + 1 columns says everything
        half = values.new_zeros(o * (i // 2 + 1)).index_add(0, place, values[source])
        return torch.fft.irfft2(half.view(o, -1).to(torch.complex64), s=(o, i)).to(self.spectrum.dtype)

    def _half(self) -> tuple[Tensor, Tensor]:
        """Where in the half spectrum the entries and their mirror images lie, and which entry each is."""
        key = self.spectrum.device
        kept = self.__dict__.get("_places")
        if kept is None or kept[0] != key:
            o, i = self.site.d_out, self.site.d_in
            generator = torch.Generator().manual_seed(self.form.seed)
            flat = torch.randperm(o * i, generator=generator)[: len(self.spectrum)]
            row, column = flat // i, flat % i
            rows, columns = torch.cat([row, -row % o]), torch.cat([column, -column % i])
            source = torch.arange(len(flat)).repeat(2)
            inside = columns <= i // 2
            place = (rows * (i // 2 + 1) + columns)[inside]
            kept = self.__dict__["_places"] = (key, (place.to(key), source[inside].to(key)))
        return kept[1]
