"""Small random models on disk and in memory, for tests of patching and comparing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 257  # the bytes, and an end token
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.0,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=120),
    "gemma2": lambda: Gemma2Config(
        **COMMON, sliding_window=40, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=1024, n_embd=32, n_layer=3, n_head=4, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=256, eos_token_id=256, pad_token_id=256,
    ),
}  # fmt: skip


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this architecture in evaluation mode; weights large enough that attention matters."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def save(directory: Path, name: str = "llama") -> Path:
    """Such a model on disk, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = bytes_to_unicode()
    vocabulary = {symbols[byte]: byte for byte in range(256)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)
    make(name).save_pretrained(directory)
    return directory
