"""Kill training at random moments, run the same command again, compare with a run never killed.

    python tests/soak_resume.py --kills 30 [--folder /tmp/soak] [--seed 0]

Scenarios take turns: 1 and 2 ranks, hints inline and deferred. A third of the kills waits for a
checkpoint write and lands inside it; with 2 ranks one rank or both die. After half of the kills a
file of the newest checkpoint is damaged. The last line is JSON: kills, damaged, and identical
(metrics but for times, rollouts, weights, saved state: all bit for bit).
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SCENARIOS = [(1, "inline"), (2, "deferred"), (2, "inline"), (1, "deferred")]
SETTINGS = """max_steps=6 save_steps=1 save_total_limit=2 eval_strategy=no start_hint_step=1
    num_generations=4 gradient_accumulation_steps=1 max_completion_length=40 report_to=[]""".split()


def start(folder, world, timing, *more):
    """`world` ranks of `python ghpo.py` at work in folder; returns {process id: rank}."""

    def command():
        import ghpo

        # 8 prompts of 4 samples a step, whatever the number of ranks
        sys.argv = [
            "ghpo.py",
            "--config",
            "configs/tiny.yaml",
            *SETTINGS,
            *more,
            f"output_dir={folder}",
            f"hint_timing={timing}",
            f"per_device_train_batch_size={32 // world}",
        ]
        ghpo.main()

    return fork(world, folder, command)


def fork(world, log, work):
    """Run work() on `world` ranks forked from here; returns {process id: rank}.

    Not torchrun: a fork shares the imports, which are most of such short runs. Rank r prints to
    the file <log>.log<r>.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    pids = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, world, port, f"{log}.log{rank}", work)
        pids[pid] = rank
    return pids


def become_rank(rank, world, port, log, work):
    """In the child: work() as rank `rank`, then leave with its status."""
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # not pytest's
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.chdir(ROOT)
        if world > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="localhost",
                MASTER_PORT=str(port),
            )
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pids, seconds=120):
    """Statuses of the ranks; those that outlive the limit are killed and have status None."""
    statuses, end = {}, time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids.keys() - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
        if time.monotonic() > end:
            for pid in pids.keys() - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        time.sleep(0.002)
    return statuses


def end_well(pids, log):
    """Wait for forked ranks; raises with the end of rank 0's log if one fails."""
    if any(status != 0 for status in wait(pids).values()):
        raise RuntimeError(Path(f"{log}.log0").read_text()[-3000:])


def finish(folder, world, timing, *more):
    """Run to the end."""
    end_well(start(folder, world, timing, *more), folder)


def kill_once(folder, world, timing, during_write, rng):
    """Start a run and kill it once: at a random moment, or inside a checkpoint's write.

    Returns what was hit: "write", "step", or None when the run ended first.
    """
    folder, launched = Path(folder), time.time()
    pids = start(folder, world, timing)
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    target = rng.randint(1, 3)  # steps after the start
    delay = rng.random() * (0.06 if during_write else 0.4)  # a tiny checkpoint takes about 0.1 s
    began, seen = None, 0
    while began is None or time.monotonic() < began + delay:
        if os.waitpid(next(iter(pids)), os.WNOHANG)[0]:
            wait({pid: rank for pid, rank in list(pids.items())[1:]})
            return None
        if began is None and during_write:
            is_third = len(complete(folder)) > 1  # so that one of two can be damaged
            began = time.monotonic() if is_third and is_writing(folder, launched) else None
        elif began is None and metrics.exists() and metrics.stat().st_mtime_ns != before:
            seen, before = seen + 1, metrics.stat().st_mtime_ns
            began = time.monotonic() if seen > target else None
        time.sleep(0.0005)
    hit = "write" if is_writing(folder, launched) else "step"
    victims = list(pids) if rng.random() < 0.5 else [rng.choice(list(pids))]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if None in wait(pids, seconds=30).values():
        raise RuntimeError("a rank outlived its killed peer by 30 s")
    return hit


def complete(folder):
    return sorted(Path(folder).glob("checkpoint-??????"))


def damage(folder, rng):
    """Damages one file of the newest checkpoint, if another one is left; returns what was done."""
    *others, newest = complete(folder) or [None]
    if not others:
        return None
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path, kind = rng.choice(files), rng.choice(["cut", "zeros", "flipped", "deleted"])
    content = bytearray(path.read_bytes())
    middle = rng.randrange(len(content))
    if kind == "cut":
        path.write_bytes(content[:middle])
    elif kind == "deleted":
        path.unlink()
    else:
        end = min(len(content), middle + (1 if kind == "flipped" else 20_000))
        for i in range(middle, end):
            content[i] = content[i] ^ 255 if kind == "flipped" else 0
        if kind == "zeros" and content[middle:end] == path.read_bytes()[middle:end]:
            path.unlink()  # zeros it was already
        else:
            path.write_bytes(content)
    return f"{path.relative_to(folder)} {kind}"


def is_writing(folder, launched):
    """A checkpoint write is under way; what an earlier kill left behind does not count."""
    try:
        return any(p.stat().st_ctime > launched for p in folder.glob("checkpoint-??????.tmp"))
    except FileNotFoundError:  # renamed between the two calls
        return False


def traces(folder):
    """What must be the same bits: metrics without times, rollouts, final weights, saved state
    (without the size of metrics.jsonl, in which the times are)."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "tokens/s"))}
        for line in lines
    ]
    rollouts = {p.name: p.read_text() for p in (folder / "rollouts").glob("step_*.jsonl")}
    checkpoints = sorted(folder.glob("checkpoint-??????"))
    states = {
        p.name: json.loads((p / "state.json").read_text()) | {"metrics_bytes": 0}
        for p in checkpoints
    }
    tensors = {p.name: [f.read_bytes() for f in sorted(p.glob("*.distcp"))] for p in checkpoints}
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {
        "metrics": metrics,
        "rollouts": rollouts,
        "states": states,
        "tensors": tensors,
        "weights": weights,
    }


def differences(folder, reference):
    """Names of the traces that differ from those of the run that was never killed."""
    mine = traces(folder)
    return [name for name in reference if mine[name] != reference[name]]


def soak(folder, kills, seed, scenarios=SCENARIOS):
    """Kill `kills` runs in all; returns (where they hit, what was damaged, differences found)."""
    import ghpo  # noqa: F401  before the forks

    folder, rng = Path(folder), random.Random(seed)
    references, hits, damaged, wrong, run = {}, [], [], [], 0
    while len(hits) < kills:
        world, timing = scenario = scenarios[run % len(scenarios)]
        if scenario not in references:
            finish(folder / f"whole-{world}-{timing}", *scenario)
            references[scenario] = traces(folder / f"whole-{world}-{timing}")
        mine, n_damaged = folder / f"killed-{run}", len(damaged)
        for _ in range(min(rng.randint(1, 3), kills - len(hits))):
            hit = kill_once(mine, world, timing, len(hits) % 3 == 2, rng)
            if not hit:
                continue
            hits.append(hit)
            done = damage(mine, rng) if 2 * len(damaged) < len(hits) else None
            if done:
                damaged.append(done)
        finish(mine, world, timing)
        found = differences(mine, references[scenario])
        if len([*mine.glob("checkpoint-*.damaged*")]) != len(damaged) - n_damaged:
            found.append(f"set aside otherwise than damaged: {damaged[n_damaged:]}")
        wrong += [(run, scenario, found)] if found else []
        print(
            f"run {run}: {world} ranks, {timing}: kills so far {len(hits)} "
            f"({hits.count('write')} in a write), damaged {damaged[n_damaged:]}, "
            f"differences: {found or 'none'}",
            flush=True,
        )
        run += 1
    return hits, damaged, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None, help="kept; a temporary one otherwise")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        hits, damaged, wrong = soak(args.folder or temporary, args.kills, args.seed)
    for item in wrong:
        print(f"DIFFERENT: {item}")
    counts = {"kills": len(hits), "damaged": len(damaged), "identical": not wrong}
    print(json.dumps(counts))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
