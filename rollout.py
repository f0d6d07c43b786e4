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

import http.client
import itertools
import json
import os
import socket
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
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


@dataclass
class Judge:
    """Verification for `collect`: decodes completions and has them scored by the worker pool."""

    pool: object  # reward.VerifierPool
    tokenizer: object
    trigger: int  # column of the reward that decides what is hard
    accuracy: int  # column that evaluation reports
    seconds: float = 0.0  # waited for verdicts

    def text(self, completion, prefix):
        """What the rewards see."""
        return prefix + self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def submit(self, request, completions):
        """Starts scoring the samples of a request; a slot has one request at a time."""
        texts = [self.text(c, prefix) for c, prefix in zip(completions, request.prefixes)]
        self.pool.submit(request.slot, texts, request.problem.answer)

    def poll(self, wait):
        """[(slot, rewards (G, F))] of the scored requests, by slot."""
        started = time.perf_counter()
        verdicts = sorted(self.pool.poll(wait))
        self.seconds += time.perf_counter() - started
        return verdicts


def collect(engine, groups, judge, next_request, merge):
    """Samples groups until next_request calls each final; nobody waits for the batch.

    A group is judged and, if hard, asked again the moment its own samples are there, while the
    others still generate. groups: blank Groups; next_request(group, slot) gives a Request or None.
    Returns the final groups in the same order. With a deterministic engine every verdict is awaited
    one poll later, so that the time it takes cannot change what is batched with what.
    """
    groups, under_way = list(groups), {}
    for slot, group in enumerate(groups):
        engine.submit(next_request(group, slot))
        under_way[slot] = None
    while under_way:
        finished = engine.poll()
        for slot, rewards in judge.poll(wait=engine.deterministic or not engine.busy):
            request, completions = under_way.pop(slot)
            pass_rate = float(np.mean([scores[judge.trigger] for scores in rewards]))
            tokens = sum(len(c.token_ids) for c in completions)
            tries = [*request.tries, replace(request.shown, pass_rate=pass_rate, tokens=tokens)]
            new = Group(request.problem, tries, completions, rewards, request)
            groups[slot] = merge(groups[slot], new)
            request = next_request(groups[slot], slot)
            if request is not None:
                engine.submit(request)
                under_way[slot] = None
        for request, completions in finished:
            under_way[request.slot] = request, completions
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


class VllmEngine:
    """vLLM inside this training process: one engine per rank, weights streamed into it.

    Build it on all ranks at the same point, after init_process_group: it joins the default group.
    close() ends that group too, so it comes last.
    """

    deterministic = False  # what is batched together depends on arrival times

    def __init__(self, config, eos_ids, max_model_len, device):
        """config: model, torch_dtype, vllm_gpu_memory_utilization; max_model_len: prompt + answer."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: update_weights needs it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = {"gpu_memory_utilization": config.vllm_gpu_memory_utilization}
        if device.type == "cpu":
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # packed weights cannot be loaded again
            torch._dynamo.config.disable = True  # else log-probs need a C++ compiler
            options = {"kv_cache_memory_bytes": 2**30, "enforce_eager": True}
            # trap: a request with a seed crashes in a chunked prefill on CPU
            options |= {"enable_chunked_prefill": False}
            options |= {"max_num_batched_tokens": max(4096, max_model_len)}
        if "RANK" in os.environ:  # torchrun: a plain LLM would take cuda:0 on every rank
            options["distributed_executor_backend"] = "external_launcher"
        import vllm

        self.can_sleep = vllm.platforms.current_platform.is_sleep_mode_available()  # not on CPU
        self.llm = vllm.LLM(
            config.model_name_or_path, revision=config.model_revision, dtype=config.torch_dtype,
            max_model_len=max_model_len, skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs", enable_sleep_mode=self.can_sleep, **options
        )  # fmt: skip
        final_only = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.params = partial(vllm.SamplingParams, output_kind=final_only)
        self.asleep = False
        self.eos_ids, self.max_model_len = list(eos_ids), max_model_len
        self.calls = {}  # handle of a sample under way: (request, completions so far, j)
        self.number = itertools.count()
        self._say("built")

    @property
    def busy(self):
        return bool(self.calls)

    def submit(self, request):
        """Starts every sample as a call of its own; ValueError when it cannot fit the engine."""
        sampling, completions = request.sampling, [None] * len(request.prompts)
        for j, prompt in enumerate(request.prompts):
            if len(prompt) + sampling.max_tokens > self.max_model_len:  # vLLM would clip silently
                raise ValueError(f"problem {request.problem.id}: {len(prompt)} prompt + "
                    f"{sampling.max_tokens} new tokens, vLLM has {self.max_model_len}")  # fmt: skip
            # eos_ids are those of the run, not what vLLM finds in tokenizer and generation config
            fields = vars(sampling) | {"seed": request.seed % 2**62 + j, "logprobs": 0}
            fields |= {"detokenize": False, "ignore_eos": True, "stop_token_ids": self.eos_ids}
            self.calls[self._start(prompt, fields)] = request, completions, j

    def poll(self):
        finished = []
        for call, ids, logp, reason in self._ended():
            request, completions, j = self.calls.pop(call)
            # trap: from NaN weights vLLM samples on without a word; over HTTP NaN is -9999
            if not all(-9000 < number < 0.001 for number in logp) or len(logp) != len(ids):
                raise RuntimeError(f"vLLM sent log-probs {logp[:4]}: are the weights finite?")
            ratio = request.shown.ratios[j]
            completions[j] = Completion(request.prompts[j], list(ids), logp, reason, ratio)
            if None not in completions:
                finished.append((request, completions))
        return finished

    def _start(self, prompt, fields):
        call = str(next(self.number))
        self.llm.llm_engine.add_request(call, {"prompt_token_ids": prompt}, self.params(**fields))
        return call

    def _ended(self):
        """One step of the engine, a token of every sample; (handle, ids, log-probs, reason)."""
        for output in self.llm.llm_engine.step() if self.calls else []:
            (out,) = output.outputs
            logp = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs)]
            yield output.request_id, out.token_ids, logp, out.finish_reason

    def update_weights(self, tensors):
        """Loads the tensors in place, one by one; RuntimeError when the stream lacks some."""

        def load(model):
            return {name for name, _ in model.named_parameters()} - model.load_weights(tensors)

        (missing,) = self.llm.apply_model(load)
        if missing:
            raise RuntimeError(f"vLLM was not given {sorted(missing)[:8]}")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._say("KV cache awake")
        self.asleep = False
        # trap: vLLM would keep the KV of the old weights and use it wherever a block matches
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

    def sleep(self):
        """Drops weights and KV cache (level 2): the next update_weights brings new ones."""
        if self.can_sleep:
            self.llm.sleep(level=2)
            self.asleep = True
            self._say("asleep")

    def wake(self):
        """Makes room for the weights; update_weights fills it, then makes room for the KV cache."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._say("weights awake")

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()

    def _say(self, moment):
        if torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
            free, total = torch.cuda.mem_get_info()
            print(f"vllm {moment}: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use")


class ServerEngine(VllmEngine):
    """A vLLM server started by `./run.sh serve CONFIG`: the same calls, by HTTP, from every rank.

    Rank 0 sends the weights by vLLM's weight transfer and listens for that on port + 1: NCCL, or
    gloo to a CPU server (tests/vllm_ext.py). What fails is a RuntimeError with host and port.
    """

    connect_s, call_s, generate_s, health_s = 5, 120, 1800, 10  # limits; time between check-ups

    def __init__(self, config, eos_ids, max_model_len, device):
        self.eos_ids, self.max_model_len = list(eos_ids), max_model_len
        self.dtype, self.device = getattr(torch, config.torch_dtype), device
        self.host, self.port = config.vllm_server_host, config.vllm_server_port
        self.pool = ThreadPoolExecutor(512)
        self.calls = {}
        self.next_check = 0.0
        self._lead(self._connect)

    def _start(self, prompt, fields):
        body = {"token_ids": prompt, "sampling_params": fields}
        return self.pool.submit(self._http, "/inference/v1/generate", body, self.generate_s)

    def _ended(self):
        """What has come back, after 20 ms at most; raises when a call or the server has failed."""
        if self.calls and time.monotonic() > self.next_check:
            self._http("/health")
            self.next_check = time.monotonic() + self.health_s
        for call in wait(self.calls, timeout=0.02, return_when=FIRST_COMPLETED).done:
            (out,) = call.result()["choices"]
            logp = [token["logprob"] for token in out["logprobs"]["content"]]
            yield call, out["token_ids"], logp, out["finish_reason"]

    def update_weights(self, tensors):
        self._lead(lambda: None)  # no rank is sampling any more
        self._lead(lambda: self._push(tensors), tensors)

    def sleep(self):
        """Nothing to free: the server has GPUs of its own."""

    wake = sleep

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _http(self, path, body=None, timeout=call_s):
        """The JSON answer to a POST, or to a GET when there is no body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.connect_s)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            method = "GET" if body is None else "POST"
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            if response.status < 400:
                return json.loads(text or "{}")
            problem = f"{response.status} {text[:2000]}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = repr(error)
        finally:
            connection.close()
        raise RuntimeError(f"vLLM server {self.host}:{self.port}{path}: {problem}. "
                           "Is it running? ./run.sh serve CONFIG starts it")  # fmt: skip

    def _lead(self, work, stream=()):
        """Rank 0 works; all empty the stream (a collective), meet, and raise what rank 0 met."""
        errors = [None]
        try:
            if not dist.is_initialized() or dist.get_rank() == 0:
                work()
        except (RuntimeError, OSError) as error:
            errors = [str(error) or repr(error)]
        for _ in stream:
            pass
        if dist.is_initialized():
            mine, errors = errors[0], [None] * dist.get_world_size()
            dist.all_gather_object(errors, mine)
        if errors[0]:
            raise RuntimeError(errors[0])

    def _connect(self):
        """Opens the transfer group: rank 0 is ours, the server's workers are the others."""
        size = 1 + self._http("/get_world_size")["world_size"]
        with socket.create_connection((self.host, self.port), self.connect_s) as probe:
            address = probe.getsockname()[0]  # ours, as the server can reach it
        place = {"master_address": address, "master_port": self.port + 1, "world_size": size}

        def join():
            if self.device.type == "cuda":
                from vllm.distributed.weight_transfer.nccl_common import trainer_init

                return partial(trainer_init(place).broadcast, src=0)
            limit = timedelta(seconds=self.call_s)
            store = dist.TCPStore(address, self.port + 1, size, True, limit, wait_for_workers=False)
            group = dist.ProcessGroupGloo(store, 0, size, limit)
            return lambda tensor: group.broadcast([tensor], dist.BroadcastOptions()).wait()

        ours = self.pool.submit(join)
        self._http("/init_weight_transfer_engine", {"init_info": place | {"rank_offset": 1}})
        self.broadcast = ours.result(self.call_s)

    def _push(self, tensors):
        self._http("/pause?mode=keep", {})
        self._http("/start_weight_update", {})
        bucket = []
        for name, tensor in tensors:
            bucket.append((name, tensor.to(self.device, self.dtype).contiguous()))
            if sum(tensor.nbytes for _, tensor in bucket) > 2**30:
                self._send(bucket)
                bucket = []
        self._send(bucket)
        self._http("/finish_weight_update", {})
        if not self._http("/reset_prefix_cache", {})["success"]:
            raise RuntimeError("the vLLM server kept its prefix cache: requests are still running")
        self._http("/resume", {})

    def _send(self, bucket):
        """Broadcasts (name, tensor) pairs while the server, told what comes, receives them."""
        info = {"names": [name for name, _ in bucket],
                "dtype_names": [str(self.dtype).removeprefix("torch.")] * len(bucket),
                "shapes": [list(tensor.shape) for _, tensor in bucket]}  # fmt: skip
        ours = self.pool.submit(lambda: [self.broadcast(tensor) for _, tensor in bucket])
        self._http("/update_weights", {"update_info": info})
        ours.result(self.call_s)
