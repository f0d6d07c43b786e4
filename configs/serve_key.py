"""The key of a vLLM server that other machines can reach: VLLM_API_KEY, in the environment only.

Both ends import this module: the trainer, and the server, by `--middleware` (plan.py).
"""

import hmac
import os
import re
from collections.abc import Callable

from configs import need

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")  # which no other machine reaches


def key_header() -> dict[str, str]:
    """The HTTP header that shows the key; empty where there is none."""
    key = os.environ.get("VLLM_API_KEY", "")
    need(
        re.fullmatch("[!-~]*", key),
        "VLLM_API_KEY may hold no spaces and no other than ASCII characters",
    )
    return {"authorization": f"Bearer {key}"} if key else {}


class RequireKey:
    """ASGI middleware: 401 without the key, on every path; vLLM's own check leaves out those that
    change weights."""

    def __init__(self, app: Callable):
        self.app, self.expected = app, key_header()["authorization"].encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "lifespan":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                answer = "websocket.http" if scope["type"] == "websocket" else "http"
                await send({"type": f"{answer}.response.start", "status": 401, "headers": []})
                await send({"type": f"{answer}.response.body", "body": b"VLLM_API_KEY is wrong"})
                return
        await self.app(scope, receive, send)
