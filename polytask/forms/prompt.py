"""Prompt: learned vectors before the text, in place of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.model import Model
from polytask.core.site import Site

WHOLE = {"prompt_embeddings": "P"}  # PEFT's name of the one tensor of a prompt


@dataclass(frozen=True)
class Tokens(Form):
    """What forms of virtual tokens have in common: they act at the input, and cannot start as the base."""

    length: int = 20

    kinds: ClassVar[tuple[str, ...]] = ("input",)
    default_sites: ClassVar[str] = "kind:input"
    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-2
    exceptions: ClassVar[Mapping[str, str]] = {
        "start": "every token attends to the virtual tokens, whatever their values; the empty prompt alone is the base"
    }

    def __post_init__(self) -> None:
        if not (isinstance(self.length, int) and self.length >= 1):
            raise ConfigError(
                f"{type(self).__name__}: length must be a whole number of at least 1, got {self.length!r}"
            )

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason or (site.shape and site.shape[0]) or site.path.startswith("*"):
            return reason
        return f"site {site.name!r} takes no token ids, so there are no virtual tokens to put before them"


class TokensPatch(Patch):
    """Virtual tokens [m, d]. What they contribute has two channels more: 1 where there is a token, and 0."""

    form: Any

    def __init__(self, form: Tokens, site: Site) -> None:
        super().__init__(form, site)
        self.tokens = form.length

    @property
    def width(self) -> int:
        """d."""
        return self.site.shape[1]

    def virtual(self, call: Call) -> Tensor:
        """The tokens: [m, d], or [B, m, d] where they differ between the rows."""
        raise NotImplementedError

    def table(self) -> Any:
        """The base's table of token vectors, called with ids."""
        return self.base.get_input_embeddings()  # type: ignore[union-attr,operator]

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        own = F.pad(self.virtual(call).to(y.dtype), (0, 1), value=1.0)
        # shorter than the longest of the batch: what is missing stays 0 and is not looked at
        m = y.shape[1] - x.shape[1]
        return F.pad(own, (0, 1, m - self.tokens, x.shape[1])).expand(y.shape)


@forms.register("prompt")
@dataclass(frozen=True)
class Prompt(Tokens):
    """Learned vectors before the text's own: ``[P; E(text)]``. Nothing else of the network changes.

    The mix weights the vectors themselves, so two prompts at one half are their mean; rows of a batch may have prompts of
    other lengths, or none. Positions are counted through a row's own prompt. Encoder-decoders have it before the encoder,
    and the decoder looks at it too; everywhere else the outputs at its positions are taken away again.

    Args:
        length: m, the number of virtual tokens.
        init: ``"random"`` (normal with deviation ``std``), ``"vocabulary"`` (vectors of tokens drawn at random), ``"text"``
            (those of ``text``, repeated or cut to the length), ``"labels"`` (those of the names in ``text``, separated by
            commas, one token each: the mean over a name's tokens) or ``"bayes"`` (when learning begins: particles drawn from
            a mixture of Gaussians over the mean word vectors of the training examples; see below).
        text: for ``"text"`` and ``"labels"``.
        std: of ``"random"``; the deviation of the base's own table when None. PEFT's default is 1 there.
        components: Gaussians of ``"bayes"``; as many as the tasks have labels, up to 16, or 8, when None.

    Reference: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691. ``"bayes"`` is after
    Li et al., BayesPrompt: Prompting Large-Scale Pre-Trained Language Models on Few-shot Inference via Debiased Domain
    Abstraction, arXiv 2401.14166, whose code averages particles drawn anew at every step, overwrites two marker tokens with
    them (also in a test, so that predictions are random) and trains the whole model; here each virtual token starts as one
    particle and is then learned, and the base is frozen.

    Raises:
        ConfigError: a setting is out of range, or the text is missing.
        SiteError: the base takes no token ids.
    """

    init: Literal["random", "vocabulary", "text", "labels", "bayes"] = "vocabulary"
    text: str = ""
    std: float | None = None
    components: int | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2104.08691"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("random", "vocabulary", "text", "labels", "bayes")
        if self.init not in allowed:
            raise ConfigError(f"Prompt: init must be one of {', '.join(allowed)}, got {self.init!r}")
        if self.init in ("text", "labels") and not self.text:
            raise ConfigError(f"Prompt: init={self.init!r} needs text, the words to start from")
        if self.components is not None and not (isinstance(self.components, int) and self.components >= 1):
            raise ConfigError(f"Prompt: components must be a whole number of at least 1, got {self.components!r}")

    def patch(self, site: Site) -> Patch:
        return PromptPatch(self, site)

    def begin_text(self, model: Model, patch: Patch) -> None:
        """Sets a prompt to the vectors of the form's words."""
        assert isinstance(patch, PromptPatch)
        network = model.module.get_submodule(patch.site.path) if patch.site.path != "*input" else model.module
        tokenizer, table = model.tokenizer, network.get_input_embeddings()  # type: ignore[operator]
        if tokenizer is None:
            raise ConfigError(f"Prompt: init={self.init!r} needs a model with a tokenizer; use init='vocabulary'")

        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=table.weight.device)

        if self.init == "text":
            vectors = table(ids(self.text))
        else:
            vectors = torch.stack([table(ids(name.strip())).mean(0) for name in self.text.split(",")])
        times = -(-self.length // len(vectors))
        with torch.no_grad():
            patch.P.copy_(vectors.repeat(times, 1)[: self.length])

    def made(self, model: Model, patches: Mapping[str, Patch]) -> None:
        if self.init in ("text", "labels"):
            for patch in patches.values():
                self.begin_text(model, patch)

    def begin(self, model: Model, adapter: Adapter, batches: Sequence[Callable[[], Tensor]]) -> None:
        if self.init != "bayes":
            return
        from . import bayes

        labels = sum(len(getattr(head, "labels", ())) for head in adapter.heads.values())
        for patch in adapter.patches.values():
            if isinstance(patch, PromptPatch):
                reader: Any = model.module.get_submodule(adapter.fit(patch, model).path)
                seen = bayes.features(model, reader.get_input_embeddings(), batches)
                vectors = bayes.drawn(
                    seen, self.length, self.components or min(labels, 16) or 8, bayes.seed_of(patch.P)
                )
                with torch.no_grad():
                    patch.P.copy_(vectors)

    def pack(self, patches: Mapping[str, Patch]) -> dict[str, Tensor]:
        return {"prompt_embeddings": next(iter(patches.values())).P.detach()}  # type: ignore[union-attr,operator]

    @classmethod
    def unpack(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> dict[str, dict[str, Tensor]]:
        return {sites[0].name: {"P": tensors["prompt_embeddings"]}}

    @classmethod
    def packed_sites(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site]:
        if int(config.get("num_transformer_submodules") or 1) > 1:
            raise ConfigError("this PEFT prompt is for encoder and decoder (num_transformer_submodules=2); one is read")
        return [Site("*input", "input", "input", (0, tensors["prompt_embeddings"].shape[1]))]

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        width = next(iter(patches.values())).site.shape[1]
        return {
            "num_virtual_tokens": self.length, "token_dim": width, "num_transformer_submodules": 1,
            "num_attention_heads": 1, "num_layers": 1, "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> Prompt:
        return cls(length=int(config["num_virtual_tokens"]))

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Trained P-tuning is a prompt: PEFT stores the vectors that its encoder gave."""
        return config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING")


class PromptPatch(TokensPatch):
    """P [m, d]."""

    def __init__(self, form: Prompt, site: Site) -> None:
        super().__init__(form, site)
        self.P = nn.Parameter(torch.empty(form.length, self.width))

    def start(self, generator: torch.Generator) -> None:
        table = self.table()
        device = table.weight.device
        with torch.no_grad():
            if self.form.init == "random" and self.form.std is not None:
                self.P.normal_(std=self.form.std, generator=generator)
            elif self.form.init == "random":
                some = torch.arange(0, table.num_embeddings, max(1, table.num_embeddings // 512), device=device)
                self.P.normal_(std=float(table(some).float().std()), generator=generator)
            else:  # words are looked up once the tokenizer is there, examples when learning begins
                ids = torch.randint(table.num_embeddings, (self.tokens,), generator=generator)
                self.P.copy_(table(ids.to(device)))

    def virtual(self, call: Call) -> Tensor:
        return self.P

    def misfit(self, site: Site) -> str:
        mine, other = self.width, site.shape[1] if site.shape else 0
        return "" if mine == other else f"its virtual tokens have {mine} features, and the model's tokens {other}"


def as_prompt(adapter: Adapter, tokens: Tensor) -> Adapter:
    """A plain prompt with these vectors and everything else of another adapter."""
    form = Prompt(length=len(tokens))
    site = next(iter(adapter.patches.values())).site
    patch = form.patch(site)
    patch.load({"P": tokens.detach().clone()})
    return Adapter(form, {site.name: patch}, adapter.heads, replace(adapter.card), adapter.name, adapter.targets)


@forms.register("p-tuning")
@dataclass(frozen=True)
class PTuning(Tokens):
    """A prompt whose vectors are the output of a small network: ``P = head(E)``. Learning ends with a plain prompt.

    Args:
        length: m, the number of virtual tokens.
        hidden: width of the network's two hidden layers; the base's own when None.
        encoder: ``"mlp"`` (linear, ReLU, linear, ReLU, linear) or ``"lstm"`` (two bidirectional layers, linear, ReLU,
            linear).

    Reference: Liu et al., GPT Understands, Too, arXiv 2103.10385. There prompts stand inside a template; here, as in
    PEFT, before the text.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base takes no token ids.
    """

    hidden: int | None = None
    encoder: Literal["mlp", "lstm"] = "mlp"

    peft_type: ClassVar[str] = "POLYTASK_P_TUNING"
    default_lr: ClassVar[float] = 1e-3
    paper: ClassVar[str] = "arXiv 2103.10385"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("mlp", "lstm"):
            raise ConfigError(f"PTuning: encoder must be mlp or lstm, got {self.encoder!r}")

    def patch(self, site: Site) -> Patch:
        return PTuningPatch(self, site)

    def finish(self, adapter: Adapter) -> Adapter:
        patch = next(iter(adapter.patches.values()))
        assert isinstance(patch, PTuningPatch)
        with torch.no_grad():
            return as_prompt(adapter, patch.virtual(NO_CALL))


class PTuningPatch(TokensPatch):
    """E [m, d] and the network's weights."""

    def __init__(self, form: PTuning, site: Site) -> None:
        super().__init__(form, site)
        d, h = self.width, form.hidden or self.width
        self.E = nn.Parameter(torch.empty(form.length, d))
        self._lstm: list[nn.LSTM] = []
        self._sizes = [(d, h), (h, h), (h, d)]
        if form.encoder == "lstm":
            self._sizes = [(2 * h, 2 * h), (2 * h, d)]
            self._gates = {}
            for layer in range(2):
                for end in ("", "_reverse"):
                    sizes = {"ih": (4 * h, d if layer == 0 else 2 * h), "hh": (4 * h, h)}
                    for part, size in sizes.items():
                        self.register_parameter(f"w_{part}{layer}{end}", nn.Parameter(torch.empty(size)))
                        self.register_parameter(f"b_{part}{layer}{end}", nn.Parameter(torch.empty(size[0])))
        for i, (a, b) in enumerate(self._sizes):
            self.register_parameter(f"W{i}", nn.Parameter(torch.empty(b, a)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.empty(b)))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.E.normal_(generator=generator)
            h = self.form.hidden or self.width
            for name, parameter in self._parameters.items():
                if parameter is not None and name != "E":
                    fan = h if name[1] == "_" else self._sizes[int(name[1])][0]
                    parameter.uniform_(-(fan**-0.5), fan**-0.5, generator=generator)

    def virtual(self, call: Call) -> Tensor:
        x: Tensor = self.E
        p: dict[str, Any] = self._parameters
        if self.form.encoder == "lstm":
            flat = [p[f"{kind}_{part}{layer}{end}"] for layer in range(2) for end in ("", "_reverse")
                    for kind in ("w", "b") for part in ("ih", "hh")]  # fmt: skip
            zero = x.new_zeros(4, 1, self.form.hidden or self.width)
            x = torch.lstm(x[None], (zero, zero), flat, True, 2, 0.0, False, True, True)[0][0]
        for i in range(len(self._sizes)):
            x = F.linear(F.relu(x) if i else x, p[f"W{i}"], p[f"b{i}"])
        return x
