"""Tiny, seeded, randomly initialised `transformers` models of many families, for tests.

`tiny(family)` builds a model of two layers from its config, without network, and a batch of three rows for it.
Text rows have unequal lengths and are padded on the right. `transformers` starts biases, norm weights, class tokens and
running statistics as constants and the rest close to zero; here all are jittered, so that a comparison notices when
one of them is lost, and the output depends on every input.
"""

import torch
import transformers
from torch import nn

ROWS, LENGTHS, VOCAB, WIDTH, IMAGE, MELS = 3, (7, 5, 3), 99, 32, 32, 16
PAD, BOS, EOS = 0, 1, VOCAB - 1

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_ENCODER = {**_TOKENS, **_SIZE, "max_position_embeddings": 32}
_GQA = {**_ENCODER, "num_key_value_heads": 2}
_VISION = {**_SIZE, "image_size": IMAGE, "patch_size": 8}
_SEQ2SEQ = {
    **_TOKENS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": BOS,
}
_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_DISTILBERT = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 32}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
_CLIP = {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 16}
_WAV2VEC2 = {
    "conv_dim": (WIDTH, WIDTH, WIDTH),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_AST = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 24, "num_mel_bins": MELS}
_SWIN = {"image_size": IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}

# family: (model class, config class, config arguments, kind of batch)
_TABLE = {
    "bert": ("BertModel", "BertConfig", _ENCODER, "text"),
    "roberta": ("RobertaModel", "RobertaConfig", _ENCODER, "text"),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {**_TOKENS, **_DISTILBERT}, "text"),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", {**_ENCODER, **_DEBERTA_V3}, "text"),
    "electra": ("ElectraModel", "ElectraConfig", {**_ENCODER, "embedding_size": 16}, "text"),
    "albert": ("AlbertModel", "AlbertConfig", {**_ENCODER, "embedding_size": 16}, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_TOKENS, **_GPT2}, "text"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER, "text"),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_ENCODER, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}, "text"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_TOKENS, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}, "text"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GQA, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GQA, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GQA, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}, "text"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GQA, "head_dim": 8, "query_pre_attn_scalar": 8}, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GQA, "text"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GQA, "num_local_experts": 4}, "text"),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_TOKENS, **_T5}, "text2text"),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 32}, "text2text"),
    "vit": ("ViTModel", "ViTConfig", _VISION, "image"),
    "deit": ("DeiTModel", "DeiTConfig", _VISION, "image"),
    "swin": ("SwinModel", "SwinConfig", _SWIN, "image"),
    "clip": ("CLIPModel", "CLIPConfig", _CLIP, "image+text"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": MELS, "max_source_positions": 12, "max_target_positions": 32},
        "speech2text",
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", {**_SIZE, **_WAV2VEC2}, "wave"),
    "ast": ("ASTModel", "ASTConfig", {**_SIZE, **_AST}, "spectrogram"),
    "resnet": ("ResNetModel", "ResNetConfig", _RESNET, "image"),
}

FAMILIES: tuple[str, ...] = tuple(_TABLE)


def _mask(lengths: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _text(prefix: str = "", lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    mask = _mask(lengths)
    ids = torch.randint(BOS + 1, EOS, mask.shape) * mask
    ids[torch.arange(ROWS), torch.tensor(lengths) - 1] = EOS
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE)}


def _wave() -> dict[str, torch.Tensor]:
    mask = _mask((400, 320, 240))
    return {"input_values": torch.randn(mask.shape) * mask, "attention_mask": mask}


_BATCH = {
    "text": _text,
    "text2text": lambda: {**_text(), **_text("decoder_", (3, 6, 4))},
    "image": _image,
    "image+text": lambda: {**_text(), **_image()},
    "speech2text": lambda: {"input_features": torch.randn(ROWS, MELS, 24), **_text("decoder_")},
    "wave": _wave,
    "spectrogram": lambda: {"input_values": torch.randn(ROWS, 24, MELS)},
}


@torch.no_grad()
def _jitter(model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim and p.requires_grad:
            p.add_(torch.randn_like(p), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer), alpha=0.5)


def tiny(family: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model of `family` in eval mode and a batch of three rows for `model(**batch)`.

    The same seed gives the same weights and batch; the global random state is left as it was.
    """
    model_name, config_name, kwargs, kind = _TABLE[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**kwargs)).eval()
        _jitter(model)
        return model, _BATCH[kind]()


def output(module_output) -> torch.Tensor:
    """The main float tensor of a model's output: CLIP's `logits_per_image`, else `logits`, else `last_hidden_state`."""
    for name in ("logits_per_image", "logits", "last_hidden_state"):
        value = getattr(module_output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError(f"no main tensor in {type(module_output).__name__}")
