"""attn_implementation: varlen: packed rows by torch's own flash attention, with no other package.

Importing this module makes the name known to transformers. What is not packed (sampling, whole
logits, padded rows) is computed by sdpa.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """(B, T, heads, head_dim), of states (B, heads, T, head_dim). more: scaling, sliding_window; of
    packed rows, where each ends (cu_seq_lens_q) and how long the longest is (max_length_q)."""
    ends, longest = more.get("cu_seq_lens_q"), more.get("max_length_q")
    if ends is None:
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    before = (more.get("sliding_window") or 0) - 1  # tokens that a token sees, -1: all
    packed = [states[0].transpose(0, 1) for states in (query, key, value)]
    out = varlen_attn(
        *packed,
        cu_seq_q=ends,
        cu_seq_k=ends,
        max_q=longest,
        max_k=longest,
        scale=more.get("scaling"),
        window_size=(before, 0),
        enable_gqa=True,
    )
    return out[None], None


def mask_of(**options: Any) -> Tensor | None:
    """sdpa's mask, but none of T x T for packed rows: an empty one, which sdpa itself refuses."""
    is_packed = options.get("allow_is_causal_skip") is False
    if is_packed and options.get("attention_mask") is None:
        return torch.empty([0] * 4)
    return sdpa_mask(**options)


AttentionInterface.register("varlen", attention)
AttentionMaskInterface.register("varlen", mask_of)
