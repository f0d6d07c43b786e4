"""Estimators of what a run reports: accuracy, rollouts, tokens, costs; and of what it takes."""

import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM



def memory_estimate(n_params, world, sharding, replicate=1, dtype_bytes=2, gathered=0) -> dict:
    """Bytes per GPU of fp32 masters, compute copy, fp32 gradients and Adam's two moments.

    gathered: weights that zero3 holds at once (the root's plus two blocks'). Activations excluded.
    """
    shards = 1 if sharding == "ddp" else world // replicate
    wrapped = world > 1 or dtype_bytes < 4
    copied = gathered if sharding == "zero3" else n_params
    parts = {"weights": 4 * n_params // shards, "compute_copy": wrapped * copied * dtype_bytes,
             "gradients": 4 * n_params // shards, "optimizer": 8 * n_params // shards}
    return {**parts, "total": sum(parts.values())}


def bytes_per_gpu(config, world) -> dict:
    """memory_estimate for a run's model, of which only the configuration is read."""
    shape = AutoConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    size = sum(p.numel() for p in model.parameters())
    blocks = list(model.base_model.layers)
    held = size - sum(p.numel() for block in blocks[2:] for p in block.parameters())
    width = torch.finfo(getattr(torch, config.torch_dtype)).bits // 8
    parts = memory_estimate(size, world, config.sharding, config.replicas, width, held)
    return {"parameters": size, **parts}


