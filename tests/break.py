"""Break the program on purpose, and see that it keeps what it promises.

    python tests/break.py [--kinds 1,2] [--only NAME ...] [--sample 20] [--root DIR] [--folder DIR]

A trial does one bad thing to the folder of a run, runs the program there in a fresh process and
compares what came of it with what is promised; break_trials.py has them. The process is a fork of
this one, which has imported torch and the program and used neither: no thread and no process group
is inherited. Trials with `as_command` execute `python ghpo.py` instead. --root takes the program of
another checkout. --sample takes the first trials of each kind; 20 of them are in the test suite.

Promised by every trial beside its own words: no traceback, no process left behind, metrics and
rollouts that are JSON, no code run that came in with data (it would write the file OWNED), nothing
lost. A line a trial: kind, name, promised/observed, ok or BROKEN, seconds. The last line is JSON;
`lost` counts checkpoints, lines of metrics and lines of rollouts that were there before the trial
and not after it. No loss is what save_total_limit takes away (`rotated`), and a checkpoint that the
trial has damaged and the program has set aside.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from break_trials import BASE, DATA, MARK, OWNED, TRIALS, Trial, gone, processes, setting, timeless

TESTS = Path(__file__).resolve().parent
LAST_SECONDS = 5.0  # for what is left of a trial that has ended to end as well
SETTINGS = [  # 4 problems by 4 samples a step, 3 steps; paths are relative to the trial's folder
    f"model_name_or_path={BASE}",
    "dataset_name=data.jsonl",
    "output_dir=run",
    "max_steps=3",
    "num_generations=4",
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=4",
    "max_completion_length=64",
    "temperature=2",
    "start_hint_step=0",
    "learning_rate=1e-3",
    "lr_scheduler_type=constant",
    "warmup_steps=0",
    "save_steps=1",
    "save_total_limit=null",
    "eval_strategy=no",
    "report_to=[]",
]
SEEN_BEFORE = {  # at commit fcd61fb, by `--root` (TB: a traceback, status 1)
    "checkpoint-000002-keep": "resumed from as the newest; TB",
    "checkpoint-notes.txt": "taken for a checkpoint; TB",
    "checkpoint-best": "resumed from; TB",
    "zeros_in_a_shard": "resumed without a word, to other numbers",
    "empty_state": "TB",
    "truncated_shard": "TB",
    "stops_itself": "hangs (60 s), 2 processes left",
    "forks_and_answers": "16 processes left",
    "26_kB": "no step in 30 s",
    "900_kB": "no step in 30 s",
    "raises": "status 0",
    "none": "status 0",
    "kills_its_worker": "status 0",
    "one_of_two_raises": "accuracy is 0 where the other reward raised",
    "data_reversed": "resumed, status 0",
    "metrics_gone_and_rate_changed": "resumed, status 0",
    "max_steps_raised": "refused, status 2",
    "top_p=-0.1": "TB",
    "learning_rate=-1": "TB",
    "hint_threshold=2": "trains, status 0",
    "temperature=1e30": "trains, status 0",
    "null_content": "TB",
    "half_a_surrogate": "TB",
    "fifo": "hangs (60 s)",
    "nan_answer": "trained on the answer nan",
    "output_dir_is_a_file": "TB",
    "ctrl_c": "TB",
    "truncated_weights": "TB",
    "missing_tensor": "trained with a random one, status 0",
    "payload_in_the_index": "its code is run",
    "payload_as_bytes": "its code is run",
    "payload_as_state": "TB",
    "pickled_weights": "TB",
    "disk_full_in_a_checkpoint": "TB",
    "linked_checkpoint": "TB, the link is renamed",
    "reward_exits_at_import": "ends, status 0",
    "special_tokens": "80 bytes of them are 8 control tokens",
}

# ---- what was there before and after -----------------------------------------------------------


def digest(folder):
    """Of names and contents."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def inventory(place):
    """({(digest, name) of folders checkpoint-*}, lines of metrics, lines of rollouts), all runs."""
    found = {(digest(path), path.name) for path in place.rglob("*checkpoint-*") if path.is_dir()}
    counts = []
    for pattern in ("metrics.jsonl*", "rollouts/*.jsonl"):
        texts = [path.read_text() for path in place.rglob(pattern) if path.is_file()]
        counts.append(Counter(line for text in texts for line in text.splitlines()))
    return found, *counts


def lost(before, after, intact, rotated):
    """How many are gone. intact: digests of whole checkpoints; these, and what is not the
    program's, keep their names."""
    n_lost = sum((before[1] - after[1]).values()) + sum((before[2] - after[2]).values())
    for one, name in before[0]:
        names = {other for found, other in after[0] if found == one}
        must_stay = one in intact or not re.fullmatch(r"checkpoint-\d{6,}", name)
        is_there = name in names if must_stay else bool(names)
        n_lost += not is_there and name not in rotated
    return n_lost


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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & ignores
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), log, log]):
            os.dup2(file, number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.chdir(place)
        os.environ[MARK] = str(place)
        config = root / "configs" / "tiny.yaml"
        sys.argv = [str(root / "ghpo.py"), "--config", str(config), *settings]
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
    """The exit status, 128 + signal as shells have it, or None where it is late."""
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


def left_behind(place):
    """How many processes outlive a trial; ends them."""
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
    status = wait(start(root, whole, SETTINGS, Trial(0, "prepare", setting())), 300)
    if status != 0:
        sys.exit(f"the run to break ends with {status}:\n{(whole / 'log').read_text()[-3000:]}")
    shutil.copytree(whole, killed)
    run = killed / "run"
    for name in ("checkpoint-000003", "model", "rollouts/step_000003.jsonl", "../log"):
        gone(name)(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    if len(lines) != 3 or not all(json.loads(line)["grad_norm"] > 0 for line in lines):
        sys.exit("a step of the run to break has no gradient")
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    return whole, killed


def faults_of(trial, place, status, whole):
    """What was promised and is not so."""
    run, log, faults = place / "run", (place / "log").read_text(errors="replace"), []
    if "Traceback" in log:
        faults.append("traceback")
    if list(place.rglob(OWNED)):
        faults.append("owned")
    if status != trial.status:
        return faults
    faults += [f"untold:{one!r}" for one in trial.told if not re.search(one, log, re.M)]
    faults += [f"gone:{name}" for name in trial.there if not (run / name).exists()]
    for path in [*run.glob("metrics.jsonl"), *run.glob("rollouts/*.jsonl")]:
        try:
            if path.is_file():
                timeless(path)
        except ValueError as error:
            return [*faults, f"{path.name}:{error!r}"]
    if trial.is_same:
        ours, theirs = (
            (timeless(run / "metrics.jsonl"), digest(run / "model"))
            for run in (place / "run", whole / "run")
        )
        if ours != theirs:
            faults.append("other-numbers")
    wrong = trial.check and trial.check(run)
    return faults + ([wrong] if wrong else [])


def attempt(trial, root, folder, whole, killed, intact):
    """Does one trial: (line to print, was it as promised, how many were lost)."""
    place = folder / f"{trial.kind:02d}-{trial.name}"
    shutil.copytree(killed, place)
    if trial.is_new:
        shutil.rmtree(place / "run")
    more = trial.act(place / "run")
    more = more if isinstance(more, list) else []
    before, began = inventory(place), time.monotonic()
    pid = start(root, place, [*SETTINGS, *more], trial)
    if trial.during:
        trial.during(pid, place / "run")
    status = wait(pid, trial.seconds)
    seconds = time.monotonic() - began
    n_left = left_behind(place)
    n_lost = lost(before, inventory(place), intact, trial.rotated)
    observed = ["late" if status is None else str(status), *faults_of(trial, place, status, whole)]
    observed += [f"{name}:{n}" for name, n in [("left", n_left), ("lost", n_lost)] if n]
    is_ok = observed == [str(trial.status)]
    verdict = "ok" if is_ok else "BROKEN"
    line = f"{trial.kind} {trial.name} {trial.status}/{'+'.join(observed)} {verdict} {seconds:.1f}"
    return line, is_ok, n_lost


def sample(n):
    """About n trials: the first of each kind, as many of every kind."""
    kinds = {trial.kind for trial in TRIALS}
    share, chosen = max(1, round(n / len(kinds))), []
    for kind in sorted(kinds):
        chosen += [trial for trial in TRIALS if trial.kind == kind][:share]
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
    sys.path.insert(0, str(root))
    import ghpo  # noqa: F401  before the forks

    n_right = n_lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        whole, killed = prepare(root, folder)
        intact = {one for one, _ in inventory(killed)[0]}
        for trial in trials:
            line, is_ok, gone = attempt(trial, root, folder, whole, killed, intact)
            print(line, flush=True)
            n_right, n_lost = n_right + is_ok, n_lost + gone
    print(json.dumps({"trials": len(trials), "as_promised": n_right, "lost": n_lost}))
    sys.exit(n_right != len(trials) or n_lost > 0)


if __name__ == "__main__":
    main()
