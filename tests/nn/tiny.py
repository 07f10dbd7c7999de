"""Tiny random models of each family."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen2Config,
    SwitchTransformersConfig,
    T5Config,
)

FAMILIES = ["t5", "bart", "gpt2", "llama", "qwen2", "gemma2"]
# one that flattens rows, one that keeps a state beside keys and values, one without a cache, one with experts of its own
ODD = ["opt", "lfm2", "openai-gpt", "switch"]
_DECODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def config(family):
    if family in ("t5", "t5-ungated"):
        return T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu" if family == "t5" else "relu",  # as T5 1.1, and as T5
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    if family == "switch":
        return SwitchTransformersConfig(
            vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=4, num_heads=4,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=64, router_jitter_noise=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    if family == "bart":
        return BartConfig(
            vocab_size=100, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=1024,
            pad_token_id=0, bos_token_id=2, eos_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None,
        )  # fmt: skip
    if family in ("gpt2", "openai-gpt"):
        return (GPT2Config if family == "gpt2" else OpenAIGPTConfig)(
            vocab_size=100,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=1024,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    if family == "opt":
        return OPTConfig(
            vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=24,
            do_layer_norm_before=False, max_position_embeddings=1024, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )  # fmt: skip
    if family == "lfm2":
        return Lfm2Config(
            **_DECODER | {"block_auto_adjust_ff_dim": False},
            layer_types=["conv", "full_attention", "conv", "full_attention"],
        )
    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}[family](**_DECODER)


def tiny_model(family, blocks=None):
    """A seeded model in evaluation mode; large enough weights that generated answers differ."""
    torch.manual_seed(0)
    found = config(family)
    if blocks is not None:
        found.num_hidden_layers = found.num_decoder_layers = blocks
    model = (AutoModelForSeq2SeqLM if found.is_encoder_decoder else AutoModelForCausalLM).from_config(found)
    return model.eval()


def assert_alike(found, expected, near=1e-5):
    """Equal tensors, each in units of its largest number."""
    for got, wanted in zip(found, expected, strict=True):
        scale = wanted.detach().abs().max().clamp_min(1e-12)
        torch.testing.assert_close(got / scale, wanted / scale, atol=near, rtol=0)
