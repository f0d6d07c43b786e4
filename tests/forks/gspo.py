"""GSPO (2507.18071): the ratio of a whole sequence, the geometric mean of its tokens' ratios, is
clipped in the place of each token's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ghpo


def token_loss(logp, old_logp, ref_logp, batch, config):
    row, weight = batch["row"], batch["policy_weight"]
    zeros = torch.zeros(int(row.max()) + 1, dtype=logp.dtype, device=logp.device)
    total = zeros.index_add(0, row, (logp - old_logp) * weight)
    length = zeros.index_add(0, row, weight).clamp(min=1)
    ratio = torch.exp(total / length)[row]
    clipped = ratio.clamp(1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
    loss = -torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"]) * weight
    return loss, (clipped - ratio).detach() * batch["advantage"] < 0


ghpo.token_loss = token_loss
sys.argv += ["num_iterations=2"]
if __name__ == "__main__":
    ghpo.main()
