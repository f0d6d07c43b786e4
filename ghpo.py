"""GHPO and GRPO from scratch: sample groups, hint the groups that fail, take one gradient step.

    torchrun --nproc_per_node 8 ghpo.py --config configs/x.yaml learning_rate=2e-6     (or python)
    python ghpo.py --config configs/x.yaml --dry_run                        show what would run

`train` is the algorithm, E1-E8 are the README's equations, configs/settings.py has every setting.
The data flows so: row -> Problem -> prompt ids -> Group (rollout.collect, hints) -> Row (make_rows,
E6) -> micro-batches -> Policy -> token_loss (E4, E5, E7) -> one optimizer step.
Fork here for loss and loop, in hints.py for the method, in rollout.py for samplers. A launcher may
also assign hints.NAME or ghpo.token_loss and then call ghpo.main().
"""

import argparse
import bisect
import copy
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import create_repo, upload_folder
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler, logging

import configs.plan
import fsdp_utils
import hints
import rollout
from configs import UserError, as_user_error, need, say
from configs.data import fingerprint, load_problems
from configs.folder import as_yaml, changed_settings, lock_folder, save_config
from configs.model import blocks_of, control_tokens, load_model, load_tokenizer, sizes
from configs.plan import Plan, bytes_per_gpu, longest_sequence, make_plan, mismatch_limit
from configs.settings import Config, eval_config, load_config
from fsdp_utils import phase
from hints import Group, Problem, Stage
from reward import VerifierPool

MISMATCH_STEPS = 10  # their mean is looked at
COLLAPSE_STEPS = 6  # the second half of them is compared with the first
IDLE_STEPS = 3  # in a row without a gradient are told
SYSTEM_PROBE = {"role": "system", "content": "Be brief."}
USER_PROBE = {"role": "user", "content": "What is 1 + 2?"}
CHECK_LIMITS = {"bfloat16": (0.02, 0.2)}  # mean and largest |dlogp|; of other types 1e-4
HEAD_LOGITS = 2**25  # of a chunk of tokens, forward and backward
HEAD_TOKENS = 64  # of a chunk at least
# Of a micro-batch at most: each adds its gradient of the head to one sum, which bfloat16 rounds.
HEAD_CHUNKS = 16
# On the terminal; of eval sets only the pass rates.
SHOWN = re.compile(
    r"accuracy_|hard_|reward/|grad_norm|mismatch_k3|eval/(?!.*(?:stderr|tokens|truncated|_n|_k)$)"
)


@dataclass
class State:
    """What a checkpoint holds beside weights and optimizer; alike on all ranks. A key that a fork
    adds has its default when an older run is resumed."""

    step: int = 0  # rollout batches done
    cursor: int = 0  # of the next fresh problem: epoch * its length + place in its order
    queue: list = field(default_factory=list)  # deferred: (problem id, its stages), oldest first
    history: dict = field(default_factory=dict)  # see hints.py
    method: dict = field(default_factory=dict)  # see hints.py
    mismatch: list = field(default_factory=list)  # k3 of the last steps that compared something
    trend: list = field(default_factory=list)  # metrics of the last steps, for watch_collapse
    idle: int = 0  # steps without a gradient in a row
    prompts_per_step: int = 0
    steps: int = 0  # that the run was to have
    data: str = ""  # fingerprint of the problems
    metrics_bytes: int = 0  # of metrics.jsonl, rank 0's

    def load(self, saved: dict) -> None:
        """Takes over what was saved as JSON."""
        for known in fields(self):
            if known.name in saved:
                setattr(self, known.name, saved[known.name])
        self.history = {int(key): value for key, value in self.history.items()}
        self.queue = [(i, [Stage(**stage) for stage in stages]) for i, stages in self.queue]


@dataclass(frozen=True)
class Run:
    """What does not change while a run goes on; `state` is what does."""

    config: Config
    state: State
    rank: int
    world: int
    device: torch.device
    folder: Path
    log: Path  # metrics.jsonl, or eval.jsonl of an evaluation
    prompts: "Prompts"
    problems: list[Problem]
    plan: Plan
    eval_sets: dict  # name: (config, problems)
    policy: "Policy"
    reference: "Policy | None"  # a frozen copy when beta > 0
    optimizer: Optimizer
    learning_rate: Callable[[int], float]  # of a step
    master_dtype: torch.dtype  # of weights, moments and loss
    compute_dtype: torch.dtype
    pool: VerifierPool
    engine: Any = None  # the last thing built
    wandb: Any = None

    @property
    def accuracy_column(self) -> int:
        """The reward that is reported as accuracy: the one named so, else the trigger."""
        names = self.config.reward_funcs
        if "accuracy" in names:
            return names.index("accuracy")
        return self.trigger_column

    @property
    def trigger_column(self) -> int:
        """The reward that decides whether a problem is hard."""
        names = self.config.reward_funcs
        for name in (self.config.hint_trigger, "accuracy"):
            if name in names:
                return names.index(name)
        return 0


def system_in_user_turn(messages: list[dict]) -> list[dict]:
    """Chat messages without their system turn: its text is in front of the first user turn."""
    system, *turns = messages
    first = [turn["role"] for turn in turns].index("user")
    content = f"{system['content']}\n\n{turns[first]['content']}"
    turns[first] = {**turns[first], "content": content}
    return turns


class Prompts:
    """The chat template: what the model reads for a problem and a hint."""

    def __init__(self, config: Config, state: State | None = None):
        self.config, self.state = config, state or State()
        self.tokenizer = load_tokenizer(config)
        # a row's own text may not become one of these; <think> may, for the prefix is text, too
        self.special = list(control_tokens(self.tokenizer).values())
        # the date that a template shows is always one: it must not change when a run is resumed
        today = datetime(2025, 1, 1)
        self.values = {"strftime_now": today.strftime, **config.chat_template_kwargs}
        name = f"model_name_or_path={config.model_name_or_path}"
        self._rendered([USER_PROBE], name)  # UserError if the template cannot even do this
        try:
            shown = self._rendered([SYSTEM_PROBE, USER_PROBE], name)
        except UserError:  # from Gemma's template; others leave the system turn out
            shown = ""
        self.has_system_role = SYSTEM_PROBE["content"] in shown
        if not self.has_system_role:
            say("chat template: no system role, its text goes in front of the first user turn")

    def ids(self, problem: Problem, hint: str = "") -> tuple[list[int], str]:
        """(token ids, text the assistant's turn starts with: what the template opens, then the
        hint); UserError names the row that the template refuses."""
        messages, prefix = hints.render(problem, hint, self.config, self.state)
        if not self.has_system_role and messages[0]["role"] == "system":
            messages = system_in_user_turn(messages)
        marked = [{**turn, "content": self._marked(turn["content"])} for turn in messages]
        text = self._rendered(marked, f"row {problem.id}")
        opening = re.search(r"(<think>\s*)?\Z", text)[0]
        if opening:
            prefix = prefix.removeprefix(hints.ASSISTANT_OPENING)
        return self._encoded(text + self._marked(prefix)), opening + prefix

    def _rendered(self, messages, what):
        with as_user_error(f"{what}: chat template"):
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.values
            )

    def _marked(self, text):
        """A row's own text, its special tokens as numbers in private characters."""
        text = re.sub("[\ue000\ue001]", "", text)  # if it has some already
        for i, token in enumerate(self.special):
            text = text.replace(token, f"\ue000{i}\ue001")
        return text

    def _encoded(self, text):
        """Token ids; special tokens of the row's own text are read as the plain text they are."""
        ids = []
        for number, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            is_token = number % 2 == 1  # text, number of a token, text, ...
            if is_token:
                piece = self.special[int(piece)]
            ids += self.tokenizer(
                piece, add_special_tokens=False, split_special_tokens=is_token
            ).input_ids
        return ids

    def fit(self, problem: Problem, ratio: float) -> tuple[str, bool]:
        """make_hint, shortened (the hint, never the problem) until max_prompt_length holds."""
        c, state = self.config, self.state

        def is_too_long(limit):
            hint, _ = hints.make_hint(problem, ratio, c, state, limit)
            return bool(hint) and len(self.ids(problem, hint)[0]) > c.max_prompt_length

        limit = 8 * c.max_prompt_length  # characters: to tokenise a whole book takes seconds
        if is_too_long(limit):
            limit = bisect.bisect_left(range(limit), True, key=is_too_long) - 1
        return hints.make_hint(problem, ratio, c, state, limit)

    def request(self, group: Group, config: Config, slot: int, salt: Any) -> rollout.Request:
        """The Request for the group's next stage, with a seed that is alike on any rank."""
        stage = group.next_stage
        read = {hint: self.ids(group.problem, hint) for hint in set(stage.hints)}
        key = repr((config.seed, salt, group.problem.id, len(group.stages))).encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return rollout.Request(
            problem=group.problem,
            stage=stage,
            prompts=[read[hint][0] for hint in stage.hints],
            prefixes=[read[hint][1] for hint in stage.hints],
            seed=digest >> 2,  # 62 bits, to which sample j adds j
            config=config,
            slot=slot,
        )


@dataclass
class Row:
    """One completion as the loss sees it: T targets follow the context."""

    input_ids: list[int]
    n_context: int  # tokens of context
    behaviour_logp: list[float]  # (T,)
    policy_weight: list[float]  # (T,)
    sft_weight: list[float]  # (T,)
    is_comparable: list[bool]  # (T,) scored under what it was sampled from (for the mismatch)
    advantage: float
    n_tokens: int  # that count in E6, 0 when masked as truncated
    token_weight: float = 0.0  # E6: of the loss of each of its tokens, 1 / denominator

    @classmethod
    def weightless(cls, input_ids: list[int], n_context: int = 1, advantage: float = 0.0) -> "Row":
        """A row that runs and moves nothing: all its tokens weigh 0 in the loss."""
        length = len(input_ids) - n_context
        zeros, never = [0.0] * length, [False] * length
        return cls(input_ids, n_context, zeros, zeros, zeros, never, advantage, n_tokens=0)

    def has_gradient(self, config: Config) -> bool:
        if self.token_weight == 0:  # masked as truncated
            return False
        return bool(self.advantage or config.beta or any(self.sft_weight))


def make_rows(groups: list[Group], prompts: "Prompts", config: Config, state: State) -> list[Row]:
    """Rows of the groups, with E6 taken over all ranks' groups: every rank must call it."""
    rows_of_groups = [make_group_rows(group, prompts, config, state) for group in groups]
    rows = [row for rows_of_group in rows_of_groups for row in rows_of_group]
    counts = {"groups": len(groups), "rows": len(rows), "tokens": sum(row.n_tokens for row in rows)}
    counts = fsdp_utils.all_reduce_scalars(counts)
    for rows_of_group in rows_of_groups:
        for row in rows_of_group:
            if row.n_tokens:
                row.token_weight = 1 / denominator(row, rows_of_group, counts, config)  # E6
    return rows


def make_group_rows(group: Group, prompts: "Prompts", config: Config, state: State) -> list[Row]:
    """The rows of one group, still without E6."""
    plain_ids, _ = prompts.ids(group.problem)
    rows = []
    for j, advantage in enumerate(hints.advantages(group, config, state).tolist()):
        completion = group.completions[j]
        view = hints.loss_view(group, j, advantage, plain_ids, config, state)
        input_ids = [*view.context, *view.targets]
        length = len(completion.token_ids)
        n_prompt = len(view.targets) - length  # targets that were part of the prompt
        is_as_sampled = input_ids == [*completion.prompt_ids, *completion.token_ids]
        is_masked = config.mask_truncated_completions and completion.finish_reason == "length"
        row = Row(
            input_ids=input_ids,
            n_context=len(view.context),
            behaviour_logp=[0.0] * n_prompt + completion.behaviour_logp,
            policy_weight=view.policy_weight,
            sft_weight=view.sft_weight,
            is_comparable=[False] * n_prompt + [is_as_sampled] * length,
            advantage=advantage,
            n_tokens=0 if is_masked else length,
        )
        rows.append(row)
    return rows


def denominator(row: Row, rows_of_group: list[Row], counts: dict, config: Config) -> float:
    """E6: what each token loss of a row is divided by. Their sum over the step is then, by type,

    bnpo     mean over groups of (sum over the group's tokens / its tokens): TRL's bnpo where a
             device's batch is one group, as in the paper
    dapo     sum over all tokens / all tokens
    grpo     mean over rows of (sum over the row's tokens / its tokens)
    dr_grpo  mean over rows of (sum over the row's tokens / max_completion_length)
    """
    if config.loss_type == "bnpo":
        return counts["groups"] * sum(other.n_tokens for other in rows_of_group)
    if config.loss_type == "dapo":
        return counts["tokens"]
    if config.loss_type == "grpo":
        return counts["rows"] * row.n_tokens
    return counts["rows"] * config.max_completion_length


def token_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, batch: dict, config: Config
) -> tuple[Tensor, Tensor]:
    """E4, E5, E7: (loss, was the ratio clipped) of each token (M,). ref_logp: None if beta is 0.
    batch: (M,) tensors by the names of Row's fields, and `row`, the number of a token's row."""
    advantage = batch["advantage"]
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - config.epsilon, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)  # E4
    if config.importance_cap:
        weight = torch.exp(old_logp - batch["behaviour_logp"]).clamp(max=config.importance_cap)
        loss = loss * weight.detach()  # E7
    if ref_logp is not None:
        delta = ref_logp - logp
        loss = loss + config.beta * (torch.exp(delta) - delta - 1)  # E5
    loss = loss * batch["policy_weight"] - batch["sft_weight"] * logp
    is_clipped = (clipped - ratio).detach() * advantage < 0
    return loss, is_clipped


def token_sums(
    loss: Tensor, is_clipped: Tensor, entropy: Tensor, old_logp: Tensor, batch: dict, c: Config
) -> dict[str, Tensor]:
    """Sums over the tokens of a micro-batch, and the largest |old_logp - behaviour_logp|."""
    weight, compared = batch["policy_weight"], batch["is_comparable"]
    delta = (old_logp - batch["behaviour_logp"]) * compared
    log_cap = math.log(c.importance_cap or math.inf)
    numbers = {
        "loss": loss,
        "tokens": weight,
        "clipped": torch.where(is_clipped, weight, 0.0),
        "entropy": entropy * weight,
        "compared": compared,
        "mismatch_k3": torch.expm1(delta) - delta,
        "importance_capped": torch.where(delta > log_cap, compared, 0.0),
    }
    sums = {key: number.double().sum() for key, number in numbers.items()}
    return sums | {"mismatch_max": delta.abs().max().double()}


def token_metrics(sums: list[dict]) -> dict[str, float]:
    """Of a step and all ranks: loss and counts as sums, mismatch_max, all else as token means."""
    stacked = {key: torch.stack([part[key] for part in sums]) for key in sums[0]}
    largest = {"mismatch_max": stacked.pop("mismatch_max").max()}
    total = {key: values.sum() for key, values in stacked.items()}
    total = fsdp_utils.all_reduce_scalars(total)
    for key in ("entropy", "clipped"):
        total[key] /= max(total["tokens"], 1)
    for key in ("mismatch_k3", "importance_capped"):
        total[key] /= max(total["compared"], 1)
    return total | fsdp_utils.all_reduce_scalars(largest, "max")


class HiddenStates(tuple):
    """(hidden states,) as a transformer would answer: None for all else that a head may ask for."""

    def __getattr__(self, name):
        return self[0] if name == "last_hidden_state" else None


class GivenStates:
    """Stands where a causal LM keeps its transformer, and answers with the states it is given."""

    def __init__(self, transformer: torch.nn.Module):
        self.transformer = transformer
        self.decoder = self  # OPT calls the decoder that its transformer wraps

    def __call__(self, *args, inputs_embeds, **kwargs):
        return HiddenStates([inputs_embeds])

    def __getattr__(self, name):
        return getattr(self.transformer, name)  # FalconH1 keeps a factor of the logits there


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM with all that its family does to the last hidden states, and nothing before:
    head_of(model)(inputs_embeds=hidden).logits. A shallow copy that shares the weights.

    Not model.lm_head: families scale or cap the logits after it. Their own forward runs instead,
    with a transformer that answers with the hidden states which we have already.
    """
    head, place = copy.copy(model), model.base_model_prefix
    # past setattr, which takes only modules in a module's place
    head._modules = {name: part for name, part in model._modules.items() if name != place}
    head.__dict__[place] = GivenStates(model.base_model)
    return head


class Policy(torch.nn.Module):
    """The FSDP root: scoring and decoding under one forward, for only that gathers the weights."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor | None = None,
        positions: Tensor | None = None,
        predict: Tensor | None = None,
        target: Tensor | None = None,
        temperature: float = 1.0,
        generate: dict | None = None,
        whole: dict | None = None,
        segments: dict | None = None,
    ) -> Any:
        """logp and entropy (M,) of the tokens target (M,) predicted at flat positions predict (M,)
        of ids (B, T), padded on the right or packed with positions restarted, at a temperature.
        segments: of packed rows, what flash attention would else work out in every layer.
        generate: arguments of the model's generate, which runs instead. whole: arguments of the
        whole causal LM, whose logits (B, T, V) are returned instead."""
        if generate:
            return self.model.generate(**generate)
        if whole:
            return self.model(**whole).logits
        # No mask: causal attention never looks right. No cache: only then do restarted positions
        # keep packed rows apart.
        out = self.model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, **segments or {}
        )
        hidden_MH = out.last_hidden_state.flatten(0, 1)[predict]
        # One chunk of (tokens, V) logits exists at a time, forward and backward.
        n_tokens = HEAD_LOGITS // self.model.config.vocab_size
        chunk = max(HEAD_TOKENS, n_tokens, math.ceil(len(target) / HEAD_CHUNKS))
        logp, entropy = [], []
        for hidden, wanted in zip(hidden_MH.split(chunk), target.split(chunk)):
            scored = checkpoint(self._score, hidden, wanted, temperature, use_reentrant=False)
            logp.append(scored[0])
            entropy.append(scored[1])
        return torch.cat(logp), torch.cat(entropy)

    def _score(self, hidden, target, temperature):
        logits = head_of(self.model)(inputs_embeds=hidden[None]).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        logp_MV = logits.log_softmax(-1)
        with torch.no_grad():
            entropy_M = -(logp_MV.exp() * logp_MV).sum(-1)
        return logp_MV.gather(-1, target[:, None]).squeeze(-1), entropy_M


def micro_batches(rows: list[Row], budget: int, is_packed: bool) -> list[list[Row]]:
    """Rows in lists of at most `budget` tokens, longest first, each list of about one length."""
    batches = []
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        longer = [row]
        if batches:
            longer = [*batches[-1], row]
        n_tokens = sum(len(row.input_ids) for row in longer)
        size = n_tokens if is_packed else len(longer) * len(longer[0].input_ids)
        # a little padding is let in, in a small batch any: to split costs more than it saves
        is_dense = n_tokens >= 0.97 * size or size <= 512
        if batches and is_dense and size <= budget:
            batches[-1] = longer
        else:
            batches.append([row])
    return batches


def collate(
    rows: list[Row], is_packed: bool, device: torch.device, dtype: torch.dtype
) -> tuple[dict, dict]:
    """(arguments of Policy.forward, per-token tensors of the loss, each (M,)) for some rows."""
    lengths = [len(row.input_ids) for row in rows]
    if is_packed:
        shape = (1, sum(lengths))
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        shape = (len(rows), max(lengths))
        starts = np.arange(len(rows)) * max(lengths)
    ids = np.zeros(shape, dtype=np.int64)
    positions = np.zeros_like(ids) + np.arange(shape[1])
    places = []  # of the targets of each row, in the flat ids
    for row, start, length in zip(rows, starts, lengths):
        ids.flat[start : start + length] = row.input_ids
        positions.flat[start : start + length] = np.arange(length)
        places.append(np.arange(start + row.n_context, start + length))
    place = np.concatenate(places)
    inputs = {"ids": ids, "positions": positions, "predict": place - 1, "target": ids.flat[place]}
    inputs = {key: torch.from_numpy(value).to(device) for key, value in inputs.items()}
    if is_packed:
        ends = torch.tensor([*starts, shape[1]], dtype=torch.int32, device=device)
        inputs["segments"] = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
        inputs["segments"] |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    row_number = np.repeat(np.arange(len(rows)), [len(targets) for targets in places])
    numbers = {}
    for key in ("behaviour_logp", "policy_weight", "sft_weight", "is_comparable"):
        numbers[key] = np.concatenate([getattr(row, key) for row in rows])
    for key in ("advantage", "token_weight"):
        numbers[key] = np.array([getattr(row, key) for row in rows])[row_number]
    batch = {key: torch.from_numpy(value).to(device, dtype) for key, value in numbers.items()}
    return inputs, batch | {"row": torch.from_numpy(row_number).to(device)}


def equal_micro_batches(run: Run, rows: list[Row]) -> list[tuple[dict, dict]]:
    """The micro-batches of some rows, as many on every rank."""
    c = run.config
    batches = micro_batches(rows, c.micro_batch_tokens, c.packing)
    n_batches = fsdp_utils.all_reduce_scalars({"n": len(batches)}, "max")["n"]
    while len(batches) < max(1, n_batches):
        batches.append([Row.weightless([0, 0])])
    return [collate(batch, c.packing, run.device, run.master_dtype) for batch in batches]


def optimize(run: Run, rows: list[Row], lr: float) -> dict[str, float]:
    """Loss and optimizer steps on the rows of all ranks; returns metrics. Every rank runs the same
    number of micro-batches; gradients are summed, for E6 has divided by the step's counts."""
    c, policy = run.config, run.policy
    used = [row for row in rows if row.has_gradient(c)]  # the others have been counted
    batches = equal_micro_batches(run, used)
    ref_logp = [None] * len(batches)
    if run.reference:
        with phase("logprob"), torch.no_grad():
            for i, (inputs, _) in enumerate(batches):
                ref_logp[i], _ = run.reference(**inputs, temperature=c.temperature)
            fsdp_utils.reshard(run.reference)
            torch.get_device_module(run.device).synchronize()  # for the seconds of the phase
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    old_logp, sums = [], []  # old_logp: from before the first update on this batch
    for iteration in range(c.num_iterations):
        for i, (inputs, batch) in enumerate(batches):
            fsdp_utils.sync_replicas(policy, is_last=i == len(batches) - 1)
            logp, entropy = policy(**inputs, temperature=c.temperature)
            if iteration == 0:
                old_logp.append(logp.detach())
            loss, is_clipped = token_loss(logp, old_logp[i], ref_logp[i], batch, c)
            loss = loss * batch["token_weight"]  # E6
            loss.sum().backward()
            sums.append(token_sums(loss.detach(), is_clipped, entropy, old_logp[i], batch, c))
        norm = float(fsdp_utils.clip_grad_norm(policy.parameters(), c.max_grad_norm))
        need(
            math.isfinite(norm),
            f"gradient norm is {norm} in step {run.state.step + 1}: is learning_rate too high, or "
            "are the weights not finite?",
        )
        run.optimizer.step()
        run.optimizer.zero_grad()
    return token_metrics(sums) | {"grad_norm": norm, "lr": lr}


@torch.no_grad()
def hint_reliance(run: Run, groups: list[Group]) -> dict[str, float]:
    """How much hinted samples owe to their hints (2604.00698): log p(y | q + h) - log p(y | q), the
    mean over their tokens, every reliance_steps steps. Every rank must call it."""
    c = run.config
    if c.reliance_steps == 0 or run.state.step % c.reliance_steps != 0:
        return {}
    rows = []
    for group in groups:
        plain_ids, _ = run.prompts.ids(group.problem)
        for completion in group.completions:
            if not completion.hint:
                continue
            for context, sign in ((completion.prompt_ids, 1.0), (plain_ids, -1.0)):
                ids = [*context, *completion.token_ids]
                rows.append(Row.weightless(ids, len(context), advantage=sign))
    difference, n_tokens = 0.0, 0
    for inputs, batch in equal_micro_batches(run, rows):
        logp, _ = run.policy(**inputs, temperature=c.temperature)
        difference += float((logp * batch["advantage"]).sum())
        n_tokens += (batch["advantage"] > 0).sum()
    fsdp_utils.reshard(run.policy)
    total = fsdp_utils.all_reduce_scalars({"difference": difference, "tokens": n_tokens})
    if not total["tokens"]:
        return {}
    return {"hint/reliance": total["difference"] / total["tokens"]}


def sample_groups(
    run: Run, groups: list[Group], c: Config, salt: Any, show: Callable | None = None
) -> list[Group]:
    """All ranks' blank groups to this rank's share of final ones, with the current weights. salt:
    part of the seeds, the step or the eval set's name."""
    state, fit, column = run.state, run.prompts.fit, run.trigger_column

    def ask(group, slot):
        return run.prompts.request(group, c, slot, salt)

    def follow(group, completions, rewards):
        return hints.after_stage(group, completions, rewards, column, c, state, fit)

    with phase("sync"):
        run.engine.wake()
        # a stream, which engine hf never starts: it has the weights themselves, gathered by now
        run.engine.update_weights(fsdp_utils.full_tensors(run.policy.model, run.compute_dtype))
    with phase("generate"):
        mine = groups[run.rank :: run.world]
        groups = [hints.advance(group, c, state, fit) for group in mine]
        groups = rollout.collect(run.engine, groups, run.pool, ask, follow, show)
        run.engine.sleep()
    return groups


class Interrupt:
    """What asks the run to end: the first SIGTERM, SIGUSR1 or Ctrl-C lets the step finish and a
    checkpoint be written, a second one ends at once. Status 128 + signal, as shells have it."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        told = f"{name}: ends after this step and its checkpoint; once more ends at once\n"
        os.write(sys.stderr.fileno(), told.encode())  # print must not be entered twice


def train(run: Run, interrupt: Interrupt) -> int:
    """The algorithm: one pass of the loop is one rollout batch. run.state is alike on all ranks.
    Returns the signal that ended it, 0 when all steps are done, even if one came in the last."""
    c, state, plan = run.config, run.state, run.plan
    is_hidden = run.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(desc=c.rl_type, total=plan.steps, initial=state.step, disable=is_hidden)
    stopped_by = 0
    while state.step < plan.steps and not stopped_by:
        started = time.perf_counter()
        failed_before = sum(run.pool.stats.values())
        fsdp_utils.seconds.clear()

        # 1. Roll out G samples a problem; 2. hint: a group that fails is asked again (E2).
        blank = next_groups(run)
        groups = sample_groups(run, blank, c, state.step, bar.set_postfix_str)
        groups = sample_more(run, groups, met={group.problem.id for group in blank})
        outcomes = write_groups(run, groups, f"rollouts/step_{state.step + 1:06d}.jsonl")
        check_rewards(run, outcomes, sum(run.pool.stats.values()) - failed_before)
        groups = [group for group in groups if hints.enters_batch(group, c, state)]

        # 3. Advantages (E1, E3), and what each row weighs in the objective of the step (E6).
        rows = make_rows(groups, run.prompts, c, state)

        # 4. Micro-batches and loss (E4, E5, E7); 5. optimizer step. The sampler gets the weights
        # when the next rollout begins.
        metrics = hint_reliance(run, groups)
        with phase("train"):
            metrics |= optimize(run, rows, run.learning_rate(state.step))
        metrics |= hints.after_step(state, outcomes, c)
        metrics |= costs(run, rows, metrics["tokens/generated"], time.perf_counter() - started)
        state.step += 1
        write_metrics(run, metrics)
        watch_mismatch(run, metrics)
        watch_collapse(run, metrics)
        watch_idle(run, metrics)
        bar.update()
        is_last = state.step == plan.steps
        if c.eval_strategy == "steps" and (is_last or state.step % c.eval_steps == 0):
            evaluate(run)
        received = fsdp_utils.all_reduce_scalars({"signal": interrupt.received}, "max")
        stopped_by = int(received["signal"])  # the ranks agree
        if is_last or stopped_by or state.step % plan.save_every == 0:
            save(run)
    bar.close()
    return stopped_by if state.step < plan.steps else 0


def next_groups(run: Run) -> list[Group]:
    """The blank groups of the next step, for all ranks: returning problems, then fresh ones."""
    state = run.state
    n_returning = int(run.config.deferred_share * run.plan.prompts)
    problem_of_id = {problem.id: problem for problem in run.problems}
    returning, waiting, ids = [], [], set()
    for problem_id, stages in state.queue:
        if len(returning) < n_returning and problem_id not in ids:  # none twice in a step
            problem = problem_of_id[problem_id]
            returning.append(Group(problem, stages, n_earlier=len(stages)))
            ids.add(problem_id)
        else:
            waiting.append((problem_id, stages))
    state.queue = waiting
    return returning + fresh_groups(run, run.plan.prompts - len(returning), ids)


def fresh_groups(run: Run, size: int, met: set[int]) -> list[Group]:
    """The next problems of the epoch, or of the next one. Those that this step has met, by their
    ids, are passed over: their turn in the epoch is the one that they had."""
    n = len(run.problems)
    # the end of an epoch may be left out: sorted, that would always be the hardest problems, so
    # those of the epoch are drawn before
    if run.config.curriculum:
        n = run.plan.per_epoch * run.plan.prompts
    cursor = run.state.cursor
    for _ in range(2):
        epoch, start = divmod(cursor, n)
        rng = np.random.default_rng([run.config.seed, epoch])
        order = [run.problems[i] for i in rng.permutation(len(run.problems))[:n]]
        if run.config.curriculum:
            order.sort(key=lambda problem: problem.level)  # stable
        places = [place for place in range(start, n) if order[place].id not in met]
        if len(places) >= size:
            break
        cursor = (epoch + 1) * n  # too few for a whole step: the rest of this epoch is left out
    chosen = places[:size]
    if chosen:
        run.state.cursor = epoch * n + chosen[-1] + 1
    return [Group(order[place]) for place in chosen]


def sample_more(run: Run, groups: list[Group], met: set[int]) -> list[Group]:
    """Dynamic sampling (DAPO) if flat_groups is replace: groups, and those of fresh problems for
    such as do not enter the batch. met: ids of the problems of all ranks' groups."""
    c, state = run.config, run.state
    if c.flat_groups != "replace":
        return groups
    for _ in range(c.replace_rounds):
        entering = [group for group in groups if hints.enters_batch(group, c, state)]
        total = fsdp_utils.all_reduce_scalars({"entering": len(entering)})["entering"]
        fresh = fresh_groups(run, run.plan.prompts - int(total), met)
        if not fresh:
            break
        met = met | {group.problem.id for group in fresh}
        groups = groups + sample_groups(run, fresh, c, state.step)
    return groups


def write_groups(run: Run, groups: list[Group], name: str) -> list[hints.Outcome]:
    """A file with a line a group, of all ranks; returns the outcomes of all ranks."""
    mine = [(rollout_line(run, group), hints.outcome_of(group)) for group in groups]
    with phase("wait"):  # for the slowest rank
        gathered = fsdp_utils.gather_objects(mine)
    pairs = [pair for rank in gathered for pair in rank]
    if run.rank == 0:
        (run.folder / name).write_text("".join(json.dumps(line) + "\n" for line, _ in pairs))
    return [outcome for _, outcome in pairs]


def rollout_line(run: Run, group: Group) -> dict:
    """A group as it is logged; a sample's prompt and hint where they are not the first one's."""
    first, decode = group.completions[0], run.prompts.tokenizer.decode
    samples = []
    for completion, scores in zip(group.completions, group.rewards):
        sample = {"text": completion.text, **dict(zip(run.config.reward_funcs, scores))}
        sample["tokens"] = len(completion.token_ids)
        sample["finish_reason"] = completion.finish_reason
        sample["hint_ratio"] = completion.hint_ratio
        if completion.prompt_ids != first.prompt_ids:
            sample["prompt"] = decode(completion.prompt_ids)
            sample["hint"] = completion.hint
        samples.append(sample)
    return {
        "id": group.problem.id,
        "problem": group.problem.text,
        "prompt": decode(first.prompt_ids),
        "hint": first.hint,
        "hint_ratio": first.hint_ratio,
        "gold": group.problem.gold,
        "stages": [asdict(stage) for stage in group.stages],
        "n_earlier": group.n_earlier,
        "is_deferred": group.is_deferred,
        "completions": samples,
    }


def check_rewards(run: Run, outcomes: list[hints.Outcome], n_failed: int) -> None:
    """Tells of texts of which a reward failed in this step; ends a run if that are all."""
    n_failed = int(fsdp_utils.all_reduce_scalars({"failed": n_failed})["failed"])
    stages = [stage for outcome in outcomes for stage in outcome.stages[outcome.n_earlier :]]
    n_texts = sum(len(stage.lengths) for stage in stages)
    last = [error for error in fsdp_utils.gather_objects(run.pool.error) if error][-1:]
    told = f"a reward failed, and is 0, for {n_failed} of {n_texts} texts; last: {''.join(last)}"
    need(n_failed < n_texts, f"{told}. Mend reward_funcs, or raise verifier_timeout")
    if n_failed:
        say(f"rewards: {told}")


def costs(run: Run, rows: list[Row], n_generated: float, seconds: float) -> dict[str, float]:
    """What a step took: seconds of rank 0 by phase (verify is part of generate, logprob of train),
    tokens of all ranks, GPU memory; and verifier failures since the start."""
    n_trained = sum(len(row.input_ids) for row in rows if row.has_gradient(run.config))
    counts = {f"verifier/{name}": count for name, count in run.pool.stats.items()}
    counts["tokens/trained"] = run.config.num_iterations * n_trained
    metrics = fsdp_utils.all_reduce_scalars(counts)
    metrics["tokens/s"] = n_generated / seconds
    return metrics | fsdp_utils.phase_seconds() | fsdp_utils.gpu_memory()


def watch_mismatch(run: Run, metrics: dict) -> None:
    """Warns of a step in which sampler and trainer disagree; stops, after a checkpoint, when the
    first step that compared tokens or the mean of the last ten does."""
    c, seen, k3 = run.config, run.state.mismatch, metrics["mismatch_k3"]
    if not metrics["compared"]:
        return
    if not math.isfinite(k3):
        k3 = 1e9  # the state becomes JSON, which has no infinity
    is_first = not seen
    seen.append(k3)
    del seen[:-MISMATCH_STEPS]
    mean = sum(seen) / MISMATCH_STEPS  # steps that are still to come count as 0
    limit = mismatch_limit(c)
    may_stop = limit is not None
    if not may_stop:
        limit = 1e-2  # is told
    if max(k3, mean) <= limit:
        return
    told = f"sampler and trainer disagree: k3 is {k3:.2g} in this step, {mean:.2g} in the mean of "
    told += f"{MISMATCH_STEPS}, the limit {limit:g}: "
    if c.top_p < 1 or c.top_k:
        say(f"{told}expected, for top_p and top_k change the sampler's distribution")
        return
    told += "stale weights in the sampler, another dtype, or a model that it computes otherwise?"
    if may_stop and (is_first or mean > limit):
        save(run)
        raise UserError(f"{told} A checkpoint is saved; mismatch_limit=null only warns")
    say(told)


def watch_collapse(run: Run, metrics: dict) -> None:
    """Warns when another reward rises while un-hinted accuracy and length fall: the model learns to
    please that reward by answering at once."""
    trend = run.state.trend
    names = run.config.reward_funcs
    others = [f"reward/{name}" for name in names if name != names[run.trigger_column]]
    falling = ["accuracy_without_hint", "tokens/completion"]
    keys = [*falling, *others]
    if not others or any(key not in metrics for key in keys):
        return
    trend.append({key: metrics[key] for key in keys})
    del trend[:-COLLAPSE_STEPS]
    if len(trend) < COLLAPSE_STEPS:
        return
    half = COLLAPSE_STEPS // 2
    early = {key: np.mean([line[key] for line in trend[:half]]) for key in keys}
    late = {key: np.mean([line[key] for line in trend[half:]]) for key in keys}
    have_fallen = all(late[key] < 0.8 * early[key] for key in falling)
    for key in others:
        if have_fallen and late[key] >= early[key] + 0.1:
            told = ", ".join(f"{k} {early[k]:.3g} -> {late[k]:.3g}" for k in [key, *falling])
            say(
                f"collapse? In {COLLAPSE_STEPS} steps {told}: lower the weight of that reward in "
                "reward_weights, or the learning rate"
            )


def watch_idle(run: Run, metrics: dict) -> None:
    """Warns when step after step has no gradient, as those of a policy that a learning rate far too
    high has destroyed: its samples are all alike, and so are their rewards. In GHPO's cold start
    that is nothing special."""
    c, state = run.config, run.state
    is_cold = hints.uses_hints(c) and state.step <= c.start_hint_step
    if metrics["grad_norm"] != 0 or is_cold:
        state.idle = 0
        return
    state.idle += 1
    if state.idle % IDLE_STEPS == 0:
        rewards = [f"reward/{name}" for name in c.reward_funcs]
        keys = [*rewards, "truncated", "tokens/completion"]
        told = ", ".join(f"{key} {metrics[key]:.3g}" for key in keys if key in metrics)
        say(
            f"nothing is learnt: {state.idle} steps in a row had no gradient: equal rewards in "
            f"every group, or masked rows ({told}). Read rollouts/step_{state.step:06d}.jsonl: "
            "if the samples are no text, learning_rate was too high, go back to a checkpoint; if "
            "all are right or all wrong, take problems of another difficulty"
        )


def evaluate(run: Run) -> dict[str, dict]:
    """Without hints, on each eval set: {name: its row of the table}, a row having n problems, k
    samples of each, accuracy_at_k of them, mean_tokens, the share truncated. The texts go to
    eval_NAME.jsonl; the log has pass@1 as eval/NAME, all else as eval/NAME_KEY."""
    table, metrics = {}, {}
    for name, (c, problems) in run.eval_sets.items():
        failed_before = sum(run.pool.stats.values())
        groups = sample_groups(run, [Group(problem) for problem in problems], c, name)
        outcomes = write_groups(run, groups, f"eval_{name}.jsonl")
        check_rewards(run, outcomes, sum(run.pool.stats.values()) - failed_before)
        rewards_PKF = np.array([outcome.rewards for outcome in outcomes])
        row = {"n": len(outcomes), "k": c.num_generations}
        row |= accuracy_at_k(rewards_PKF[:, :, run.accuracy_column] > 0)
        row["mean_tokens"] = np.mean([outcome.lengths for outcome in outcomes])
        row["truncated"] = np.mean([outcome.is_truncated for outcome in outcomes])
        table[name] = row
        for key, value in row.items():
            metrics[f"eval/{name}_{key}".removesuffix("_pass@1")] = value
    write_metrics(run, metrics)
    return table


def accuracy_at_k(is_right_PK: np.ndarray) -> dict[str, float]:
    """pass@1, its standard error over problems, pass@k and pass@k/2, of P problems' K samples."""
    n_problems, n_samples = is_right_PK.shape
    rates = is_right_PK.mean(1)
    error = 0.0
    if n_problems > 1:
        error = rates.std(ddof=1) / math.sqrt(n_problems)
    found = {"pass@1": rates.mean(), "stderr": error}
    for k in sorted({n_samples // 2, n_samples} - {0, 1}):
        passed = [pass_at_k(n_samples, int(n_right), k) for n_right in is_right_PK.sum(1)]
        found[f"pass@{k}"] = np.mean(passed)
    return found


def pass_at_k(n_samples: int, n_right: int, k: int) -> float:
    """The unbiased chance that one of k samples is right when n_right of n_samples are."""
    return 1 - math.comb(n_samples - n_right, k) / math.comb(n_samples, k)  # E8


def write_metrics(run: Run, metrics: dict) -> None:
    """One line to the run's log, a shorter one to the terminal, all of it to wandb if asked."""
    step = run.state.step
    if run.rank == 0:
        line = {"step": step}
        for key, value in metrics.items():
            line[key] = value if math.isfinite(value) else None  # JSON has no NaN
        with open(run.log, "a") as file:
            file.write(json.dumps(line) + "\n")
            run.state.metrics_bytes = file.tell()  # only rank 0's state is saved
    if run.wandb:
        run.wandb.log(metrics, step=step)
    is_evaluation = "loss" not in metrics
    if is_evaluation or step % run.config.logging_steps == 0:
        shown = [f"{key} {value:.3g}" for key, value in metrics.items() if SHOWN.match(key)]
        say(f"step {step}: {', '.join(shown)}")


def save(run: Run) -> None:
    """A checkpoint of the state as it is, with an export in it."""
    fsdp_utils.save_checkpoint(
        run.folder,
        run.state.step,
        run.policy,
        run.optimizer,
        asdict(run.state),
        run.config.save_total_limit or 0,
        lambda folder: export(run, folder / "model"),
    )


def export(run: Run, folder: Path) -> None:
    """Weights, config and tokenizer as transformers and vLLM load them; called on all ranks."""
    model = run.policy.model
    weights = {}
    tensors = fsdp_utils.full_tensors(model, run.compute_dtype)
    for name, tensor in tensors:  # on all ranks: each is a collective
        if run.rank == 0:
            weights[name] = tensor.cpu()
    if run.rank > 0:
        return
    with as_user_error(f"{folder} cannot be written"):
        model.save_pretrained(folder, state_dict=weights)
        run.prompts.tokenizer.save_pretrained(folder)
    model.config.dtype = run.config.torch_dtype  # transformers has put the masters' there
    model.config.save_pretrained(folder)


def setup(config: Config, is_eval: bool = False) -> Run:
    """What `train` needs, in an order that matters: wrong data and rewards are told before a model
    is loaded, the folder is ours before it is read, memory is tried before Adam's moments are
    loaded, and the engine takes what is left of it."""
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pool = VerifierPool(config.reward_funcs, min(8, cores), config.verifier_timeout)
    place = fsdp_utils.setup_distributed()
    if config.cpu_offload:
        torch.set_num_threads(cores)  # of Adam, which runs there; run.sh allows it one
    state = State()
    prompts = Prompts(config, state)
    problems, plan, eval_sets = load_data(config, prompts, place.world, is_eval)
    examples = problems or [one for _, held_out in eval_sets.values() for one in held_out]
    pool.probe([(one.gold, rollout.row_of(one, config)) for one in examples[:4]])
    state.prompts_per_step, state.data = plan.prompts, fingerprint(problems)
    compute_dtype, master_dtype = dtypes(config)
    policy = load_policy(config)
    reference = load_policy(config).requires_grad_(False).eval() if config.beta else None
    optimizer, learning_rate = make_optimizer(config, policy, plan.steps)
    folder = open_folder(config, place.rank, is_eval)
    run = Run(
        config=config,
        state=state,
        rank=place.rank,
        world=place.world,
        device=place.device,
        folder=folder,
        log=folder / ("eval.jsonl" if is_eval else "metrics.jsonl"),
        prompts=prompts,
        problems=problems,
        plan=plan,
        eval_sets=eval_sets,
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        learning_rate=learning_rate,
        master_dtype=master_dtype,
        compute_dtype=compute_dtype,
        pool=pool,
    )
    check_policy(run)
    if not is_eval:
        startup_pass(run)
    resume(run, is_eval)
    return replace(run, engine=build_engine(run), wandb=start_wandb(run))


def make_optimizer(config: Config, policy: Policy, steps: int) -> tuple[Optimizer, Callable]:
    """(Adam, the learning rate as a function of the step, counted from 0)."""
    optimizer = AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=torch.cuda.is_available(),
    )
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    kind, more = config.lr_scheduler_type, config.lr_scheduler_kwargs
    with as_user_error(f"config: lr_scheduler_type={kind}, lr_scheduler_kwargs={more}"):
        (factor,) = get_scheduler(kind, optimizer, warmup, steps, more).lr_lambdas

    def learning_rate(step):
        # differs from reference: warm-up begins above 0, for a step at rate 0 is a step lost
        return config.learning_rate * factor(step + 1 if step < warmup else step)

    return optimizer, learning_rate


def load_data(
    config: Config, prompts: Prompts, world: int, is_eval: bool
) -> tuple[list[Problem], Plan, dict]:
    """(problems to train on, plan of the run, eval sets); an evaluation trains on no problem."""
    eval_sets = {}
    for name, spec in config.eval_datasets.items():
        c = eval_config(config, spec)
        eval_sets[name] = c, load_problems(c, prompts, keep_all=True)
    if is_eval:
        return [], Plan(prompts=0, per_epoch=0, steps=0, save_every=0), eval_sets
    problems = load_problems(config, prompts)
    plan = make_plan(config, world, len(problems))
    for name, (_, held_out) in eval_sets.items():
        theirs = {tuple(problem.text.split()) for problem in held_out}
        n_also = sum(tuple(problem.text.split()) in theirs for problem in problems)
        if n_also:  # its numbers are then too good
            say(f"data: {n_also} training problems also stand in the eval set {name}")
    return problems, plan, eval_sets


def build_engine(run: Run) -> Any:
    c, tokenizer = run.config, run.prompts.tokenizer
    named = run.policy.model.generation_config.eos_token_id  # one, several or none
    eos_ids = {tokenizer.eos_token_id, *np.ravel(named).tolist()} - {None}  # ravel(None) is [None]
    return rollout.ENGINES[c.engine](c, tokenizer, eos_ids, longest_sequence(c), run.policy)


def start_wandb(run: Run) -> Any:
    if "wandb" not in run.config.report_to or run.rank > 0:
        return None
    import wandb

    return wandb.init(project="ghpo", config=asdict(run.config), dir=run.folder)


def load_policy(c: Config) -> Policy:
    """The causal LM, its weights float32 (or float64), sharded."""
    dtype, master_dtype = dtypes(c)
    # as stored it takes less memory until `shard` casts it; not where float32 is computed, for
    # buffers that are stored in bfloat16 would stay rounded
    as_stored = dtype == torch.bfloat16
    logging.disable_progress_bar()
    model = load_model(c, "auto" if as_stored else master_dtype)
    if c.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # it is loaded in eval mode, in which nothing would be checkpointed
    return fsdp_utils.shard(
        Policy(model), blocks_of(model), c.sharding, dtype, c.replicas, c.cpu_offload
    )


def dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """(of the computation, of weights, moments and loss: at least float32)."""
    compute_dtype = getattr(torch, config.torch_dtype)
    return compute_dtype, torch.promote_types(compute_dtype, torch.float32)


def check_policy(run: Run) -> None:
    """Compares the log-probs of the training pass with those of the whole causal LM on each
    sequence alone; UserError on a difference. Collective: every rank must call it."""
    c = run.config
    mean_limit, largest_limit = CHECK_LIMITS.get(c.torch_dtype, (1e-4, 1e-4))
    name = f"model_name_or_path={c.model_name_or_path}: {run.policy.model.config.model_type}"
    with as_user_error(name), torch.no_grad():
        mean, largest = policy_error(run, c.packing)
    fsdp_utils.reshard(run.policy)
    remedy = "Try attn_implementation=eager or torch_dtype=float32, else take another model"
    if c.packing:
        remedy = "It may be that rows which are packed see each other: set packing=false"
    need(
        mean <= mean_limit and largest <= largest_limit,
        f"{name}: log-probs of the training pass are not the model's: off by {mean:.2g} in the "
        f"mean, {largest:.2g} at most (allowed: {mean_limit:g}, {largest_limit:g}). {remedy}",
    )


def policy_error(run: Run, is_packed: bool) -> tuple[float, float]:
    """(mean, largest) |dlogp| over ranks, of random sequences through Policy and one by one."""
    policy, rng = run.policy, np.random.default_rng(0)
    size = policy.model.config.vocab_size
    sequences = [rng.integers(size, size=length).tolist() for length in (48, 48, 29)]
    rows = [Row.weightless(ids) for ids in sequences]
    inputs, _ = collate(rows, is_packed, run.device, run.master_dtype)
    logp, _ = policy(**inputs)
    expected = []
    for ids in sequences:
        ids = torch.tensor([ids], device=run.device)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits_TV = policy(whole=whole)[0, :-1].to(logp.dtype)
        expected.append(-cross_entropy(logits_TV, ids[0, 1:], reduction="none"))
    error = (logp - torch.cat(expected)).abs().nan_to_num(torch.inf)
    errors = {"mean": error.mean(), "largest": error.max()}
    errors = fsdp_utils.all_reduce_scalars(errors, "max")
    return errors["mean"], errors["largest"]


def startup_pass(run: Run) -> None:
    """Steps of rows at maximum length that weigh nothing, before a checkpoint is loaded:
    out-of-memory comes in minute one, not hour ten. On a GPU, unless the config says otherwise."""
    c = run.config
    is_wanted = torch.cuda.is_available() if c.startup_pass is None else c.startup_pass
    if not is_wanted:
        return
    width = c.max_prompt_length + c.max_completion_length
    row = Row.weightless([0] * width, c.max_prompt_length, advantage=1.0)
    row.token_weight = 1.0  # else it would be left out
    rows = [row] * max(1, c.micro_batch_tokens // width)
    for _ in range(2):  # the second pass beside Adam's moments
        optimize(
            run, rows + rows, 0.0
        )  # two micro-batches: the second beside the first's gradients
    for moments in run.optimizer.state.values():
        for moment in moments.values():
            moment.zero_()  # as new; they stay, for the engine measures what memory is free
    torch.cuda.empty_cache()
    say(f"start-up pass: {len(rows)} rows of {width} tokens and Adam's moments fit")


def open_folder(config: Config, rank: int, is_eval: bool) -> Path:
    """Starts or refuses output_dir; a run of another config is moved aside, never deleted."""
    folder = Path(config.output_dir)
    changed = changed_settings(config, folder / "config.yaml")
    need(
        not changed or (config.overwrite_output_dir and not is_eval),
        f"output_dir={folder} holds another run ({', '.join(changed)} differ): choose another, or, "
        "to train, overwrite_output_dir=true to move it",
    )
    fsdp_utils.barrier("every rank has looked at the folder")
    if rank == 0:
        if changed:
            lock_folder(folder)  # not while somebody writes there
            folder.rename(f"{folder}.{time.strftime('%Y%m%d-%H%M%S')}")
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        save_config(config, folder / "config.yaml")
    fsdp_utils.barrier("the folder is there")
    return folder


def resume(run: Run, is_eval: bool) -> None:
    """Weights, optimizer and state of the newest checkpoint, if there is one."""
    found = fsdp_utils.load_newest(run.folder, run.policy, run.optimizer)
    if found:
        path, saved = found
        run.state.load(saved)
        if not is_eval:
            check_resumed(run, path)
        say(f"resuming {path}")
    run.state.steps = run.plan.steps
    if run.rank == 0 and run.log.is_file() and not is_eval:
        cut_log(run.log, run.state.metrics_bytes)


def check_resumed(run: Run, path: Path) -> None:
    """Refuses to go on with other data or another size of steps; tells of another end."""
    c, state, plan = run.config, run.state, run.plan
    need(
        not state.data or state.data == fingerprint(run.problems),
        f"{path} was made with other data: history and queue would mean other problems. "
        "Bring dataset_name back as it was, or choose another output_dir",
    )
    need(
        state.prompts_per_step == plan.prompts,
        f"{path} had {state.prompts_per_step} prompts a step, not {plan.prompts}: change "
        "gradient_accumulation_steps",
    )
    kind = c.lr_scheduler_type
    before = state.steps
    if before not in (0, plan.steps) and not kind.startswith("constant"):
        say(f"max_steps was {before} and is {plan.steps}: the {kind} rate goes on by the new one")


def cut_log(log: Path, length: int) -> None:
    """The log as it was at the checkpoint; its later lines, which come again, go to LOG.stale."""
    with open(log, "r+b") as file, open(f"{log}.stale", "ab") as stale:
        kept = file.read(length).rfind(b"\n") + 1  # a crash may have cut a line
        file.seek(kept)
        stale.write(file.read())
        file.truncate(kept)


def dry_run(config: Config) -> None:
    """Prints config, arithmetic, data, a problem as the model sees it at each stage, and memory."""
    print(as_yaml(config))
    prompts, world = Prompts(config), int(os.environ.get("WORLD_SIZE", 1))
    problems = load_problems(config, prompts)
    make_plan(config, world, len(problems), is_dry=True)
    problem = next((problem for problem in problems if problem.solution), problems[0])
    for omega in [0.0, *config.hint_ratio]:
        hint, is_trimmed = prompts.fit(problem, omega)
        ids, _ = prompts.ids(problem, hint)
        print(f"---- row {problem.id}, omega {omega:g}, {len(ids)} tokens, trimmed: {is_trimmed}")
        print(prompts.tokenizer.decode(ids))
    memory = bytes_per_gpu(config, world, *sizes(config))
    print(f"---- bytes per GPU, activations excluded: {memory}")
    if config.engine == "server":
        print(configs.plan.server_commands(config, torch.cuda.device_count()))


def main() -> None:
    """The command line; what the user can mend, or the system refuses, is one line, status 2."""
    parser = argparse.ArgumentParser(
        description="GHPO and GRPO from scratch: trains, or evaluates, as a config says",
        allow_abbrev=False,
        epilog="then settings: key=value, --key value, --key=value",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--eval", action="store_true", help="evaluate the model, and stop")
    args, overrides = parser.parse_known_args()
    stopped_by = 0
    try:
        config = load_config(args.config, overrides, args.eval, will_run=not args.dry_run)
        if args.dry_run:
            dry_run(config)
        else:
            stopped_by = run_config(config, args.eval)
    except (UserError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError):
            told = f"in phase '{fsdp_utils.current_phase()}': {error}"
        print(f"error: {told}", file=sys.stderr, flush=True)
        os._exit(2)
    except KeyboardInterrupt:  # before there was a step to finish
        stopped_by = signal.SIGINT
    if stopped_by:
        os._exit(128 + stopped_by)


def run_config(config: Config, is_eval: bool) -> int:
    """Trains, or evaluates only; returns the signal that ended it, 0 when all is done."""
    run = setup(config, is_eval)
    stopped_by = 0
    if is_eval:
        table = json.dumps(evaluate(run), indent=1)
        if run.rank == 0:
            (run.folder / "eval.json").write_text(table + "\n")
            print(table, flush=True)
    else:
        if config.eval_strategy == "steps" and run.state.step == 0:
            evaluate(run)
        stopped_by = train(run, Interrupt())
        if not stopped_by:
            export(run, run.folder / "model")
            if config.push_to_hub and run.rank == 0:
                place = create_repo(config.hub_model_id or run.folder.name, exist_ok=True)
                upload_folder(repo_id=place.repo_id, folder_path=run.folder / "model")
            say(f"done: {run.folder}")
    fsdp_utils.barrier("every rank is done")
    run.engine.close()
    run.pool.close()
    if run.wandb:
        run.wandb.finish()
    return stopped_by


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo must not outlive the interpreter: that aborts now and then
