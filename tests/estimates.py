"""Estimates for `ghpo.py --dry_run`: what a configuration takes, by arithmetic."""

import os
from dataclasses import asdict

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


def dry_run(config) -> None:
    """Prints config, arithmetic, data, a problem as the model sees it at each stage, and memory."""
    import ghpo

    print(yaml.safe_dump(asdict(config), sort_keys=False))
    prompts, world = ghpo.Prompts(config), int(os.environ.get("WORLD_SIZE", 1))
    problems = ghpo.load_problems(config, prompts)
    ghpo.make_plan(config, world, len(problems))
    problem = max(problems, key=lambda p: bool(p.trace))
    for omega in [0.0, *config.hint_ratio]:
        hint, is_trimmed = prompts.fit(problem, omega)
        ids, _ = prompts.ids(problem, hint)
        print(f"---- row {problem.id}, omega {omega:g}, {len(ids)} tokens, trimmed: {is_trimmed}")
        print(prompts.tokenizer.decode(ids))
    print(f"---- bytes per GPU, activations excluded: {bytes_per_gpu(config, world)}")
