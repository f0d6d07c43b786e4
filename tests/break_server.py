"""Break the vLLM server of a training run, in every way that was thought of; with the real vLLM.

    python tests/break_server.py [--folder DIR]        about 8 minutes on two cores

Promised after each fault: within 30 seconds one message that says what to do, status 2, no
traceback; nothing earned (checkpoints, rollouts, lines of metrics) is lost; and with the server
back, the same command resumes and finishes. A line for each fault: seconds, what was told. The last
line is JSON: faults, as_promised, lost (files and lines that were there and are no longer).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "tests/tiny/base"
KEY, LIMIT_SECONDS, START_SECONDS = "a-key-of-this-test", 30, 240
STEPS, GROUPS, SAMPLES = 12, 8, 64  # of the run; a step's
AGAIN = "same command resumes"
BROKEN = f"(Read|RemoteProtocol|Connect)Error.*{AGAIN}"


class Server:
    """`./run.sh serve`, with a small KV cache."""

    def __init__(self, folder, port):
        self.log, self.port, self.process = folder / "server.log", port, None
        self.log.touch()

    def start(self):
        from configs.plan import server_arguments
        from configs.settings import load_config

        os.environ["VLLM_API_KEY"] = KEY
        config = load_config(ROOT / "configs/tiny.yaml", [f"vllm_server_port={self.port}"])
        argv, environment = server_arguments(config, 0)
        argv[argv.index("--kv-cache-memory-bytes") + 1] = str(2**27)
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                argv, env=environment, stdout=file, stderr=file, start_new_session=True, cwd=ROOT
            )
        deadline = time.monotonic() + START_SECONDS
        while not is_listening(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.log.read_text()[-4000:])
            time.sleep(0.2)

    def send(self, number):
        """A signal to the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process and self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def post(self, path, body):
        """A call of somebody else who knows the key."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read()

    def calls_since(self, mark):
        """The paths that the server has answered since its log had this length."""
        with open(self.log, "rb") as file:
            file.seek(mark)
            return re.findall(rb'"(?:GET|POST) (\S+) HTTP', file.read())


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port():
    """One whose next is free as well."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port < 65535 and two.connect_ex(("127.0.0.1", port + 1)):
                return port


def start_program(command, log, key):
    """A process whose output goes to a file."""
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}
    if key:
        environment["VLLM_API_KEY"] = key
    with open(log, "w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )


class Trial:
    """One training run, and what happens to it."""

    def __init__(self, folder):
        self.folder, self.run, self.log = folder, folder / "run", folder / "trainer.log"
        self.server = Server(folder, free_port())
        self.earned, self.lost, self.faults, self.kept = set(), set(), 0, 0

    def start(self, *settings, key=KEY):
        command = [
            sys.executable, "ghpo.py", "--config", "configs/tiny.yaml", "engine=server",
            f"vllm_server_port={self.server.port}", f"output_dir={self.run}",
            f"max_steps={STEPS}", f"gradient_accumulation_steps={GROUPS // 2}", "save_steps=1",
            "save_total_limit=null", "eval_strategy=no", "start_hint_step=0", *settings,
        ]  # fmt: skip
        return start_program(command, self.log, key)

    def state(self):
        """What the run has earned: (name, digest) of files, and (name, line) of metrics."""
        files = [*self.run.glob("checkpoint-??????/**/*"), *self.run.glob("rollouts/*.jsonl")]
        found = {
            (str(path), hashlib.blake2b(path.read_bytes()).hexdigest())
            for path in files
            if path.is_file()
        }
        for path in self.run.glob("metrics.jsonl*"):  # .stale: of steps that are done again
            found |= {("metrics", line) for line in path.read_text().splitlines()}
        return found

    def judge(self, fault, process, since, want, log=None):
        """Waits for the end of a process, and prints what came of the fault."""
        log = log or self.log
        try:
            status = process.wait(LIMIT_SECONDS + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"{process.wait()}, killed"
        seconds = time.monotonic() - since
        text = log.read_text()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        told = errors[-1] if errors else text[-300:]
        is_kept = (
            status == 2
            and seconds < LIMIT_SECONDS
            and len(errors) == 1
            and re.search(want, told)
            and "Traceback" not in text
            and KEY not in text
        )
        self.faults, self.kept = self.faults + 1, self.kept + bool(is_kept)
        self.look_for_losses()
        verdict = "as promised" if is_kept else f"NOT AS PROMISED (wanted {want!r})"
        print(f"{fault}: {seconds:.1f} s, status {status}, {verdict}: {told}", flush=True)

    def look_for_losses(self):
        self.lost |= self.earned - self.state()

    def until(self, process, condition):
        """Waits; raises with the trainer's words if it ends first."""
        while not condition():
            if process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-4000:])
            time.sleep(0.001)

    def to_a_new_step(self):
        """The same command again: (process, when it has resumed and done one step more)."""
        before = len(list(self.run.glob("checkpoint-??????")))
        process = self.start()
        self.until(process, lambda: len(list(self.run.glob("checkpoint-??????"))) > before)
        newest = f"resuming {self.run}/checkpoint-{before:06d}"
        if before and newest not in self.log.read_text():
            raise RuntimeError(f"not {newest!r}: {self.log.read_text()[-4000:]}")
        return process

    def stop_server_in(self, process, begin, end, n_ends=1, delay=0.0):
        """SIGSTOPs the server between the answer to one call and the n-th one to another."""
        while True:
            mark = self.server.log.stat().st_size
            self.until(process, lambda mark=mark: begin in self.server.calls_since(mark))
            time.sleep(delay)
            self.server.send(signal.SIGSTOP)
            calls = self.server.calls_since(mark)
            if calls[calls.index(begin) :].count(end) < n_ends:
                break
            self.server.send(signal.SIGCONT)  # too late, in the next step
        self.earned |= self.state()
        return time.monotonic()

    def in_sync(self, process):
        return self.stop_server_in(process, b"/start_weight_update", b"/finish_weight_update")

    def in_generation(self, process):
        return self.stop_server_in(
            process, b"/resume", b"/inference/v1/generate", n_ends=SAMPLES, delay=0.2
        )


def refused_servers(trial):
    """What `./run.sh serve` says itself."""
    serve = [sys.executable, "-m", "configs.plan", "serve", "configs/tiny.yaml",
             f"vllm_server_port={trial.server.port}"]  # fmt: skip
    log = trial.folder / "serve.log"
    for host in ("0.0.0.0", ""):
        since = time.monotonic()
        process = start_program([*serve, f"vllm_server_host={host or repr(host)}"], log, None)
        trial.judge(f"a server on {host or 'any address'}, without a key", process, since,
                    "set VLLM_API_KEY", log)  # fmt: skip
    with socket.create_server(("127.0.0.1", trial.server.port)):
        since = time.monotonic()
        trial.judge("the server's port is taken", start_program(serve, log, KEY), since,
                    "in use.*another vllm_server_port", log)  # fmt: skip


def earn_something(trial):
    """A step or two, ended as the README has it."""
    process = trial.to_a_new_step()
    process.terminate()
    if process.wait(60) != 128 + signal.SIGTERM:
        raise RuntimeError(trial.log.read_text()[-4000:])
    trial.earned = trial.state()


def refused_starts(trial):
    """A server that lives and is not the one for this run."""
    longer = json.dumps({"x": {"dataset_name": str(ROOT / "tests/tiny/data/eval_easy.jsonl"),
                               "max_completion_length": 300}})  # fmt: skip
    other = trial.folder / "another"
    shutil.copytree(BASE, other)
    elsewhere = f"output_dir={trial.folder / 'run of another'}"
    for fault, settings, key, want in (
        ("no key", [], None, f"401.*same VLLM_API_KEY.*{AGAIN}"),
        ("a wrong key", [], KEY + "x", f"401.*same VLLM_API_KEY.*{AGAIN}"),
        ("another model is served", [f"model_name_or_path={other}", elsewhere], KEY,
         "has tests/tiny/base .*this run has .*another.*start it with this run's config"),
        ("the server is for shorter sequences",
         ["eval_strategy=steps", f"eval_datasets={longer}"], KEY,
         "224 tokens, this run .* 428: start it with this run's config"),
    ):  # fmt: skip
        since = time.monotonic()
        trial.judge(fault, trial.start(*settings, key=key), since, want)
    with socket.create_server(("127.0.0.1", trial.server.port + 1)):
        since = time.monotonic()
        trial.judge("the port of the weights is taken", trial.start(), since,
                    f"{trial.server.port + 1}.*in use.*another vllm_server_port")  # fmt: skip


def break_running(trial):
    """Faults in the middle of a step."""
    server = trial.server
    process = trial.to_a_new_step()
    since = trial.in_generation(process)
    trial.judge("stopped in mid-generation", process, since, f"/health: ReadTimeout.*{AGAIN}")
    server.send(signal.SIGCONT)

    process = trial.to_a_new_step()
    trial.in_generation(process)
    server.send(signal.SIGCONT)
    since = time.monotonic()
    server.post("/update_weight_version", {"new_version": "of another run"})
    trial.judge("another run uses the server", process, since, f"not this run's.*{AGAIN}")

    process = trial.to_a_new_step()
    since = trial.in_sync(process)
    trial.judge("stopped in mid-sync", process, since, f"/health: ReadTimeout.*{AGAIN}")
    server.kill()
    server.start()

    process = trial.to_a_new_step()
    since = trial.in_sync(process)
    server.kill()
    in_sync = f"(Read|RemoteProtocol|Connect)Error.*{AGAIN}|broadcast of the weights.*{AGAIN}"
    trial.judge("killed in mid-sync", process, since, in_sync)
    server.start()

    process = trial.to_a_new_step()
    since = trial.in_generation(process)
    server.kill()
    trial.judge("killed in mid-generation", process, since, BROKEN)
    since = time.monotonic()
    trial.judge("no server", trial.start(), since, f"ConnectError.*run.sh serve.*{AGAIN}")
    server.start()

    process = trial.to_a_new_step()
    rollouts = trial.run / "rollouts"
    step = len(list(rollouts.iterdir()))
    trial.until(process, lambda: len(list(rollouts.iterdir())) > step)
    process.send_signal(signal.SIGSTOP)  # generated, not yet at the next sync
    server.kill()
    server.start()
    trial.earned |= trial.state()
    since = time.monotonic()
    process.send_signal(signal.SIGCONT)
    trial.judge("restarted between two steps", process, since, f"not this run's.*{AGAIN}")


def finish(trial):
    """The same command, to the end."""
    status = trial.start().wait(600)
    lines = (trial.run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    if status or steps != list(range(1, STEPS + 1)):
        raise RuntimeError(f"status {status}, steps {steps}: {trial.log.read_text()[-4000:]}")
    trial.look_for_losses()
    print(f"the same command: {STEPS} steps, each once, status 0", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default=None, help="kept; a temporary one otherwise")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trial = Trial(folder)
        try:
            refused_servers(trial)
            trial.server.start()
            earn_something(trial)
            refused_starts(trial)
            break_running(trial)
            finish(trial)
        finally:
            trial.server.kill()
    for item in sorted(trial.lost):
        print(f"LOST: {item}")
    print(json.dumps({"faults": trial.faults, "as_promised": trial.kept, "lost": len(trial.lost)}))
    sys.exit(trial.kept < trial.faults or bool(trial.lost))


if __name__ == "__main__":
    main()
