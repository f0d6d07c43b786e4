"""Rollouts: three sampling engines behind one small surface, and the streaming collect.

Token ids in, token ids and behaviour log-probs out; text is decoded for the rewards only. The loop
cannot tell the engines apart:

    submit(request)         one try at one problem: G samples
    poll()                  makes progress; [(request, completions)] of the requests that finished
    update_weights(stream)  (name, full tensor) pairs; the prefix cache is reset inside
    wake() / sleep()        before and after sampling
    busy, deterministic     is anything unfinished; do the same requests give the same bits

A forker adds an engine as one more class with these names, and its name in `setup` of ghpo.py.
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
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

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
    """Samples with the training model itself, by transformers' generate: all that waits, at once.

    policy(generate={...}) runs generate under the FSDP root; unshard and reshard, called by wake
    and sleep, let ranks generate different numbers of tokens without a collective.
    """

    deterministic = True

    def __init__(self, policy, eos_ids, pad_id, unshard, reshard, max_rows=256):
        self.policy, self.eos_ids, self.pad_id = policy, sorted(eos_ids), pad_id
        self.unshard, self.reshard, self.max_rows = unshard, reshard, max_rows
        self.waiting = []

    @property
    def busy(self):
        return bool(self.waiting)

    def submit(self, request):
        self.waiting.append(request)

    def wake(self):
        self.policy.eval()
        self.unshard()

    def sleep(self):
        self.reshard()
        self.policy.train()

    def update_weights(self, tensors):
        """Nothing to do: these are the weights. The stream is not started, on any rank."""

    def close(self):
        """Nothing to stop."""

    @torch.no_grad()
    def poll(self):
        """Answers waiting requests, as many as max_rows sequences take."""
        taken, rows = [], []
        while self.waiting and len(rows) + len(self.waiting[0].prompts) <= max(
                self.max_rows, len(self.waiting[0].prompts)):
            request = self.waiting.pop(0)
            taken.append(request)
            rows += [(request, j) for j in range(len(request.prompts))]
        if not rows:
            return []
        sampling, prompts = taken[0].sampling, [request.prompts[j] for request, j in rows]
        device = next(self.policy.parameters()).device
        ids, mask = (t.to(device) for t in pad_left(prompts, self.pad_id))
        picks = SeededSampler(sampling, [request.seed + j for request, j in rows])
        output = self.policy(generate={
            "inputs": ids, "attention_mask": mask, "max_new_tokens": sampling.max_tokens,
            "do_sample": False, "logits_processor": [picks], "eos_token_id": self.eos_ids,
            "pad_token_id": self.pad_id, "use_cache": True,
            "synced_gpus": False})[:, ids.shape[1] :].tolist()  # no collective at every token
        logp = torch.stack(picks.logp, dim=1).tolist()
        completions = []
        for (request, j), tokens, numbers in zip(rows, output, logp):
            ends = [t for t, token in enumerate(tokens) if token in self.eos_ids]
            length = ends[0] + 1 if ends else len(tokens)
            completions.append(Completion(
                request.prompts[j], tokens[:length], numbers[:length],
                "stop" if ends else "length", request.shown.ratios[j]))
        return [(request, [completions.pop(0) for _ in request.prompts]) for request in taken]


class SeededSampler(LogitsProcessor):
    """Makes generate's greedy choice a draw by each row's own random numbers; keeps log-probs.

    A row's numbers come from its seed alone: they do not depend on the batch or the rank.
    """

    def __init__(self, sampling, seeds):
        self.sampling, self.logp = sampling, []  # logp: a (B,) tensor for each token
        numbers = [np.random.default_rng(seed).random(sampling.max_tokens) for seed in seeds]
        self.uniform_BT = torch.from_numpy(np.stack(numbers))

    def __call__(self, ids, logits_BV):
        logits_BV = logits_BV.float() / (self.sampling.temperature or 1.0)
        if self.sampling.top_k:
            logits_BV = TopKLogitsWarper(self.sampling.top_k)(ids, logits_BV)
        if self.sampling.top_p < 1:
            logits_BV = TopPLogitsWarper(self.sampling.top_p)(ids, logits_BV)
        logp_BV = logits_BV.log_softmax(-1)
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        if self.sampling.temperature:  # invert the distribution function
            cdf_BV = logp_BV.double().exp().cumsum(-1)
            uniform_B1 = self.uniform_BT[:, len(self.logp), None].to(ids.device)
            token_B1 = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)
            token_B1 = token_B1.clamp(max=logits_BV.shape[1] - 1)
        self.logp.append(logp_BV.gather(-1, token_B1).squeeze(1))
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, token_B1, 0.0)


def pad_left(prompts, pad_id):
    """Token id lists to (ids (P, T), mask (P, T)), padded on the left, where mask is 0."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


class VllmEngine:
    """vLLM inside this training process: one engine per rank, weights streamed into it.

    Build it on all ranks at the same point, after init_process_group: it joins the default group.
    close() ends that group too, so it comes last.
    """

    deterministic = False  # what is batched together depends on arrival times
    asleep = can_sleep = False

    def __init__(self, config, eos_ids, max_model_len, device):
        """max_model_len: prompt + answer, in tokens."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: update_weights needs it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = {"gpu_memory_utilization": config.vllm_gpu_memory_utilization}
        if device.type == "cpu":
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # packed weights cannot be loaded again
            torch._dynamo.config.disable = True  # else log-probs need a C++ compiler
            # trap: a request with a seed crashes in a chunked prefill on CPU
            options = {"enable_chunked_prefill": False, "enforce_eager": True,
                       "max_num_batched_tokens": max(4096, max_model_len),
                       "kv_cache_memory_bytes": 2**30}  # fmt: skip
        if "RANK" in os.environ:  # torchrun: a plain LLM would take cuda:0 on every rank
            options["distributed_executor_backend"] = "external_launcher"
        import vllm

        self.can_sleep = vllm.platforms.current_platform.is_sleep_mode_available()  # not on CPU
        self.llm = vllm.LLM(
            config.model_name_or_path, revision=config.model_revision, dtype=config.torch_dtype,
            max_model_len=max_model_len, skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs", enable_sleep_mode=self.can_sleep, **options)
        final_only = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.params = partial(vllm.SamplingParams, output_kind=final_only)
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
                                 f"{sampling.max_tokens} new tokens > {self.max_model_len}")
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
        (loaded,) = self.llm.apply_model(lambda model: model.load_weights(tensors))
        (names,) = self.llm.apply_model(lambda model: dict(model.named_parameters()).keys())
        if names - loaded:
            raise RuntimeError(f"vLLM was not given {sorted(names - loaded)[:8]}")
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
        self.dtype, self.device = config.torch_dtype, device
        self.host, self.port = config.vllm_server_host, config.vllm_server_port
        self.pool = ThreadPoolExecutor(512)
        self.calls, self.next_check = {}, 0.0
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

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.broadcast = None  # frees port + 1 for the next run

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
                           "Is it running? ./run.sh serve CONFIG starts it")

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
        """vLLM's sequence of calls; it is told of each tensor while that is broadcast to it."""
        self._http("/pause?mode=keep", {})
        self._http("/start_weight_update", {})
        for name, tensor in tensors:
            tensor = tensor.to(self.device, getattr(torch, self.dtype)).contiguous()
            ours = self.pool.submit(self.broadcast, tensor)
            coming = {"names": [name], "dtype_names": [self.dtype], "shapes": [[*tensor.shape]]}
            self._http("/update_weights", {"update_info": coming})
            ours.result(self.call_s)
        self._http("/finish_weight_update", {})
        if not self._http("/reset_prefix_cache", {})["success"]:
            raise RuntimeError("the vLLM server kept its prefix cache: requests are still running")
        self._http("/resume", {})
