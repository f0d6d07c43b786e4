"""The vLLM engines against the trainer, with the real vLLM on CPU: ./run.sh test-vllm (4 minutes).

One live vLLM engine per process is all that vLLM allows, so the runs of ghpo.py are subprocesses.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy OpenMP threads are 10 x slower

import httpx2
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("vllm")

import fsdp_utils
import rollout
from configs.plan import server_arguments
from configs.settings import Config
from ghpo import Policy
from hints import Problem, Stage
from rollout import HfEngine, Request, ServerEngine, VllmEngine

TESTS = Path(__file__).parent
BASE = TESTS / "tiny/base"
EOS = {1, 7}  # two, of which the model's own config names none
LENGTH, KEY = 300, "a-key-of-this-test"


NO_TEXT = SimpleNamespace(decode=lambda ids: "", added_tokens_decoder={}, pad_token_id=0)


def random_model(folder, tied):
    """A random Llama with an uneven next-token distribution; head_dim 32 is vLLM's least on CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.25, tie_word_embeddings=tied, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def settings(folder, port=0):
    return SimpleNamespace(
        model_name_or_path=str(folder), model_revision="main", torch_dtype="float32",
        vllm_gpu_memory_utilization=0.3, vllm_server_host="127.0.0.1", vllm_server_port=port,
    )  # fmt: skip


def ask(problem, temperature=1.0, samples=3, max_tokens=48, length=160):
    """A request whose prompt fills a whole 128-token block of vLLM's prefix cache."""
    prompt = torch.randint(8, 96, (length,), generator=torch.Generator().manual_seed(problem))
    stage = Stage([0.0] * samples, [""] * samples)
    return Request(
        Problem(problem, [], ""), stage, [prompt.tolist()] * samples, [""] * samples,
        2**62 - 2 + problem, SimpleNamespace(
            temperature=temperature, max_completion_length=max_tokens, top_p=1.0, top_k=0),
    )  # fmt: skip


def sample(engine, requests):
    """{(problem id, sample): Completion}"""
    for request in requests:
        engine.submit(request)
    found = {}
    while engine.is_busy():
        for request, completions in engine.poll():
            for j, completion in enumerate(completions):
                found[request.problem.id, j] = completion
    return found


def trainer_logp(model, completion, temperature):
    """The trainer's own log-probs of a completion (T,), with gradient."""
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    predict = torch.arange(len(completion.prompt_ids) - 1, ids.shape[1] - 1)
    target = ids[0, predict + 1]
    positions = torch.arange(ids.shape[1])[None]
    return Policy(model)(ids, positions, predict, target, temperature)[0]


@torch.no_grad()
def worst_difference(model, found, temperature=1.0):
    return max(
        (trainer_logp(model, c, temperature) - torch.tensor(c.behaviour_logp)).abs().max().item()
        for c in found.values()
    )


def greedy_tokens(engine):
    found = sample(engine, [ask(problem, 0.0) for problem in range(4)])
    return {key: completion.token_ids for key, completion in found.items()}


def assert_greedy_equals_hf(engine, model):
    tokens = greedy_tokens(engine)
    assert tokens == greedy_tokens(HfEngine(None, NO_TEXT, EOS, LENGTH, Policy(model)))
    assert len(set(map(tuple, tokens.values()))) > 1


def optimizer_steps(model, found, steps):
    """A few steps away from what was sampled: enough to change what comes next."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([trainer_logp(model, c, 1.0).mean() for c in found.values()]).mean().backward()
        optimizer.step()


# ---- inside the process --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "untied"])
def colocated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(folder, request.param == "tied")
    engine = VllmEngine(settings(folder), NO_TEXT, EOS, LENGTH, Policy(model))
    yield engine, folder
    engine.close()


@pytest.fixture
def pair(colocated):
    """(engine, model) with the same weights, whatever the test before left behind."""
    engine, folder = colocated
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine.update_weights(model.named_parameters())
    return engine, model


def test_weights_come_with_the_first_update_alone(colocated):
    """They are not read: the first test of an engine that has none yet."""
    engine, folder = colocated
    assert engine.llm.llm_engine.vllm_config.load_config.load_format == "dummy"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = sample(engine, [ask(0, 0.0)])
    assert worst_difference(model, before, 1.0) > 0.1
    engine.update_weights(model.named_parameters())
    assert_greedy_equals_hf(engine, model)
    assert worst_difference(model, sample(engine, [ask(0)])) < 1e-3


def test_greedy_equals_hf_engine(pair):
    assert_greedy_equals_hf(*pair)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logp_equals_trainer(pair, temperature):
    engine, model = pair
    found = sample(engine, [ask(problem, temperature) for problem in range(6)])
    assert worst_difference(model, found, temperature) < 1e-3
    reasons = {c.finish_reason for c in found.values()}
    assert reasons == {"stop", "length"}
    for completion in found.values():
        ends = [token in EOS for token in completion.token_ids]
        assert ends[-1] == (completion.finish_reason == "stop") and not any(ends[:-1])


def test_follows_three_optimizer_steps(pair):
    engine, model = pair
    before = sample(engine, [ask(problem) for problem in range(4)])
    for _ in range(3):
        optimizer_steps(model, before, 1)
        engine.update_weights(model.named_parameters())
    after = sample(engine, [ask(problem) for problem in range(4)])
    assert worst_difference(model, after) < 1e-3
    assert worst_difference(model, before) > 0.1  # the steps did move the policy
    assert_greedy_equals_hf(engine, model)


def test_stale_prefix_cache_would_be_seen(pair, monkeypatch):
    engine, model = pair
    before = sample(engine, [ask(0)])
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        optimizer_steps(model, before, 3)
        engine.update_weights(model.named_parameters())
        stale = worst_difference(model, sample(engine, [ask(0)]))
    engine.update_weights(model.named_parameters())
    fresh = worst_difference(model, sample(engine, [ask(0)]))
    assert fresh < 1e-3 < 1e-2 < stale


def test_seeds_decide_the_tokens(pair):
    """As documented: with fp32 on CPU, company and order change nothing; problem and sample do."""
    engine, _ = pair
    alone = sample(engine, [ask(3)])
    together = sample(engine, [ask(problem) for problem in (5, 3, 4)])
    for key, completion in alone.items():
        assert completion.token_ids == together[key].token_ids
    same_prompt = replace(ask(3), problem=Problem(9, [], ""), seed=77)
    texts = [tuple(c.token_ids) for c in (*alone.values(), *sample(engine, [same_prompt]).values())]
    assert len(set(texts)) == 6


def test_samples_may_have_prompts_of_their_own(pair):
    engine, model = pair
    request = replace(ask(0), prompts=[ask(0).prompts[0], ask(1).prompts[0], [9, 10]])
    found = sample(engine, [request])
    assert [found[0, j].prompt_ids for j in range(3)] == request.prompts
    assert worst_difference(model, found) < 1e-3


def test_refuses_what_would_go_wrong_silently(pair):
    engine, model = pair
    with pytest.raises(ValueError, match="160 prompt.*200 new"):
        engine.submit(ask(0, max_tokens=200))
    assert not engine.is_busy()
    weights = list(model.named_parameters())
    with pytest.raises(RuntimeError, match="norm|lm_head"):
        engine.update_weights(weights[:-1])
    with torch.no_grad():
        weights[-1][1].fill_(float("nan"))
    engine.update_weights(weights)
    with pytest.raises(RuntimeError, match="finite"):
        sample(engine, [ask(0)])
    while engine.llm.llm_engine.has_unfinished_requests():  # leave nothing behind
        engine.llm.llm_engine.step()
    engine.calls.clear()


def tiny_run(folder, *overrides, processes=1):
    """ghpo.py on the tiny task with short answers, as a process of its own."""
    common = ["eval_strategy=no", "start_hint_step=0", "save_strategy=no", "warmup_steps=0"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "ghpo.py",
         "--config", "configs/tiny.yaml", f"output_dir={folder}", f"model_name_or_path={BASE}",
         *common, *overrides],
        cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_ranks_with_an_engine_each(tmp_path):
    """Sharded training, weights streamed to both engines: the mismatch shows that they arrive."""
    run = tiny_run(tmp_path / "run", "engine=vllm", "max_steps=3",
                   "gradient_accumulation_steps=4", processes=2)  # fmt: skip
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0 and 0 < line["mismatch_max"] < 1e-3
    exported = tmp_path / "run" / "model"  # loads in vLLM and in transformers, with the same text
    code = f"import test_vllm; test_vllm.print_greedy_tokens({str(exported)!r})"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        timeout=300,
    )
    assert told.returncode == 0, told.stderr[-4000:]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ours = greedy_tokens(HfEngine(None, NO_TEXT, EOS, LENGTH, Policy(model)))
    assert json.loads(told.stdout.splitlines()[-1]) == [ours[key] for key in sorted(ours)]


def print_greedy_tokens(folder):
    """In a process of its own: what vLLM samples from an exported model."""
    engine = VllmEngine(settings(folder), NO_TEXT, EOS, LENGTH, None)
    print(json.dumps(list(dict(sorted(greedy_tokens(engine).items())).values())), flush=True)
    engine.close()


# ---- over HTTP -----------------------------------------------------------------------------------


def server_engine(port, model=BASE, length=LENGTH):
    if not dist.is_initialized():
        fsdp_utils.setup_distributed()
    return ServerEngine(settings(model, port), NO_TEXT, EOS, length, None)


def free_port():
    """A port whose next one, for the weights, is most likely free as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server on the tiny model with a key, which the last test kills: .port, .log, .kill()."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_API_KEY", KEY)
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    config = Config(str(BASE), dataset_name="-", torch_dtype="float32", vllm_server_port=port,
                    max_prompt_length=LENGTH - 64, max_completion_length=64)  # fmt: skip
    argv, environment = server_arguments(config, 0)
    with open(log, "w") as file:
        process = subprocess.Popen(
            argv, env=environment, stdout=file, stderr=file, start_new_session=True
        )

    def kill():
        """SIGKILL to the server and its worker, which share a session."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    deadline = time.monotonic() + 1200  # for busy machines: it ends with the process
    while socket.socket().connect_ex(("127.0.0.1", port)):
        if process.poll() is not None or time.monotonic() > deadline:
            kill()
            pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")
        time.sleep(0.5)
    yield SimpleNamespace(port=port, log=log, kill=kill)
    kill()
    patch.undo()


UNLISTED = ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/metrics/", "/", "/no")
UPGRADE = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
           "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip


def test_every_route_asks_for_the_key(server):
    key = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        listed = client.get("/openapi.json", headers=key).json()["paths"]
        dev_mode = {"/collective_rpc", "/sleep", "/init_weight_transfer_engine", "/update_weights"}
        assert dev_mode | {"/health", "/metrics", "/v1/models"} < set(listed)
        routes = [(method, path) for path, methods in listed.items() for method in methods]
        routes += [("get", path) for path in UNLISTED]
        routes += [(method, path) for method in ("options", "head", "put") for path in listed]
        for method, path in routes:
            for wrong in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, UPGRADE):
                status = client.request(method, path, headers=wrong).status_code
                assert status == 401, (method, path, wrong)
        assert client.get("/health", headers=key).status_code == 200
    assert KEY not in server.log.read_text()


def test_a_server_of_another_run_is_refused(server):
    for model, length, told in (
        ("elsewhere/other", LENGTH, "base .*this run has elsewhere/other"),
        (BASE, LENGTH + 1, f" {LENGTH} tokens, .* {LENGTH + 1}: start it"),
    ):
        with pytest.raises(RuntimeError, match=told):
            server_engine(server.port, model, length)
    mine = server_engine(server.port, f"elsewhere/{BASE.name}")
    weights = LlamaForCausalLM(AutoConfig.from_pretrained(BASE)).state_dict()
    weights.pop("lm_head.weight")  # tied
    mine.update_weights(weights.items())
    assert len(sample(mine, [ask(0)])) == 3
    mine._call("/update_weight_version", {"new_version": "of another run"})
    with pytest.raises(RuntimeError, match="not this run's"):
        sample(mine, [ask(0)])
    with pytest.raises(RuntimeError, match="not this run's"):
        mine.update_weights(weights.items())
    mine.close()


def test_the_port_of_the_weights_may_be_taken(server):
    with socket.create_server(("127.0.0.1", server.port + 1)):
        with pytest.raises(ValueError, match=f"{server.port + 1} cannot be listened to"):
            server_engine(server.port)


def test_server_follows_weights(server, monkeypatch):
    engine = server_engine(server.port)
    config = AutoConfig.from_pretrained(BASE)
    config.initializer_range = 0.25
    for seed, n_bytes in enumerate((rollout.BUCKET_BYTES, 2**18)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        size = sum(p.nbytes for p in model.parameters())
        monkeypatch.setattr(rollout, "BUCKET_BYTES", n_bytes)
        before = server.log.read_text().count("POST /update_weights")
        engine.update_weights(model.named_parameters())
        n_calls = server.log.read_text().count("POST /update_weights") - before
        assert n_calls == 1 if size < n_bytes else 1 < n_calls <= 1 + size // n_bytes
        for temperature in (0.6, 1.0, 1.3):
            found = sample(engine, [ask(problem, temperature) for problem in range(4)])
            assert worst_difference(model, found, temperature) < 1e-3
        assert_greedy_equals_hf(engine, model)
    with pytest.raises(RuntimeError, match=f"{server.port}.*400.*temperature"):
        sample(engine, [ask(0, -1.0)])
    with pytest.raises(RuntimeError, match=f"{server.port}/update_weights.*500"):
        engine.update_weights(iter([("no.such.weight", torch.zeros(3))]))
    engine.close()


def test_a_server_left_in_mid_update_is_to_be_restarted(server):
    """As by a trainer that was killed there."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(BASE)).eval()
    killed = server_engine(server.port)
    killed._call("/pause?mode=wait")
    killed._call("/start_weight_update")
    killed._send(list(model.named_parameters())[:3])
    killed.close()
    with pytest.raises(RuntimeError, match="during a weight update.*Start it anew.*run.sh serve"):
        server_engine(server.port)
    key = {"authorization": f"Bearer {KEY}"}  # in the place of a restart
    url = f"http://127.0.0.1:{server.port}/finish_weight_update"
    assert httpx2.post(url, headers=key, trust_env=False, timeout=60).status_code == 200
    engine = server_engine(server.port)
    engine.update_weights(model.named_parameters())
    assert worst_difference(model, sample(engine, [ask(0)])) < 1e-3
    engine.close()


def test_dead_or_wrong_server_is_named():
    port = free_port()
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}.*ConnectError.*run.sh serve"):
        server_engine(port)
    web = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{web.server_port}.*404"):
        server_engine(web.server_port)
    web.shutdown()


def test_training_ends_clearly_when_its_server_dies(server, tmp_path):
    run = tiny_run(tmp_path / "run", "engine=server", f"vllm_server_port={server.port}",
                   "save_strategy=steps", "save_steps=1", "max_steps=500")  # fmt: skip
    while not fsdp_utils.checkpoints(tmp_path / "run"):
        assert run.poll() is None, run.stdout.read()[-4000:]
        time.sleep(0.2)
    updates = server.log.read_text().count("POST /resume")
    while server.log.read_text().count("POST /resume") == updates:
        assert run.poll() is None, run.stdout.read()[-4000:]
        time.sleep(0.02)  # until the next generation begins
    server.kill()
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert f"127.0.0.1:{server.port}" in output and "run.sh serve" in output
    checkpoint = fsdp_utils.checkpoints(tmp_path / "run")[-1]
    policy = Policy(AutoModelForCausalLM.from_pretrained(BASE))
    old = [p.clone() for p in policy.parameters()]
    state = fsdp_utils.load_checkpoint(checkpoint, policy, torch.optim.AdamW(policy.parameters()))
    assert state["step"] >= 1
    assert not all(torch.equal(a, b) for a, b in zip(old, policy.parameters()))
