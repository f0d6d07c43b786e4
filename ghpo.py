"""GHPO and GRPO from scratch: sample groups, hint the groups that fail, take one gradient step.

    python ghpo.py --config configs/tiny.yaml                          one process, CPU or GPU
    torchrun --nproc_per_node 8 ghpo.py --config configs/x.yaml lr_scheduler_type=constant
    python ghpo.py --config configs/x.yaml --dry_run                   what would run, model unloaded

`train` is the algorithm; E1-E8 are the equations of the README. Fork here for the loss and the loop,
in hints.py for the method, in rollout.py for samplers, in reward.py for rewards.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fsdp_utils
import hints
import rollout
from reward import VerifierPool, parse_gold, resolve_reward
from rollout import Group, Request, Sampling


@dataclass(frozen=True)
class Config:
    """Every setting, one line each. "steps" are rollout batches everywhere."""

    # model
    model_name_or_path: str = ""  # hub name or folder, a causal LM with a chat template
    model_revision: str = "main"
    torch_dtype: str = "bfloat16"  # compute type; weights and optimizer are always float32
    bf16: bool | None = None  # the reference's flag: must agree with torch_dtype
    attn_implementation: str = "sdpa"  # flash_attention_2 falls back to sdpa where not installed
    # data
    dataset_name: str = ""  # hub name, folder, or .jsonl / .json / .parquet file
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_prompt_column: str = "problem"  # text or a list of chat messages
    dataset_answer_column: str = "solution"  # the gold answer, as in the reference's data
    dataset_hint_column: str = "solution_hint"  # the solution trace that hints are cut from
    dataset_level_column: str = "level"  # difficulty, for the curriculum; may be missing
    system_prompt: str | None = None
    curriculum: bool = False  # easy to hard by level instead of shuffled (GRPO-CL)
    # hints
    rl_type: str = "ghpo"  # ghpo | grpo (= no hints)
    hint_ratio: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # omega; one = fixed
    start_hint_step: int = 0  # cold start: no hints in the first so many steps
    hint_trigger: str = "accuracy"  # reward that decides what is hard; "always" hints everything
    hint_threshold: float = 0.0  # hard: mean trigger reward of the group <= this
    hint_where: str = "user"  # user (message) | assistant (prefix of the answer)
    hint_timing: str = "inline"  # inline (paper) | deferred (failed problems return next step)
    deferred_share: float = 0.5  # largest part of a step's prompts that are returning problems
    hint_context: str = "hinted"  # loss sees the hint (paper) | original: clip on the plain prompt
    hint_exhausted: str = "keep"  # a group that fails the last stage: keep (reference) | drop
    # rollout
    engine: str | None = None  # hf | vllm | server; unset: vllm if use_vllm else hf
    use_vllm: bool | None = None
    num_generations: int = 8  # G
    max_prompt_length: int = 512  # tokens; longer problems are dropped, longer hints shortened
    max_completion_length: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    vllm_gpu_memory_utilization: float = 0.3  # of the whole GPU
    vllm_server_host: str = "127.0.0.1"
    vllm_server_port: int = 8000
    # rewards
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    reward_weights: list[float] = field(default_factory=lambda: [1.0, 0.5])
    verifier_timeout: float = 5.0  # seconds an answer, then it scores 0
    # loss
    loss_type: str = "bnpo"  # bnpo (the reference's) | dapo | grpo | dr_grpo, see E6
    epsilon: float = 0.2
    epsilon_high: float | None = None  # unset: epsilon
    beta: float = 0.0  # KL coefficient; > 0 keeps a frozen reference model
    scale_rewards: bool = True  # divide advantages by the group's standard deviation
    num_iterations: int = 1  # optimizer steps per rollout batch
    mask_truncated_completions: bool = False
    importance_cap: float | None = 2.0  # E7; null: no correction
    # optimisation
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "cosine"  # cosine | linear (both to 0) | constant
    warmup_ratio: float = 0.0
    warmup_steps: int = 0  # wins over warmup_ratio
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    nonfinite: str = "stop"  # stop | skip the step when the gradient is not finite
    num_train_epochs: float = 1.0
    max_steps: int = -1  # > 0 wins over num_train_epochs
    per_device_train_batch_size: int = 8  # completions; with the next line: prompts a step
    gradient_accumulation_steps: int = 1
    micro_batch_tokens: int = 16384  # tokens per forward: memory, not the objective
    packing: bool | None = None  # several rows in one sequence; unset: with flash attention only
    gradient_checkpointing: bool = True
    sharding: str = "zero3"  # zero3 | zero2 | ddp
    replicas: int = 1  # HSDP: copies of the sharded model (number of nodes)
    cpu_offload: bool = False
    startup_pass: bool | None = None  # a step at maximum length first; unset: on GPU
    # evaluation, never with hints
    eval_strategy: str = "no"  # no | steps
    eval_steps: int = 100
    eval_datasets: dict = field(default_factory=dict)  # name: path or {dataset_name: ..., ...}
    eval_samples: int = 1  # k of avg@k and pass@k
    eval_temperature: float = 0.0
    eval_max_completion_length: int | None = None  # unset: max_completion_length
    # output
    output_dir: str = "runs/ghpo"
    overwrite_output_dir: bool = False  # a run of another config there is moved aside
    save_strategy: str = "steps"  # no | steps | epoch
    save_steps: int = 100
    save_total_limit: int | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    report_to: list[str] = field(default_factory=list)  # wandb
    logging_steps: int = 1  # for the terminal; metrics.jsonl has every step
    seed: int = 42


# Keys of the reference's YAML that have no meaning here.
IGNORED = """vllm_device do_eval gradient_checkpointing_kwargs hub_strategy log_completions log_level
    logging_first_step logging_strategy per_device_eval_batch_size remove_unused_columns
    dataloader_num_workers ddp_timeout trust_remote_code use_liger_kernel run_name""".split()
CHOICES = {
    "torch_dtype": ("bfloat16", "float16", "float32", "float64"), "rl_type": ("ghpo", "grpo"),
    "hint_where": ("user", "assistant"), "hint_timing": ("inline", "deferred"),
    "hint_context": ("hinted", "original"), "hint_exhausted": ("keep", "drop"),
    "engine": ("hf", "vllm", "server", None), "loss_type": ("bnpo", "dapo", "grpo", "dr_grpo"),
    "lr_scheduler_type": ("cosine", "linear", "constant"), "nonfinite": ("stop", "skip"),
    "sharding": ("zero3", "zero2", "ddp"), "eval_strategy": ("no", "steps"),
    "save_strategy": ("no", "steps", "epoch"),
}  # fmt: skip
# Keys that may change when a run is resumed.
RESUMABLE = """output_dir overwrite_output_dir save_strategy save_steps save_total_limit push_to_hub
    hub_model_id report_to logging_steps micro_batch_tokens packing gradient_checkpointing sharding
    replicas cpu_offload startup_pass per_device_train_batch_size gradient_accumulation_steps
    verifier_timeout vllm_gpu_memory_utilization vllm_server_host vllm_server_port""".split()


class UserError(Exception):
    """Something the user can mend; shown as one message, without a traceback."""


# ---- configuration -----------------------------------------------------------------------------


def load_config(path, overrides=()):
    """YAML file and key=value strings to a checked Config; UserError names key, value and remedy."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: overrides are written key=value")
        values[key] = yaml.safe_load(value)
    return config_from(values)


def config_from(values):
    """A dict of settings to a checked Config."""
    types = get_type_hints(Config)
    for key in list(values):
        if key in IGNORED:
            say(f"config: {key} has no meaning here, ignored")
            del values[key]
        elif key not in types:
            near = difflib.get_close_matches(key, [*types, *IGNORED], n=1)
            raise UserError(f"config: unknown key {key!r}" + (f", did you mean {near[0]}?" * bool(near)))
    config = Config(**{key: cast(key, value, types[key]) for key, value in values.items()})
    check(config)
    return config


def cast(key, value, kind):
    """A YAML value as `kind`, a field's annotation; UserError when it cannot be one."""
    options = get_args(kind) if None in get_args(kind) or type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if str(kind).startswith("list["):
        items = value if isinstance(value, list) else [value]
        return [cast(key, item, get_args(kind)[0]) for item in items]
    if kind is str and value is False:
        return "no"  # YAML 1.1 reads an unquoted no as false
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-6 as text
        except ValueError:
            number = math.nan
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number == number // 1:
            return int(number)
    elif kind not in (int, float) and isinstance(value, kind):
        return value
    raise UserError(f"config: {key}={value!r} is no {getattr(kind, '__name__', kind)}")


def check(config):
    """Everything that can be wrong in a config by itself; UserError names the key."""

    def need(condition, message):
        if not condition:
            raise UserError("config: " + message)

    for key, allowed in CHOICES.items():
        value = getattr(config, key)
        need(value in allowed, f"{key}={value!r} must be one of {[a for a in allowed if a]}")
    for key in ("model_name_or_path", "dataset_name"):
        need(getattr(config, key), f"{key} is missing")
    need(all(0 <= omega <= 1 for omega in config.hint_ratio), "hint_ratio lies outside [0, 1]")
    need(config.hint_ratio == sorted(config.hint_ratio), "hint_ratio must be ascending")
    need(
        len(config.reward_weights) == len(config.reward_funcs),
        f"{len(config.reward_funcs)} reward_funcs but {len(config.reward_weights)} reward_weights",
    )
    need(
        config.rl_type == "grpo" or config.hint_trigger in ["always", *config.reward_funcs],
        f"hint_trigger={config.hint_trigger!r} is not among reward_funcs {config.reward_funcs}",
    )
    need(config.hint_trigger != "always" or config.hint_ratio, "always hinting needs a hint_ratio")
    engine = config.engine or ("vllm" if config.use_vllm else "hf")
    need(
        config.use_vllm is None or config.use_vllm == (engine != "hf"),
        f"engine={config.engine} and use_vllm={config.use_vllm} disagree: set only one",
    )
    need(
        config.bf16 is None or config.bf16 == (config.torch_dtype == "bfloat16"),
        f"bf16={config.bf16} and torch_dtype={config.torch_dtype} disagree",
    )
    need(config.temperature > 0, "temperature must be above 0 in training")
    at_least = {"num_generations": 2, "per_device_train_batch_size": 1, "num_iterations": 1,
                "gradient_accumulation_steps": 1, "max_prompt_length": 1, "max_completion_length": 1,
                "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "eval_samples": 1}  # fmt: skip
    for key, least in at_least.items():
        need(getattr(config, key) >= least, f"{key}={getattr(config, key)} must be at least {least}")


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from config, ranks and data."""

    prompts: int  # per step, all ranks together
    steps_per_epoch: int
    steps: int


def make_plan(config, world, n_problems):
    """Batch arithmetic, checked: prompts = ranks * per_device * accumulation / G."""
    c = config
    rows = c.per_device_train_batch_size * c.gradient_accumulation_steps
    if rows % c.num_generations:
        raise UserError(
            f"config: per_device_train_batch_size {c.per_device_train_batch_size} * "
            f"gradient_accumulation_steps {c.gradient_accumulation_steps} = {rows} is not divisible "
            f"by num_generations {c.num_generations}"
        )
    prompts = world * rows // c.num_generations
    if n_problems < prompts:
        raise UserError(f"{c.dataset_name}: {n_problems} usable problems, one step takes {prompts}")
    per_epoch = n_problems // prompts
    steps = c.max_steps if c.max_steps > 0 else max(1, int(c.num_train_epochs * per_epoch))
    say(
        f"batch: {world} ranks * {c.per_device_train_batch_size} per device * "
        f"{c.gradient_accumulation_steps} accumulation / {c.num_generations} generations = "
        f"{prompts} prompts a step; {n_problems} problems = {per_epoch} steps an epoch; {steps} steps"
    )
    return Plan(prompts, per_epoch, steps)


def say(message):
    """One line from rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, file=sys.stderr)


# ---- data --------------------------------------------------------------------------------------


def read_rows(config):
    """Rows of the data set as dicts; UserError names the file and line."""
    name, path = config.dataset_name, Path(config.dataset_name)
    try:
        if path.suffix == ".jsonl" and path.is_file():
            rows = []
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except ValueError as error:
                    raise UserError(f"{name}, line {number}: broken JSON, {error}") from None
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            if not path.is_file():
                raise UserError(f"dataset_name={name}: no such file")
            from datasets import load_dataset

            kind = "json" if path.suffix == ".json" else "parquet"
            rows = list(load_dataset(kind, data_files=name, split="train"))
        else:
            from datasets import load_dataset

            rows = list(load_dataset(name, config.dataset_config, split=config.dataset_split))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"dataset_name={name} cannot be loaded: {error}") from None
    if not rows:
        raise UserError(f"dataset_name={name} has no rows")
    return rows


def load_problems(config, prompts, with_trace):
    """Usable problems, ids = row numbers; what is dropped is counted and shown."""
    rows, problems, dropped = read_rows(config), [], defaultdict(list)
    needed = [config.dataset_prompt_column, config.dataset_answer_column]
    needed += [config.dataset_hint_column] * with_trace
    for column in needed:
        if column not in rows[0]:
            raise UserError(
                f"{config.dataset_name}: no column {column!r}, it has {sorted(rows[0])}; set "
                "dataset_prompt_column, dataset_answer_column or dataset_hint_column"
            )
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for number, row in enumerate(rows):
        question, answer, trace = [row.get(c) for c in (*needed, config.dataset_hint_column)[:3]]
        level = row.get(config.dataset_level_column)
        answer = "" if answer is None else str(answer).strip()
        if isinstance(question, str) and question.strip():
            question = [{"role": "user", "content": question}]
        messages = [*system, *(question or [])]
        level = float("".join(filter(str.isdigit, str(level))) or 0)  # "Level 5" is 5
        problem = hints.Problem(number, messages, answer, str(trace or ""), level)
        reason = "no problem text" * (not question) or "no answer" * (not answer)
        reason = reason or parse_gold(answer)
        if not reason and len(prompts.ids(problem)[0]) > config.max_prompt_length:
            reason = f"prompt over max_prompt_length {config.max_prompt_length}"
        if reason:
            dropped[reason].append(number)
        else:
            problems.append(problem)
    say(f"data: {config.dataset_name}: {len(problems)} of {len(rows)} problems usable")
    for reason, numbers in dropped.items():
        say(f"data: dropped {len(numbers)}: {reason} (rows {', '.join(map(str, numbers[:5]))} ...)")
    untraced = sum(not p.trace.strip() for p in problems)
    if with_trace and untraced:
        say(f"data: {untraced} problems have no solution trace and are never hinted")
    return problems


class Prompts:
    """The chat template: what the model reads for a problem and a hint."""

    def __init__(self, tokenizer, config):
        if not tokenizer.chat_template:
            raise UserError(f"{config.model_name_or_path}: its tokenizer has no chat template")
        if tokenizer.pad_token_id is None:
            raise UserError(f"{config.model_name_or_path}: its tokenizer has no pad token")
        self.tokenizer = tokenizer
        self.config = config

    def ids(self, problem, hint=""):
        """(token ids, text the assistant's turn starts with)."""
        messages, prefix = hints.render(problem, hint, self.config)
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text + prefix, add_special_tokens=False).input_ids, prefix

    def fitted(self, problem, ratio, hint):
        """(ids, prefix, hint), the hint shortened until the prompt has max_prompt_length."""
        ids, prefix = self.ids(problem, hint)
        while hint and len(ids) > self.config.max_prompt_length:
            hint, _ = hints.make_hint(problem, ratio, limit=len(hint) - 1)
            ids, prefix = self.ids(problem, hint)
        return ids, prefix, hint

    def request(self, problem, shown, tries, sampling, seed, slot):
        """A Try to sample, as a Request of G prompts."""
        fits = {pair: self.fitted(problem, *pair) for pair in set(zip(shown.ratios, shown.hints))}
        ids, prefixes, texts = zip(*(fits[pair] for pair in zip(shown.ratios, shown.hints)))
        ratios = [omega * bool(text) for omega, text in zip(shown.ratios, texts)]
        shown = dataclasses.replace(shown, ratios=ratios, hints=list(texts))
        return Request(problem, list(ids), shown, tries, list(prefixes), seed, sampling, slot)


class Judge:
    """Verification for collect: completions to rewards, in worker processes, by text."""

    def __init__(self, pool, tokenizer, trigger):
        self.pool = pool
        self.tokenizer = tokenizer
        self.trigger = trigger  # column of the reward that decides what is hard
        self.open = {}
        self.count = 0
        self.seconds = 0.0  # waited for verdicts

    def text(self, completion, prefix):
        return prefix + self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def submit(self, request, completions):
        texts = [self.text(c, p) for c, p in zip(completions, request.prefixes)]
        self.open[self.count] = (request, completions)
        self.pool.submit(self.count, texts, request.problem.answer)
        self.count += 1

    def poll(self, wait):
        """[(slot, Group of this try)], in the order of submission."""
        started = time.perf_counter()
        judged = sorted(self.pool.poll(wait))
        self.seconds += time.perf_counter() - started
        groups = []
        for key, rewards in judged:
            request, completions = self.open.pop(key)
            pass_rate = float(np.mean([row[self.trigger] for row in rewards]))
            tokens = sum(len(c.token_ids) for c in completions)
            tried = dataclasses.replace(request.shown, pass_rate=pass_rate, tokens=tokens)
            tries = [*request.tries, tried]
            group = Group(request.problem, tries, completions, rewards, request)
            groups.append((request.slot, group))
        return groups


def request_seed(*parts):
    """A 62-bit seed from (run seed, step, problem id, stage); rank-free. Sample j adds j."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


# ---- advantages and loss -----------------------------------------------------------------------


def advantages(group, config):
    """E1 and E3: rewards (G, F) to advantages (G,), float64."""
    rewards_G = np.array(group.rewards) @ np.array(config.reward_weights)  # E1
    ratios_G = np.array([c.hint_ratio for c in group.completions])
    mean, std = hints.baseline(rewards_G, ratios_G)
    return (rewards_G - mean) / (std + 1e-4 if config.scale_rewards else 1.0)  # E3


@dataclass
class Row:
    """One completion as the loss sees it."""

    input_ids: list  # context and targets
    context: int  # tokens that are context; the other T are targets
    behaviour_logp: list  # (T,)
    policy_weight: list  # (T,)
    likelihood_weight: list  # (T,)
    advantage: float
    tokens: int  # that count in E6; 0 when masked as truncated
    group: int
    is_on_context: bool  # the loss context is the one sampled from: mismatch can be measured
    scale: float = 0.0  # E6


def make_rows(groups, plain_ids, config):
    """Groups to Rows; plain_ids: problem -> prompt ids without hint."""
    rows = []
    for number, group in enumerate(groups):
        for completion, advantage in zip(group.completions, advantages(group, config)):
            plain = plain_ids(group.problem)
            context, targets, policy, likelihood = hints.loss_view(completion, plain, config)
            taken_over = [0.0] * (len(targets) - len(completion.token_ids))
            masked = config.mask_truncated_completions and completion.finish_reason == "length"
            row = Row(
                [*context, *targets], len(context), taken_over + completion.behaviour_logp,
                policy, likelihood, float(advantage),
                0 if masked else len(completion.token_ids), number,
                [*context, *targets] == [*completion.prompt_ids, *completion.token_ids],
            )  # fmt: skip
            rows.append(row)
    return rows


def token_scales(tokens_N, group_N, counts, config):
    """E6: the weight of each row's tokens in the objective of the whole step.

    counts: {"groups", "rows", "tokens"} over all ranks and all rows, zero-advantage ones included.
    """
    ones_N = np.ones(len(tokens_N))
    if config.loss_type == "bnpo":  # mean over groups of the group's token mean
        group_tokens_N = np.bincount(group_N, weights=tokens_N)[group_N] if len(group_N) else ones_N
        scale_N = 1 / (counts["groups"] * np.maximum(group_tokens_N, 1))
    elif config.loss_type == "dapo":  # mean over all tokens
        scale_N = ones_N / max(counts["tokens"], 1)
    elif config.loss_type == "grpo":  # mean over rows of the row's token mean
        scale_N = 1 / (counts["rows"] * np.maximum(tokens_N, 1))
    else:  # dr_grpo: sum over a constant
        scale_N = ones_N / (counts["rows"] * config.max_completion_length)
    return scale_N * (tokens_N > 0)


def token_loss(logp, old_logp, ref_logp, batch, config):
    """E4, E5 and E7 for the tokens of a micro-batch, each (M,); ref_logp may be None."""
    advantage = batch["advantage"]
    ratio = torch.exp(logp - old_logp)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clipped = ratio.clamp(1 - config.epsilon, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)  # E4
    if config.importance_cap is not None:
        weight = torch.exp(old_logp - batch["behaviour_logp"]).clamp(max=config.importance_cap)
        loss = loss * weight.detach()  # E7
    if ref_logp is not None:
        kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1  # E5
        loss = loss + config.beta * kl
    return loss * batch["policy_weight"] - batch["likelihood_weight"] * logp


def pass_at_k(n, c, k):
    """E8: the unbiased chance that one of k of n samples, c of them right, is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # E8


class Policy(nn.Module):
    """The FSDP root: transformer and LM head under one forward, for scoring and for decoding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def blocks(self):
        return list(self.model.base_model.layers)

    def forward(self, ids, positions, mask=None, cache=None, predict_M=None, target_M=None, temperature=1.0):
        """With a cache: logits (B, V) of the last position. Else logp and entropy (M,) of target_M
        at the flat positions predict_M of the (B, T) ids; packed rows restart their positions.
        """
        if cache is not None:
            out = self.model(
                input_ids=ids, position_ids=positions, attention_mask=mask,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            return out.logits[:, -1]
        # Right padding needs no mask under causal attention. use_cache must be off: it is what
        # makes restarted positions mean separate sequences.
        out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden_MH = out.last_hidden_state.flatten(0, 1)[predict_M]
        # The (tokens, V) logits exist one chunk at a time, forward and backward.
        chunk = max(64, 2**26 // self.model.config.vocab_size)
        parts = []
        for hidden, target in zip(hidden_MH.split(chunk), target_M.split(chunk)):
            parts.append(checkpoint(self._score, hidden, target, temperature, use_reentrant=False))
        logp, entropy = zip(*parts)
        return torch.cat(logp), torch.cat(entropy)

    def _score(self, hidden, target, temperature):
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logp_MV = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp_MV.exp() * logp_MV).sum(-1)
        return logp_MV.gather(-1, target[:, None]).squeeze(-1), entropy


def micro_batches(rows, budget, is_packed):
    """Rows in lists of at most `budget` tokens (padding counted unless packed), longest first."""
    batches = []
    for row in sorted(rows, key=lambda r: -len(r.input_ids)):
        if batches:
            batch = batches[-1]
            used = sum(len(r.input_ids) for r in batch) if is_packed else 0
            padded = (len(batch) + 1) * len(batch[0].input_ids)
            if (used + len(row.input_ids) if is_packed else padded) <= budget:
                batch.append(row)
                continue
        batches.append([row])
    return batches


def collate(rows, is_packed, device, dtype):
    """Rows to the tensors of one forward: ids, positions (B, T) and per-token tensors (M,)."""
    lengths = [len(r.input_ids) for r in rows]
    width = sum(lengths) if is_packed else max(lengths)
    ids = np.zeros((1 if is_packed else len(rows), width), dtype=np.int64)
    positions = np.tile(np.arange(width), (len(ids), 1))
    starts = np.cumsum([0] + lengths)[:-1] if is_packed else np.arange(len(rows)) * width
    predict, target = [], []
    for row, start, length in zip(rows, starts, lengths):
        ids.flat[start : start + length] = row.input_ids
        positions.flat[start : start + length] = np.arange(length)
        predict.append(start + np.arange(row.context, length) - 1)
        target.append(row.input_ids[row.context :])
    repeats = [length - row.context for row, length in zip(rows, lengths)]
    per_token = {
        key: np.concatenate([np.asarray(getattr(row, key)) for row in rows])
        for key in ("behaviour_logp", "policy_weight", "likelihood_weight")
    }
    for key in ("advantage", "scale", "is_on_context"):
        per_token[key] = np.repeat([float(getattr(row, key)) for row in rows], repeats)
    inputs = {
        "ids": ids, "positions": positions,
        "predict_M": np.concatenate(predict), "target_M": np.concatenate(target),
    }  # fmt: skip
    move = lambda array, kind: torch.from_numpy(array).to(device, kind, non_blocking=True)  # noqa: E731
    return (
        {key: move(array, torch.long) for key, array in inputs.items()},
        {key: move(array, dtype) for key, array in per_token.items()},
    )


FILLER = Row([0, 0], 1, [0.0], [0.0], [0.0], 0.0, 0, 0, False)  # runs, and weighs nothing
SUMS = ["tokens", "entropy", "clipped", "compared", "mismatch_k3", "capped", "loss"]


def optimize(run, rows, counts, lr):
    """Phases 4 and 5: micro-batches, loss, optimizer steps; returns metrics of all ranks.

    Every rank runs the same number of micro-batches; gradients are summed over them and the ranks,
    and the objective is already divided by the counts of the whole step.
    """
    config, policy = run.config, run.policy
    scales = token_scales(
        np.array([r.tokens for r in rows]), np.array([r.group for r in rows], int), counts, config
    )
    for row, scale in zip(rows, scales):
        row.scale = float(scale)
    # A row without advantage gives no gradient, but it has been counted.
    used = [r for r in rows if r.advantage or config.beta or any(r.likelihood_weight)]
    batches = micro_batches(used, config.micro_batch_tokens, run.is_packed)
    count = int(fsdp_utils.all_reduce_scalars({"n": max(1, len(batches))}, "max")["n"])
    batches += [[FILLER]] * (count - len(batches))
    batches = [collate(batch, run.is_packed, run.dist.device, run.dtype) for batch in batches]
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    old, ref = [None] * count, [None] * count
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=run.dist.device)
    largest = torch.zeros((), dtype=run.dtype, device=run.dist.device)
    for iteration in range(config.num_iterations):
        for i, (inputs, batch) in enumerate(batches):
            fsdp_utils.last_micro_batch(policy, i == count - 1)
            if config.beta and iteration == 0:
                with torch.no_grad():
                    ref[i], _ = run.reference(**inputs, temperature=config.temperature)
            logp, entropy = policy(**inputs, temperature=config.temperature)
            if iteration == 0:
                old[i] = logp.detach()
            loss_M = token_loss(logp, old[i], ref[i], batch, config) * batch["scale"]  # E6
            loss_M.sum().backward()
            with torch.no_grad():
                delta = (old[i] - batch["behaviour_logp"]) * batch["is_on_context"]
                capped = torch.exp(delta) > (config.importance_cap or math.inf)
                clipped = ((logp - old[i]).exp() - 1) * batch["advantage"].sign()
                high = config.epsilon if config.epsilon_high is None else config.epsilon_high
                bound = torch.where(batch["advantage"] > 0, high, config.epsilon)
                parts = [
                    batch["policy_weight"], entropy * batch["policy_weight"], clipped > bound,
                    batch["is_on_context"], delta.exp() - delta - 1, capped, loss_M,
                ]  # fmt: skip
                sums += torch.stack([part.double().sum() for part in parts])
                largest = torch.maximum(largest, delta.abs().max())
        norm = float(fsdp_utils.clip_grad_norm(policy.parameters(), config.max_grad_norm))
        if not math.isfinite(norm):
            path = run.folder / f"nonfinite_step_{run.step:06d}_rank_{run.dist.rank}.pt"
            torch.save({"rows": rows, "step": run.step}, path)
            if config.nonfinite == "stop":
                raise UserError(f"gradient norm is {norm} at step {run.step}; its rows are in {path}")
        else:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    total = fsdp_utils.all_reduce_scalars(dict(zip(SUMS, sums.tolist())))
    largest = fsdp_utils.all_reduce_scalars({"largest": float(largest)}, "max")["largest"]
    tokens, compared = max(total["tokens"], 1), max(total["compared"], 1)
    return {
        "loss": total["loss"] / config.num_iterations,
        "grad_norm": norm,
        "lr": lr,
        "entropy": total["entropy"] / tokens,
        "clip_fraction": total["clipped"] / tokens,
        "mismatch_k3": total["mismatch_k3"] / compared,
        "mismatch_max": largest,
        "importance_capped": total["capped"] / compared,
        "micro_batches": count,
    }


def learning_rate(config, step, steps):
    """lr of a rollout batch; differs from reference: the first warm-up step is not 0."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * shape[config.lr_scheduler_type]


# ---- the loop ----------------------------------------------------------------------------------


def train(run):
    """The algorithm: one pass of the loop is one rollout batch. State is the same on all ranks."""
    config, state, dist = run.config, run.state, run.dist
    sampling = Sampling(
        config.temperature, config.max_completion_length, config.top_p, config.top_k
    )
    for step in tqdm(range(state["step"], run.plan.steps), initial=state["step"],
                     total=run.plan.steps, disable=dist.rank > 0, desc=config.rl_type):  # fmt: skip
        run.step = step + 1
        clock = Clock()

        # 1. roll out, 2. hint: sample G answers a problem; ask the groups that fail again (E2)
        def next_request(group, slot, step=step):
            if group.completions and config.hint_timing == "deferred":
                return None
            shown, tries = hints.plan_try(
                group.problem, group.tries, config.num_generations, config, state["history"], step
            )
            if shown is None and group.completions:
                return None
            shown = shown or hints.unhinted(config.num_generations)
            seed = request_seed(config.seed, step, group.problem.id, len(tries))
            return run.prompts.request(group.problem, shown, tries, sampling, seed, slot)

        blank = next_groups(run)
        with fsdp_utils.phase("rollout"):
            run.engine.wake()
            run.engine.update_weights(fsdp_utils.full_tensors(run.policy.model))
            clock.lap("sync")
            mine = blank[dist.rank :: dist.world]
            groups = rollout.collect(run.engine, mine, run.judge, next_request, hints.merge)
            run.engine.sleep()
            clock.lap("generate")
        metrics = record(run, step, groups, mine)
        if config.hint_exhausted == "drop":
            groups = [g for g in groups if not is_exhausted(run, g, step)]

        # 3. advantages (E1, E3)
        rows = make_rows(groups, lambda problem: run.prompts.ids(problem)[0], config)
        tokens = sum(row.tokens for row in rows)
        counts = {"groups": len(groups), "rows": len(rows), "tokens": tokens}
        counts = fsdp_utils.all_reduce_scalars(counts)
        clock.lap("wait")

        # 4. micro-batches and loss (E4-E7), 5. optimizer step
        with fsdp_utils.phase("train"):
            lr = learning_rate(config, step, run.plan.steps)
            metrics |= optimize(run, rows, counts, lr)
            clock.lap("train")
        check_mismatch(run, step, metrics)

        metrics |= {"seconds/verify": run.judge.seconds} | clock.laps
        run.judge.seconds = 0.0
        state["step"] = step + 1
        write_metrics(run, metrics)
        if config.eval_strategy == "steps" and is_due(step + 1, config.eval_steps, run.plan.steps):
            evaluate(run)
        every = {"steps": config.save_steps, "epoch": run.plan.steps_per_epoch}
        if is_due(step + 1, every.get(config.save_strategy, run.plan.steps), run.plan.steps):
            save(run)


def is_due(step, every, last):
    return step % every == 0 or step == last


class Clock:
    """Seconds per phase of a step."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[f"seconds/{name}"], self.last = now - self.last, now


def next_groups(run):
    """The blank groups of the next step, all ranks: returning problems first, then fresh ones."""
    config, state, n = run.config, run.state, len(run.problems)
    most = int(config.deferred_share * run.plan.prompts)
    queue, state["queue"] = state["queue"][:most], state["queue"][most:]
    fresh = run.plan.prompts - len(queue)
    epoch, start = divmod(state["cursor"], n)
    if start + fresh > n:  # a step never straddles two epochs: no problem twice in one step
        epoch, start = epoch + 1, 0
    state["cursor"] = epoch * n + start + fresh
    order = np.random.default_rng([config.seed, epoch]).permutation(n)
    if config.curriculum:
        order = sorted(order, key=lambda i: run.problems[i].level)
    blank = [Group(run.by_id[id], [hints.Try(**t) for t in tries]) for id, tries in queue]
    return blank + [Group(run.problems[i]) for i in order[start : start + fresh]]


def is_exhausted(run, group, step):
    """Still hard after its last stage, with nothing left to show."""
    config = run.config
    if step < config.start_hint_step or not hints.needs_hint(group.tries, config):
        return False
    G, history = config.num_generations, run.state["history"]
    return hints.plan_try(group.problem, group.tries, G, config, history, step)[0] is None


def record(run, step, groups, blank):
    """Writes the rollouts of all ranks, updates history and queue, gives the step's metrics."""
    config, state, lines = run.config, run.state, []
    for group, before in zip(groups, blank):
        planned, tries = hints.plan_try(
            group.problem, group.tries, config.num_generations, config, state["history"], step
        )
        deferred = config.hint_timing == "deferred" and planned is not None
        completions = [
            {
                "text": run.judge.text(c, ""), "hint_ratio": c.hint_ratio, "tokens": len(c.token_ids),
                "finish_reason": c.finish_reason, **dict(zip(config.reward_funcs, scores)),
            }
            for c, scores in zip(group.completions, group.rewards)
        ]  # fmt: skip
        lines.append({
            "id": group.problem.id, "problem": group.problem.messages[-1]["content"],
            "prompt": run.tokenizer.decode(group.completions[-1].prompt_ids),
            "hint": group.request.shown.hints[-1], "hint_ratio": group.request.shown.ratios[-1],
            "fresh": not before.tries, "deferred": deferred,
            "tries": [dataclasses.asdict(t) for t in tries], "completions": completions,
        })  # fmt: skip
    lines = list(itertools.chain(*fsdp_utils.gather_objects(lines)))
    for line in lines:
        tries = [hints.Try(**t) for t in line["tries"]]
        hints.remember(state["history"], line["id"], tries)
        if line["deferred"]:
            state["queue"].append((line["id"], line["tries"]))
    if run.dist.rank == 0:
        path = run.folder / "rollouts" / f"step_{step + 1:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rollout_metrics(lines, config) | {"queue": len(state["queue"])}


def rollout_metrics(lines, config):
    """Metrics of a step from its rollout lines. Without hint means: fresh problems, first try."""
    metrics, samples = {}, [c for line in lines for c in line["completions"]]
    for name in config.reward_funcs:
        metrics[f"reward/{name}"] = float(np.mean([c[name] for c in samples]))
    plain = [line["tries"][0] for line in lines if line["fresh"] and line["tries"][0]["ratios"][0] == 0]
    tries = [t for line in lines for t in line["tries"]]
    stages, counts = Counter(), Counter()
    for t in tries:
        omega = max(t["ratios"])
        counts["skipped" if t["skipped"] else f"tried@{omega:g}"] += 1
        counts["trimmed"] += t["trimmed"]
        if not t["skipped"]:
            stages[omega] += t["tokens"]
            counts[f"solved@{omega:g}"] += t["pass_rate"] > config.hint_threshold
    hard = [t["pass_rate"] <= config.hint_threshold for t in plain]
    metrics |= {f"hint/{name}": count for name, count in sorted(counts.items())}
    metrics |= {f"tokens/stage@{omega:g}": n for omega, n in sorted(stages.items())}
    return metrics | {
        "accuracy_without_hint": float(np.mean([t["pass_rate"] for t in plain])) if plain else None,
        "hard_fraction": float(np.mean(hard)) if plain else None,
        "hint/unsolved": sum(
            line["tries"][-1]["pass_rate"] <= config.hint_threshold for line in lines
        ),
        "tokens/generated": sum(stages.values()),
        "completion_length": float(np.mean([c["tokens"] for c in samples])),
        "truncated": float(np.mean([c["finish_reason"] == "length" for c in samples])),
    }


def check_mismatch(run, step, metrics):
    """Sampler and trainer must agree in the first steps of a run, or something is wired wrongly."""
    limit = 1e-4 if run.config.torch_dtype in ("float32", "float64") else 1e-2
    if step - run.first_step < 3 and metrics["mismatch_k3"] > limit:
        raise UserError(
            f"step {step + 1}: sampler and trainer disagree, mean k3 {metrics['mismatch_k3']:.2g} > "
            f"{limit:g} (largest log-prob difference {metrics['mismatch_max']:.2g}): stale weights, "
            "another dtype, or top_p/top_k in the sampler"
        )


def evaluate(run):
    """Un-hinted accuracy on each eval set: avg@k with its standard error, pass@k (E8)."""
    if not run.eval_sets:
        return
    with fsdp_utils.phase("evaluate"):
        run.engine.wake()
        run.engine.update_weights(fsdp_utils.full_tensors(run.policy.model))
        metrics = {}
        for name, (spec, problems) in run.eval_sets.items():
            length = spec.eval_max_completion_length or spec.max_completion_length
            sampling = Sampling(spec.eval_temperature, length, spec.top_p, spec.top_k)
            shown = hints.unhinted(spec.eval_samples)

            def ask(group, slot, name=name, sampling=sampling, shown=shown):
                seed = request_seed(run.config.seed, "eval", name, group.problem.id)
                if not group.completions:
                    return run.prompts.request(group.problem, shown, [], sampling, seed, slot)

            blank = [Group(problem) for problem in problems[run.dist.rank :: run.dist.world]]
            groups = rollout.collect(run.engine, blank, run.judge, ask, hints.merge)
            right = [[int(r[run.accuracy] > 0) for r in group.rewards] for group in groups]
            right = list(itertools.chain(*fsdp_utils.gather_objects(right)))
            k, means = spec.eval_samples, np.mean(right, axis=1)
            metrics[f"eval/{name}"] = float(means.mean())
            metrics[f"eval/{name}_stderr"] = float(means.std(ddof=1) / math.sqrt(len(means)))
            if k > 1:
                passed = [pass_at_k(k, sum(r), j) for r in right for j in (k,)]
                metrics[f"eval/{name}_pass@{k}"] = float(np.mean(passed))
        run.engine.sleep()
    write_metrics(run, metrics)
    say(" ".join(f"{key} {value:.3f}" for key, value in metrics.items() if "stderr" not in key))


def write_metrics(run, metrics):
    """Appends a line to metrics.jsonl; the terminal and wandb get the same numbers."""
    if run.dist.rank:
        return
    line = {"step": run.state["step"], **metrics}
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if run.wandb:
        run.wandb.log(metrics, step=run.state["step"])
    if "loss" in metrics and is_due(line["step"], run.config.logging_steps, run.plan.steps):
        keys = ("accuracy_without_hint", "hard_fraction", "reward/accuracy", "grad_norm", "mismatch_k3")
        say(f"step {line['step']}: " + " ".join(f"{k} {line[k] or 0:.3g}" for k in keys if k in line))


def save(run):
    """A checkpoint with an export in Hugging Face format in it."""
    limit = run.config.save_total_limit or 0
    fsdp_utils.save_checkpoint(
        run.folder, run.state["step"], run.policy, run.optimizer, run.state, limit,
        lambda path: export(run, path / "model"),
    )  # fmt: skip


def export(run, path):
    """Full weights, config and tokenizer as transformers and vLLM load them; all ranks call it."""
    weights = {}
    for name, tensor in fsdp_utils.full_tensors(run.policy):
        if run.dist.rank == 0:
            weights[name.removeprefix("model.")] = tensor.to("cpu", run.export_dtype)
    if run.dist.rank == 0:
        run.policy.model.save_pretrained(path, state_dict=weights)
        run.tokenizer.save_pretrained(path)


# ---- start -------------------------------------------------------------------------------------


def make_engine(run):
    """The sampler named by the config; see rollout.py for the surface."""
    config = run.config
    name = config.engine or ("vllm" if config.use_vllm else "hf")
    eos = run.policy.model.generation_config.eos_token_id
    eos_ids = {run.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if name == "hf":
        return rollout.HfEngine(
            run.policy, eos_ids, lambda: fsdp_utils.unshard(run.policy),
            lambda: fsdp_utils.reshard(run.policy),
        )  # fmt: skip
    length = config.max_prompt_length + max(
        config.max_completion_length, config.eval_max_completion_length or 0
    )
    engine = rollout.VllmEngine if name == "vllm" else rollout.ServerEngine
    return engine(config, eos_ids, length, run.dist.device)


def load_policy(config, attention):
    """The causal LM in float32 (float64 when asked), wrapped."""
    master = torch.promote_types(getattr(torch, config.torch_dtype), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path, revision=config.model_revision, dtype=master,
        attn_implementation=attention,
    )  # fmt: skip
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(model)


def setup(config):
    """Everything `train` needs, in the order that matters: workers before GPU, group before vLLM."""
    run = argparse.Namespace(config=config)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pool = VerifierPool(config.reward_funcs, max(1, min(8, cores)), config.verifier_timeout)
    run.dist = fsdp_utils.setup_distributed()
    run.tokenizer = load_tokenizer(config)
    run.prompts = Prompts(run.tokenizer, config)
    run.problems, run.plan = load_training_data(config, run.prompts, run.dist.world)
    run.by_id = {problem.id: problem for problem in run.problems}
    run.eval_sets = {}
    for name, spec in config.eval_datasets.items():
        spec = {"dataset_name": spec} if isinstance(spec, str) else spec
        spec = config_from({**dataclasses.asdict(config), **spec})
        run.eval_sets[name] = (spec, load_problems(spec, run.prompts, with_trace=False))
    attention = config.attn_implementation
    if attention == "flash_attention_2" and not is_installed("flash_attn"):
        say("attn_implementation: flash-attn is not installed, using sdpa")
        attention = "sdpa"
    run.is_packed = attention == "flash_attention_2" if config.packing is None else config.packing
    run.dtype = torch.float64 if config.torch_dtype == "float64" else torch.float32
    run.export_dtype = getattr(torch, config.torch_dtype)
    shard = lambda p: fsdp_utils.shard(  # noqa: E731
        p, p.blocks, config.sharding, run.export_dtype, config.replicas, config.cpu_offload
    )
    run.policy = shard(load_policy(config, attention))
    if config.beta:
        run.reference = shard(load_policy(config, attention)).requires_grad_(False).eval()
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(), lr=0.0, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay, fused=run.dist.device.type == "cuda",
    )  # fmt: skip
    trigger = config.reward_funcs.index(config.hint_trigger) if config.hint_trigger != "always" else 0
    names = config.reward_funcs
    run.accuracy = names.index("accuracy") if "accuracy" in names else 0
    run.judge = Judge(pool, run.tokenizer, trigger)
    open_folder(run)
    run.engine = make_engine(run)
    return run


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def load_tokenizer(config):
    try:
        return AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path={config.model_name_or_path}: {error}") from None


def load_training_data(config, prompts, world):
    hinted = config.rl_type == "ghpo"
    problems = load_problems(config, prompts, with_trace=hinted)
    return problems, make_plan(config, world, len(problems))


def open_folder(run):
    """Resumes, refuses or starts the run in output_dir; what was written is moved, never deleted."""
    config, folder = run.config, Path(run.config.output_dir)
    run.folder, run.wandb = folder, None
    run.state = {"step": 0, "cursor": 0, "queue": [], "history": {}}
    mine = dataclasses.asdict(config)
    previous = folder / "config.yaml"
    if previous.is_file():
        theirs = yaml.safe_load(previous.read_text())
        changed = [k for k in mine if k not in RESUMABLE and theirs.get(k) != mine[k]]
        if changed and not config.overwrite_output_dir:
            raise UserError(
                f"output_dir={folder} holds a run with another {', '.join(changed)}: choose another "
                "folder, or overwrite_output_dir=true to move that run aside"
            )
        if changed:
            if run.dist.rank == 0:
                aside = next(p for i in itertools.count(1) if not (p := Path(f"{folder}.old{i}")).exists())
                folder.rename(aside)
            fsdp_utils.gather_objects(None)
    latest = fsdp_utils.latest_checkpoint(folder)
    if latest:
        run.state = fsdp_utils.load_checkpoint(latest, run.policy, run.optimizer)
        run.state["history"] = {int(k): v for k, v in run.state["history"].items()}
        say(f"resuming {latest}")
    run.first_step = run.state["step"]
    fsdp_utils.gather_objects(None)
    if run.dist.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        set_newer_aside(folder, run.first_step)
        previous.write_text(yaml.safe_dump(mine, sort_keys=False))
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        (folder / "command.txt").write_text(f"{' '.join(sys.argv)}\ngit {git.stdout.strip()}\n")
        if "wandb" in config.report_to:
            if is_installed("wandb"):
                import wandb

                run.wandb = wandb.init(project="ghpo", config=mine, dir=folder)
            else:
                say("report_to: wandb is not installed, metrics.jsonl has everything")


def set_newer_aside(folder, step):
    """Metrics and rollouts after the checkpoint go to *.stale: they are computed again."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept, stale = [], []
    for line in lines:
        is_whole = line.endswith("\n")
        (kept if is_whole and json.loads(line)["step"] <= step and step else stale).append(line)
    if stale:
        with open(folder / "metrics.jsonl.stale", "a") as file:
            file.writelines(stale)
        temporary = folder / "metrics.jsonl.tmp"
        temporary.write_text("".join(kept))
        temporary.rename(path)
    for path in (folder / "rollouts").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.rename(path.with_suffix(".jsonl.stale"))


def dry_run(config):
    """Config, arithmetic, data and one problem at every hint stage, as the model would see it."""
    print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    tokenizer = load_tokenizer(config)
    prompts = Prompts(tokenizer, config)
    world = int(os.environ.get("WORLD_SIZE", 1))
    problems, plan = load_training_data(config, prompts, world)
    problem = next((p for p in problems if p.trace), problems[0])
    for omega in [0.0, *config.hint_ratio]:
        hint, trimmed = hints.make_hint(problem, omega) if omega else ("", False)
        ids, _, hint = prompts.fitted(problem, omega, hint)
        print(f"---- problem {problem.id}, omega {omega:g}, {len(ids)} tokens, trimmed {trimmed}")
        print(tokenizer.decode(ids))
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision)
        model = AutoModelForCausalLM.from_config(shape)
    size = sum(p.numel() for p in model.parameters())
    estimate = fsdp_utils.memory_estimate(
        size, world, config.sharding, config.replicas, 2 if config.torch_dtype == "bfloat16" else 4
    )
    print(f"---- {size:,} parameters; bytes per GPU without activations: {estimate}")


def main():
    """Reads the command line; a UserError ends the program with its message alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--eval", action="store_true", help="evaluate the model, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            return dry_run(config)
        run = setup(config)
        if args.eval or (config.eval_strategy == "steps" and run.first_step == 0):
            evaluate(run)
        if not args.eval:
            train(run)
            finish(run)
        fsdp_utils.gather_objects(None)
        run.engine.close()
        run.judge.pool.close()
    except UserError as error:
        say(f"error: {error}")
        os._exit(2)


def finish(run):
    """Reports what is left in the queue and gives the model its final place."""
    if run.state["queue"]:
        say(f"{len(run.state['queue'])} failed problems were still queued for a hint at the end")
    export(run, run.folder / "model")
    if run.config.push_to_hub and run.dist.rank == 0:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(run.config.hub_model_id or run.folder.name, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=run.folder / "model")


if __name__ == "__main__":
    main()
