"""The base: a pretrained network with its tokenizer or processor, its sites, and what is attached to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from . import attach as _attach
from .attach import HUB, SLOTS, Slot
from .errors import AdapterError, ModelError, SiteError, listing, nearest
from .form import Call
from .hub import Hub, calling
from .mix import Mix, MixLike
from .select import Selector, select
from .site import Site, find_sites

if TYPE_CHECKING:
    from .adapter import Adapter
    from .form import Patch

ModelKind = Literal["encoder", "causal", "seq2seq", "image", "audio", "dual"]


class Model:
    """A pretrained network that adapters are attached to. The network itself stays as it is: `module`.

    What is *present* (``attach``), what *acts* (``using``) and what is *trainable* (the stage that learns) are three
    separate facts: an attached adapter acts only inside ``with model.using(...)`` or after ``model.use(...)``.

    Args:
        module: any ``nn.Module``.
        processor: its tokenizer or image processor, where it has one.
        kind: ``encoder``, ``causal``, ``seq2seq``, ``image``, ``audio`` or ``dual``; guessed when None.
        name: what it is called in cards: a hub name, a path or an alias.
        source: what other libraries call it, where that differs (the hub name behind an alias).
        pooling: how one vector is made of an encoder's output: ``mean``, ``cls``, ``last``, or ``none`` when the module
            returns vectors; guessed when None.
        read_weights: a selector of linear, conv or embedding sites whose module is never called because another module
            reads its weight; adapters act on the weight there.

    Raises:
        ModelError: the module already belongs to another model with something attached.
    """

    def __init__(
        self,
        module: nn.Module,
        processor: Any = None,
        *,
        kind: ModelKind | None = None,
        name: str = "",
        source: str = "",
        pooling: str | None = None,
        read_weights: Selector | None = None,
    ) -> None:
        self.module = module
        self.processor = processor
        self.kind: str = kind or guess_kind(module)
        self.name = name or str(getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__)
        self.source = source or self.name
        self.pooling = pooling or guess_pooling(module, self.kind)
        self._hub: Hub = module.__dict__.get(HUB) or Hub()
        self._sites: list[Site] | None = None
        self._by_name: dict[str, Site] = {}
        self._read_weights = read_weights
        self._fingerprint: tuple[int, str] | None = None

    @classmethod
    def load(cls, name: str, **options: Any) -> Self:
        """A model by alias (``minilm``), hub name, or folder. See `polytask.core.load.load_model` for the options."""
        from .load import load_model

        return load_model(cls, name, **options)

    # What there is

    @property
    def sites(self) -> list[Site]:
        """Every place where an adapter can act, in the order of the modules."""
        if self._sites is None:
            found = find_sites(self.module)
            if self._read_weights is not None:
                chosen = {site.name for site in select(found, self._read_weights)}
                found = [_as_read(site) if site.name in chosen else site for site in found]
            self._sites = found
            self._by_name = {site.name: site for site in found}
        return self._sites

    def site(self, name: str) -> Site:
        """The site called ``name``. Raises `SiteError` with the nearest one."""
        self.sites  # noqa: B018  fills the index
        if name not in self._by_name:
            raise SiteError(
                f"this model has no site {name!r}{nearest(name, self._by_name)}; `polytask sites` lists them"
            )
        return self._by_name[name]

    def select(self, selector: Selector) -> list[Site]:
        """The sites that a selector picks; see `polytask.core.select`."""
        return select(self.sites, selector)

    @property
    def fingerprint(self) -> str:
        """A short hash of the backbone's weights: names, shapes and a sample of the values.

        It is the same in fp32 and bf16, with and without a language-model head, and does not see attached adapters.
        """
        backbone = getattr(self.module, "base_model", self.module)
        parameters = [(n, p) for n, p in backbone.named_parameters() if "pooler." not in n]
        state = hash(tuple((p.data_ptr(), p._version) for _, p in parameters))
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, weights_hash(parameters))
        return self._fingerprint[1]

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def width(self) -> int:
        """The size of the vectors that ``features`` gives."""
        config = getattr(self.module, "config", None)
        if self.kind == "dual" and isinstance(getattr(config, "projection_dim", None), int):
            return int(config.projection_dim)  # type: ignore[union-attr]
        for key in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(getattr(config, key, None), int):
                return int(getattr(config, key))
        sizes = getattr(config, "hidden_sizes", None)
        if sizes:
            return int(sizes[-1])
        raise ModelError(f"the width of {self.name!r} is not known; give Model.width or use a transformers model")

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, where it has one beside something for images; else the processor itself."""
        return getattr(self.processor, "tokenizer", None) or self.processor

    # Attaching

    @property
    def attached(self) -> tuple[str, ...]:
        """The names of the adapters that are present."""
        return tuple(self._hub.adapters)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters that are present, by name."""
        return dict(self._hub.adapters)

    @property
    def mix(self) -> Mix | None:
        """The mix that acts now; None is the bare base."""
        return self._hub.mix

    def attach(self, adapter: Adapter, name: str | None = None, *, check_base: bool = True) -> str:
        """Makes an adapter present. It acts once a mix names it.

        Args:
            adapter: the adapter. Its parameters stay its own; it may be attached to several models at once.
            name: what mixes call it; the adapter's own name when None.
            check_base: refuse an adapter that was made for another base.

        Returns:
            The name.

        Raises:
            AdapterError: the name is taken, the base is another one, or a shape does not fit.
            SiteError: the model lacks a site of the adapter.
        """
        name = name or adapter.name or f"adapter{len(self._hub.adapters)}"
        if name in self._hub.adapters:
            raise AdapterError(f"an adapter called {name!r} is attached already; detach it or choose another name")
        if check_base:
            adapter.check_base(self)
        fits = [(adapter.fit(patch, self), patch) for patch in adapter.patches.values()]  # all checks before any change
        self._hub.adapters[name] = adapter
        try:
            self._adopt_root()
            for site, patch in fits:
                self._put(name, site, patch)
        except Exception:
            self.detach(name)  # all or nothing
            raise
        return name

    def _put(self, name: str, site: Site, patch: Patch) -> None:
        module = self.module.get_submodule(site.path)
        slots: dict[str, Slot] = module.__dict__.get(SLOTS, {})
        slot = slots.get(site.param) or Slot(site, module, self._hub)
        if slot.hub is not self._hub:
            raise AdapterError(
                f"site {site.name!r} has adapters of another Model over the same module; detach those first"
            )
        slot.put(name, patch)
        module.__dict__.setdefault(SLOTS, slots)[site.param] = slot
        self._hub.slots[site.name] = slot
        if site.kind == "input" and self.kind == "seq2seq":
            self._hub.crossing = slot
        self._refresh(module)

    def detach(self, name: str | None = None) -> None:
        """Takes an adapter away (all of them when ``name`` is None); modules without any get their own class back."""
        if name is not None and name not in self._hub.adapters:
            there = listing(self._hub.adapters) or "nothing"
            raise AdapterError(f"no adapter {name!r} is attached{nearest(name, self._hub.adapters)}; there is: {there}")
        for gone in [name] if name is not None else list(self._hub.adapters):
            for site, slot in [(n, s) for n, s in self._hub.slots.items() if gone in s.patches]:
                self._take(gone, site, slot)
            del self._hub.adapters[gone]
            if self._hub.mix is not None and gone in self._hub.mix.names():
                self._hub.set_mix(None)
        if not self._hub.adapters:
            self._hub.root = None
            _attach.refresh(self.module, None)

    def rebind(self, name: str) -> None:
        """Takes up what became of an attached adapter whose patches were replaced, resized or removed."""
        adapter = self._hub.adapters[name]
        patches = {adapter.fit(patch, self).name: patch for patch in adapter.patches.values()}
        for site, slot in [(n, s) for n, s in self._hub.slots.items() if name in s.patches]:
            if site in patches:
                slot.put(name, patches[site])
            else:
                self._take(name, site, slot)

    def _take(self, name: str, site: str, slot: Slot) -> None:
        slot.take(name)
        if not slot.patches:
            del self._hub.slots[site]
            if slot is self._hub.crossing:
                self._hub.crossing = None
            del slot.module.__dict__[SLOTS][slot.site.param]
        self._refresh(slot.module)

    def _adopt_root(self) -> None:
        if self.module.__dict__.get(HUB) is not self._hub:
            if HUB in self.module.__dict__:
                raise ModelError(
                    "another Model has adapters attached to this module; use that one, or detach them first"
                )
            self._hub.root = self.module
            _attach.refresh(self.module, self._hub)

    def _refresh(self, module: nn.Module) -> None:
        _attach.refresh(module, self._hub if module is self.module else None)

    # Acting

    def use(self, mix: MixLike) -> None:
        """Makes a mix act from now on: a name, ``{name: weight}``, a list with an entry per row, a `Mix`, or None."""
        self._hub.set_mix(Mix.of(mix))

    @contextmanager
    def using(self, mix: MixLike, *, tasks: str | Sequence[str] | None = None) -> Iterator[Self]:
        """Makes a mix act inside the block, and the one before it afterwards.

        Args:
            mix: as for `use`.
            tasks: the task of each row, or the one of all, for adapters and mixes that ask.
        """
        before = self._hub.mix
        self._hub.set_mix(Mix.of(mix))
        call = self._hub.call
        if tasks is not None:
            self._hub.call = Call(tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks))
        try:
            yield self
        finally:
            self._hub.call = call
            gone = before is not None and not set(before.names()) <= set(self._hub.adapters)
            self._hub.set_mix(None if gone else before)  # an adapter that was detached inside does not come back

    def features(self, batch: Mapping[str, Tensor], call: Call | None = None) -> Tensor:
        """One vector per row, [B, width], pooled as the model was trained.

        Args:
            batch: the tensors that the backbone's forward takes.
            call: what the forward knows; by default its mask and number of rows.
        """
        mask = batch.get("attention_mask")
        rows = len(next(iter(batch.values())))
        if self.kind == "dual":
            from .dual import image_features, text_features

            known = call or Call(tasks=self._hub.call.tasks, rows=rows).spread()
            if "pixel_values" in batch:
                return image_features(self, batch["pixel_values"], known)[0]
            return text_features(self, batch, known)
        backbone = getattr(self.module, "base_model", self.module)
        with calling(self._hub, call or Call(tasks=self._hub.call.tasks, mask=mask, rows=rows)):
            if self._hub.mix is not None and backbone is not self.module:  # which enters by itself
                self._hub.enter(dict(batch), ())
            out = backbone(**batch)
        return pool(out, mask, self.pooling)

    def likelihood(self, batch: Mapping[str, Tensor], call: Call | None = None) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of each row's labels, and how many labels there are: ([B], [B]), in nats.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is predicted). For causal models
                ``labels`` lie on ``input_ids``; for seq2seq models they are the decoder's target.
            call: what the forward knows; by default its mask and number of rows.
        """
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        known = call or Call(tasks=self._hub.call.tasks, mask=batch.get("attention_mask"), rows=len(labels))
        with calling(self._hub, known):
            if self.kind == "seq2seq":
                logits = self.module(**inputs, labels=labels).logits
            else:
                # only the positions that are scored go through the head: its product is the largest of a small model
                keep = int((labels != -100).any(0).nonzero().min()) if bool((labels != -100).any()) else 1
                start = max(keep - 1, 0)
                hidden = self.module(**inputs, logits_to_keep=labels.shape[1] - start).logits
                logits, labels = hidden[:, :-1], labels[:, start + 1 :]
        nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return nll.sum(1), (labels != -100).sum(1)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the network, and the adapters that are attached, as ``nn.Module.to`` does (adapters keep their dtype)."""
        self.module.to(*args, **kwargs)
        for adapter in self._hub.adapters.values():
            adapter.to(self.device)
        for slot in self._hub.slots.values():
            slot.forget()
        return self

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return (
            f"Model({self.name!r}, {self.kind}, {count:,} parameters, attached: {listing(self.attached) or 'nothing'})"
        )


def _as_read(site: Site) -> Site:
    from dataclasses import replace

    return replace(site, read="weight")


def guess_kind(module: nn.Module) -> str:
    """What a network is, from its configuration and the name of its class."""
    config = getattr(module, "config", None)
    name = type(module).__name__
    if getattr(config, "vision_config", None) is not None and getattr(config, "text_config", None) is not None:
        return "dual"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    main = getattr(module, "main_input_name", "")
    if main == "pixel_values":
        return "image"
    if main in ("input_values", "input_features"):
        return "audio"
    if config is None and any(isinstance(m, nn.Conv2d) for m in module.modules()):
        return "image"
    return "encoder"


def guess_pooling(module: nn.Module, kind: str) -> str:
    """``mean`` for audio and convolutions, ``last`` for decoders, ``cls`` where there is such a token."""
    if not hasattr(module, "config"):
        return "none"
    if kind in ("causal", "seq2seq"):
        return "last" if kind == "causal" else "mean"
    if kind in ("image", "audio"):
        return "cls" if any(n.endswith("cls_token") for n, _ in module.named_parameters()) else "mean"
    return "cls"


def pool(out: Any, mask: Tensor | None, pooling: str) -> Tensor:
    """[B, T, d] (or [B, C, H, W]) to one vector per row."""
    hidden: Tensor = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", out[0])
    if hidden.dim() == 2:
        return hidden
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    if mask is not None and mask.shape != hidden.shape[:2]:
        mask = None  # the mask of raw audio does not lie on its frames
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        if mask is None:
            return hidden[:, -1]
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if mask is None:
        return hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def weights_hash(parameters: Sequence[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and up to 64 values of each tensor, rounded to bf16."""
    digest = hashlib.sha256()
    samples = []
    for name, tensor in parameters:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float())
    if samples:
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()[:32]
