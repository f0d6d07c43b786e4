"""attn_implementation: varlen: packed rows by torch's own flash attention, with no other package.

Importing this module makes the name known to transformers. What is not packed (sampling, whole
logits, padded rows) is computed by sdpa.
"""

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """(B, T, heads, head_dim), of states (B, heads, T, head_dim). more: of packed rows, where each
    ends (cu_seq_lens_q) and how long the longest is (max_length_q)."""
    ends = more.get("cu_seq_lens_q")
    if ends is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    longest = more["max_length_q"]
    before = sliding_window - 1 if sliding_window else -1  # tokens that a token sees, -1: all
    packed_query, packed_key, packed_value = (
        states[0].transpose(0, 1) for states in (query, key, value)
    )
    out = varlen_attn(
        packed_query,
        packed_key,
        packed_value,
        cu_seq_q=ends,
        cu_seq_k=ends,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=True,
    )
    return out[None], None


def mask(
    *, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **more: Any
) -> torch.Tensor | None:
    """sdpa's mask, but none of T x T for packed rows: an empty one, which sdpa itself refuses."""
    if attention_mask is None and not allow_is_causal_skip:
        return torch.empty(0, 0, 0, 0)
    return sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **more
    )


AttentionInterface.register("varlen", attention)
AttentionMaskInterface.register("varlen", mask)
