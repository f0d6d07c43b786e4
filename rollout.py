"""Rollouts: three sampling engines behind one small surface, and the streaming collect.

Token ids in, token ids and behaviour log-probs out; text is decoded for the rewards only. To add
an engine, subclass Engine and name the class in `setup` of ghpo.py.
"""
import itertools
import os
import socket
import time
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import ThreadPool

import httpx2
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from fsdp_utils import gather_objects, phase, reshard, unshard
from hints import Problem, Try

@dataclass(frozen=True)
class Request:
    """One try at one problem: a prompt for each of the G samples (normally all the same)."""
    problem: Problem
    prompts: list  # (G,) of token ids
    shown: Try  # the ratios and hints in these prompts
    tries: list  # list[Try] before this one
    prefixes: list  # (G,) text the assistant's turn already starts with
    seed: int  # sample j uses seed + j
    config: object  # its temperature (0: greedy), top_p, top_k and max_completion_length hold
    slot: int = 0  # place in the collect call

@dataclass(frozen=True)
class Completion:
    """One sample with exactly the context it was sampled from."""
    prompt_ids: list
    token_ids: list  # the end-of-sequence token included when it was sampled
    behaviour_logp: list  # (T,) the sampler's, at the sampling temperature (1 when greedy)
    finish_reason: str  # "stop" or "length"
    hint_ratio: float
    text: str = ""  # for the rewards only

@dataclass(frozen=True)
class Group:
    """A problem with the samples that enter the batch; replaced whole by the next try."""
    problem: Problem
    tries: list = field(default_factory=list)  # list[Try], oldest first
    completions: list = field(default_factory=list)  # (G,)
    rewards: list = field(default_factory=list)  # (G, F)
    request: Request | None = None  # what the completions answer; None: blank, not sampled yet

def collect(engine, groups, pool, next_request, merge, trigger=0):
    """Samples blank groups until next_request(group, slot) gives None for each; in the same order.
    A group is judged and, if hard, asked again the moment its own samples are there. With a
    deterministic engine every verdict is awaited one poll later, so that the time it takes cannot
    change what is batched with what. trigger: the column of the rewards that is Try.pass_rate.
    """
    groups, under_way = list(groups), len(groups)
    for slot, group in enumerate(groups):
        engine.submit(next_request(group, slot))
    while under_way:
        finished = engine.poll()
        with phase("verify"):
            verdicts = pool.poll(wait=engine.deterministic or not engine.busy)
        for (request, completions), rewards in sorted(verdicts, key=lambda v: v[0][0].slot):
            pass_rate = float(np.mean([scores[trigger] for scores in rewards]))
            tokens = sum(len(c.token_ids) for c in completions)
            tries = [*request.tries, replace(request.shown, pass_rate=pass_rate, tokens=tokens)]
            new = Group(request.problem, tries, completions, rewards, request)
            group = groups[request.slot] = merge(groups[request.slot], new)
            if again := next_request(group, request.slot):
                engine.submit(again)
            else:
                under_way -= 1
        for request, completions in finished:
            texts = [prefix + c.text for prefix, c in zip(request.prefixes, completions)]
            pool.submit((request, completions), texts, request.problem.answer)
    return groups

class Engine:
    """What the engines share: a request becomes a call for each of its samples. Engines have
    _start(prompt, fields), the handle of a call; _ended(), which makes progress and gives
    (handle, ids, log-probs, reason); update_weights(stream of (name, full tensor))."""
    deterministic = False  # do the same requests give the same bits, whenever verdicts arrive?
    busy = property(lambda self: bool(self.calls))

    def __init__(self, tokenizer, eos_ids, max_model_len):
        self.tokenizer, self.eos_ids, self.max_model_len = tokenizer, sorted(eos_ids), max_model_len
        self.calls, self.numbers = {}, map(str, itertools.count())  # {handle: see submit}

    def submit(self, request):
        """Starts the calls of one try at one problem; ValueError when one cannot fit."""
        c, completions = request.config, [None] * len(request.prompts)
        for j, prompt in enumerate(request.prompts):
            if len(prompt) + c.max_completion_length > self.max_model_len:  # vLLM clips silently
                raise ValueError(f"problem {request.problem.id}: {len(prompt)} prompt + "
                                 f"{c.max_completion_length} new tokens > {self.max_model_len}")
            # eos_ids are those of the run, not what vLLM finds in tokenizer and generation config
            fields = {
                "temperature": c.temperature, "top_p": c.top_p, "top_k": c.top_k,
                "max_tokens": c.max_completion_length, "seed": request.seed + j, "logprobs": 0,
                "detokenize": False, "ignore_eos": True, "stop_token_ids": self.eos_ids}
            self.calls[self._start(prompt, fields)] = request, completions, j

    def poll(self):
        """Makes progress; [(request, completions)] of the requests that finished."""
        finished = []
        for call, ids, logp, reason in self._ended() if self.calls else []:
            request, completions, j = self.calls.pop(call)
            # trap: from NaN weights vLLM samples on without a word; over HTTP NaN is -9999
            if not all(-9000 < number < 0.001 for number in logp) or len(logp) != len(ids):
                raise RuntimeError(f"sampled log-probs {logp[:4]}: are the weights finite?")
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            completions[j] = Completion(
                request.prompts[j], list(ids), logp, reason, request.shown.ratios[j], text)
            if None not in completions:
                finished.append((request, completions))
        return finished

    def wake(self):
        """Before sampling; as sleep() after it and close() at the very end: nothing to do here."""

    sleep = close = wake

class HfEngine(Engine):
    """Samples with the training model itself, by transformers' generate: all that waits, at once.

    The FSDP root's weights are whole from wake to sleep: no collective while ranks generate.
    """
    deterministic = True

    def __init__(self, config, tokenizer, eos_ids, max_model_len, policy, max_rows=256):
        super().__init__(tokenizer, eos_ids, max_model_len)
        self.policy, self.max_rows = policy, max_rows

    def wake(self):
        self.policy.eval()
        unshard(self.policy)

    def sleep(self):
        reshard(self.policy)
        self.policy.train()

    def update_weights(self, tensors):
        """Nothing to do: these are the weights. The stream is not started, on any rank."""

    def _start(self, prompt, fields):
        return next(self.numbers)

    @torch.no_grad()
    def _ended(self):
        """Generates the samples that wait, as many as max_rows, to their end."""
        rows = list(self.calls.values())[: self.max_rows]
        c, device = rows[0][0].config, next(self.policy.parameters()).device
        prompts = [torch.tensor(request.prompts[j], device=device) for request, _, j in rows]
        ids = pad_sequence(prompts, True, self.tokenizer.pad_token_id, "left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left")
        draws = SeededDraws(c, [request.seed + j for request, _, j in rows])
        output = self.policy(generate={
            "inputs": ids, "attention_mask": mask, "max_new_tokens": c.max_completion_length,
            "do_sample": False, "logits_processor": [draws], "eos_token_id": self.eos_ids,
            "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True,
            "repetition_penalty": 1.0,  # the model's own generation config may have another
            "synced_gpus": False})[:, ids.shape[1] :].tolist()  # no collective at every token
        logp = torch.stack(draws.logp, 1).tolist()
        for call, tokens, logp_T in zip([*self.calls], output, logp):  # poll removes calls
            ends = [t for t, token in enumerate(tokens, 1) if token in self.eos_ids]
            length = ends[0] if ends else len(tokens)
            yield call, tokens[:length], logp_T[:length], "stop" if ends else "length"

class SeededDraws(LogitsProcessor):
    """Makes generate's greedy choice a draw by each row's own seed alone; keeps the log-probs."""

    def __init__(self, config, seeds):
        self.config, self.logp = config, []  # logp: a (B,) tensor for each token
        self.uniform_BT = torch.from_numpy(np.stack([
            np.random.default_rng(seed).random(config.max_completion_length) for seed in seeds]))

    def __call__(self, ids, logits_BV):
        logits_BV = logits_BV.float() / (self.config.temperature or 1.0)
        if self.config.top_k:
            logits_BV = TopKLogitsWarper(self.config.top_k)(ids, logits_BV)
        if self.config.top_p < 1:
            logits_BV = TopPLogitsWarper(self.config.top_p)(ids, logits_BV)
        logp_BV = logits_BV.log_softmax(-1)
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        if self.config.temperature:  # invert the distribution function
            cdf_BV = logp_BV.double().exp().cumsum(-1)
            level_B1 = self.uniform_BT[:, len(self.logp), None].to(ids.device) * cdf_BV[:, -1:]
            token_B1 = (cdf_BV <= level_B1).sum(-1, True).clamp(max=cdf_BV.shape[1] - 1)
        self.logp.append(logp_BV.gather(-1, token_B1).squeeze(1))
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, token_B1, 0.0)

class VllmEngine(Engine):
    """vLLM inside this training process, one engine per rank. Build it on all ranks at the same
    point, after init_process_group: it joins the default group, which close() ends, so that comes
    last. VLLM_LOGGING_LEVEL=INFO shows memory at sleep."""

    def __init__(self, config, tokenizer, eos_ids, max_model_len, policy):
        super().__init__(tokenizer, eos_ids, max_model_len)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: update_weights needs it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        options = {"gpu_memory_utilization": config.vllm_gpu_memory_utilization}
        if not (is_gpu := torch.cuda.is_available()):
            from configs.vllm_cpu import cpu_options
            options = cpu_options(max_model_len)
        if "RANK" in os.environ:  # torchrun: a plain LLM would take cuda:0 on every rank
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(
            config.model_name_or_path, revision=config.model_revision, dtype=config.torch_dtype,
            max_model_len=max_model_len, skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs", enable_sleep_mode=is_gpu, **options)
        self.close = self.llm.llm_engine.engine_core.shutdown
        if is_gpu:  # level 2 drops weights and KV cache; update_weights brings them back
            self.sleep = partial(self.llm.sleep, level=2)
        self.params = partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY)

    def _start(self, prompt, fields):
        call = next(self.numbers)
        self.llm.llm_engine.add_request(call, {"prompt_token_ids": prompt}, self.params(**fields))
        return call

    def _ended(self):
        """One step of the engine: a token of every sample."""
        for output in self.llm.llm_engine.step():
            (out,) = output.outputs
            logp = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs)]
            yield output.request_id, out.token_ids, logp, out.finish_reason

    def update_weights(self, tensors):
        """Loads the tensors in place, one by one; RuntimeError when the stream lacks some."""
        torch.cuda.empty_cache()
        self.llm.wake_up(tags=["weights"])  # of an engine that is awake: does nothing
        (missing,) = self.llm.apply_model(lambda model: dict(model.named_parameters()).keys()
                                          - model.load_weights(tensors))
        if missing:
            raise RuntimeError(f"vLLM was not given {sorted(missing)[:8]}")
        self.llm.wake_up(tags=["kv_cache"])
        # trap: vLLM would keep the KV of the old weights and use it wherever a block matches
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

class ServerEngine(Engine):
    """A vLLM server started by `./run.sh serve CONFIG`: the same calls, by HTTP, from every rank.
    Rank 0 sends the weights by vLLM's weight transfer, NCCL (gloo on CPU: configs/vllm_cpu.py), and
    listens for that on port + 1. What fails is a RuntimeError with host and port."""

    def __init__(self, config, tokenizer, eos_ids, max_model_len, policy):
        super().__init__(tokenizer, eos_ids, max_model_len)
        host, port = config.vllm_server_host, config.vllm_server_port
        self.url, self.next_check, self.link = f"http://{host}:{port}", 0.0, None
        self.pool = ThreadPool(512)  # of daemons: a server that hangs does not keep the process
        if os.environ.get("RANK", "0") != "0":
            return
        place = {"rank_offset": 1, "master_port": port + 1,  # we are rank 0, then its workers
                 "world_size": 1 + self._http("/get_world_size", method="GET")["world_size"]}
        with socket.create_connection((host, port), 5) as probe:
            place["master_address"] = probe.getsockname()[0]  # ours, as the server can reach it
        if not torch.cuda.is_available():
            import configs.vllm_cpu  # noqa: F401, puts gloo in the place of NCCL
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        link = self.pool.apply_async(trainer_init, [place])
        self._http("/init_weight_transfer_engine", {"init_info": place})
        self.link = link.get(120)

    def _start(self, prompt, fields):
        return self.pool.apply_async(self._http, ["/inference/v1/generate", {
            "token_ids": prompt, "sampling_params": fields}, 1800])

    def _ended(self):
        """What has come back, after 20 ms; raises when a call or the server has failed."""
        time.sleep(0.02)
        if time.monotonic() > self.next_check:
            self._http("/is_paused", method="GET")  # unlike /health it waits for the engine
            self.next_check = time.monotonic() + 10
        for call in [call for call in self.calls if call.ready()]:
            (out,) = call.get()["choices"]
            logp = [token["logprob"] for token in out["logprobs"]["content"]]
            yield call, out["token_ids"], logp, out["finish_reason"]

    def _http(self, path, body=None, timeout=120, method="POST"):
        """The server's JSON answer."""
        try:  # without the proxies of the environment and, since this is not https, certificates
            answer = httpx2.request(method, self.url + path, json=body, trust_env=False,
                                    verify=False, timeout=httpx2.Timeout(timeout, connect=5))
            if answer.is_error:
                raise ValueError(f"{answer.status_code} {answer.text[:2000]}")
            return answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise RuntimeError(f"vLLM server {self.url}{path}: {error!r}. Is it running? "
                               "./run.sh serve CONFIG starts it") from None

    def update_weights(self, tensors):
        """vLLM's sequence of calls; it is told of each tensor while that is broadcast to it."""
        gather_objects("no rank is sampling any more")
        if self.link:
            self._http("/pause?mode=wait")  # empties the prefix cache too, or answers 500
            self._http("/start_weight_update")
        for name, tensor in tensors:  # on every rank: each is a collective
            if self.link:
                self.pool.apply_async(self.link.broadcast, [tensor.contiguous(), 0])
                self._http("/update_weights", {"update_info": {
                    "names": [name], "shapes": [[*tensor.shape]],
                    "dtype_names": [str(tensor.dtype).removeprefix("torch.")]}})
        if self.link:
            self._http("/finish_weight_update")
            self._http("/resume")
        gather_objects("the server has them")

    def close(self):
        self.pool.terminate()
        self.link = None  # frees port + 1 for the next run
