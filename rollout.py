"""Rollouts: three sampling engines behind one small surface, and the streaming collect.

Called by ghpo.py: engine.wake, update_weights, collect, sleep. A Request goes in; collect asks the
engine for its samples, hands their text to the verifier pool, and the Group goes on to its next
stage or is final. Token ids in, token ids and behaviour log-probs out; text is decoded for the
rewards only. To add an engine, subclass Engine and name the class in ENGINES.
"""

import asyncio
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from configs import UserError
from configs.model import control_tokens
from configs.plan import need_port
from configs.serve_key import key_header
from fsdp_utils import barrier, gather_objects, phase, reshard, saved_buffers, unshard
from hints import Completion, Group, Problem, Stage

CONNECT_SECONDS, CALL_SECONDS, GENERATE_SECONDS = 5, 120, 1800  # limits of calls to a server
POLL_SECONDS, CHECK_SECONDS = 0.02, 5  # how often a server's answers, and it itself, are looked at
ALIVE_SECONDS = 15  # within which a server shows that it lives, however long its engine computes
KEEP_SECONDS = 2  # of an idle connection: the server ends one after 5
MAX_CALLS = 512  # of a rank that the server computes at once
BUCKET_BYTES = 2**30  # of weights that are sent with one call
LOWEST_LOGP, HIGHEST_LOGP = -9000, 0.001  # over HTTP a NaN is -9999
SHOW_SECONDS = 0.5  # between two updates of the progress bar


@dataclass(frozen=True)
class Request:
    """One stage of one problem: a prompt for each of the G samples (normally all the same)."""

    problem: Problem
    stage: Stage  # the ratios and hints in the prompts
    prompts: list[list[int]]  # (G,) token ids
    prefixes: list[str]  # (G,) text the assistant's turn already starts with
    seed: int  # sample j uses seed + j
    config: Any  # its temperature (0: greedy), top_p, top_k and max_completion_length hold
    slot: int = 0  # place in the collect call


class Progress:
    """What is seen of a long step: groups done, stage, tokens, tokens a second."""

    def __init__(self, n_groups: int = 0, show: Callable[[str], None] | None = None):
        self.n_groups, self.show = n_groups, show
        self.n_done, self.n_tokens, self.stage = 0, 0, 0
        self.started = self.shown = time.monotonic()

    def update(self, tokens: int = 0, done: int = 0, stage: int = 0) -> None:
        """Counts what has come, and shows it every half second."""
        self.n_tokens += tokens
        self.n_done += done
        self.stage = max(self.stage, stage)
        now = time.monotonic()
        if self.show and now > self.shown + SHOW_SECONDS:
            self.shown = now
            speed = self.n_tokens / (now - self.started)
            self.show(
                f"{self.n_done}/{self.n_groups} groups, stage {self.stage}, "
                f"{self.n_tokens} tokens, {speed:.0f}/s"
            )


def collect(
    engine: "Engine",
    groups: list[Group],
    pool: Any,
    ask: Callable[[Group, int], Request],
    follow: Callable[[Group, list[Completion], list[list[float]]], Group],
    show: Callable[[str], None] | None = None,
) -> list[Group]:
    """Samples the groups' next stages until each is final or deferred; in the same order.

    ask(group, slot) is the request of group.next_stage; follow(group, completions, rewards) the
    group with what follows. A group is judged and, if hard, asked again the moment its own samples
    are there. With a deterministic engine a poll's texts are judged while the next poll samples,
    and that verdict is awaited: how long it takes cannot change what is batched with what.
    """
    groups, n_running = list(groups), len(groups)
    engine.progress = Progress(n_running, show)
    for slot, group in enumerate(groups):
        engine.submit(ask(group, slot))
    while n_running:
        # 1. Sample.
        finished = engine.poll()
        # 2. Verdicts on what earlier polls finished; nothing else is left to do if none samples.
        must_wait = engine.deterministic or not engine.is_busy()
        with phase("verify"):
            verdicts = pool.poll(wait=must_wait)
        verdicts.sort(key=lambda verdict: verdict[0][0].slot)
        for (request, completions), rewards in verdicts:
            group = follow(groups[request.slot], completions, rewards)
            groups[request.slot] = group
            if group.next_stage and not group.is_deferred:
                engine.submit(ask(group, request.slot))
                engine.progress.update(stage=len(group.stages))
            else:
                n_running -= 1
                engine.progress.update(done=1)
        # 3. Hand over what this poll finished.
        for request, completions in finished:
            texts = [completion.prefix + completion.text for completion in completions]
            row = row_of(request.problem, request.config)
            pool.submit((request, completions), texts, request.problem.gold, row)
    return groups


def row_of(problem: Problem, config: Any) -> dict:
    """What rewards may ask for beside the text and the gold answer."""
    known = {"problem": problem.text, "strict_answers": config.strict_answers}
    return {**problem.row, **known}


class Engine:
    """What the engines share: a request becomes a call for each of its samples. Engines have
    _start(prompt, fields), the handle of a call; _ended(), which makes progress and gives
    (handle, ids, log-probs, reason); update_weights(stream of (name, full tensor))."""

    deterministic = False  # do the same requests give the same bits, whenever verdicts arrive?

    def __init__(
        self, config: Any, tokenizer: Any, eos_ids: set[int], max_model_len: int, policy: Any
    ):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.eos_ids, self.max_model_len = sorted(eos_ids), max_model_len
        self.control_tokens = control_tokens(tokenizer)  # which no text of a completion shows
        self.calls = {}  # handle: (request, its completions so far, number of the sample)
        self.numbers = map(str, itertools.count())
        self.progress = Progress()

    def is_busy(self) -> bool:
        return bool(self.calls)

    def submit(self, request: Request) -> None:
        """Starts the calls of one stage of one problem; ValueError when one cannot fit."""
        c, completions = request.config, [None] * len(request.prompts)
        for j, prompt in enumerate(request.prompts):
            if len(prompt) + c.max_completion_length > self.max_model_len:  # vLLM clips silently
                raise ValueError(
                    f"problem {request.problem.id}: {len(prompt)} prompt + "
                    f"{c.max_completion_length} new tokens > {self.max_model_len}"
                )
            # eos_ids are those of the run, not what vLLM finds in tokenizer and generation config
            fields = {
                "temperature": c.temperature,
                "top_p": c.top_p,
                "top_k": c.top_k,
                "max_tokens": c.max_completion_length,
                "seed": request.seed + j,
                "logprobs": 0,
                "detokenize": False,
                "ignore_eos": True,
                "stop_token_ids": self.eos_ids,
            }
            call = self._start(prompt, fields)
            self.calls[call] = request, completions, j

    def poll(self) -> list[tuple[Request, list[Completion]]]:
        """Makes progress; the requests that finished, with their completions."""
        finished = []
        if not self.calls:
            return finished
        for call, ids, logp, reason in self._ended():
            request, completions, j = self.calls.pop(call)
            # trap: from NaN weights vLLM samples on without a word
            is_sound = all(LOWEST_LOGP < number < HIGHEST_LOGP for number in logp)
            if not is_sound or len(logp) != len(ids):
                raise RuntimeError(f"sampled log-probs {logp[:4]}: are the weights finite?")
            completions[j] = Completion(
                prompt_ids=request.prompts[j],
                token_ids=list(ids),
                behaviour_logp=logp,
                finish_reason=reason,
                hint_ratio=request.stage.ratios[j],
                hint=request.stage.hints[j],
                prefix=request.prefixes[j],
                text=self.tokenizer.decode([i for i in ids if i not in self.control_tokens]),
            )
            if None not in completions:
                finished.append((request, completions))
        return finished

    def wake(self) -> None:
        """Before sampling."""

    def sleep(self) -> None:
        """After sampling, before training."""

    def close(self) -> None:
        """At the very end."""


class HfEngine(Engine):
    """Samples with the training model itself, by transformers' generate: all that waits, at once.

    The FSDP root's weights are whole from wake to sleep: no collective while ranks generate.
    """

    deterministic = True
    max_rows = 256  # that are generated at once

    def wake(self) -> None:
        self.policy.eval()
        unshard(self.policy)

    def sleep(self) -> None:
        reshard(self.policy)
        self.policy.train()

    def update_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Nothing to do: these are the weights. The stream is not started, on any rank."""

    def _start(self, prompt, fields):
        return next(self.numbers)

    @torch.no_grad()
    def _ended(self):
        """Generates the samples that wait, as many as max_rows, to their end."""
        waiting = list(self.calls.items())[: self.max_rows]
        rows = [(request, j) for _, (request, _, j) in waiting]
        c, device = rows[0][0].config, next(self.policy.parameters()).device
        prompts = [torch.tensor(request.prompts[j], device=device) for request, j in rows]
        masks = [torch.ones_like(prompt) for prompt in prompts]
        ids_BT = pad_sequence(prompts, True, self.tokenizer.pad_token_id, "left")
        mask_BT = pad_sequence(masks, True, 0, "left")
        seeds = [request.seed + j for request, j in rows]
        draws = SeededDraws(c, seeds, self.eos_ids, self.progress)
        arguments = {
            "inputs": ids_BT,
            "attention_mask": mask_BT,
            "max_new_tokens": c.max_completion_length,
            "do_sample": False,
            "logits_processor": [draws],
            "eos_token_id": self.eos_ids,
            "pad_token_id": self.tokenizer.pad_token_id,
            "use_cache": True,
            "repetition_penalty": 1.0,  # the model's own generation config may have another
            "synced_gpus": False,  # no collective at every token
        }
        output = self.policy(generate=arguments)[:, ids_BT.shape[1] :].tolist()
        logp = torch.stack(draws.logp, 1).tolist()
        for (call, _), tokens, logp_T in zip(waiting, output, logp):
            length, reason = len(tokens), "length"
            for t, token in enumerate(tokens, 1):
                if token in self.eos_ids:
                    length, reason = t, "stop"
                    break
            yield call, tokens[:length], logp_T[:length], reason


class SeededDraws(LogitsProcessor):
    """Makes generate's greedy choice a draw by each row's own seed alone; keeps the log-probs."""

    def __init__(self, config: Any, seeds: list[int], eos_ids: list[int], progress: Progress):
        self.config, self.progress, self.eos_ids = config, progress, torch.tensor(eos_ids)
        self.is_ended_B1 = torch.zeros(len(seeds), 1, dtype=torch.bool)
        self.logp = []  # a (B,) tensor for each token
        length = config.max_completion_length
        draws = [np.random.default_rng(seed).random(length) for seed in seeds]
        self.uniform_BT = torch.from_numpy(np.stack(draws))

    def __call__(self, ids, logits_BV):
        logits_BV = logits_BV.float() / (self.config.temperature or 1.0)
        if self.config.top_k:
            logits_BV = TopKLogitsWarper(self.config.top_k)(ids, logits_BV)
        if self.config.top_p < 1:
            logits_BV = TopPLogitsWarper(self.config.top_p)(ids, logits_BV)
        weight_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).exp_()
        # trap: a GPU sums in a tree, where float32 could lift a token of weight 0
        exact = torch.float64 if ids.is_cuda else torch.float32
        cdf_BV = weight_BV.cumsum(-1, dtype=exact)
        if self.config.temperature:
            token_B1 = draw(cdf_BV, self.uniform_BT[:, len(self.logp), None].to(ids.device))
        else:
            token_B1 = logits_BV.argmax(-1, keepdim=True)
        p_B1 = weight_BV.gather(-1, token_B1) / cdf_BV[:, -1:]
        self.logp.append(p_B1.log().squeeze(1).float())
        self.progress.update(tokens=int((~self.is_ended_B1).sum()))
        self.is_ended_B1 |= torch.isin(token_B1.cpu(), self.eos_ids)
        return logits_BV.fill_(-torch.inf).scatter_(-1, token_B1, 0.0)


def draw(cdf_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """Inverts a distribution function of any sum: (B, 1) places, of which none has weight 0."""
    total_B1 = cdf_BV[:, -1:]
    # the cast may round up to the total, behind the last token that has a weight
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    level_B1 = torch.minimum((uniform_B1 * total_B1).to(cdf_BV.dtype), below_B1)
    place_B1 = torch.searchsorted(cdf_BV, level_B1, right=True)
    return place_B1.clamp(max=cdf_BV.shape[1] - 1)  # where all is NaN, which poll tells of


class VllmEngine(Engine):
    """vLLM inside this training process, one engine per rank. Build it on all ranks at the same
    point, after init_process_group: it joins the default group, which close() ends, so that comes
    last. VLLM_LOGGING_LEVEL=INFO shows memory at sleep."""

    def __init__(
        self, config: Any, tokenizer: Any, eos_ids: set[int], max_model_len: int, policy: Any
    ):
        super().__init__(config, tokenizer, eos_ids, max_model_len, policy)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: update_weights needs it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.has_gpu = torch.cuda.is_available()
        if self.has_gpu:
            options = {"gpu_memory_utilization": config.vllm_gpu_memory_utilization}
        else:
            from configs.vllm_cpu import cpu_options

            options = cpu_options(max_model_len)
        if "RANK" in os.environ:  # torchrun: a plain LLM would take cuda:0 on every rank
            options["distributed_executor_backend"] = "external_launcher"
        # the first update_weights brings all weights, but vLLM may not take a saved buffer
        if policy and not saved_buffers(policy.model):
            options["load_format"] = "dummy"
        self.llm = LLM(
            config.model_name_or_path,
            revision=config.model_revision,
            dtype=config.torch_dtype,
            max_model_len=max_model_len,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=self.has_gpu,
            **options,
        )

    def _start(self, prompt, fields):
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        call = next(self.numbers)
        params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
        self.llm.llm_engine.add_request(call, {"prompt_token_ids": prompt}, params)
        return call

    def _ended(self):
        """One step of the engine: a token of every sample."""
        for output in self.llm.llm_engine.step():
            (out,) = output.outputs
            logp = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs)]
            self.progress.update(tokens=len(logp))
            yield output.request_id, out.token_ids, logp, out.finish_reason

    def update_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Loads the tensors in place, one by one; RuntimeError when the stream lacks some."""

        def load(model):
            loaded = model.load_weights(tensors)
            if not self.has_gpu:
                from configs.vllm_cpu import pack

                pack(model)
            return {name for name, _ in model.named_parameters()} - loaded

        torch.cuda.empty_cache()
        self.llm.wake_up(tags=["weights"])  # of an engine that is awake: does nothing
        (missing,) = self.llm.apply_model(load)
        if missing:
            raise RuntimeError(f"vLLM was not given {sorted(missing)[:8]}")
        self.llm.wake_up(tags=["kv_cache"])
        # trap: vLLM would keep the KV of the old weights and use it wherever a block matches
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

    def sleep(self) -> None:
        """Level 2 drops weights and KV cache; update_weights brings them back."""
        if self.has_gpu:
            self.llm.sleep(level=2)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class ServerError(UserError, RuntimeError):
    """The server does not answer, or refuses: one line for the user."""


class ServerEngine(Engine):
    """A vLLM server started by `./run.sh serve CONFIG`: the same calls, by HTTP, from every rank.
    Rank 0 sends the weights by vLLM's weight transfer, NCCL (gloo on CPU: configs/vllm_cpu.py), and
    listens for that on port + 1. What fails is a ServerError with host and port."""

    def __init__(
        self, config: Any, tokenizer: Any, eos_ids: set[int], max_model_len: int, policy: Any
    ):
        super().__init__(config, tokenizer, eos_ids, max_model_len, policy)
        host, port = config.vllm_server_host, config.vllm_server_port
        self.url = f"http://{host}:{port}"
        self.link = None  # to the server's workers, on rank 0
        self.version = None  # of the weights that were sent last
        self.rank = int(os.environ.get("RANK", "0"))
        self.n_engines, self.headers = 1, {}  # headers: of the requests of a group
        # without the proxies of the environment and, since this is not https, certificates
        self.http = httpx2.AsyncClient(
            base_url=self.url,
            headers=key_header(),
            trust_env=False,
            verify=False,
            limits=httpx2.Limits(keepalive_expiry=KEEP_SECONDS),
        )
        self.turns, self.loop = asyncio.Semaphore(MAX_CALLS), asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()  # all calls
        self.next_check = 0.0
        # waits for the server's engine, which answers between its steps: see _check
        self.engine_probe = self._begin(self._http("/is_paused", method="GET"))
        if self.rank == 0:
            self._need_same_model(config.model_name_or_path)
            self.link = self._open_link(host, port)

    def _need_same_model(self, name):
        """ServerError when the server's own config lets this run fail, or go on wrongly."""
        (served,) = self._call("/v1/models", method="GET")["data"]
        theirs, length = served["root"], served["max_model_len"]
        if Path(theirs).name != Path(name).name or length < self.max_model_len:
            raise ServerError(
                f"vLLM server {self.url} has {theirs} for sequences of {length} tokens, this run "
                f"has {name} and {self.max_model_len}: start it with this run's config and settings"
            )

    def _open_link(self, host, port):
        """The group in which this process is rank 0 and the server's workers are the others."""
        workers = self._call("/get_world_size", method="GET")["world_size"]
        of_one = self._call("/get_world_size?include_dp=false", method="GET")["world_size"]
        self.n_engines = workers // of_one
        with socket.create_connection((host, port), CONNECT_SECONDS) as probe:
            address = probe.getsockname()[0]  # ours, as the server can reach it
        place = {
            "rank_offset": 1,
            "master_address": address,
            "master_port": port + 1,
            "world_size": 1 + workers,
        }
        need_port(address, port + 1)
        if not torch.cuda.is_available():
            import configs.vllm_cpu  # noqa: F401, puts gloo in the place of NCCL
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        # ends the group of an earlier run; if that was killed while it sent weights the server
        # refuses, and so does this run
        self._call("/shutdown_weight_transfer_engine")
        joined = self._http("/init_weight_transfer_engine", {"init_info": place})
        try:
            return self._result(asyncio.to_thread(trainer_init, place), joined)
        except RuntimeError as error:  # ours, or NCCL's
            raise ServerError(
                f"vLLM server {self.url}: no group for the weights: {error}. On GPUs: NCCL takes "
                "one process each, so server and training need GPUs of their own; "
                "CUDA_VISIBLE_DEVICES divides those of one machine"
            ) from None

    def submit(self, request: Request) -> None:
        """All samples of a problem go to one of the server's engines, which then has its prompt."""
        if self.n_engines > 1:
            engine = (request.slot + self.rank) % self.n_engines
            self.headers = {"X-data-parallel-rank": str(engine)}
        super().submit(request)

    def _start(self, prompt, fields):
        body = {"token_ids": prompt, "sampling_params": fields}
        return self._begin(self._generate(body, self.headers))

    async def _generate(self, body, headers):
        async with self.turns:
            path = "/inference/v1/generate"
            return await self._http(path, body, "POST", GENERATE_SECONDS, headers)

    def _ended(self):
        """What has come back, after 20 ms; raises when a call or the server has failed."""
        time.sleep(POLL_SECONDS)
        self._check()
        for call in [call for call in self.calls if call.done()]:
            (out,) = call.result()["choices"]
            self._need_our_weights({span["version"] for span in out["weight_versions"] or []})
            logp = [token["logprob"] for token in out["logprobs"]["content"]]
            self.progress.update(tokens=len(logp))
            yield call, out["token_ids"], logp, out["finish_reason"]

    def _need_our_weights(self, versions):
        if versions != {self.version}:
            raise ServerError(
                f"vLLM server {self.url} has weights that are not this run's: was it restarted, or "
                "does another run use it? With a server of its own the same command resumes"
            )

    def _check(self):
        """ServerError when the server no longer lives, however long a call may still wait."""
        if time.monotonic() > self.next_check:
            # the HTTP process, within 15 s; below the engine behind it, within 120 s
            self._begin(self._http("/health", None, "GET", ALIVE_SECONDS)).result()
            if self.engine_probe.done():
                self.engine_probe.result()
                self.engine_probe = self._begin(self._http("/is_paused", method="GET"))
            self.next_check = time.monotonic() + CHECK_SECONDS

    def _begin(self, coroutine):
        """Its Future; it runs beside the calls."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def _result(self, *coroutines):
        """Runs coroutines side by side and waits for all; returns what the first one does. What one
        of them raises, or a server that no longer lives, is raised at once."""
        calls = [self._begin(coroutine) for coroutine in coroutines]
        deadline, waiting = time.monotonic() + CALL_SECONDS + ALIVE_SECONDS, calls
        while waiting:
            done, waiting = wait(calls, POLL_SECONDS, FIRST_EXCEPTION)
            for call in done:
                call.result()
            self._check()
            if time.monotonic() > deadline:
                raise self._error("", TimeoutError("nothing moves"))
        return calls[0].result()

    def _call(self, path, body=None, method="POST"):
        """The server's answer."""
        return self._result(self._http(path, body, method))

    async def _http(self, path, body=None, method="POST", timeout=CALL_SECONDS, headers=None):
        limits = httpx2.Timeout(timeout, connect=CONNECT_SECONDS)
        try:
            answer = await self.http.request(
                method, path, json=body, timeout=limits, headers=headers
            )
            if answer.is_error:
                raise ValueError(f"{answer.status_code} {answer.text[:2000]}")
            return answer.json() if answer.content else None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise self._error(path, error) from None

    def _error(self, path, error):
        return ServerError(
            f"vLLM server {self.url}{path}: {error!r}. Start it anew, ./run.sh serve CONFIG, "
            "with the same VLLM_API_KEY as here; then the same command resumes this run"
        )

    def update_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """vLLM's sequence of calls, one for a bucket of tensors, which is broadcast meanwhile."""
        if self.link and self.version:
            self._need_our_weights({self._call("/weight_info", method="GET")["weight_version"]})
        # also a barrier: no rank is sampling any more
        of_ranks = gather_objects((uuid.uuid4().hex, self.n_engines))
        self.version, self.n_engines = of_ranks[0]  # rank 0 alone has asked for the engines
        if self.link:
            self._call("/pause?mode=wait")  # empties the prefix cache too, or answers 500
            self._call("/start_weight_update")
        # all ranks gather: those without a link one tensor at a time, which they drop
        for bucket in buckets(tensors, BUCKET_BYTES if self.link else 0):
            if self.link:
                self._send(bucket)
            del bucket  # before the next one is gathered
        if self.link:
            self._call("/finish_weight_update", {"weight_version": self.version})
            self._call("/resume")
        barrier("the server has the weights")

    def _send(self, bucket):
        names, tensors = zip(*bucket)
        info = {
            "names": names,
            "shapes": [[*tensor.shape] for tensor in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        }
        tensors = [tensor.contiguous() for tensor in tensors]
        # trap: a thread has a stream of its own, on which nothing waits for cast and gather
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        taken = self._http("/update_weights", {"update_info": info})
        self._result(asyncio.to_thread(self._broadcast, tensors, stream), taken)

    def _broadcast(self, tensors, stream):
        try:
            for tensor in tensors:
                self.link.broadcast(tensor, 0, stream)
        except RuntimeError as error:  # NCCL's and gloo's
            raise self._error(", broadcast of the weights", error) from error

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.link = None  # frees port + 1 for the next run


def buckets(tensors: Iterable, n_bytes: int) -> Iterator[list]:
    """The stream in lists, each of just so many tensors as reach n_bytes, the last of the rest."""
    bucket, size = [], 0
    for name, tensor in tensors:
        bucket.append((name, tensor))
        size += tensor.nbytes
        if size >= n_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


ENGINES = {"hf": HfEngine, "vllm": VllmEngine, "server": ServerEngine}
