"""Who may talk to the vLLM server: its address, its key, its port. Without vLLM."""

import asyncio
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import httpx2
import pytest
import yaml
from conftest import ROOT, make_config, settings
from test_configs import options_of

from configs import UserError, plan
from configs.serve_key import RequireKey, key_header
from rollout import ServerEngine, ServerError

KEY = "s3cret/+=~"


async def everything(scope, receive, send):
    """An app that serves whatever it is asked."""
    if scope["type"] == "lifespan":
        await send({"type": "lifespan.startup.complete"})
    elif scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here you are"})


def answers(kind, *headers, method="POST", path="/update_weights"):
    """What the guarded app sends to a connection with these headers."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    asyncio.run(RequireKey(everything)(scope, None, send))
    return sent


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


WRONG = [
    [], [b""], [b"Bearer"], [b"Bearer "], [KEY.encode()], [f"Basic {KEY}".encode()],
    [f"Bearer {KEY[:-1]}".encode()], [f"Bearer {KEY}x".encode()],
    [f"Bearer {KEY.upper()}".encode()], ["Bearer schlüssel".encode()], [b"Bearer \xff"],
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG)
@pytest.mark.parametrize("method, path", [
    ("GET", "/health"), ("POST", "/collective_rpc"), ("OPTIONS", "/v1/models"), ("HEAD", "/docs"),
    ("POST", "/no/such/path")])  # fmt: skip
def test_no_path_and_no_method_goes_without_the_key(key, values, method, path):
    headers = [(b"authorization", value) for value in values]
    start, body = answers("http", (b"host", b"x"), *headers, method=method, path=path)
    assert (start["type"], start["status"]) == ("http.response.start", 401)
    assert body["type"] == "http.response.body" and KEY.encode() not in body["body"]
    start, body = answers("websocket", *headers, path=path)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert body["type"] == "websocket.http.response.body"


def test_the_key_opens(key):
    header = (b"authorization", f"Bearer {KEY}".encode())
    assert answers("http", header)[0]["status"] == 200
    assert answers("websocket", header) == [{"type": "websocket.accept"}]
    assert answers("lifespan") == [{"type": "lifespan.startup.complete"}]


def test_without_a_key_there_is_no_guard_that_lets_all_through(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_header() == {}
    with pytest.raises(KeyError):
        RequireKey(everything)


@pytest.mark.parametrize("bad", ["two words", "line\n", "schlüssel", "\ttab"])
def test_a_key_that_no_header_can_hold_is_refused_untold(bad, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", bad)
    with pytest.raises(UserError, match="VLLM_API_KEY") as caught:
        key_header()
    assert bad not in str(caught.value)


@pytest.mark.parametrize("empty", [True, False])
def test_which_addresses_need_a_key(empty, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if empty:
        monkeypatch.setenv("VLLM_API_KEY", "")
    for host in ("127.0.0.1", "localhost", "::1"):
        argv, _ = plan.server_arguments(make_config(vllm_server_host=host), 0)
        assert "middleware" not in options_of(argv)
    for host in ("0.0.0.0", "::", "", "10.0.0.7", "server7", "127.0.0.1.example.org"):
        for n_gpus in (0, 1, 8):
            with pytest.raises(UserError, match="set VLLM_API_KEY in the environment"):
                plan.server_arguments(make_config(vllm_server_host=host), n_gpus)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    argv, environment = plan.server_arguments(make_config(vllm_server_host="0.0.0.0"), 1)
    assert options_of(argv)["middleware"] == "configs.serve_key.RequireKey"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)  # where it is found
    assert KEY not in " ".join(argv) and environment["VLLM_API_KEY"] == KEY


def serve(tmp_path, *overrides, **environment):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings()))
    mine = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    return subprocess.run(
        [sys.executable, "-m", "configs.plan", "serve", str(path), *overrides], cwd=ROOT,
        env=mine | environment, capture_output=True, text=True, timeout=120)  # fmt: skip


def test_serve_refuses_the_network_without_a_key_and_a_port_that_is_taken(tmp_path):
    done = serve(tmp_path, "vllm_server_host=0.0.0.0")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: config: vllm_server_host=0.0.0.0: ")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = serve(tmp_path, f"vllm_server_port={port}", VLLM_API_KEY=KEY)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port} cannot be listened to" in done.stderr and KEY not in done.stderr
    done = serve(tmp_path, "vllm_server_host=no.such.host.invalid", VLLM_API_KEY=KEY)
    assert done.returncode == 2 and "no.such.host.invalid" in done.stderr


def test_the_trainer_shows_the_key_and_never_tells_it(key, monkeypatch):
    asked = []

    def answer(request):
        asked.append(request.headers["authorization"])
        return httpx2.Response(401, text="VLLM_API_KEY is wrong")

    client, transport = httpx2.AsyncClient, httpx2.MockTransport(answer)
    monkeypatch.setattr(
        httpx2, "AsyncClient", lambda **options: client(**options, transport=transport)
    )
    with pytest.raises(ServerError, match="401.*same VLLM_API_KEY as here") as caught:
        ServerEngine(make_config(), SimpleNamespace(added_tokens_decoder={}), {1}, 10, None)
    assert KEY not in str(caught.value)
    assert asked and set(asked) == {f"Bearer {KEY}"}
