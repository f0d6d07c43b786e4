"""Break the program on purpose, and see that it keeps what it promises.

    python tests/break.py [--kinds 1,2] [--only NAME ...] [--sample 20] [--root DIR] [--folder DIR]

A trial does one bad thing to the folder of a run, runs the program there in a fresh process and
compares what came of it with what is promised. The process is a fork of this one, which has imported
torch and the program and used neither: no threads and no process group are inherited. Trials with
`as_command` execute `python ghpo.py` instead. `--root` takes the program of another checkout.

What every trial promises beside its own words: no traceback, no process left behind, metrics and
rollouts that are JSON, no code run that came in with data (the file OWNED), and nothing lost.
A line a trial: kind, name, promised/observed, ok or BROKEN, seconds. The last line is JSON; `lost`
counts checkpoints, lines of metrics and lines of rollouts that were there before and are not after
it. Rotation by save_total_limit is none (`rotated`), nor is what a trial damaged and the program has
set aside.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BASE, DATA = TESTS / "tiny" / "base", TESTS / "tiny" / "data"
OWNED = "owned"  # what a payload would write
MARK = "BREAK_TRIAL"  # in the environment of every process of a trial
LAST_SECONDS = 3.0  # for the processes of a trial that has ended to end as well
SETTINGS = [  # 4 problems by 4 samples a step, 3 steps; paths are relative to the trial's folder
    f"model_name_or_path={BASE}", "dataset_name=data.jsonl", "output_dir=run", "max_steps=3",
    "num_generations=4", "per_device_train_batch_size=4", "gradient_accumulation_steps=4",
    "max_completion_length=64", "temperature=2", "start_hint_step=0", "learning_rate=1e-3",
    "lr_scheduler_type=constant", "warmup_steps=0", "save_steps=1", "save_total_limit=null",
    "eval_strategy=no", "report_to=[]"]
DONE = "done: "  # what a run says at its end


@dataclass(frozen=True)
class Trial:
    """One bad thing and what is promised. The run is 2 of 3 steps old, or `is_new`."""

    kind: int  # of shared/docs/BREAK.md
    name: str
    act: Callable  # act(run folder): does it; may return more settings for the command line
    told: tuple = ()  # patterns that the program must print
    status: int = 0
    is_new: bool = False
    is_same: bool = False  # ends with the metrics and weights of the run that nothing happened to
    there: tuple = ()  # paths in the run's folder that must be there at the end
    rotated: tuple = ()  # checkpoints that save_total_limit takes away
    check: Callable | None = None  # check(run folder): None, or what is wrong
    during: Callable | None = None  # during(process id, run folder): while the program runs
    in_child: Callable | None = None  # in the process, before the program begins
    as_command: bool = False
    seconds: float = 40  # that it may take on a busy machine


# ---- what is done to a run ---------------------------------------------------------------------


def nothing(run):
    """As it is."""


def checkpoint(run, step=2):
    return run / f"checkpoint-{step:06d}"


def shard(run, step=2):
    return max(checkpoint(run, step).glob("*.distcp"), key=lambda path: path.stat().st_size)


def overwrite(path, at, data):
    """Bytes at a place, a share of the file."""
    with open(path, "r+b") as file:
        file.seek(int(at * path.stat().st_size))
        file.write(data)


def flip(path, at):
    """One bit."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    path.write_bytes(data)


def truncate(path, share):
    os.truncate(path, int(share * path.stat().st_size))


def seal(folder):
    """New checksums of a checkpoint, as its attacker would write them."""
    path = folder / "checksums.json"
    if path.exists():
        names = [name for name in json.loads(path.read_text()) if (folder / name).is_file()]
        sums = {name: hashlib.blake2b((folder / name).read_bytes()).hexdigest() for name in names}
        path.write_text(json.dumps(sums))


# ---- the trials --------------------------------------------------------------------------------


def foreign(name, is_folder=True):
    """Something of the user's beside the checkpoints."""
    def act(run):
        if is_folder:
            shutil.copytree(checkpoint(run, 1), run / name)
        else:
            (run / name).write_text("mine\n")
        return ["save_total_limit=2"]

    return act


def damage(work, *settings):
    """work(run) on the newest checkpoint."""
    def act(run):
        work(run)
        return list(settings)

    return act


NAMES = [
    Trial(1, name, foreign(name, is_folder), ("resuming .*checkpoint-000002$", DONE), is_same=True,
          there=(name,), rotated=("checkpoint-000001",))
    for name, is_folder in [
        ("checkpoint-000002-keep", True), ("checkpoint-best", True), ("checkpoint-000000-old", True),
        ("checkpoint-notes.txt", False), ("checkpoint-", True), ("checkpoint-12345", True),
        ("checkpoint-000009.bak", True), ("checkpoint-999999.damaged", True),
        ("checkpoint--00001", True), ("old_checkpoint-000009", True),
        ("checkpoint-000003", False)]]

ASIDE = ("checkpoint-000002 is damaged and set aside", "resuming .*checkpoint-000001$", DONE)


def damaged(name, work, *told, **more):
    """The newest checkpoint is set aside, the one before resumed, to the same numbers."""
    return Trial(2, name, damage(work), (*ASIDE, *told), is_same=True,
                 there=("checkpoint-000002.damaged",), **more)


DAMAGE = [
    damaged("zeros_in_a_shard", lambda run: overwrite(shard(run), 0.3, bytes(20_000)), "distcp"),
    damaged("empty_state", lambda run: (checkpoint(run) / "state.json").write_text(""), "state.json"),
]

TRIALS = [*NAMES, *DAMAGE]


# ---- what was there before and after -----------------------------------------------------------


def digest(folder):
    """Of names and contents."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def inventory(place):
    """({(digest, name) of folders checkpoint-*}, lines of metrics, lines of rollouts) of all runs."""
    found = {(digest(path), path.name) for path in place.rglob("*checkpoint-*") if path.is_dir()}
    lines = []
    for pattern in ("metrics.jsonl*", "rollouts/*.jsonl"):
        files = [path for path in place.rglob(pattern) if path.is_file()]
        lines.append(Counter(line for path in files for line in path.read_text().splitlines()))
    return found, *lines


def lost(before, after, intact, rotated):
    """How many are gone. intact: digests of whole checkpoints, which must keep their names."""
    n_lost = 0
    for one, name in before[0]:
        names = {other for found, other in after[0] if found == one}
        must_stay = one in intact or not re.fullmatch(r"checkpoint-\d{6,}", name)
        is_there = name in names if must_stay else bool(names)
        n_lost += not is_there and name not in rotated
    return n_lost + sum((before[1] - after[1]).values()) + sum((before[2] - after[2]).values())


def timeless(text):
    """Metrics without what the clock gives."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items()
             if not key.startswith(("seconds/", "tokens/s"))} for line in lines]


def refuse(word):
    raise ValueError(f"{word} is no JSON")


# ---- running -----------------------------------------------------------------------------------


def start(root, place, settings, trial):
    """The process id of the program at work in a trial's folder; it prints to the file log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.chdir(place)
        os.environ[MARK] = str(place)
        sys.argv = [str(root / "ghpo.py"), "--config", str(root / "configs" / "tiny.yaml"), *settings]
        if trial.in_child:
            trial.in_child()
        if trial.as_command:
            os.execv(sys.executable, [sys.executable, *sys.argv])
        import ghpo

        ghpo.main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid, seconds):
    """The exit status (128 + signal for one that a signal ended), or None where it is late."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def processes(place):
    """Ids of the living processes that a trial has started, by the mark in their environment."""
    mark, found = f"{MARK}={place}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark in (path / "environ").read_bytes().split(b"\0")
            is_dead = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:  # it has just ended
            continue
        if is_ours and not is_dead:
            found.append(int(path.name))
    return found


def orphans(place):
    """How many processes a trial has left behind; ends them."""
    end = time.monotonic() + LAST_SECONDS
    while processes(place) and time.monotonic() < end:
        time.sleep(0.05)
    left = processes(place)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def prepare(root, folder):
    """A run of three steps, and one that was killed in its third: (whole, killed)."""
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir(parents=True)
    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)[:48]
    (whole / "data.jsonl").write_text("".join(lines))
    status = wait(start(root, whole, SETTINGS, Trial(0, "prepare", nothing)), 300)
    if status != 0:
        sys.exit(f"the run to break ends with {status}:\n{(whole / 'log').read_text()[-3000:]}")
    shutil.copytree(whole, killed)
    run = killed / "run"
    shutil.rmtree(run / "checkpoint-000003")
    shutil.rmtree(run / "model")
    (run / "rollouts" / "step_000003.jsonl").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    if len(lines) != 3 or not all(json.loads(line)["grad_norm"] > 0 for line in lines):
        sys.exit("a step of the run to break has no gradient")
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    (killed / "log").unlink()
    return whole, killed


def faults_of(trial, place, status, whole):
    """What was promised and is not so."""
    run, log = place / "run", (place / "log").read_text(errors="replace")
    faults = []
    if "Traceback" in log:
        faults.append("traceback")
    faults += [f"untold:{one!r}" for one in trial.told if not re.search(one, log, re.M)]
    faults += [f"gone:{name}" for name in trial.there if not (run / name).exists()]
    if list(place.rglob(OWNED)):
        faults.append("owned")
    if status is None:
        return faults
    for path in [*run.glob("metrics.jsonl"), *run.glob("rollouts/*.jsonl")]:
        try:
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=refuse)
        except ValueError as error:
            faults.append(f"{path.name}:{error!r}")
    if trial.is_same and status == trial.status:
        same = [timeless((folder / "run" / "metrics.jsonl").read_text()) for folder in (whole, place)]
        weights = [(folder / "run" / "model" / "model.safetensors").read_bytes()
                   for folder in (whole, place)]
        if same[0] != same[1] or weights[0] != weights[1]:
            faults.append("other-numbers")
    wrong = trial.check and status == trial.status and trial.check(run)
    return faults + ([wrong] if wrong else [])


def attempt(trial, root, folder, whole, killed, intact):
    """Does one trial; (line to print, was it as promised, how many were lost)."""
    place = folder / f"{trial.kind:02d}-{trial.name}"
    shutil.copytree(killed, place)
    if trial.is_new:
        shutil.rmtree(place / "run")
    more = trial.act(place / "run") or []
    before = inventory(place)
    began = time.monotonic()
    pid = start(root, place, [*SETTINGS, *more], trial)
    if trial.during:
        trial.during(pid, place / "run")
    status = wait(pid, trial.seconds)
    seconds = time.monotonic() - began
    n_left = orphans(place)
    n_lost = lost(before, inventory(place), intact, trial.rotated)
    faults = faults_of(trial, place, status, whole)
    faults += [f"left:{n_left}"] * (n_left > 0) + [f"lost:{n_lost}"] * (n_lost > 0)
    is_ok = status == trial.status and not faults
    observed = "+".join(["late" if status is None else str(status), *faults])
    line = (f"{trial.kind} {trial.name} {trial.status}/{observed} "
            f"{'ok' if is_ok else 'BROKEN'} {seconds:.1f}")
    return line, is_ok, n_lost


def sample(n):
    """n trials, spread evenly: the same number of every kind, as far as n allows."""
    kinds = sorted({trial.kind for trial in TRIALS})
    chosen = []
    for i, kind in enumerate(kinds):
        ours = [trial for trial in TRIALS if trial.kind == kind]
        share = max(1, n // len(kinds) + (i < n % len(kinds)))
        step = len(ours) / min(share, len(ours))
        chosen += [ours[int(j * step)] for j in range(min(share, len(ours)))]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", help="as 1,2,10")
    parser.add_argument("--only", nargs="+", help="names of trials")
    parser.add_argument("--sample", type=int, help="so many trials, of every kind")
    parser.add_argument("--root", type=Path, default=TESTS.parent, help="another checkout")
    parser.add_argument("--folder", type=Path, help="kept; a temporary one otherwise")
    args = parser.parse_args()
    trials = sample(args.sample) if args.sample else TRIALS
    if args.kinds:
        trials = [trial for trial in trials if str(trial.kind) in args.kinds.split(",")]
    if args.only:
        trials = [trial for trial in trials if trial.name in args.only]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = args.root.resolve()
    sys.path[:0] = [str(root)]
    import ghpo  # noqa: F401  before the forks

    n_right = n_lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        whole, killed = prepare(root, folder.resolve())
        intact = {one for one, _ in inventory(killed)[0]}
        for trial in trials:
            line, is_ok, gone = attempt(trial, root, folder.resolve(), whole, killed, intact)
            print(line, flush=True)
            n_right, n_lost = n_right + is_ok, n_lost + gone
    print(json.dumps({"trials": len(trials), "as_promised": n_right, "lost": n_lost}))
    sys.exit(n_right != len(trials) or n_lost > 0)


if __name__ == "__main__":
    main()
