"""Sites: the named places of a network where an adapter can act, found on any ``nn.Module``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn

from .tokens import attention_shape

Kind = Literal["linear", "conv", "embedding", "norm", "experts", "parameter", "attention", "block", "input"]
KINDS: tuple[str, ...] = ("linear", "conv", "embedding", "norm", "experts", "parameter", "attention", "block", "input")

# Roles by the end of a module's path, first match wins. One table for all families: the names of the field overlap.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(lm_head|proj_out|embed_out|score|classifier(\.\w+)*|predictions\.\w+|cls\.\w+|head|fc)$", "head"),
    (r"pooler(\.dense)?$", "pooler"),
    (r"(c_attn|qkv|qkv_proj|query_key_value|Wqkv|in_proj_weight)$", "qkv"),
    (r"(query|q_proj|q_lin|query_proj|q_attn|q|q_proj_weight|wq)$", "query"),
    (r"(key|k_proj|k_lin|key_proj|k|k_proj_weight|wk)$", "key"),
    (r"(value|v_proj|v_lin|value_proj|v|v_proj_weight|wv)$", "value"),
    (r"(kv|kv_proj)$", "key_value"),
    (r"(pos_key_proj|pos_query_proj)$", "position"),
    (r"\w*(attn|attention)\.c_proj$", "attn_out"),
    (r"\w*(?i:attn|attention)\w*\.(output\.dense|dense|out_lin|out_proj|o_proj|o|proj|to_out\.0|wo)$", "attn_out"),
    (r"gate_up_proj$", "gate_up"),
    (r"(gate_proj|wi_0|experts\.\d+\.w1|feed_forward\.w1)$", "gate"),
    (r"(mlp|moe|block_sparse_moe)\.(gate|router)(\.weight)?$|router(\.\w+)?$", "router"),
    (r"(intermediate\.dense|lin1|ffn|c_fc|dense_h_to_4h|up_proj|fc1|wi|wi_1|w3|intermediate_dense|linear1)$", "up"),
    (r"(output\.dense|lin2|ffn_output|c_proj|dense_4h_to_h|down_proj|fc2|wo|w2|output_dense|linear2)$", "down"),
    (r"(word_embeddings|wte|embed_tokens|embed_in|token_embedding|shared|tok_embeddings)$", "token"),
    (r"(position_embeddings?|wpe|embed_positions|rel_embeddings|relative_attention_bias|pos_embed)$", "position"),
    (r"(relative_position_bias_table)$", "position"),
    (r"token_type_embeddings$", "type"),
    (r"(patch_embeddings\.projection|patch_embedding|patch_embed\.proj)$", "patch"),
    (
        r"((text_|visual_)?projection|embeddings_project|embedding_hidden_mapping_in|project_in|project_out)$",
        "projection",
    ),
    (r"reduction$", "projection"),
)
_ROLE_PATTERNS = tuple((re.compile(r"(^|\.)" + f"(?:{pattern})"), role) for pattern, role in _ROLES)

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "qkv", "key_value", "attn_out"),
    "mlp": ("up", "down", "gate", "gate_up"),
}
ROLES: tuple[str, ...] = tuple(dict.fromkeys([role for _, role in _ROLES] + ["norm", "conv", "other"]))
# What "linear" leaves out: layers that only read the network's result or choose experts.
NOT_IN_STACK = ("head", "pooler", "router")


@dataclass(frozen=True, slots=True)
class Site:
    """A named place where an adapter can act.

    Attributes:
        path: the module's path in the model (the first one where a module is shared).
        kind: what the module is; see `KINDS`.
        role: what it does in its block (``query``, ``up``, ``token``, ...), ``other`` where unknown.
        shape: the weight's shape as it is stored. For the input the token table's (0 entries for images); for attention
            (heads, key and value heads, head size), empty where it does not go through transformers' table of attention
            functions; empty for blocks.
        layer: position in its stack of blocks, or None outside of one.
        depth: ``layer`` as a fraction of the stack, 0 for the first block and 1 for the last.
        param: the parameter's name where the site is one raw parameter of its module, else empty.
        transposed: the weight is stored [d_in, d_out] (GPT-2's ``Conv1D``).
        read: ``"call"`` when the module is called, ``"weight"`` when its weight is read by somebody else.
        rows: whether the first dimension of what the site sees is the batch (False for gathered tokens of an expert,
            for tables of relative positions and for sequence-first layers).
    """

    path: str
    kind: str
    role: str
    shape: tuple[int, ...] = ()
    layer: int | None = None
    depth: float | None = None
    param: str = ""
    transposed: bool = False
    read: str = "call"
    rows: bool = True
    bias: bool = False

    @property
    def name(self) -> str:
        """The path, with the parameter's name for raw parameters."""
        return f"{self.path}.{self.param}".lstrip(".") if self.param else self.path

    @property
    def shown(self) -> str:
        """The name as messages say it: the model itself has none."""
        return f"the site {self.name!r}" if self.name else "the input of the whole model"

    @property
    def d_in(self) -> int:
        """Input features (for an embedding, the number of entries)."""
        if self.kind == "embedding":
            return self.shape[0]
        return self.shape[0] if self.transposed else self.shape[-1] if self.kind == "experts" else self.shape[1]

    @property
    def d_out(self) -> int:
        """Output features."""
        if self.kind == "embedding" or self.transposed:
            return self.shape[1]
        return self.shape[1] if self.kind == "experts" else self.shape[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a card. Defaults are left out."""
        standard = {f.name: f.default for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v != standard[k]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """The reverse of ``as_dict``."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return cls(**values)


def role_of(name: str, kind: str = "linear") -> str:
    """The role of the module at ``name``, from the end of its path."""
    if kind == "norm":
        return "norm"
    if kind in ("attention", "block", "input"):
        return kind
    for pattern, role in _ROLE_PATTERNS:
        if pattern.search(name):
            return role
    return "conv" if kind == "conv" else "other"


def find_sites(root: nn.Module) -> list[Site]:
    """Every site of a network, in the order of its modules. A module that is shared gives one site."""
    blocks = stacks(root)
    entries = _entries(root)
    found: list[Site] = []
    for path, module in root.named_modules():
        layer, depth = _place(path, blocks)
        rows = _sees_rows(root, path)
        for kind, param, shape, transposed, read in _describe(root, path, module, blocks, entries):
            name = f"{path}.{param}" if param else path
            bias = not param and module._parameters.get("bias") is not None
            found.append(
                Site(path, kind, role_of(name, kind), shape, layer, depth, param, transposed, read, rows, bias)
            )
    return found


_Description = tuple[str, str, tuple[int, ...], bool, str]


def _describe(
    root: nn.Module, path: str, module: nn.Module, blocks: dict[str, tuple[int, int]], entries: tuple[str, ...]
) -> Iterator[_Description]:
    if path in entries:
        yield "input", "", _table(module), False, "call"
    if path in blocks:
        yield "block", "", (), False, "call"
    kind = _leaf_kind(module)
    weight = _stored(module, "weight")
    if kind and weight is not None:
        yield kind, "", weight, type(module).__name__ == "Conv1D", _how_read(root, path)
        return
    if _is_attention(module) and not any(_is_attention(m) for m in module.modules() if m is not module):
        yield "attention", "", attention_shape(module), False, "call"
    for name, parameter in module._parameters.items():
        if parameter is None or ".parametrizations." in f".{path}.":
            continue
        shape = tuple(parameter.shape)
        projection = isinstance(module, nn.MultiheadAttention) and parameter.dim() == 2
        fused = parameter.dim() == 3 and "expert" in f"{type(module).__name__} {path}".lower()
        yield "linear" if projection else "experts" if fused else "parameter", name, shape, False, "weight"


def _base_path(root: nn.Module) -> str:
    """The path of the network without its head."""
    base = getattr(root, "base_model", root)
    return next((path for path, module in root.named_modules() if module is base), "")


CLASS_TOKENS = ("cls_token", "class_embedding", "distillation_token")  # what stands before an image's patches
TOWERS = ("text_model", "vision_model")  # what transformers calls the two networks of a dual model


def _entries(root: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that turn token ids (or pixels) into the vectors that the blocks work on."""
    path = _base_path(root)
    towers = tuple(f"{path}.{name}".lstrip(".") for name in TOWERS if name in root.get_submodule(path)._modules)
    if len(towers) == len(TOWERS):
        return towers
    double = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    while True:  # OPT and encoder-decoders have a network inside that looks the tokens up
        for name in ("encoder",) if double else ("decoder", "encoder"):
            inner = root.get_submodule(path)._modules.get(name)
            if inner is not None and _table(inner) and "inputs_embeds" in inspect.signature(inner.forward).parameters:
                path = f"{path}.{name}".lstrip(".")
                break
        else:
            return (path,)


def _table(module: nn.Module) -> tuple[int, ...]:
    """The shape of the table of token vectors, () where there is none."""
    get = getattr(module, "get_input_embeddings", None)
    try:
        table = get() if get is not None else None
    except (NotImplementedError, AttributeError):
        table = None
    if isinstance(table, nn.Embedding):
        return tuple(table.weight.shape)
    # an image network with a class token takes virtual tokens too; it has no table
    marked = any(hasattr(getattr(module, "embeddings", None), name) for name in CLASS_TOKENS[:2])
    config: Any = getattr(module, "config", None)
    return (0, int(config.hidden_size)) if marked else ()


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("Attention")


def _leaf_kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear) or name == "Conv1D":
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    norms = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm
    if isinstance(module, norms) or (name.endswith("Norm") and not any(module.children())):
        return "norm"
    return ""


def _stored(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of a weight, also where a parametrisation computes it."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return tuple(parameter.shape)
    parametrized = module._modules.get("parametrizations")
    if parametrized is not None and name in parametrized._modules:
        return tuple(getattr(module, name).shape)
    return None


def _parents(root: nn.Module, path: str) -> Iterator[nn.Module]:
    module = root
    for part in path.split(".")[:-1] if path else []:
        yield module
        module = module._modules[part]  # type: ignore[assignment]
    if path:
        yield module


def _how_read(root: nn.Module, path: str) -> str:
    """``weight`` for modules whose owner reads their weight and does not call them, or not always."""
    *_, owner, module = [None, *_parents(root, path), root.get_submodule(path)]
    if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer) or path.endswith("rel_embeddings"):
        return "weight"
    # a table of positions with a forward of its own (BART, OPT, Whisper) computes what it looks up: x is not the index
    own = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
    return "weight" if own and not hasattr(module, "embed_scale") else "call"


def _sees_rows(root: nn.Module, path: str) -> bool:
    *above, name = path.split(".")
    if "experts" in above or name == "relative_attention_bias":
        return False
    parents = list(_parents(root, path))
    owner = type(parents[-1]).__name__ if parents else ""
    # DeBERTa pushes its table of relative positions through these
    if re.match(r"Disentangled\w*Attention", owner) and (
        name.startswith("pos_") or (name in ("query_proj", "key_proj") and getattr(parents[-1], "share_att_key", False))
    ):
        return False
    if re.match(r"Deberta\w*Encoder$", owner) and name in ("LayerNorm", "rel_embeddings"):
        return False
    # a torch layer keeps the flag in its attention
    inside = [m for parent in parents for m in (parent.modules() if isinstance(parent, _TORCH_LAYERS) else (parent,))]
    return all(getattr(module, "batch_first", True) for module in inside)


_TORCH_LAYERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def stacks(root: nn.Module) -> dict[str, tuple[int, int]]:
    """Path of each block to its (position, length of its stack)."""
    found: dict[str, tuple[int, int]] = {}

    def blocks(prefix: str, container: nn.Module) -> Iterable[str]:
        for name, child in container.named_children():
            path = f"{prefix}.{name}"
            inner = [(n, c) for n, c in child.named_children() if _is_stack(c)]
            # stages and groups hold the blocks one level down (Swin, ResNet, ALBERT)
            if re.search(r"(Stage|Group)$", type(child).__name__) and inner:
                for n, c in inner:
                    yield from blocks(f"{path}.{n}", c)
            else:
                yield path

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}".lstrip(".")
            if _is_stack(child):
                members = list(blocks(path, child))
                found.update({member: (i, len(members)) for i, member in enumerate(members)})
            else:
                walk(path, child)

    walk("", root)
    return found


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(children) > 0
        and len({type(child).__name__ for child in children}) <= 2  # some stacks alternate two kinds of block
        and all(any(True for _ in child.children()) for child in children)
        and any(_leaf_kind(leaf) in ("linear", "conv") for leaf in module.modules())
    )


def _place(path: str, blocks: dict[str, tuple[int, int]]) -> tuple[int | None, float | None]:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        place = blocks.get(".".join(parts[:end]))
        if place is not None:
            layer, length = place
            return layer, layer / (length - 1) if length > 1 else 0.0
    return None, None
