"""One vocabulary for models whose tokenizers differ: its tokens, the rows that each model has for them, and its tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polytask.core.errors import ConfigError, MergeError, listing, nearest

from .embeddings import FILL, MEAN, ZERO, Remapped, Rows, common, embeddings
from .source import Source, config_of

FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
REPLACED = (*FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
KEYS = ("source", "tokens", "pad_to_multiple_of")


@dataclass
class Vocabulary:
    """The result's vocabulary.

    Attributes:
        tokenizer: of `transformers`.
        ids: of the tokens.
        size: rows of the embeddings: the tokens, and what fills up to a multiple.
        said: what was asked for.
    """

    tokenizer: Any
    ids: Mapping[str, int]
    size: int
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the rows depend on, as a hash."""
        text = json.dumps([sorted(self.ids.items()), self.size, dict(self.said)], default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def card(self) -> dict[str, Any]:
        """What a record says about it."""
        return {**self.said, "tokens": dict(self.said.get("tokens") or {}), "rows": self.size}

    def files(self, home: Path | None, config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
        """The tokenizer's files, ``config.json`` and ``generation_config.json``, with sizes and special tokens as they are now.

        Args:
            home: the folder of the model whose configuration is copied.
            config: in place of its ``config.json``.
        """
        found = {}
        with tempfile.TemporaryDirectory() as place:
            self.tokenizer.save_pretrained(place)
            for file in sorted(Path(place).iterdir()):
                if file.is_file():
                    found[file.name] = file.read_bytes()
        tokens = {row: token for token, row in (tokenizer_of(home) or self.tokenizer).get_vocab().items()}
        for name in ("config.json", "generation_config.json"):
            said = config if config and name == "config.json" else config_of(home, name)
            if said:
                found[name] = (json.dumps(self._settled(said, tokens), indent=2) + "\n").encode()
        return found

    def _settled(self, said: Mapping[str, Any], tokens: Mapping[int, str]) -> dict[str, Any]:
        def moved(key: str, value: Any) -> Any:
            if isinstance(value, list):
                there = [m for v in value if (m := moved(key, v)) is not None]
                return there or None
            if isinstance(value, bool) or not isinstance(value, int):
                return value
            now = self.ids.get(tokens.get(value, ""))
            return getattr(self.tokenizer, key, None) if now is None else now

        out: dict[str, Any] = {}
        for key, value in said.items():
            if key == "vocab_size":
                out[key] = self.size
            elif key.endswith("_token_id"):
                out[key] = moved(key, value)
            else:
                out[key] = self._settled(value, tokens) if key == "text_config" and isinstance(value, dict) else value
        return out


def align(
    sources: Mapping[str, Source], base: str | None, said: str | Mapping[str, Any], named: Callable[[Any], str] = str
) -> tuple[dict[str, Source], Vocabulary | None]:
    """Brings models into one vocabulary. A token's row in a model is the model's own where it has the token; else that of the
    source that ``tokens`` names; else that of the only model that has it; else the base's; else the mean over those that have it;
    else zeros, with a warning. Rows without a token are the mean of all.

    Args:
        sources: by name, the one whose tokenizer is called ``base`` first.
        base: the name of the base, or None where there is none.
        said: ``union`` (the first model's tokenizer with the others' tokens added behind its own, in their order), ``base`` or a
            model's name; or a mapping of `KEYS`: ``tokens`` gives, for single tokens, ``source`` (a model's name,
            ``{kind: zero}``, or ``{kind: model_token, model, token | token_id}``) and ``force``, to take it for own rows too.
        named: a model's name from what stands for it in ``said``.

    Returns:
        The models, and the vocabulary; the models as they are and None where all tokenizers are the same and nothing else
        is asked for (rows that no token uses then stay).

    Raises:
        ConfigError: an unknown key, model or token.
        MergeError: a model without a tokenizer, or embeddings that are not found or fit no other's.
    """
    wanted = _said(said)
    names = list(sources)
    models = list(sources.values())
    whole = [embeddings(model) for model in models]
    if wanted["source"] in ("union", "base") and set(wanted) == {"source"} and _same(models, whole):
        return dict(sources), None
    tensors = common(models, whole)
    tokenizers = _tokenizers(models, whole)
    vocabularies = [_tokens(m, t) for m, t in zip(models, tokenizers, strict=True)]
    if wanted["source"] not in ("union", "base"):
        chosen = _number(named(wanted["source"]), names, "tokenizer")
        tokenizer = copy.deepcopy(tokenizers[chosen])
    else:
        tokenizer = copy.deepcopy(tokenizers[0])
    if wanted["source"] == "union":
        for fellow, vocabulary in zip(tokenizers[1:], vocabularies[1:], strict=True):
            _add(tokenizer, fellow, vocabulary)
    tokenizer.add_tokens([token for token in wanted.get("tokens") or {} if token not in tokenizer.get_vocab()])
    ids = dict(tokenizer.get_vocab())
    multiple = wanted.get("pad_to_multiple_of") or 1
    size = -(-(max(ids.values()) + 1) // multiple) * multiple
    asked = _asked(wanted.get("tokens") or {}, names, vocabularies, whole, named)
    owner = names.index(base) if base is not None else None
    lenders, owners = _lenders(ids, vocabularies, owner, asked)
    forced = {token for token, (_, _, force) in asked.items() if force}
    made: dict[str, Source] = {}
    for number, name in enumerate(names):
        rows = _rows(number, size, ids, vocabularies[number], lenders, owners, forced)
        made[name] = Remapped(models[number], tensors, rows, models)
    return made, Vocabulary(tokenizer, ids, size, wanted)


def aligned(
    base: Source | None, sources: Sequence[Source], said: str | Mapping[str, Any]
) -> tuple[Source | None, list[Source], Vocabulary | None]:
    """`align` for a base and models in their order, which are called by their own names (of several equal ones with a number)."""
    names = [source.name for source in sources]
    unique = [n if names.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(names)]
    root = None if base is None else base.name if base.name not in unique else f"{base.name} (the base)"
    given = dict(zip(unique, sources, strict=True))
    made, vocabulary = align({**({root: base} if root is not None and base is not None else {}), **given}, root, said)
    return None if root is None else made[root], [made[name] for name in unique], vocabulary


def _said(said: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(said, str):
        return {"source": said}
    if not isinstance(said, Mapping):
        raise ConfigError(f"tokenizer must be 'union', 'base', a model's name, or a mapping, got {said!r}")
    for key in said:
        if key not in KEYS:
            raise ConfigError(f"tokenizer has no key {key!r}{nearest(str(key), KEYS)}; it has: {listing(KEYS)}")
    multiple = said.get("pad_to_multiple_of")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise ConfigError(f"tokenizer: pad_to_multiple_of must be a number from 1, got {multiple!r}")
    if said.get("tokens") is not None and not isinstance(said["tokens"], Mapping):
        raise ConfigError(f"tokenizer: tokens must be a mapping of tokens, got {said['tokens']!r}")
    return {"source": "union", **{key: value for key, value in said.items() if value is not None}}


def _same(models: Sequence[Source], whole: Sequence[tuple[list[str], int]]) -> bool:
    """Whether all have the same tokenizer files and as many rows."""
    held = {tuple(_bytes(model.folder, name) for name in FILES) for model in models}
    return len(held) == 1 and len({size for _, size in whole}) == 1


def _bytes(folder: Path | None, name: str) -> bytes:
    return (folder / name).read_bytes() if folder is not None and (folder / name).is_file() else b""


def tokenizer_of(folder: Path | None, name: str = "the model") -> Any:
    """The tokenizer beside a model's weights; None where there is none. Raises `MergeError` for one that cannot be read."""
    if not any(_bytes(folder, file) for file in FILES):
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MergeError(f"the tokenizer of {name} cannot be read: {reason}") from error


def _tokenizers(models: Sequence[Source], whole: Sequence[tuple[list[str], int]]) -> list[Any]:
    """Of each model; the first's, where a model has none and as many rows."""
    found = [tokenizer_of(model.folder, model.name) for model in models]
    for i, model in enumerate(models):
        if found[i] is not None:
            continue
        if found[0] is None or whole[i][1] != whole[0][1]:
            raise MergeError(f"{model.name} has no tokenizer; put its files beside the weights")
        warnings.warn(f"{model.name} has no tokenizer; it is taken to have that of {models[0].name}", stacklevel=4)
        found[i] = found[0]
    return found


def _tokens(source: Source, tokenizer: Any) -> dict[str, int]:
    """The tokens that have a row, in the order of the rows."""
    _, size = embeddings(source)
    there = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return {token: row for token, row in there if row < size}


def _add(tokenizer: Any, fellow: Any, vocabulary: Mapping[str, int]) -> None:
    """A tokenizer's tokens behind those that are there, in their order and of their kind."""
    there = tokenizer.get_vocab()
    kinds = {str(added): added for added in fellow.added_tokens_decoder.values()}
    tokenizer.add_tokens([kinds.get(token, token) for token in vocabulary if token not in there])
    lost = [token for token in vocabulary if token not in tokenizer.get_vocab()]
    if lost:
        raise MergeError(f"the tokenizer takes no token {listing(map(repr, lost), 4)}; say tokenizer='base'")


def _number(name: str, names: Sequence[str], where: str) -> int:
    if name not in names:
        raise ConfigError(f"{where}: there is no model {name!r}{nearest(name, names)}; there are: {listing(names)}")
    return names.index(name)


_Asked = dict[str, tuple[int, int, bool]]  # token: model (or ZERO), row, force


def _asked(
    tokens: Mapping[str, Any], names: Sequence[str], vocabularies: Sequence[Mapping[str, int]],
    whole: Sequence[tuple[list[str], int]], named: Callable[[Any], str],
) -> _Asked:  # fmt: skip
    """What is said about single tokens. Raises `ConfigError`."""
    found: _Asked = {}
    for token, given in tokens.items():
        where = f"tokenizer: tokens[{token!r}]"
        said = given or {}
        if not isinstance(said, Mapping) or not set(said) <= {"source", "force"}:
            raise ConfigError(f"{where} must be a mapping of source and force, got {given!r}")
        source, force = said.get("source"), bool(said.get("force", False))
        if source is None:
            if force:
                raise ConfigError(f"{where} is forced and has no source; say which")
            continue
        if isinstance(source, Mapping) and source.get("kind") == "zero":
            found[token] = (ZERO, 0, force)
            continue
        number, row = _place(source, token, names, vocabularies, named, where)
        if not 0 <= row < whole[number][1]:
            raise ConfigError(f"{where}: {names[number]} has {whole[number][1]} rows, and no row {row}")
        found[token] = (number, row, force)
    return found


def _place(
    source: Any, token: str, names: Sequence[str], vocabularies: Sequence[Mapping[str, int]],
    named: Callable[[Any], str], where: str,
) -> tuple[int, int]:  # fmt: skip
    """The model and its row."""
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        if not set(source) <= {"kind", "model", "token", "token_id"} or ("token" in source) == ("token_id" in source):
            raise ConfigError(f"{where}: a model_token says model, and either token or token_id; got {dict(source)!r}")
        number = _number(named(source.get("model")), names, where)
        if "token_id" in source:
            return number, int(source["token_id"])
        token = str(source["token"])
    elif isinstance(source, Mapping) and "kind" in source:
        raise ConfigError(f"{where}: kind must be zero or model_token, got {source['kind']!r}")
    else:
        number = _number(named(source), names, where)
    if token not in vocabularies[number]:
        raise ConfigError(f"{where}: {names[number]} has no token {token!r}; choose one that it has, or another model")
    return number, vocabularies[number][token]


def _lenders(
    ids: Mapping[str, int], vocabularies: Sequence[Mapping[str, int]], base: int | None, asked: _Asked
) -> tuple[dict[str, tuple[int, int]], dict[int, list[tuple[int, int]]]]:
    """Whose row those have that lack a token: (model, row) by token; and the owners by id, for those that are a mean."""
    lenders: dict[str, tuple[int, int]] = {}
    means: dict[int, list[tuple[int, int]]] = {}
    nobody = []
    for token, place in ids.items():
        owners = [(m, v[token]) for m, v in enumerate(vocabularies) if token in v]
        if token in asked:
            lenders[token] = asked[token][:2]
        elif len(owners) == 1:
            lenders[token] = owners[0]
        elif not owners:
            lenders[token] = (ZERO, 0)
            nobody.append(token)
        elif base is not None and token in vocabularies[base]:
            lenders[token] = (base, vocabularies[base][token])
        elif len(owners) < len(vocabularies):
            lenders[token] = (MEAN, 0)
            means[place] = owners
    if nobody:
        warnings.warn(f"no model has the token {listing(map(repr, nobody), 8)}; its rows are zeros", stacklevel=3)
    return lenders, means


def _rows(
    number: int, size: int, ids: Mapping[str, int], vocabulary: Mapping[str, int], lenders: Mapping[str, tuple[int, int]],
    owners: Mapping[int, Sequence[tuple[int, int]]], forced: set[str],
) -> Rows:  # fmt: skip
    model, row = [FILL] * size, [0] * size
    for token, place in ids.items():
        own = vocabulary.get(token)
        model[place], row[place] = lenders[token] if own is None or token in forced else (number, own)
    return Rows(torch.tensor(model), torch.tensor(row), owners)
