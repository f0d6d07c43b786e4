"""Tiny random models of the families that people train, with the tokenizer of tests/tiny/base.

Their weights are scaled up, so that a scale or cap of the logits that is left out shows.
"""

from pathlib import Path

import torch
import transformers

BASE = Path(__file__).parent / "tiny" / "base"
PAD, EOS = 256, 257  # of the tiny tokenizer
VOCABULARY = 266

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip

# family: (class of the causal LM, what its config has besides SIZES)
FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "llama_without_pad": ("LlamaForCausalLM", {"pad_token_id": None}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 8}),
    "phi": ("PhiForCausalLM", {"num_key_value_heads": 4, "resid_pdrop": 0.1}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 8.0}),
    "cohere2": ("Cohere2ForCausalLM", {"logit_scale": 0.25}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "minicpm3": ("MiniCPM3ForCausalLM", {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8}),
    "falcon_h1": ("FalconH1ForCausalLM", {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "lm_head_multiplier": 0.5, "mamba_chunk_size": 16}),
    "gpt2": ("GPT2LMHeadModel", {"n_positions": 512}),
    "opt": ("OPTForCausalLM", {
        "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "seed_oss": ("SeedOssForCausalLM", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
}  # fmt: skip


def build(family: str, scale: float = 6.0, seed: int = 0):
    """The causal LM of a family, its matrices `scale` times what the library initialises."""
    name, options = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**(SIZES | options)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(scale)
    return model
