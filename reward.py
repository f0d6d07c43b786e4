"""Rule-based rewards and the pool of processes that scores them.

A first version: exact strings and plain numbers only; the mathematics follows.
"""

import importlib
import importlib.util
import json
import math
import os
import queue
import re
import resource
import select
import subprocess
import sys
import threading
from fractions import Fraction

PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?\Z")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(response: str) -> str | None:
    """The final answer in `response`, or None when there is no single one."""
    text = response.rpartition("</think>")[2]
    if "<answer>" in text:
        text = text.split("<answer>")[1].partition("</answer>")[0]
    start = text.rfind("\\boxed{")
    if start < 0:
        return text.strip() if "<answer>" in response else None
    end = text.find("}", start)
    return text[start + 7:end].strip() if end > 0 else None


def parse_gold(gold: str) -> str | None:
    """Why `gold` cannot be used, or None when it can."""
    return None if gold.strip() else "empty"


def accuracy_reward(response: str, gold: str) -> float:
    """1.0 when the final answer of `response` equals `gold`, else 0.0."""
    answer = extract_answer(response)
    gold = gold.strip()
    if not answer or not gold:
        return 0.0
    if PLAIN_NUMBER.match(answer) and PLAIN_NUMBER.match(gold):
        return float(Fraction(answer.replace(",", "")) == Fraction(gold.replace(",", "")))
    return float(answer.replace(" ", "") == gold.replace(" ", ""))


def format_reward(response: str, gold: str = "") -> float:
    """1.0 for exactly `<think>..</think><answer>..</answer>` with two non-blank bodies, else 0.0."""
    text = response.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, think, between, answer, after = re.split("|".join(TAGS), text)
    in_order = sorted(TAGS, key=text.find) == list(TAGS)
    return float(in_order and not (before or between.strip() or after)
                 and bool(think.strip()) and bool(answer.strip()))


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


def resolve_reward(name: str):
    """The function f(response, gold) -> float called `name`.

    `name` is a key of REWARDS, "path/to/file.py:function" or "module:function".
    Raises ValueError when there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    source, _, function = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location("user_reward", source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        known = ", ".join(REWARDS)
        raise ValueError(f"no reward {name!r}: use one of {known}, or file.py:function "
                         f"({error})") from error


def worker_loop(reward_funcs: list[str], memory_gb: float) -> None:
    """A worker's life: a batch per line on stdin, one line per text on stdout, until EOF."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a user's function prints must not mix with the replies
    if memory_gb:
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        functions = [resolve_reward(name) for name in reward_funcs]
    except Exception as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        texts, gold = json.loads(line)
        for text in texts:
            try:
                rewards = [float(function(text, gold)) for function in functions]
                reply = rewards if all(map(math.isfinite, rewards)) else None
            except Exception:
                reply = None
            print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """One process and its pipes; used by one thread of the pool only."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""
        hello = self.reply(60.0)
        if hello != "ready":
            self.kill()
            raise ValueError(hello or "a reward worker did not start")

    def send(self, texts: list[str], gold: str) -> None:
        self.process.stdin.write(json.dumps([texts, gold]).encode() + b"\n")
        self.process.stdin.flush()

    def reply(self, timeout: float):
        """The next reply. Raises TimeoutError, or EOFError when the process is gone."""
        while b"\n" not in self.buffer:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except OSError:  # unsent bytes for a process that is gone
            pass


class VerifierPool:
    """Scores groups of texts in worker processes; nothing that a text does reaches the caller.

    A text that takes longer than `timeout` seconds costs its worker its life and scores 0. A
    worker that dies is replaced and the text it was at is tried once more, then scores 0. Both
    are counted in `stats`. Rewards are F floats per text, in the order of `reward_funcs`.
    Raises ValueError at start when a reward cannot be found.
    """

    def __init__(self, reward_funcs: list[str], workers: int, timeout: float = 5.0,
                 memory_gb: float = 8.0):
        self.command = [sys.executable, os.path.abspath(__file__), "--worker",
                        json.dumps([reward_funcs, memory_gb])]
        self.zeros = [0.0] * len(reward_funcs)
        self.timeout = timeout
        self.stats = {"timeouts": 0, "crashes": 0}
        self.pending = 0  # groups submitted and not yet returned by poll
        self.lock = threading.Lock()
        self.jobs = queue.SimpleQueue()
        self.done = queue.SimpleQueue()
        self.closed = False
        started = [Worker(self.command) for _ in range(max(1, workers))]
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True)
                        for worker in started]
        for thread in self.threads:
            thread.start()

    def submit(self, key, texts: list[str], gold: str) -> None:
        """Queue the G `texts` of one problem; returns at once."""
        self.pending += 1
        self.jobs.put((key, list(texts), gold))

    def poll(self, wait: bool) -> list[tuple]:
        """(key, rewards_GF) of the groups that are ready; with `wait`, of all submitted ones."""
        ready = []
        while self.pending and (wait or not self.done.empty()):
            ready.append(self.done.get())
            self.pending -= 1
        return ready

    def close(self) -> None:
        """Stop the workers; what is still queued scores 0. Can be called twice."""
        self.closed = True
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def _serve(self, worker) -> None:
        for key, texts, gold in iter(self.jobs.get, None):
            unique = list(dict.fromkeys(texts))
            rewards = {}
            retried = None
            while len(rewards) < len(unique) and not self.closed:
                waiting = unique[len(rewards):]
                try:
                    worker = worker or Worker(self.command)
                    worker.send(waiting, gold)
                    for text in waiting:
                        reply = worker.reply(self.timeout)
                        rewards[text] = self._count("crashes") if reply is None else reply
                except (TimeoutError, EOFError, OSError, ValueError) as error:
                    if worker:
                        worker.kill()
                    worker = None
                    stuck = unique[len(rewards)]
                    if isinstance(error, TimeoutError) or stuck == retried:
                        late = isinstance(error, TimeoutError)
                        rewards[stuck] = self._count("timeouts" if late else "crashes")
                    retried = stuck
            self.done.put((key, [rewards.get(text, self.zeros) for text in texts]))
        if worker:
            worker.kill()

    def _count(self, what: str) -> list[float]:
        with self.lock:
            self.stats[what] += 1
        return self.zeros


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    worker_loop(*json.loads(sys.argv[2]))
