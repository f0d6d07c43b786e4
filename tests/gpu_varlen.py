"""Rows packed for varlen on a GPU, in bfloat16, against the same model in float32, unpacked.

    python tests/gpu_varlen.py        needs a GPU of compute capability 8 or newer, half a minute

Its error may be at most twice what sdpa has in bfloat16 without packing.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import configs.varlen  # noqa: F401
import ghpo

SHAPE = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
         "initializer_range": 0.1}  # fmt: skip
LENGTHS = [700, 333, 128, 65, 20, 2]


def scores(model, attention, is_packed, device, dtype):
    """(log-probs, gradient of all weights) of random rows, in float64."""
    model = copy.deepcopy(model).to(device, dtype)
    model.set_attn_implementation(attention)
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, (length,), generator=rng).tolist() for length in LENGTHS]
    rows = [ghpo.Row.weightless(one) for one in ids]
    inputs, _ = ghpo.collate(rows, is_packed, device, torch.float32)
    logp, _ = ghpo.Policy(model)(**inputs)
    logp.sum().backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return logp.detach().double(), gradient


def main(device, dtype):
    """Prints the errors; are they small enough?"""
    is_right = True
    for window in (None, 64):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window))
        exact = scores(model, "sdpa", False, device, torch.float32)
        plain = scores(model, "sdpa", False, device, dtype)
        packed = scores(model, "varlen", True, device, dtype)
        for name, right, usual, ours in zip(("log-probs", "gradient"), exact, plain, packed):
            usual, ours = (float((x - right).norm() / right.norm()) for x in (usual, ours))
            print(f"window {window}, {name}: varlen off by {ours:.2g}, sdpa by {usual:.2g}")
            is_right &= ours <= 2 * usual + 1e-5
    print("varlen is right" if is_right else "varlen is WRONG: set attn_implementation=sdpa")
    return is_right


if __name__ == "__main__":
    sys.exit(not main(torch.device("cuda"), torch.bfloat16))
