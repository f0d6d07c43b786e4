"""The engine of a vLLM server against a stub of its HTTP routes: calls, streams, errors."""

import json
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import pytest
import torch
import torch.distributed as dist
from conftest import make_config

import fsdp_utils
import rollout
from hints import Problem, Stage
from rollout import Request, ServerEngine, ServerError

NO_TEXT = SimpleNamespace(decode=lambda ids: "", added_tokens_decoder={})


class Stub:
    """Answers as vLLM would; .calls: (path, body, headers). It may fail or wait on a path."""

    def __init__(self, workers=1):
        self.calls, self.workers, self.version = [], workers, None
        self.fails, self.waits = {}, {}

    async def answer(self, request):
        path, body = request.url.path, json.loads(request.content or "null")
        self.calls.append((path, body, request.headers))
        if path in self.waits:
            while not self.waits[path].is_set():
                await rollout.asyncio.sleep(0.01)
        if path in self.fails:
            return httpx2.Response(500, text=self.fails[path])
        return httpx2.Response(200, json=self.body_of(path, body, request.url.params))

    def body_of(self, path, body, params):
        if path == "/v1/models":
            return {"data": [{"root": make_config().model_name_or_path, "max_model_len": 9999}]}
        if path == "/get_world_size":
            return {"world_size": 1 if params.get("include_dp") == "false" else self.workers}
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/inference/v1/generate":
            token = {"token_ids": [5], "logprobs": {"content": [{"logprob": -0.5}]}}
            version = {"weight_versions": [{"version": self.version}], "finish_reason": "stop"}
            return {"choices": [token | version]}
        return {}

    def paths(self):
        return [path for path, _, _ in self.calls if path not in ("/health", "/is_paused")]


class Link:
    """The group of the weights: keeps what is broadcast, on which stream and in which thread."""

    def __init__(self, error=None):
        self.sent, self.error = [], error

    def broadcast(self, tensor, src, stream):
        if self.error:
            raise self.error
        assert src == 0
        self.sent.append((tensor, stream, threading.current_thread()))


@pytest.fixture
def stub(monkeypatch):
    stub, client = Stub(), httpx2.AsyncClient
    monkeypatch.setattr(
        httpx2,
        "AsyncClient",
        lambda **options: client(**options, transport=httpx2.MockTransport(stub.answer)),
    )
    monkeypatch.setattr(rollout, "BUCKET_BYTES", 100)
    if not dist.is_initialized():
        fsdp_utils.setup_distributed()
    return stub


def connected(monkeypatch, link):
    monkeypatch.setattr(ServerEngine, "_open_link", lambda *_: link)
    return ServerEngine(make_config(), NO_TEXT, {1}, 99, None)


def weights(*sizes, dtype=torch.float32):
    return [(f"w{i}", torch.full((size,), float(i), dtype=dtype)) for i, size in enumerate(sizes)]


def test_weights_go_in_buckets(stub, monkeypatch):
    link = Link()
    engine = connected(monkeypatch, link)
    sent = [*weights(10, 10, 20, 70, 1), ("half", torch.ones(3, 2, dtype=torch.bfloat16).T)]
    engine.update_weights(iter(sent))
    infos = [body["update_info"] for path, body, _ in stub.calls if path == "/update_weights"]
    assert [info["names"] for info in infos] == [["w0", "w1", "w2"], ["w3"], ["w4", "half"]]
    assert infos[0]["shapes"] == [[10], [10], [20]] and infos[2]["shapes"] == [[1], [2, 3]]
    assert infos[2]["dtype_names"] == ["float32", "bfloat16"]
    for (tensor, _, _), (_, given) in zip(link.sent, sent, strict=True):
        assert torch.equal(tensor, given) and tensor.is_contiguous()
    order = ["/pause", "/start_weight_update", *["/update_weights"] * 3, "/finish_weight_update"]
    assert stub.paths()[1:] == [*order, "/resume"]
    assert stub.version == engine.version
    engine.close()


def test_another_rank_sends_nothing_and_keeps_nothing(stub, monkeypatch):
    engine = connected(monkeypatch, None)
    alive = []

    def stream():
        for name, tensor in weights(500, 500):
            yield name, tensor
            alive.append(name)

    engine.update_weights(stream())
    assert alive == ["w0", "w1"] and stub.paths() == ["/v1/models"]
    engine.close()


def test_buckets_hold_what_they_are_told():
    def names(n_bytes):
        return [
            [name for name, _ in bucket] for bucket in rollout.buckets(weights(2, 2, 2), n_bytes)
        ]

    assert names(0) == [["w0"], ["w1"], ["w2"]] and names(9) == [["w0", "w1"], ["w2"]]
    assert names(24) == names(25) == [["w0", "w1", "w2"]]
    assert list(rollout.buckets([], 9)) == []


def test_the_broadcast_is_ordered_after_the_casts(stub, monkeypatch):
    """In another thread, but on the stream of the thread that made the tensors."""
    main = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda: "casts" if threading.current_thread() is main else "a side stream",
    )
    link = Link()
    engine = connected(monkeypatch, link)
    engine.update_weights(iter(weights(30, 30)))
    assert len(link.sent) == 2
    for _, stream, thread in link.sent:
        assert stream == "casts" and thread is not main
    engine.close()


def test_a_broadcast_that_fails_reaches_the_user(stub, monkeypatch):
    """At once, though the server would still wait for the weights."""
    stub.waits["/update_weights"] = threading.Event()
    engine = connected(monkeypatch, Link(RuntimeError("NCCL error: unhandled system error")))
    started = time.monotonic()
    with pytest.raises(
        ServerError, match="broadcast of the weights.*unhandled system.*run.sh serve"
    ):
        engine.update_weights(iter(weights(30)))
    assert time.monotonic() - started < 10
    stub.waits["/update_weights"].set()
    engine.close()


def test_a_server_that_refuses_the_weights_reaches_the_user(stub, monkeypatch):
    """At once, though the broadcast still waits for the server."""
    over, link = threading.Event(), Link()
    link.broadcast = lambda *_: over.wait(60)
    stub.fails["/update_weights"] = "no such weight"
    engine = connected(monkeypatch, link)
    with pytest.raises(ServerError, match="/update_weights.*500 no such weight"):
        engine.update_weights(iter(weights(30)))
    over.set()
    engine.close()


def test_a_broadcast_that_never_ends_is_told(stub, monkeypatch):
    over, link = threading.Event(), Link()
    link.broadcast = lambda *_: over.wait(60)
    monkeypatch.setattr(rollout, "CALL_SECONDS", 0.5)
    monkeypatch.setattr(rollout, "ALIVE_SECONDS", 0.5)
    engine = connected(monkeypatch, link)
    with pytest.raises(ServerError, match="nothing moves.*run.sh serve"):
        engine._send(weights(30))
    over.set()
    engine.close()


def test_a_server_that_dies_while_it_waits_is_told(stub, monkeypatch):
    stub.waits["/update_weights"] = threading.Event()
    engine = connected(monkeypatch, Link())
    stub.fails["/health"] = "dead"
    engine.next_check = 0.0
    with pytest.raises(ServerError, match="/health.*500 dead"):
        engine._send(weights(30))
    stub.waits["/update_weights"].set()
    engine.close()


def request(slot):
    config = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=0, max_completion_length=4)
    return Request(Problem(slot, [], ""), Stage([0.0] * 3, [""] * 3), [[2, 3]] * 3, [""] * 3, 7,
                   config, slot)  # fmt: skip


@pytest.mark.parametrize("n_engines, rank", [(1, 0), (4, 0), (4, 3)])
def test_a_groups_samples_go_to_one_engine(n_engines, rank, stub, monkeypatch):
    engine = connected(monkeypatch, Link())
    engine.n_engines, engine.rank = n_engines, rank
    engine.update_weights(iter(weights(1)))
    for slot in (0, 1, 5):
        engine.submit(request(slot))
    engine.submit(replace(request(5), prompts=[[2, 3, 4]] * 3))  # its next stage
    done = []
    while engine.is_busy():
        done += engine.poll()
    assert len(done) == 4
    sent = [call for call in stub.calls if call[0] == "/inference/v1/generate"]
    places = [headers.get("x-data-parallel-rank") for _, _, headers in sent]
    expected = [str((slot + rank) % 4) for slot in (0, 1, 5, 5) for _ in range(3)]
    assert sorted(map(str, places)) == sorted(expected if n_engines > 1 else ["None"] * 12)
    for place in set(places):
        assert places.count(place) % 3 == 0
    engine.close()


def test_calls_take_no_thread_each(stub, monkeypatch):
    stub.waits["/inference/v1/generate"] = threading.Event()
    before = threading.active_count()
    engine = connected(monkeypatch, Link())
    engine.update_weights(iter(weights(1)))
    monkeypatch.setattr(engine, "turns", rollout.asyncio.Semaphore(40))
    for slot in range(20):
        engine.submit(request(slot))
    while [path for path, _, _ in stub.calls].count("/inference/v1/generate") < 40:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [path for path, _, _ in stub.calls].count("/inference/v1/generate") == 40
    assert threading.active_count() <= before + 2  # the loop, and one that broadcasts
    stub.waits["/inference/v1/generate"].set()
    done = []
    while engine.is_busy():
        done += engine.poll()
    assert len(done) == 20
    engine.close()


@pytest.fixture
def vllm_group(monkeypatch):
    """In the place of vLLM's way into the group of the weights."""
    found = {}

    def trainer_init(place):
        if "error" in found:
            raise found["error"]
        found["place"] = place
        return "the link"

    name = "vllm.distributed.weight_transfer.nccl_common"
    module = SimpleNamespace(trainer_init=trainer_init)
    for part in (name.rsplit(".", i)[0] for i in range(4)):
        monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.setitem(sys.modules, "configs.vllm_cpu", module)
    monkeypatch.setattr(rollout, "need_port", lambda *_: None)
    monkeypatch.setattr(rollout.socket, "create_connection", lambda *_: Probe())
    return found


class Probe:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def getsockname(self):
        return ("10.0.0.9", 1)


def test_the_group_of_the_weights_begins_anew(stub, vllm_group):
    stub.workers = 4
    engine = ServerEngine(make_config(), NO_TEXT, {1}, 99, None)
    assert engine.link == "the link" and engine.n_engines == 4
    place = {"rank_offset": 1, "master_address": "10.0.0.9", "master_port": 8001, "world_size": 5}
    assert vllm_group["place"] == place
    last = [call for call in stub.calls if call[0] in stub.paths()][-2:]
    assert last[0][0] == "/shutdown_weight_transfer_engine"
    assert last[1][:2] == ("/init_weight_transfer_engine", {"init_info": place})
    engine.close()


def test_a_server_in_mid_update_is_to_be_restarted(stub, vllm_group):
    """As vLLM answers after a trainer that was killed while it sent weights."""
    refusal = "Cannot release a trainer connection during a weight update"
    stub.fails["/shutdown_weight_transfer_engine"] = refusal
    with pytest.raises(ServerError, match=f"{refusal}.*Start it anew.*run.sh serve"):
        ServerEngine(make_config(), NO_TEXT, {1}, 99, None)
    assert "/init_weight_transfer_engine" not in stub.paths()


def test_two_processes_on_one_gpu_are_told_of(stub, vllm_group):
    vllm_group["error"] = RuntimeError("NCCL error: invalid usage")
    stub.waits["/init_weight_transfer_engine"] = threading.Event()
    with pytest.raises(ServerError, match="invalid usage.*GPUs of their own.*CUDA_VISIBLE_DEVICES"):
        ServerEngine(make_config(), NO_TEXT, {1}, 99, None)
    stub.waits["/init_weight_transfer_engine"].set()
