"""A small CLIP-like model of photos and digits: ``python -m experiments.vision_language.small_clip [--out DIR]``.

Trained from scratch on 10,000 small photos of ten kinds and 10,000 handwritten digits, with the sentences of
``data/classes.yaml``, and kept as a folder that ``polytask.Model.load``, ``AutoModel`` and ``AutoProcessor`` read. A tenth of
the training images is held out and only reported on; the test images are never trained on. All twenty classes are seen in
training: a class is "new" to a prompt learned on others, not to this model.

The loss is CLIP's in both directions, with shared targets, as a class has many right captions in a batch:

    s_ij = exp(t) <image_i, caption_j>                m_ij = p_i(class of caption j)
    L    = 1/2 CE(rows of s; rows of m, each summing to 1) + 1/2 CE(columns of s; columns of m, likewise)

`p_i` is the image's label, and for photos half of it is what a CIFAR-10 ResNet-20 says of the image (softened), so that part of
the training is distillation from that network. It was trained on the original photos of CIFAR-10's training split. Its last
map has 8x8 places of 64 channels, as many as there are patches here, so a second term lets each patch of the layer before the
last predict its place (mean squared error, through a linear layer that is thrown away).

What else makes it learn in few passes: half of the patches are left out except at the end (Li et al. 2023, FLIP); the
attention begins near the identity with sine positions (Trockman and Kolter 2023); the patch layer begins with whitened pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.config import read_yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CLASSES = Path(__file__).parent / "data" / "classes.yaml"
VERSION = 1  # raise it when the same settings would train another model
START, END = "<|startoftext|>", "<|endoftext|>"
TEMPLATE = "a photo of a {}."
SIDE, PATCH = 32, 4
FILES = {"photos": "cifar10_jpeg", "digits": "mnist"}


class DataMissing(Exception):
    """The images or the teacher's weights are not there."""


@dataclass(frozen=True)
class Settings:
    """What the trained model depends on, apart from the data."""

    epochs: int = 7
    whole: float = 0.12  # the last share of the steps sees whole images
    seed: int = 0
    width: int = 128
    layers: int = 5
    text_layers: int = 2
    heads: int = 4
    expansion: int = 2
    photos: int = 64  # a batch's images
    digits: int = 32
    captions: int = 2  # a batch's captions of each class
    kept: float = 0.5  # share of the patches that are looked at
    lr: float = 1.5e-3
    decay: float = 0.05
    teacher: float = 0.5  # the ResNet's share of a photo's target
    softness: float = 2.0  # temperature of the ResNet's distribution
    places: float = 2.0  # weight of the term for the ResNet's map

    def mark(self) -> str:
        """What tells one trained model from another: version, settings and sentences."""
        text = json.dumps([VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode() + CLASSES.read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- texts


def groups() -> dict[str, dict[str, Any]]:
    """Group to its templates and its classes with their descriptions: ``photos`` first, then ``digits``."""
    return dict(read_yaml(CLASSES)["groups"])


def class_names() -> list[str]:
    """The twenty names in the order of the labels."""
    return [name for group in groups().values() for name in group["classes"]]


class Captions:
    """Draws captions: a template, a description, or two sentences in a row."""

    def __init__(self) -> None:
        self.choices = [
            ([t.format(name) for t in group["templates"]], list(said))
            for group in groups().values()
            for name, said in group["classes"].items()
        ]

    def every(self) -> list[str]:
        """All single sentences."""
        return [text for named, said in self.choices for text in named + said]

    def draw(self, each: int, rng: np.random.Generator) -> list[str]:
        """`each` captions of every class, class after class; the first of each names its class."""
        made = []
        for named, said in self.choices:
            for i in range(each):
                named_one, said_one, other = rng.choice(named), rng.choice(said), rng.choice(said)
                forms = (named_one, f"{named_one} {said_one}", str(said_one), f"{said_one} {other}")
                made.append(str(forms[0] if i == 0 else forms[rng.integers(4)]))
        return made


def make_tokenizer() -> Any:
    """Byte-level pairs learned from the captions and the word list: a known word is one token, any text can be read."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    words = str(read_yaml(CLASSES)["words"])
    trainer = trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, show_progress=False, special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([*Captions().every(), words], trainer)
    ends = [(START, tokenizer.token_to_id(START)), (END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, unk_token=END,
        model_max_length=77, padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- images


@dataclass
class Images:
    """Pixels [N, 32, 32, 3] as bytes and labels [N]; digits are classes 10 to 19."""

    pixels: np.ndarray
    labels: np.ndarray

    def part(self, chosen: np.ndarray) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])


def read_images(name: str, split: str) -> Images:
    """``photos`` or ``digits``, ``train`` or ``test``, as RGB of 32x32.

    Raises:
        DataMissing: the file is not there.
    """
    from PIL import Image

    file = DATA / "images" / f"{FILES[name]}_{split}.npz"
    if not file.exists():
        raise DataMissing(f"{file.name} is not in the data folder's images/ (shared/data beside the project)")
    packed = np.load(file)
    if name == "photos":
        jpeg, off = packed["jpeg"], packed["off"]
        rows = [Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB") for a, b in zip(off, off[1:], strict=False)]
        return Images(np.stack([np.asarray(row) for row in rows]), packed["y"].astype(np.int64))
    rows = [Image.fromarray(row).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for row in packed["x"]]
    return Images(np.stack([np.asarray(row) for row in rows]), packed["y"].astype(np.int64) + 10)


def split_off(images: Images, seed: int) -> tuple[Images, Images]:
    """Nine tenths to train on and one to report on."""
    order = np.random.default_rng(seed).permutation(len(images.labels))
    held = len(order) // 10
    return images.part(np.sort(order[held:])), images.part(np.sort(order[:held]))


@torch.no_grad()
def teacher_says(images: Images, softness: float) -> tuple[Tensor, Tensor]:
    """The ResNet's softened distribution over the ten kinds of photos, [N, 10], and its last map [N, 8, 8, 64].

    The map's channels have mean 0 and variance 1.

    Raises:
        DataMissing: its weights are not there.
    """
    from ..forms.resnet import load

    folder = DATA / "weights" / "resnet20"
    if not (folder / "model.safetensors").exists():
        raise DataMissing("resnet20/model.safetensors is not in the data folder's weights/")
    network, last = load(folder)
    seen: list[Tensor] = []
    network.layer3.register_forward_hook(lambda module, given, made: seen.append(made.permute(0, 2, 3, 1).half()))
    said = []
    for pixels in torch.from_numpy(images.pixels).split(100):
        features = network(pixels.permute(0, 3, 1, 2) / 255.0)
        said.append(((features @ last["weight"].T + last["bias"]) / softness).softmax(-1))
    places = torch.cat(seen)
    some = places[::9].float()
    return torch.cat(said), ((places - some.mean((0, 1, 2))) / (some.std((0, 1, 2)) + 1e-3)).half()


def moves(count: int, step: int, flips: bool, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns [B, 32] of images padded by 4: moved by up to 4 pixels in multiples of `step`, perhaps mirrored."""
    corner = step * torch.randint(0, 8 // step + 1, (2, count, 1), generator=rng)
    rows, columns = corner + torch.arange(SIDE)
    if flips:
        columns = torch.where(torch.rand(count, 1, generator=rng) < 0.5, columns.flip(1), columns)
    return rows, columns


def taken(padded: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`padded` [B, H, W, C] at the rows and columns [B, S] of each image: [B, S, S, C]."""
    return padded[torch.arange(len(padded))[:, None, None], rows[:, :, None], columns[:, None, :]]


def moved(pixels: Tensor, rows: Tensor, columns: Tensor, tints: float, rng: torch.Generator) -> Tensor:
    """Bytes [B, 32, 32, 3] to [B, 3, 32, 32] in 0..1 with other contrast, and other light and colours by `tints`."""
    x = taken(F.pad(pixels, (0, 0, 4, 4, 4, 4)), rows, columns).permute(0, 3, 1, 2) / 255.0
    light, contrast = 0.2 * torch.rand(2, len(x), 1, 1, 1, generator=rng) - 0.1
    tint = 0.06 * torch.rand(len(x), 3, 1, 1, generator=rng) - 0.03
    middle = x.mean((1, 2, 3), keepdim=True)
    return ((x - middle) * (1 + contrast) + middle + tints * (light + tint)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------- model


def make_model(settings: Settings, tokenizer: Any) -> Any:
    """The network before training, by seed."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(settings.seed)
    if tokenizer.eos_token_id == 2:
        raise ValueError("CLIP's text network pools elsewhere when the end token is 2")
    common = {
        "hidden_size": settings.width,
        "intermediate_size": settings.expansion * settings.width,
        "num_attention_heads": settings.heads,
        "projection_dim": settings.width,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": settings.text_layers,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": settings.layers}
    towers = {"text_config": {**common, **text}, "vision_config": {**common, **vision}}
    return CLIPModel(CLIPConfig(**towers, projection_dim=settings.width))


@torch.no_grad()
def prepare(vision: Any, pixels: Tensor) -> None:
    """Starts the vision network near something useful.

    The patch layer whitens pixels (`pixels` [N, 3, 32, 32], normalised), positions are sines of row and column, and in each
    layer ``W_q = W_k`` (a patch looks at those like it) and ``W_o W_v = -0.4 I`` plus noise.
    """
    embeddings = vision.embeddings
    weight = embeddings.patch_embedding.weight  # [D, 3, 4, 4]
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)  # [N * 64, 48]
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    whiten = (vectors / (values + 1e-2).sqrt()).T  # [48, 48]
    turn = torch.nn.init.orthogonal_(torch.empty(len(weight), len(whiten)))
    weight.copy_((turn @ whiten).view_as(weight))

    side, quarter = SIDE // PATCH, len(weight) // 4
    angles = torch.arange(side)[:, None] * torch.logspace(0, -2, quarter)  # [8, D / 4]
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    grid = torch.cat((waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)), -1).flatten(0, 1)
    embeddings.position_embedding.weight[1:] = 0.5 * grid

    for layer in vision.encoder.layers:
        attention = layer.self_attn
        torch.nn.init.normal_(attention.q_proj.weight, std=0.05)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.out_proj.weight.add_(attention.v_proj.weight.T, alpha=-0.4)


def some_patches(images: int, kept: float, rng: torch.Generator | None = None) -> Tensor:
    """A random share of each image's patches, [B, K] in 0..63; all in order when `kept` is 1."""
    patches = (SIDE // PATCH) ** 2
    if kept == 1:
        return torch.arange(patches).expand(images, -1)
    return torch.rand(images, patches, generator=rng).argsort(1)[:, : round(kept * patches)]


def image_vectors(model: Any, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, D] of normalised images [B, 3, 32, 32], and what the layer before the last says of the patches.

    Only `patches` [B, K] are looked at. The vector is read from the first token, so that the last layer has it alone as query.
    """
    vision = model.vision_model
    x = vision.embeddings(pixels)  # [B, 1 + 64, D]
    order = F.pad(patches + 1, (1, 0))[..., None].expand(-1, -1, x.shape[-1])
    x = vision.pre_layrnorm(x.gather(1, order))
    *layers, last = vision.encoder.layers
    for layer in layers:
        x = layer(x, None)
    attention, seen = last.self_attn, last.layer_norm1(x)
    parts = (attention.q_proj(seen[:, :1]), attention.k_proj(seen), attention.v_proj(seen))
    heads = [
        part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts
    ]  # [B, heads, 1 or 1 + K, d]
    first = x[:, 0] + attention.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))[:, 0]
    first = first + last.mlp(last.layer_norm2(first))
    return F.normalize(model.visual_projection(vision.post_layernorm(first)), dim=-1), x[:, 1:]


def text_vectors(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit vectors [C, D]."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    found = model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    return F.normalize(model.text_projection(found), dim=-1)


def loss_of(images: Tensor, texts: Tensor, scale: Tensor, match: Tensor) -> Tensor:
    """CLIP's loss with shared targets: `images` [B, D], `texts` [C, D], `match` [B, C] is how right a caption is.

    A caption that fits no image of the batch counts little.
    """
    scores = scale.exp().clamp(max=100) * images @ texts.T
    by_image = match / match.sum(1, keepdim=True)
    by_text = match / match.sum(0).clamp_min(0.5)
    return -(
        (by_image * scores.log_softmax(1)).sum(1).mean() + (by_text * scores.log_softmax(0)).sum(0).mean()
    ) / 2  # fmt: skip


@torch.no_grad()
def vectors_of(model: Any, processor: Any, images: Images) -> Tensor:
    """Unit vectors [N, D] of images as the processor prepares them."""
    made = []
    for start in range(0, len(images.labels), 100):
        pixels = processor.image_processor(images=list(images.pixels[start : start + 100]), return_tensors="pt")
        pixels = pixels["pixel_values"]
        made.append(image_vectors(model, pixels, some_patches(len(pixels), 1))[0])
    return torch.cat(made)


@torch.no_grad()
def zero_shot(model: Any, processor: Any, vectors: Tensor, labels: np.ndarray, classes: list[int]) -> float:
    """The share of the images of `classes` that are nearest to their own class's name in `TEMPLATE`, among these."""
    names, chosen = class_names(), np.isin(labels, classes)
    texts = text_vectors(model, processor.tokenizer, [TEMPLATE.format(names[c]) for c in classes])
    best = torch.tensor(classes)[(vectors[torch.from_numpy(chosen)] @ texts.T).argmax(1)]
    return float((best == torch.from_numpy(labels[chosen])).float().mean())


# -------------------------------------------------------------------------------------------------------------- training


class Course:
    """The training: everything that an epoch needs, and where it stands."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.captions = Captions()
        self.sets = [split_off(read_images(name, "train"), settings.seed)[0] for name in ("photos", "digits")]
        every = np.concatenate([images.pixels[::4] for images in self.sets]) / 255.0
        self.mean, self.std = every.mean((0, 1, 2)).round(4).tolist(), every.std((0, 1, 2)).round(4).tolist()
        self.processor = self._processor()
        self.model = make_model(settings, self.processor.tokenizer)
        prepare(self.model.vision_model, self._normal(torch.from_numpy(every[::5]).float().permute(0, 3, 1, 2)))
        self.to_places = torch.nn.Linear(settings.width, 64)
        self.targets, self.places = self._targets()
        self.parameters = [*self.model.parameters(), *self.to_places.parameters()]
        flat, deep = [p for p in self.parameters if p.ndim < 2], [p for p in self.parameters if p.ndim >= 2]
        parts = [{"params": deep, "weight_decay": settings.decay}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(parts, lr=settings.lr, betas=(0.9, 0.98))
        self.epoch, self.seconds = 0, 0.0

    def _processor(self) -> Any:
        from transformers import CLIPImageProcessor, CLIPProcessor

        size = {"height": SIDE, "width": SIDE}
        pictures = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=self.mean, image_std=self.std)
        return CLIPProcessor(image_processor=pictures, tokenizer=make_tokenizer())

    def _normal(self, pixels: Tensor) -> Tensor:
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def _targets(self) -> tuple[list[Tensor], Tensor]:
        """Each image's distribution over the twenty classes, [N, 20] for photos and for digits; the ResNet's map of photos."""
        photos, digits = (F.one_hot(torch.from_numpy(images.labels), 20).float() for images in self.sets)
        said, places = teacher_says(self.sets[0], self.settings.softness)
        share = self.settings.teacher
        return [(1 - share) * photos + share * F.pad(said, (0, 10)), digits], places

    @property
    def steps(self) -> int:
        """Steps of an epoch, which is one pass over the photos."""
        return len(self.sets[0].labels) // self.settings.photos

    def run_epoch(self) -> float:
        """One epoch; the mean loss. What is drawn depends on seed and epoch only, so a resumed run is the same run."""
        key = 1000 * self.settings.seed + self.epoch
        rng, words = torch.Generator().manual_seed(key), np.random.default_rng(key)
        orders = [torch.randperm(len(images.labels), generator=rng) for images in self.sets]
        began, total = time.perf_counter(), 0.0
        self.model.train()
        for step in range(self.steps):
            sizes = (self.settings.photos, self.settings.digits)
            rows = [order[step * size : (step + 1) * size] for order, size in zip(orders, sizes, strict=True)]
            done = self.epoch * self.steps + step
            loss = self._loss(rows, done / (self.settings.epochs * self.steps), rng, words)
            self._step(loss, done / (self.settings.epochs * self.steps))
            total += loss.item()
        self.epoch += 1
        self.seconds += time.perf_counter() - began
        return total / self.steps

    def _loss(self, rows: list[Tensor], share: float, rng: torch.Generator, words: np.random.Generator) -> Tensor:
        """The loss on these photos and digits, when `share` of the training is done."""
        settings, model = self.settings, self.model
        pixels = []
        for i, images in enumerate(self.sets):
            down, across = moves(len(rows[i]), 1 if i else PATCH, not i, rng)
            if not i:
                cells = down[:, ::PATCH] // PATCH, across[:, ::PATCH] // PATCH  # of the map, padded by one place
            pixels.append(moved(torch.from_numpy(images.pixels[rows[i].numpy()]), down, across, float(not i), rng))
        patches = some_patches(sum(map(len, rows)), settings.kept if share < 1 - settings.whole else 1, rng)
        images, seen = image_vectors(model, self._normal(torch.cat(pixels)), patches)
        texts = text_vectors(model, self.processor.tokenizer, self.captions.draw(settings.captions, words))
        kinds = torch.arange(20).repeat_interleave(settings.captions)
        wanted = torch.cat([target[row] for target, row in zip(self.targets, rows, strict=True)])
        loss = loss_of(images, texts, model.logit_scale, wanted[:, kinds])

        photos = len(rows[0])
        places = F.pad(self.places[rows[0]].float(), (0, 1), value=1.0)  # the last channel tells a place from padding
        places = taken(F.pad(places, (0, 0, 1, 1, 1, 1)), *cells).flatten(1, 2)  # [B, 64, 65]
        places = places.gather(1, patches[:photos, :, None].expand(-1, -1, places.shape[-1]))
        missed = (self.to_places(seen[:photos]) - places[..., :-1]).square().mean(-1) * places[..., -1]
        return loss + settings.places * missed.sum() / places[..., -1].sum()

    def _step(self, loss: Tensor, share: float) -> None:
        """Warm-up over a twentieth of the steps, then a cosine to zero."""
        rate = self.settings.lr * min(share * 20, 0.5 + 0.5 * math.cos(math.pi * share))
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def keep(self) -> None:
        """Writes where the training stands."""
        state = {
            "mark": self.settings.mark(), "epoch": self.epoch, "seconds": self.seconds,
            "model": self.model.state_dict(), "to_places": self.to_places.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / "training.pt.part")
        os.replace(self.folder / "training.pt.part", self.folder / "training.pt")

    def go_on(self) -> None:
        """Takes up what `keep` wrote, where it belongs to the same settings."""
        file = self.folder / "training.pt"
        state = torch.load(file, weights_only=True) if file.exists() else {}
        if state.get("mark") == self.settings.mark():
            self.model.load_state_dict(state["model"])
            self.to_places.load_state_dict(state["to_places"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.seconds = state["epoch"], state["seconds"]


def measure(model: Any, processor: Any, seed: int) -> dict[str, float]:
    """Zero-shot accuracies on the test images (all classes, the first five, the last five) and on the held-out tenths."""
    made = {}
    for name, first in (("photos", 0), ("digits", 10)):
        five, other = list(range(first, first + 5)), list(range(first + 5, first + 10))
        test, held = read_images(name, "test"), split_off(read_images(name, "train"), seed)[1]
        vectors = vectors_of(model, processor, test)
        for part, classes in (("test", five + other), ("base_test", five), ("new_test", other)):
            made[f"{name}_{part}"] = zero_shot(model, processor, vectors, test.labels, classes)
        vectors = vectors_of(model, processor, held)
        made[f"{name}_held_out"] = zero_shot(model, processor, vectors, held.labels, five + other)
    return {name: round(value, 4) for name, value in made.items()}


def default_folder() -> Path:
    """``$POLYTASK_CACHE/small-clip``; the cache is ``~/.cache/polytask`` when the variable is not set."""
    return Path(os.environ.get("POLYTASK_CACHE") or Path.home() / ".cache" / "polytask") / "small-clip"


def finished(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """What was measured on the folder's model, when it is one of these settings."""
    note = folder / "small-clip.json"
    known = json.loads(note.read_text()) if note.exists() else {}
    return known["results"] if known.get("mark") == settings.mark() else None


def small_clip(out: str | Path | None = None, settings: Settings | None = None, minutes: float | None = None) -> Path:
    """The folder of the trained model, trained now if it is not there.

    Args:
        out: the folder; `default_folder` when None.
        settings: of the model and its training.
        minutes: stop after the epoch in which this time ends; a later call goes on from there.

    Raises:
        DataMissing: it must be trained, and the images or the teacher are not there.
        TimeoutError: `minutes` ended before the last epoch.
    """
    folder, settings = Path(out or default_folder()).expanduser(), settings or Settings()
    if finished(folder, settings) is not None:
        return folder
    began = time.perf_counter()
    course = Course(settings, folder)
    course.go_on()
    while course.epoch < settings.epochs:
        loss = course.run_epoch()
        course.keep()
        print(
            f"epoch {course.epoch}/{settings.epochs}: loss {loss:.3f}, {course.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if minutes is not None and course.epoch < settings.epochs and time.perf_counter() - began > 60 * minutes:
            raise TimeoutError(f"{course.epoch} of {settings.epochs} epochs are done; call it again to go on")
    course.model.eval().save_pretrained(folder)
    course.processor.save_pretrained(folder)
    results = measure(course.model, course.processor, settings.seed)
    results["seconds"] = round(course.seconds)
    results["parameters"] = sum(p.numel() for p in course.model.parameters())
    note = {"mark": settings.mark(), "settings": dataclasses.asdict(settings), "results": results}
    (folder / "small-clip.json").write_text(json.dumps(note, indent=1) + "\n")
    (folder / "training.pt").unlink(missing_ok=True)
    return folder


def main() -> None:
    """Trains or finds the model; prints its folder and a JSON line of what was measured on it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.vision_language.small_clip", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="the folder; $POLYTASK_CACHE/small-clip when not given")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes over the photos")
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which this time ends, to go on later")
    given = parser.parse_args()
    settings = Settings(epochs=given.epochs)
    try:
        folder = small_clip(given.out, settings, given.minutes)
    except DataMissing as missing:
        print(missing, file=sys.stderr)
        sys.exit(2)
    except TimeoutError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(1)
    print(folder)
    print(json.dumps(finished(folder, settings)))


if __name__ == "__main__":
    main()
