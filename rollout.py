"""Rollouts: three sampling engines behind one small surface, and the streaming collect.

Token ids in, token ids and behaviour log-probs out; text is decoded for the rewards only. The loop
cannot tell the engines apart:

    submit(request)         one try at one problem: G samples
    poll()                  makes progress; [(request, completions)] of the requests that finished
    update_weights(stream)  (name, full tensor) pairs; the prefix cache is reset inside
    wake() / sleep()        before and after sampling
    busy, deterministic     is anything unfinished; do the same requests give the same bits

A forker adds an engine as one more class with these names, and its line in `make_engine` of ghpo.py.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from hints import Problem, Try


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; the log-probs are then those of temperature 1."""

    temperature: float = 1.0
    max_tokens: int = 2048
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """One try at one problem: a prompt for each of the G samples (normally all the same)."""

    problem: Problem
    prompts: list  # (G,) of token ids
    shown: Try  # the ratios and hints in these prompts
    tries: list  # list[Try] before this one
    prefixes: list  # (G,) text the assistant's turn already starts with
    seed: int  # sample j uses seed + j
    sampling: Sampling
    slot: int = 0  # place in the collect call


@dataclass(frozen=True)
class Completion:
    """One sample with exactly the context it was sampled from."""

    prompt_ids: list
    token_ids: list  # the end-of-sequence token included when it was sampled
    behaviour_logp: list  # (T,) the sampler's, at the sampling temperature
    finish_reason: str  # "stop" or "length"
    hint_ratio: float


@dataclass(frozen=True)
class Group:
    """A problem with the samples that enter the batch; replaced whole by the next try."""

    problem: Problem
    tries: list = field(default_factory=list)  # list[Try], oldest first
    completions: list = field(default_factory=list)  # (G,)
    rewards: list = field(default_factory=list)  # (G, F)
    request: Request | None = None  # what the completions answer; None: blank, not sampled yet


def collect(engine, groups, judge, next_request, merge):
    """Samples groups until next_request calls each final; nobody waits for the batch.

    A group is judged and, if hard, asked again the moment its own samples are there, while the
    others still generate. groups: blank Groups. judge: `submit(request, completions)` and
    `poll(wait)`, which gives [(slot, Group of this try)]. next_request(group, slot) gives a Request or
    None. Returns the final groups in the order of the blank ones.
    With a deterministic engine every verdict is awaited one poll later, so that arrival times of
    verdicts cannot change what is batched with what.
    """
    groups = list(groups)
    open_slots = set()
    for slot, group in enumerate(groups):
        engine.submit(next_request(group, slot))
        open_slots.add(slot)
    while open_slots:
        finished = engine.poll()
        for slot, new in judge.poll(wait=engine.deterministic or not engine.busy):
            groups[slot] = merge(groups[slot], new)
            request = next_request(groups[slot], slot)
            if request is None:
                open_slots.remove(slot)
            else:
                engine.submit(request)
        for request, completions in finished:
            judge.submit(request, completions)
    return groups


class HfEngine:
    """Samples with the training model itself: continuous batching on a left-padded KV cache.

    policy(input_ids, position_ids, attention_mask, cache=...) gives the logits (B, V) of the last
    position. unshard/reshard: called by wake/sleep, so that sampling needs no collective and ranks
    may decode different numbers of tokens. All requests under way share one Sampling.
    """

    deterministic = True

    def __init__(self, policy, eos_ids, unshard, reshard, max_rows=256, burst=8):
        self.policy = policy
        self.eos_ids = set(eos_ids)
        self.unshard = unshard
        self.reshard = reshard
        self.max_rows = max_rows  # sequences decoded at once
        self.burst = burst  # decode steps per poll: new requests enter between bursts
        self.waiting = []  # requests not admitted yet
        self.running = []  # [(request, its rows)]
        self.rows = []  # the batch: sequences in the order of the cache
        self.cache = None
        self.mask_BT = None  # 1 where the cache holds a real token

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    def submit(self, request):
        self.waiting.append(request)

    def wake(self):
        self.policy.eval()
        self.unshard()

    def sleep(self):
        self.cache = self.mask_BT = None
        self.reshard()
        self.policy.train()

    def update_weights(self, tensors):
        """Nothing to do: these are the weights. The stream is not started, on any rank."""

    def close(self):
        """Nothing to stop."""

    @torch.no_grad()
    def poll(self):
        """Admits waiting requests, then decodes up to `burst` tokens of each running sequence."""
        admitted = []
        while self.waiting:
            samples = len(self.waiting[0].prompts)
            if (self.rows or admitted) and len(self.rows + admitted) + samples > self.max_rows:
                break
            request = self.waiting.pop(0)
            rows = [_Row(request, j) for j in range(samples)]
            self.running.append((request, rows))
            admitted += rows
        if admitted:
            self._prefill(admitted)
        for _ in range(self.burst):
            self._drop_finished()
            if not self.rows:
                break
            self._decode()
        running, self.running, done = self.running, [], []
        for request, rows in running:
            if all(row.finish_reason for row in rows):
                done.append((request, [row.completion() for row in rows]))
            else:
                self.running.append((request, rows))
        return done

    def _prefill(self, rows):
        """Runs each distinct prompt once, samples the first token, joins the running batch."""
        prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in rows))
        which_B = torch.tensor([prompts.index(tuple(row.prompt_ids)) for row in rows])
        ids_PT, mask_PT = pad_left(prompts)
        device = next(self.policy.parameters()).device
        ids_PT, mask_PT, which_B = ids_PT.to(device), mask_PT.to(device), which_B.to(device)
        positions_PT = (mask_PT.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()
        logits_PV = self.policy(ids_PT, positions_PT, mask_PT, cache=cache)
        cache.batch_select_indices(which_B)
        self._sample(rows, logits_PV[which_B])
        self._join(rows, cache, mask_PT[which_B])

    def _join(self, rows, cache, mask_BT):
        """Adds sequences to the batch; the shorter of the two caches is padded on its left."""
        if not self.rows:
            self.rows, self.cache, self.mask_BT = rows, cache, mask_BT
            return
        old, new = self.mask_BT.shape[1], mask_BT.shape[1]
        grow_old, grow_new = max(new - old, 0), max(old - new, 0)
        for ours, theirs in zip(self.cache.layers, cache.layers):  # (B, heads, T, head_dim)
            for name in ("keys", "values"):
                top = F.pad(getattr(ours, name), (0, 0, grow_old, 0))
                bottom = F.pad(getattr(theirs, name), (0, 0, grow_new, 0))
                setattr(ours, name, torch.cat([top, bottom]))
        masks = [F.pad(self.mask_BT, (grow_old, 0)), F.pad(mask_BT, (grow_new, 0))]
        self.rows, self.mask_BT = self.rows + rows, torch.cat(masks)

    def _decode(self):
        """One more token for every sequence of the batch."""
        last = [[row.token_ids[-1]] for row in self.rows]
        ids_B1 = torch.tensor(last, device=self.mask_BT.device)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(ids_B1)], dim=1)
        positions_B1 = self.mask_BT.sum(-1, keepdim=True) - 1
        logits_BV = self.policy(ids_B1, positions_B1, self.mask_BT, cache=self.cache)
        self._sample(self.rows, logits_BV)

    def _drop_finished(self):
        alive = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if 0 < len(alive) < len(self.rows):
            index = torch.tensor(alive, device=self.mask_BT.device)
            self.cache.batch_select_indices(index)
            self.mask_BT = self.mask_BT[index]
            start = int(self.mask_BT.any(0).int().argmax())  # columns that pad every row
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]
            self.mask_BT = self.mask_BT[:, start:]
        self.rows = [self.rows[i] for i in alive]

    def _sample(self, rows, logits_BV):
        """Draws a token for each row by inverting the CDF at the row's own uniform number."""
        sampling = rows[0].request.sampling
        logits_BV = logits_BV.float() / (sampling.temperature or 1.0)
        if sampling.top_k:
            logits_BV = TopKLogitsWarper(sampling.top_k)(None, logits_BV)
        if sampling.top_p < 1:
            logits_BV = TopPLogitsWarper(sampling.top_p)(None, logits_BV)
        logp_BV = logits_BV.log_softmax(-1)
        if sampling.temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            cdf_BV = logp_BV.double().exp().cumsum(-1)
            uniform = [[row.uniforms[len(row.token_ids)]] for row in rows]
            uniform_B1 = torch.tensor(uniform, dtype=torch.float64, device=cdf_BV.device)
            token_B = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True).squeeze(1)
            token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
        logp_B = logp_BV.gather(-1, token_B[:, None]).squeeze(1)
        for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist()):
            row.token_ids.append(token)
            row.logp.append(logp)
            if token in self.eos_ids:
                row.finish_reason = "stop"
            elif len(row.token_ids) == sampling.max_tokens:
                row.finish_reason = "length"


class _Row:
    """Sample j of a request while it is being decoded."""

    def __init__(self, request, j):
        self.request = request
        self.j = j
        self.prompt_ids = request.prompts[j]
        self.token_ids = []
        self.logp = []
        self.finish_reason = None
        # One number per token, from the seed alone: independent of the batch and of the rank.
        self.uniforms = np.random.default_rng(request.seed + j).random(request.sampling.max_tokens)

    def completion(self):
        ratio = self.request.shown.ratios[self.j]
        return Completion(self.prompt_ids, self.token_ids, self.logp, self.finish_reason, ratio)


def pad_left(prompts):
    """Token id lists to (ids (P, T), mask (P, T)), zeros on the left where mask is 0."""
    longest = max(map(len, prompts))
    ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_PT = torch.zeros_like(ids_PT)
    for i, prompt in enumerate(prompts):
        ids_PT[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask_PT[i, longest - len(prompt) :] = 1
    return ids_PT, mask_PT
