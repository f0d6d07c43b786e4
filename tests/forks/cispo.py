"""CISPO (2506.13585): the ratio is a clipped weight without a gradient: no token is left out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ghpo


def token_loss(logp, old_logp, ref_logp, batch, config):
    ratio = torch.exp(logp - old_logp)
    weight = ratio.clamp(max=1 + (config.epsilon_high or config.epsilon)).detach()
    loss = -weight * batch["advantage"] * logp * batch["policy_weight"]
    return loss, (weight < ratio).detach()


ghpo.token_loss = token_loss
sys.argv += ["num_iterations=2"]
if __name__ == "__main__":
    ghpo.main()
