"""GHPO and GRPO from scratch: sample groups, hint the groups that fail, take one gradient step.

    torchrun --nproc_per_node 8 ghpo.py --config configs/x.yaml learning_rate=2e-6     (or python)
    python ghpo.py --config configs/x.yaml --dry_run                        show what would run

`train` is the algorithm, E1-E8 are the README's equations, configs/default.yaml has every setting.
Fork here for loss and loop, in hints.py for the method, in rollout.py for samplers.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel,
    get_scheduler, logging)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fsdp_utils
import hints
import rollout
from configs import changed_settings, eval_config, load_config, make_plan, need, save_config, say
from fsdp_utils import phase
from reward import UserError, VerifierPool, parse_gold
from rollout import Group, Request
from tests.estimates import accuracy_at_k, costs, rollout_metrics, token_metrics, token_sums

PROMPT_DATE = datetime(2025, 1, 1)  # what a chat template shows as today
THINK_OPENED = re.compile(r"<think>\s*$")
MARK = re.compile("\ue000(\\d+)\ue001")  # private characters, see Prompts
SYSTEM_PROBE = {"role": "system", "content": "Be brief."}
USER_PROBE = {"role": "user", "content": "What is 1 + 2?"}
EXAMPLE_TEMPLATE = (  # as YAML
    r'"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"')
LIBRARY_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError,
                  RuntimeError, SafetensorError, TemplateError)
CHECK_LENGTHS = [48, 48, 29]  # tokens of the sequences that check_policy compares
CHECK_LIMITS = {"bfloat16": (0.02, 0.2)}  # mean and largest |dlogp|; of other types EXACT
EXACT = (1e-4, 1e-4)

def read_rows(config):
    """Rows of the data set as dicts; UserError names the file and line."""
    name, kind, where = config.dataset_name, Path(config.dataset_name).suffix[1:], ""
    try:
        if kind == "jsonl":
            rows = []
            for number, line in enumerate(Path(name).read_text(encoding="utf-8").split("\n"), 1):
                where = f", line {number}"
                rows += [{**json.loads(line)}] if line.strip() else []
            return rows
        from datasets import load_dataset
        if kind in ("json", "parquet"):
            return list(load_dataset(kind, data_files=name, split="train"))
        return list(load_dataset(name, config.dataset_config, split=config.dataset_split))
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"dataset_name={name}{where}: {error}") from None

def load_problems(config, prompts):
    """Usable problems, ids = row numbers; what is dropped is counted and shown."""
    c, rows, found = config, read_rows(config), defaultdict(list)  # why not usable: problems
    columns = [c.dataset_prompt_column, c.dataset_answer_column, c.dataset_hint_column]
    columns = columns if c.rl_type == "ghpo" else columns[:2]
    wanted = columns + [c.dataset_level_column] * c.curriculum
    missing = [column for column in wanted if rows and column not in rows[0]]
    need(not missing, f"{c.dataset_name}: no column {missing} in {[*rows[0]] if rows else 0}: set "
         "dataset_prompt_column and so on (eval_datasets: in a set's own settings)")
    system = [{"role": "system", "content": c.system_prompt}] if c.system_prompt else []
    for number, row in enumerate(rows):
        question, answer, *trace = ("" if row.get(k) is None else row[k] for k in columns)
        if not isinstance(question, list):
            question = [{"role": "user", "content": str(question)}] * bool(str(question).strip())
        level = re.search(r"\d+|$", str(row.get(c.dataset_level_column)))[0]  # "Level 5" is 5
        problem = hints.Problem(number, system + question, str(answer).strip(),
                                "".join(map(str, trace)), float(level or 0))
        reason = "no problem text" * (not question) or parse_gold(problem.answer)
        if not reason and len(prompts.ids(problem)[0]) > c.max_prompt_length:
            reason = f"prompt over max_prompt_length={c.max_prompt_length} tokens"
        found[reason].append(problem)
    problems = found.pop(None, [])
    bare = sum(not problem.trace.strip() for problem in problems) * (c.rl_type == "ghpo")
    say(f"data: {c.dataset_name}: {len(problems)} of {len(rows)} rows usable"
        + f", {bare} without a solution to hint from" * bool(bare))
    for reason, dropped in found.items():
        say(f"data: dropped {len(dropped)}, {reason}: rows {[p.id for p in dropped[:5]]}")
    need(problems, f"dataset_name={c.dataset_name}: none of its {len(rows)} rows is usable")
    return problems

@contextmanager
def as_user_error(what: str):
    """What the libraries raise inside becomes one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:400]}") from None

def load_tokenizer(config):
    """The tokenizer, with a chat template and a pad token; UserError when it cannot be used."""
    name = f"model_name_or_path={config.model_name_or_path}"
    with as_user_error(f"{name}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=False)
        spelt = tokenizer.decode(tokenizer("12").input_ids)
    need("12" in spelt.replace(" ", ""), f"{name}: its tokenizer reads 12 as {spelt!r}: are files "
         "missing?")
    template = getattr(config, "chat_template", None)
    if template and "{" not in template:  # all Jinja has a brace
        with as_user_error(f"chat_template={template}"):
            template = Path(template).read_text(encoding="utf-8")
    if template:
        tokenizer.chat_template = template
    need(tokenizer.chat_template, f"{name}: its tokenizer has no chat template: set one, Jinja or "
         f"a file, for example chat_template: {EXAMPLE_TEMPLATE}")
    need(tokenizer.eos_token is not None, f"{name}: its tokenizer names no eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"tokenizer: no pad token, {tokenizer.eos_token} takes its place")
    prove_export(name, tokenizer)
    return tokenizer

def prove_export(name, *parts):
    """Saves configs or a tokenizer once, lest the first checkpoint of a run fails on them."""
    with as_user_error(f"{name}: cannot be exported"), TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)

def system_in_user_turn(messages):
    """Chat messages without a system turn: its text stands in front of the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, *turns = messages
    first = [turn["role"] for turn in turns].index("user")
    content = f"{system['content']}\n\n{turns[first]['content']}"
    return [*turns[:first], {**turns[first], "content": content}, *turns[first + 1 :]]

class Prompts:
    """The chat template: what the model reads for a problem and a hint."""

    def __init__(self, config):
        self.config = config
        self.tokenizer = load_tokenizer(config)
        self.special = [token for token in self.tokenizer.all_special_tokens
                        if not re.fullmatch("</?(think|answer)>", token)]
        # the date that a template shows must not change the prompts when a run is resumed
        self.template_values = {"strftime_now": PROMPT_DATE.strftime}
        self.template_values |= getattr(config, "chat_template_kwargs", None) or {}
        if "strftime_now" in str(self.tokenizer.chat_template):
            say(f"chat template: the date that it shows is always {PROMPT_DATE:%Y-%m-%d}")
        name = f"model_name_or_path={config.model_name_or_path}"
        self._rendered([USER_PROBE], name)
        self.has_system_role = self._knows_the_system_role()
        if not self.has_system_role:
            say("chat template: no system role, its text goes in front of the first user turn")

    def ids(self, problem, hint=""):
        """(token ids, text the assistant's turn starts with: what the template opens, then the
        hint); UserError names the row that the template refuses."""
        messages, prefix = hints.render(problem, hint, self.config)
        if not self.has_system_role:
            messages = system_in_user_turn(messages)
        marked = [{**turn, "content": self._marked(turn["content"])} for turn in messages]
        text = self._rendered(marked, f"{self.config.dataset_name}: row {problem.id}")
        opened = THINK_OPENED.search(text)
        opening = opened[0] if opened else ""
        if opening:
            prefix = prefix.removeprefix(hints.ASSISTANT_OPENING)
        return self._encoded(text + self._marked(prefix)), opening + prefix

    def _rendered(self, messages, what):
        with as_user_error(f"{what}: chat template"):
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.template_values)

    def _knows_the_system_role(self):
        """Gemma's template raises, others leave the system turn out."""
        try:
            return SYSTEM_PROBE["content"] in self._rendered([SYSTEM_PROBE, USER_PROBE], "probe")
        except UserError:
            return False

    def _marked(self, content):
        """A row's own text in which special tokens are replaced, so that a template's stand out."""
        if isinstance(content, str):
            for i, token in enumerate(self.special):
                content = content.replace(token, f"\ue000{i}\ue001")
        return content

    def _encoded(self, text):
        """Token ids; special tokens of the row's own text are read as the plain text they are."""
        ids = []
        for i, piece in enumerate(MARK.split(text)):
            if i % 2:
                ids += self.tokenizer(self.special[int(piece)], add_special_tokens=False,
                                      split_special_tokens=True).input_ids
            else:
                ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def fit(self, problem, ratio):
        """make_hint, shortened (the hint, never the problem) until max_prompt_length holds."""
        hint, is_trimmed = hints.make_hint(problem, ratio)
        while hint and len(self.ids(problem, hint)[0]) > self.config.max_prompt_length:
            hint, _ = hints.make_hint(problem, ratio, limit=len(hint) - 1)
        return hint, is_trimmed

    def request(self, group, shown, config, slot, step):
        """The Request for a Try; its seed: a hash of run, step, problem and stage, not rank."""
        rendered = {hint: self.ids(group.problem, hint) for hint in set(shown.hints)}
        ids, prefixes = zip(*(rendered[hint] for hint in shown.hints))
        key = repr((config.seed, step, group.problem.id, len(group.tries))).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2  # 62 bits
        return Request(group.problem, ids, shown, group.tries, prefixes, seed, config, slot)

def advantages(group, config):
    """E1 and E3: rewards (G, F) to advantages (G,), float64."""
    rewards_G = np.array(group.rewards) @ np.array(config.reward_weights)  # E1
    mean, std = hints.baseline(rewards_G, np.array([c.hint_ratio for c in group.completions]))
    return (rewards_G - mean) / (std + 1e-4 if config.scale_rewards else 1.0)  # E3

@dataclass
class Row:
    """One completion as the loss sees it; T targets follow the context."""
    input_ids: list
    context: int  # tokens of context
    behaviour_logp: list  # (T,)
    policy_weight: list  # (T,)
    likelihood_weight: list  # (T,)
    is_on_context: list  # (T,) scored under what it was sampled from: mismatch can be measured
    advantage: float
    tokens: int  # that count in E6, 0 when masked as truncated
    scale: float = 0.0  # E6

def make_rows(groups, prompts, config):
    """Rows of the groups, with E6 taken over all ranks' groups: every rank must call it."""
    groups_of_rows = []
    for group in groups:
        plain, rows = prompts.ids(group.problem)[0], []
        for completion, advantage in zip(group.completions, advantages(group, config)):
            context, targets, *weights = hints.loss_view(completion, plain, config)
            input_ids, length = [*context, *targets], len(completion.token_ids)
            taken_over = [0.0] * (len(targets) - length)  # from the prompt
            is_same = input_ids == [*completion.prompt_ids, *completion.token_ids]
            is_masked = config.mask_truncated_completions and completion.finish_reason == "length"
            rows.append(Row(input_ids, len(context), taken_over + completion.behaviour_logp,
                            *weights, taken_over + [float(is_same)] * length, float(advantage),
                            0 if is_masked else length))
        groups_of_rows.append(rows)
    whole = sum(groups_of_rows, [])
    counts = {"groups": len(groups), "rows": len(whole), "tokens": sum(r.tokens for r in whole)}
    counts = fsdp_utils.all_reduce_scalars(counts)
    for rows in groups_of_rows:
        for row in [row for row in rows if row.tokens]:
            row.scale = 1 / {  # E6: means over tokens,
                "bnpo": counts["groups"] * sum(r.tokens for r in rows),  # over groups, of theirs
                "dapo": counts["tokens"],  # over all
                "grpo": counts["rows"] * row.tokens,  # over rows, of theirs
                "dr_grpo": counts["rows"] * config.max_completion_length}[config.loss_type]
    return whole

def token_loss(logp, old_logp, ref_logp, batch, config):
    """E4, E5, E7: (loss, was the ratio clipped) of each token (M,). ref_logp: None if beta is 0."""
    advantage, high = batch["advantage"], config.epsilon_high
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - config.epsilon, 1 + (config.epsilon if high is None else high))
    loss = -torch.minimum(ratio * advantage, clipped * advantage)  # E4
    if config.importance_cap:
        weight = torch.exp(old_logp - batch["behaviour_logp"]).clamp(max=config.importance_cap)
        loss = loss * weight.detach()  # E7
    if ref_logp is not None:
        loss = loss + config.beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)  # E5
    loss = loss * batch["policy_weight"] - batch["likelihood_weight"] * logp
    return loss, (clipped - ratio).detach() * advantage < 0

class HiddenStates(tuple):
    """(hidden states,) as a transformer would answer: None for all else that a head may ask for."""

    last_hidden_state = property(itemgetter(0))

    def __getattr__(self, name):
        return None

class GivenStates:
    """Stands where a causal LM keeps its transformer, and answers with the states it is given."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.decoder = self  # OPT calls the decoder that its transformer wraps

    def __call__(self, *args, inputs_embeds, **kwargs):
        return HiddenStates([inputs_embeds])

    def __getattr__(self, name):
        return getattr(self.transformer, name)  # FalconH1 keeps a factor of the logits there

def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM with all that its family does to the last hidden states, and nothing before:
    head_of(model)(inputs_embeds=hidden).logits. A shallow copy that shares the weights."""
    head, place = copy.copy(model), model.base_model_prefix
    head._modules = {name: part for name, part in model._modules.items() if name != place}
    head.__dict__[place] = GivenStates(model.base_model)
    return head

class Policy(torch.nn.Module):
    """The FSDP root: transformer and LM head under one forward, for scoring and for decoding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids=None, positions=None, predict=None, target=None, temperature=1.0,
                generate=None, whole=None):
        """logp and entropy (M,) of the tokens target (M,) predicted at flat positions predict (M,)
        of ids (B, T), padded on the right or packed with positions restarted, at a temperature.
        generate: arguments of the model's generate, which runs instead. whole: arguments of the
        whole causal LM, whose logits (B, T, V) are returned instead."""
        if generate:
            return self.model.generate(**generate)
        if whole:
            return self.model(**whole).logits
        # No mask: causal attention never looks right. No cache: only then do restarted positions
        # keep packed rows apart.
        out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden_MH = out.last_hidden_state.flatten(0, 1)[predict]
        # One chunk of (tokens, V) logits exists at a time, forward and backward.
        chunk = max(64, 2**25 // self.model.config.vocab_size)
        parts = [checkpoint(self._score, h, t, temperature, use_reentrant=False)
                 for h, t in zip(hidden_MH.split(chunk), target.split(chunk))]
        return tuple(torch.cat(part) for part in zip(*parts))

    def _score(self, hidden, target, temperature):
        # trap: families scale or cap their logits after the head, so it is never called alone
        logits = head_of(self.model)(inputs_embeds=hidden[None]).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logp_MV = logits.log_softmax(-1)
        with torch.no_grad():
            entropy_M = -(logp_MV.exp() * logp_MV).sum(-1)
        return logp_MV.gather(-1, target[:, None]).squeeze(-1), entropy_M

def micro_batches(rows, budget, is_packed):
    """Rows in lists of at most `budget` tokens, longest first; 3 % padding, or none if packed."""
    batches = []
    for row in sorted(rows, key=lambda r: -len(r.input_ids)):
        batch = [*batches[-1], row] if batches else []
        tokens = sum(len(r.input_ids) for r in batch)
        size = tokens if is_packed or not batch else len(batch) * len(batch[0].input_ids)
        # up to 512 tokens more padding is let in: splitting further costs more than it saves
        if batch and size <= budget and (tokens >= 0.97 * size or size <= 512):
            batches[-1] = batch
        else:
            batches.append([row])
    return batches

def collate(rows, is_packed, device, dtype):
    """(arguments of Policy.forward, per-token tensors of the loss, each (M,)) for some rows."""
    lengths = [len(row.input_ids) for row in rows]
    width = sum(lengths) if is_packed else max(lengths)
    starts = np.cumsum([0, *lengths]) if is_packed else np.arange(len(rows)) * width
    ids = np.zeros((1 if is_packed else len(rows), width), dtype=np.int64)
    positions, places = np.zeros_like(ids) + np.arange(width), []
    for row, start, length in zip(rows, starts, lengths):
        ids.flat[start : start + length] = row.input_ids
        positions.flat[start : start + length] = np.arange(length)
        places.append(np.arange(start + row.context, start + length))
    target = np.concatenate(places)
    inputs = {"ids": ids, "positions": positions, "predict": target - 1, "target": ids.flat[target]}
    loss_inputs = {key: np.concatenate([np.broadcast_to(getattr(row, key), len(place))
                                        for row, place in zip(rows, places)])
                   for key in ("behaviour_logp", "policy_weight", "likelihood_weight",
                               "is_on_context", "advantage", "scale")}
    return ({key: torch.from_numpy(value).to(device) for key, value in inputs.items()},
            {key: torch.from_numpy(value).to(device, dtype) for key, value in loss_inputs.items()})

def optimize(run, rows, lr):
    """Loss and optimizer steps on the rows of all ranks; returns metrics. Every rank runs the same
    number of micro-batches; gradients are summed, for E6 has divided by the step's counts."""
    c, policy, sums = run.config, run.policy, []
    # A row without advantage gives no gradient, but it has been counted.
    used = [row for row in rows if row.advantage or c.beta or any(row.likelihood_weight)]
    batches = micro_batches(used, c.micro_batch_tokens, c.packing)
    most = int(fsdp_utils.all_reduce_scalars({"n": max(1, len(batches))}, "max")["n"])
    filler = Row([0, 0], 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0)  # runs, and weighs nothing
    batches += [[filler]] * (most - len(batches))
    batches = [collate(b, c.packing, run.device, run.master_dtype) for b in batches]
    with phase("logprob"), torch.no_grad():
        ref = [run.reference(**inputs, temperature=c.temperature)[0] if c.beta else None
               for inputs, _ in batches]
        torch.get_device_module(run.device).synchronize()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    old = []  # from before the first update on this batch
    for iteration in range(c.num_iterations):
        for i, (inputs, batch) in enumerate(batches):
            fsdp_utils.last_micro_batch(policy, i == most - 1)
            logp, entropy = policy(**inputs, temperature=c.temperature)
            old += [logp.detach()] * (iteration == 0)
            loss, is_clipped = token_loss(logp, old[i], ref[i], batch, c)
            loss = loss * batch["scale"]  # E6
            loss.sum().backward()
            sums.append(token_sums(loss.detach(), is_clipped, entropy, old[i], batch, c))
        norm = float(fsdp_utils.clip_grad_norm(policy.parameters(), c.max_grad_norm))
        if math.isfinite(norm):
            run.optimizer.step()
        else:
            path = run.folder / f"nonfinite_step_{run.state['step']}_rank_{run.rank}.pt"
            torch.save(rows, path)
            need(c.nonfinite == "skip", f"gradient norm is {norm}: its batch is in {path}")
        run.optimizer.zero_grad()
    return token_metrics(sums) | {"grad_norm": norm, "lr": lr}

def roll_out(run, blank, c, step):
    """Blank groups to final ones, with the current weights; and each one's last plan_try."""
    planned = {}  # slot: (next Try or None, tries so far)

    def next_request(group, slot):
        shown, tries = planned[slot] = hints.plan_try(
            group, c, run.state["history"], step, run.prompts.fit)
        if not group.completions or (shown and c.hint_timing == "inline"):
            shown = shown or hints.Try([0.0] * c.num_generations, [""] * c.num_generations)
            return run.prompts.request(replace(group, tries=tries), shown, c, slot, step)

    with phase("sync"):
        run.engine.wake()
        run.engine.update_weights(fsdp_utils.full_tensors(run.policy.model, run.compute_dtype))
    with phase("generate"):
        groups = rollout.collect(
            run.engine, blank, run.pool, next_request, hints.merge, run.trigger)
        run.engine.sleep()
    return groups, list(planned.values())

def train(run):
    """The algorithm: one pass of the loop is one rollout batch. run.state is alike on all ranks."""
    c, state, plan = run.config, run.state, run.plan
    steps = range(state["step"], plan.steps)
    for step in tqdm(steps, c.rl_type, plan.steps, initial=state["step"], disable=run.rank > 0):
        started = time.perf_counter()
        fsdp_utils.seconds.clear()

        # 1. Roll out G samples a problem; 2. hint: a group that fails is asked again (E2).
        blank = next_groups(run)[run.rank :: run.world]
        groups, planned = roll_out(run, blank, c, step)
        metrics = record(run, groups, blank, planned)
        if c.hint_exhausted == "drop" and c.rl_type == "ghpo" and step >= c.start_hint_step:
            groups = [group for group, (shown, _) in zip(groups, planned)
                      if shown or not hints.needs_hint(group.tries, c)]

        # 3. Advantages (E1, E3), and what each row weighs in the objective of the step (E6).
        rows = make_rows(groups, run.prompts, c)

        # 4. Micro-batches and loss (E4, E5, E7); 5. optimizer step. The sampler gets the weights
        # when the next rollout begins.
        with phase("train"):
            metrics |= optimize(run, rows, run.learning_rate(step))
        state["step"] = step + 1
        spent = costs(run, rows, metrics["tokens/generated"], time.perf_counter() - started)
        write_metrics(run, metrics | spent)
        limit = 1e-2 if c.torch_dtype == "bfloat16" else 1e-4
        need(step > run.first_step + 2 or metrics["mismatch_k3"] <= limit,
             f"sampler and trainer disagree, mean k3 {metrics['mismatch_k3']:.2g} > {limit:g}: "
             "stale weights, another dtype, or top_p and top_k in use?")
        is_last = state["step"] == plan.steps
        if c.eval_strategy == "steps" and (is_last or state["step"] % c.eval_steps == 0):
            evaluate(run)
        if is_last or state["step"] % plan.save_every == 0:
            fsdp_utils.save_checkpoint(
                run.folder, step + 1, run.policy, run.optimizer, state, c.save_total_limit or 0,
                lambda folder: export(run, folder / "model"))

def next_groups(run):
    """The blank groups of the next step, for all ranks: returning problems, then fresh ones."""
    c, state, n = run.config, run.state, len(run.problems)
    most = int(c.deferred_share * run.plan.prompts)
    queue, state["queue"] = state["queue"][:most], state["queue"][most:]
    fresh = run.plan.prompts - len(queue)
    epoch, start = divmod(state["cursor"], n)
    if start + fresh > n:  # a step never straddles two epochs: no fresh problem twice in one
        epoch, start = epoch + 1, 0
    state["cursor"] = epoch * n + start + fresh
    order = np.random.default_rng([c.seed, epoch]).permutation(n)
    order = sorted(order, key=lambda i: run.problems[i].level if c.curriculum else 0)  # stable
    known = {problem.id: problem for problem in run.problems}
    return [Group(known[i], tries) for i, tries in queue] + [
        Group(run.problems[i]) for i in order[start : start + fresh]]

def record(run, groups, blank, planned):
    """Writes the rollouts of all ranks, updates history and queue; returns the step's metrics."""
    c, state, lines = run.config, run.state, []
    for group, before, (shown, tries) in zip(groups, blank, planned):
        lines.append({
            "id": group.problem.id, "problem": group.problem.messages[-1]["content"],
            "prompt": run.prompts.tokenizer.decode(group.request.prompts[0]),
            "hint": group.request.shown.hints[0], "hint_ratio": group.request.shown.ratios[0],
            "answer": group.problem.answer, "tries": tries, "earlier_tries": len(before.tries),
            "is_deferred": c.hint_timing == "deferred" and shown is not None,
            "completions": [{
                "text": o.text, **dict(zip(c.reward_funcs, scores)), "tokens": len(o.token_ids),
                "finish_reason": o.finish_reason, "hint_ratio": o.hint_ratio}
                for o, scores in zip(group.completions, group.rewards)]})
    with phase("wait"):  # for the slowest rank
        lines = sum(fsdp_utils.gather_objects(lines), [])
    if run.rank == 0:
        path = run.folder / "rollouts" / f"step_{state['step'] + 1:06d}.jsonl"
        path.write_text("".join(json.dumps(line, default=vars) + "\n" for line in lines))
    for line in lines:
        hints.remember(state["history"], line["id"], line["tries"])
        state["queue"] += [(line["id"], line["tries"])] * line["is_deferred"]
    return rollout_metrics(lines, c) | {"queue": len(state["queue"])}

def evaluate(run):
    """Accuracy without hints on each eval set: avg@k, its standard error over problems, pass@k."""
    metrics = {}
    for name, (c, problems) in run.eval_sets.items():
        blank = [Group(problem) for problem in problems[run.rank :: run.world]]
        groups, _ = roll_out(run, blank, c, name)
        right = [[scores[run.accuracy] > 0 for scores in group.rewards] for group in groups]
        right_PK = sum(fsdp_utils.gather_objects(right), [])
        metrics |= {f"eval/{name}{key}": x for key, x in accuracy_at_k(right_PK).items()}
    write_metrics(run, metrics)

def write_metrics(run, metrics):
    """One line to metrics.jsonl, a shorter one to the terminal, all of it to wandb if asked."""
    step = run.state["step"]
    if run.rank == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
            run.state["metrics_bytes"] = file.tell()  # only rank 0's state is saved
    if run.wandb:
        run.wandb.log(metrics, step=step)
    if "loss" not in metrics or step % run.config.logging_steps == 0:
        keys = "accuracy_|hard_|reward/|grad_norm|mismatch_k3|eval/(?!.*stderr)"
        say(f"step {step}: " + ", ".join(
            f"{key} {value:.3g}" for key, value in metrics.items() if re.match(keys, key)))

def export(run, folder, **hub):
    """Weights, config and tokenizer as transformers and vLLM load them; called on all ranks."""
    model = run.policy.model
    tensors = fsdp_utils.full_tensors(model, run.compute_dtype)
    weights = {name: tensor.cpu() for name, tensor in tensors if run.rank == 0}
    if run.rank == 0:
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved:  # as the bias of some MoE routers
                weights[name] = buffer.cpu()
        model.save_pretrained(folder, state_dict=weights, **hub)
        run.prompts.tokenizer.save_pretrained(folder, **hub)

def setup(config, is_eval=False):
    """What `train` needs, in the order that matters: verifiers, process group, weights, engine."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pool = VerifierPool(config.reward_funcs, max(1, min(8, cores)), config.verifier_timeout)
    run = SimpleNamespace(**vars(fsdp_utils.setup_distributed()), config=config, pool=pool,
                          folder=Path(config.output_dir), wandb=None, eval_sets={})
    columns = {name: i for i, name in enumerate(config.reward_funcs)}
    run.accuracy = columns.get("accuracy", columns.get(config.hint_trigger, 0))
    run.trigger = columns.get(config.hint_trigger, run.accuracy)
    run.prompts = Prompts(config)
    run.problems = load_problems(config, run.prompts)
    run.plan = make_plan(config, run.world, len(run.problems))
    for name, spec in config.eval_datasets.items():
        c = eval_config(config, spec)
        run.eval_sets[name] = c, load_problems(c, run.prompts)
    run.compute_dtype = getattr(torch, config.torch_dtype)
    run.master_dtype = torch.promote_types(run.compute_dtype, torch.float32)
    logging.disable_progress_bar()
    run.policy = load_policy(run)
    run.reference = load_policy(run).requires_grad_(False).eval() if config.beta else None
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), fused=run.device.type == "cuda")
    steps = run.plan.steps
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    rate = get_scheduler(config.lr_scheduler_type, run.optimizer, warmup, steps).lr_lambdas[0]
    # differs from reference: warm-up begins above 0, for a step at rate 0 is a step lost
    run.learning_rate = lambda step: config.learning_rate * rate(step + (step < warmup))
    open_folder(run, is_eval)
    tokenizer = run.prompts.tokenizer
    ends = np.ravel(run.policy.model.generation_config.eos_token_id).tolist()  # one, several, None
    ends = {tokenizer.eos_token_id, *ends} - {None}
    engines = {"hf": rollout.HfEngine, "vllm": rollout.VllmEngine, "server": rollout.ServerEngine}
    configs = [config, *(c for c, _ in run.eval_sets.values())]
    longest = max(c.max_prompt_length + c.max_completion_length for c in configs)
    run.engine = engines[config.engine](config, tokenizer, ends, longest, run.policy)
    return run

def load_policy(run):
    """The causal LM, its weights float32 (or float64), sharded."""
    c = run.config
    model = load_model(c, run.master_dtype)
    if c.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # it is loaded in eval mode, in which nothing would be checkpointed
    return fsdp_utils.shard(Policy(model), blocks_of(model), c.sharding, run.compute_dtype,
                            c.replicas, c.cpu_offload)

def load_model(config, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM without dropout; UserError when a folder is incomplete, or holds no text model
    alone. Everything that an export writes beside the weights has been written once."""
    name = f"model_name_or_path={config.model_name_or_path}"
    where = {"revision": config.model_revision, "trust_remote_code": False}
    with as_user_error(name):
        model_config = AutoConfig.from_pretrained(config.model_name_or_path, **where)
        text_config = model_config.get_text_config()
    if text_config is not model_config:
        check_wrapper(name, model_config)
    off = turn_off_dropout(text_config)
    if off:
        say(f"{name}: trained without its {', '.join(off)}")
    attention = config.attn_implementation
    if attention == "sdpa" and not sdpa_computes(model_config, text_config):
        say(f"{name}: attn_implementation: sdpa cannot compute its attention, using eager")
        attention = "eager"
    longest = config.max_prompt_length + config.max_completion_length
    limit = getattr(text_config, "max_position_embeddings", longest)
    need(longest <= limit, f"{name}: max_prompt_length + max_completion_length = {longest} tokens, "
         f"but it has {limit} positions: lower one of them")
    with as_user_error(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path, config=model_config, dtype=dtype,
            attn_implementation=attention, output_loading_info=True, **where)
    missing = sorted(report["missing_keys"])
    need(not missing, f"{name}: its files lack {len(missing)} of the model's tensors, which would "
         f"be random: get the whole model ({', '.join(missing[:2])} ...)")
    allow_sampling(name, model.generation_config)
    prove_export(name, model.config, model.generation_config)
    return model

def check_wrapper(name, model_config):
    """A model of several modalities is refused, or told where the library has its text model."""
    text_config = model_config.get_text_config()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if kind and kind.config_class is type(text_config):
        say(f"{name}: of {model_config.model_type} the text model alone is trained and exported")
        return
    text_type = text_config.model_type
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    text_model = names.get(text_type) or names.get(text_type.split("_")[0]) or "one for text alone"
    raise UserError(f"{name}: {model_config.model_type} wraps a text model ({text_type}) and is "
                    f"not trained here: name a text model, {text_model}")

def sdpa_computes(model_config, text_config) -> bool:
    """Can sdpa compute the attention? It would leave out a cap on its logits (Gemma 2) silently."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    is_capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    return getattr(kind, "_supports_sdpa", True) and not is_capped

def turn_off_dropout(model_config) -> list[str]:
    """Sets what is random in training to 0; the names of what was not."""
    names = [name for name, value in vars(model_config).items()
             if re.search("drop|jitter", name) and isinstance(value, float) and value > 0]
    for name in names:
        setattr(model_config, name, 0.0)
    return names

def allow_sampling(name, generation):
    """A generation config that names a temperature, say, but does not sample cannot be saved."""
    try:
        generation.validate(strict=True)
    except ValueError:
        if not generation.do_sample:
            generation.do_sample = True
            say(f"{name}: its generation_config is exported with do_sample: true")

def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers, which FSDP shards one by one; what holds the embedding belongs to the root."""
    names, embedding = model._no_split_modules or [], model.get_input_embeddings()
    return [part for part in model.modules()
            if type(part).__name__ in names and embedding not in part.modules()]

def check_policy(run) -> None:
    """Compares the log-probs of the training pass with those of the whole causal LM on each
    sequence alone; UserError on a difference. Collective: every rank must call it."""
    c, model_type = run.config, run.policy.model.config.model_type
    limits = CHECK_LIMITS.get(c.torch_dtype, EXACT)
    name = f"model_name_or_path={c.model_name_or_path}: {model_type}"
    with as_user_error(name), torch.no_grad():
        mean, largest = policy_error(run, c.packing)
        is_right = mean <= limits[0] and largest <= limits[1]
        if c.packing and not is_right:
            alone, _ = policy_error(run, False)
            need(alone > limits[0], f"{name}: rows that are packed see each other, log-probs are "
                 f"off by {largest:.2g}: set packing=false")
    fsdp_utils.reshard(run.policy)
    need(is_right, f"{name}: log-probs of the training pass are not the model's: off by {mean:.2g} "
         f"in the mean, {largest:.2g} at most (allowed: {limits[0]:g}, {limits[1]:g}). Try "
         "attn_implementation=eager or torch_dtype=float32, else take another model")

def policy_error(run, is_packed: bool) -> tuple[float, float]:
    """(mean, largest) |dlogp| over ranks, of random sequences through Policy and one by one."""
    policy, rng = run.policy, np.random.default_rng(0)
    size = policy.model.config.vocab_size
    sequences = [rng.integers(size, size=length).tolist() for length in CHECK_LENGTHS]
    rows = [Row(ids, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0) for ids in sequences]
    inputs, _ = collate(rows, is_packed, run.device, run.master_dtype)
    logp, _ = policy(**inputs)
    expected = []
    for ids in sequences:
        ids = torch.tensor([ids], device=run.device)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits_TV = policy(whole=whole)[0, :-1].to(logp.dtype)
        expected.append(logits_TV.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    error = (logp - torch.cat(expected)).abs().nan_to_num(torch.inf)
    errors = {"mean": float(error.mean()), "largest": float(error.max())}
    errors = fsdp_utils.all_reduce_scalars(errors, "max")
    return errors["mean"], errors["largest"]

def startup_pass(run):
    """Steps of rows at maximum length that weigh nothing, before a checkpoint is loaded:
    out-of-memory comes in minute one, not hour ten."""
    c, width = run.config, run.config.max_prompt_length + run.config.max_completion_length
    row = Row([0] * width, c.max_prompt_length, 0.0, 0.0, 0.0, 0.0, 1.0, 0)
    rows = [row] * max(1, c.micro_batch_tokens // width)
    for _ in range(2):  # activations beside gradients, then beside Adam's moments too
        optimize(run, 2 * rows, 0.0)
    run.optimizer.state.clear()
    torch.cuda.empty_cache()  # for the engine, which is built later
    say(f"start-up pass: {len(rows)} rows of {width} tokens and Adam's moments fit")

def open_folder(run, is_eval):
    """Starts, resumes or refuses output_dir; what was written is moved aside, never deleted."""
    c, folder, metrics = run.config, run.folder, run.folder / "metrics.jsonl"
    changed = changed_settings(c, folder / "config.yaml")
    need(not changed or c.overwrite_output_dir, f"output_dir={folder} holds another run ("
         f"{', '.join(changed)} differ): choose another, or overwrite_output_dir=true to move it")
    fsdp_utils.gather_objects("every rank has looked")
    if run.rank == 0:
        if changed:
            folder.rename(f"{folder}.{time.strftime('%Y%m%d-%H%M%S')}")
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        save_config(c, folder / "config.yaml")
    fsdp_utils.gather_objects("the folder is there")
    run.state = {"step": 0, "cursor": 0, "queue": [], "history": {}, "metrics_bytes": 0,
                 "prompts": run.plan.prompts}
    if not is_eval and (c.startup_pass or c.startup_pass is None and torch.cuda.is_available()):
        startup_pass(run)
    if found := fsdp_utils.checkpoints(folder):
        state = run.state = fsdp_utils.load_checkpoint(found[-1], run.policy, run.optimizer)
        state["history"] = {int(key): value for key, value in state["history"].items()}
        state["queue"] = [(i, [hints.Try(**t) for t in tries]) for i, tries in state["queue"]]
        need(state["prompts"] == run.plan.prompts, f"{found[-1]} had {state['prompts']} prompts a "
             "step: change gradient_accumulation_steps")
        say(f"resuming {found[-1]}")
    run.first_step = run.state["step"]
    if run.rank == 0 and metrics.is_file() and not is_eval:  # later lines will be computed again
        with open(metrics, "r+b") as file, open(f"{metrics}.stale", "ab") as stale:
            kept = file.read(run.state["metrics_bytes"])
            stale.write(file.read())
            file.truncate(len(kept))
    if "wandb" in c.report_to and run.rank == 0:
        import wandb
        run.wandb = wandb.init(project="ghpo", config=asdict(c), dir=folder)

def main():
    """The command line; what the user can mend ends the program with one message, status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--eval", action="store_true", help="evaluate the model, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides, args.eval, args.dry_run)
        if args.dry_run:
            from tests.estimates import dry_run
            return dry_run(config)
        run = setup(config, args.eval)
        if args.eval or (config.eval_strategy == "steps" and run.state["step"] == 0):
            evaluate(run)
        if not args.eval:
            train(run)
            hub = {"push_to_hub": True, "repo_id": config.hub_model_id or run.folder.name}
            export(run, run.folder / "model", **(hub if config.push_to_hub else {}))
            say(f"done: {run.folder}, {len(run.state['queue'])} deferred problems still queued")
        fsdp_utils.gather_objects("every rank is done")
        run.engine.close()
        run.pool.close()
        if run.wandb:
            run.wandb.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo must not outlive the interpreter: that aborts now and then
