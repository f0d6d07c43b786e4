"""Estimators of what a run reports: accuracy, rollouts, tokens, costs; and of what it takes."""

import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import fsdp_utils
import hints
from configs import say
from configs.plan import bytes_per_gpu


def pass_at_k(n, c, k):
    """The unbiased chance that one of k of n samples is right when c are."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # E8


def accuracy_at_k(right_PK) -> dict:
    """avg@k, its standard error over problems, pass@k and pass@k/2, from P problems' k samples."""
    right_PK = np.array(right_PK)
    n, k = right_PK.shape
    error = right_PK.mean(1).std(ddof=n > 1) / math.sqrt(n)
    passed = {f"_pass@{j}": float(np.mean([pass_at_k(k, int(c), j) for c in right_PK.sum(1)]))
              for j in {k // 2, k} - {0, 1}}  # fmt: skip
    return {"": float(right_PK.mean()), "_stderr": float(error), **passed}


def rollout_metrics(lines, config) -> dict:
    """Metrics of a step from its rollout lines, with the tries as hints.Try."""
    counts, means = Counter(), defaultdict(list)
    for line in lines:
        tries, first = line["tries"], line["tries"][0]
        counts["hint/unsolved"] += hints.needs_hint(tries, config) and not line["is_deferred"]
        if not line["earlier_tries"] and not first.ratio:  # fresh problems
            means["accuracy_without_hint"].append(first.pass_rate)
            means["hard_fraction"].append(hints.needs_hint([first], config))
        for tried in tries[line["earlier_tries"] :]:
            is_solved = not tried.skipped and not hints.needs_hint([tried], config)
            at = f"@{tried.ratio:g}"
            counts.update({
                "tokens/generated": tried.tokens, "tokens/generated" + at: tried.tokens,
                "hint/trimmed": tried.trimmed, "hint/skipped": tried.skipped,
                "hint/tried" + at: not tried.skipped, "hint/solved" + at: is_solved})  # fmt: skip
        for sample in line["completions"]:
            means["tokens/completion"].append(sample["tokens"])
            means["truncated"].append(sample["finish_reason"] == "length")
            for name in config.reward_funcs:
                means[f"reward/{name}"].append(sample[name])
    means = {key: float(np.mean(value)) for key, value in means.items()}
    return {**means, **dict(sorted(counts.items()))}


def token_sums(loss, is_clipped, entropy, old_logp, batch, config) -> dict:
    """Sums over the tokens of a micro-batch, and the largest |old_logp - behaviour_logp|."""
    delta = (old_logp - batch["behaviour_logp"]) * batch["is_on_context"]
    parts = {"loss": loss, "tokens": batch["policy_weight"], "clipped": is_clipped,
             "entropy": entropy * batch["policy_weight"], "compared": batch["is_on_context"],
             "mismatch_k3": torch.expm1(delta) - delta,
             "capped": delta > math.log(config.importance_cap or math.inf)}  # fmt: skip
    sums = {key: part.double().sum() for key, part in parts.items()}
    return sums | {"mismatch_max": delta.abs().max().double()}


def token_metrics(sums) -> dict:
    """The token_sums of a step, over all ranks: sums of loss and tokens, means of the others."""
    stacked = {key: torch.stack([part[key] for part in sums]) for key in sums[0]}
    largest = {"mismatch_max": float(stacked.pop("mismatch_max").max())}
    total = fsdp_utils.all_reduce_scalars({key: float(x.sum()) for key, x in stacked.items()})
    for key in ("entropy", "clipped"):
        total[key] /= max(total["tokens"], 1)
    for key in ("mismatch_k3", "capped"):
        total[key] /= max(total["compared"], 1)
    return total | fsdp_utils.all_reduce_scalars(largest, "max")


def costs(run, rows, generated, seconds) -> dict:
    """What a step took: seconds of this rank by phase (verify is part of generate, logprob of
    train), tokens, GPU memory, verifier failures."""
    if any(run.pool.stats.values()):
        say(f"rewards: {run.pool.stats} so far, these texts scored 0; last: {run.pool.error}")
    stats = {f"verifier/{name}": count for name, count in run.pool.stats.items()}
    used = [row for row in rows if row.advantage or run.config.beta or any(row.likelihood_weight)]
    stats["tokens/trained"] = run.config.num_iterations * sum(len(row.input_ids) for row in used)
    metrics = fsdp_utils.all_reduce_scalars(stats) | {"tokens/s": generated / seconds}
    metrics |= {f"seconds/{name}": spent for name, spent in fsdp_utils.seconds.items()}
    if torch.cuda.is_available():  # the engine's memory is in what is free
        free, whole = torch.cuda.mem_get_info()
        metrics |= {"gib/used": (whole - free) / 2**30,
                    "gib/peak": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
    if run.config.gpu_tflops:  # model FLOPs utilization: attention and recomputation not counted
        flops = 6 * sum(p.numel() for p in run.policy.parameters()) * metrics["tokens/trained"]
        speed = flops / run.world / metrics["seconds/train"]
        metrics["mfu"] = speed / (run.config.gpu_tflops * 1e12)
    return metrics


def model_size(config) -> tuple:
    """(parameters, those that zero3 holds at once) of a model whose configuration alone is read."""
    shape = AutoConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    size = sum(p.numel() for p in model.parameters())
    blocks = list(model.base_model.layers)
    return size, size - sum(p.numel() for block in blocks[2:] for p in block.parameters())


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
    print(f"---- bytes per GPU, activations excluded: {bytes_per_gpu(config, world, *model_size(config))}")
