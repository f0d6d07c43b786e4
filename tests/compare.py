"""Runs the real program on the tiny task and reports: the demo, and arms x seeds side by side.

    python tests/compare.py demo [key=value ...]                  one GHPO run    -> runs/demo
    python tests/compare.py compare [--arms a b] [--seeds 3]      GHPO and GRPO   -> runs/compare
    python tests/compare.py compare --arms all --seeds 5 --out ablation           -> runs/ablation
    python tests/compare.py evals RUN RUN ...          the eval.json of several runs side by side

Every run is `torchrun ghpo.py --config configs/tiny.yaml` (or a fork of tests/forks) with a few
key=value settings (ARMS); this file only starts runs, reads their metrics.jsonl, prints tables,
draws and writes summary.json. To fork: add an arm.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/tiny.yaml"
TIERS = {"easy": "easy (k=2)", "transfer": "transfer (k=4, never trained on)", "hard": "hard (k=8)"}
DEMO_TOKENS = 96  # max_completion_length of CONFIG
COLOURS = {"ghpo": "tab:blue", "grpo": "tab:orange"}

# What distinguishes each arm from configs/tiny.yaml. max_steps: as many as generate the tokens that
# GHPO's 50 steps generate, about 363,000; the table says how many it was.
ARMS = {
    "ghpo": ["rl_type=ghpo"],
    "grpo": ["rl_type=grpo", "max_steps=69"],
    "fixed-0.5": ["rl_type=ghpo", "hint_ratio=[0.5]", "max_steps=43"],
    "always-0.5": ["rl_type=ghpo", "hint_ratio=[0.5]", "hint_trigger=always", "max_steps=69"],
    "no-cold-start": ["rl_type=ghpo", "start_hint_step=0", "max_steps=53"],
    "assistant-prefix": ["rl_type=ghpo", "hint_where=assistant", "max_steps=51"],
    "deferred": ["rl_type=ghpo", "hint_timing=deferred", "max_steps=63"],
    "original-context": ["rl_type=ghpo", "hint_context=original", "max_steps=46"],
    "drop-hard": ["rl_type=ghpo", "hint_ratio=[]", "hint_exhausted=drop", "max_steps=69"],
    "ghpo-drop-flat": ["rl_type=ghpo", "flat_groups=drop"],
    "dapo": ["rl_type=grpo", "flat_groups=replace", "epsilon_high=0.28", "max_steps=18"],
    "grpo-cl": ["rl_type=grpo", "curriculum=true", "max_steps=87"],
    "grpo-cl-h-0.5": [
        "rl_type=ghpo",
        "curriculum=true",
        "hint_ratio=[0.5]",
        "hint_trigger=always",
        "max_steps=87",
    ],
    "self-distill": ["start_hint_step=1000", "learning_rate=5e-5", "max_steps=69"],
    "format-only": [
        "rl_type=grpo",
        "reward_funcs=[format]",
        "reward_weights=[1.0]",
        "max_steps=69",
    ],
    "random-reward": [
        "rl_type=grpo",
        "reward_funcs=[tests/controls.py:coin, accuracy]",
        "reward_weights=[1.0, 0.0]",
        "max_steps=69",
    ],
}
PROGRAMS = {"self-distill": "tests/forks/self_distill.py"}  # the others are ghpo.py


class RunFailed(RuntimeError):
    """A training process ended with an error."""


def train(
    folder: Path, settings: list[str], log: Path | None = None, program: str = "ghpo.py"
) -> float:
    """One training run into folder; returns its seconds. Output goes to log, or to the terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [program, "--config", CONFIG, f"output_dir={folder}", *settings]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    if log is None:
        done = subprocess.run(command, cwd=ROOT, env=env)
    else:
        with log.open("w") as out:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        where = "" if log is None else f", see {log}"
        raise RunFailed(f"{' '.join(command[1:])} ended with status {done.returncode}{where}")
    return time.monotonic() - start


def read_run(folder: Path) -> dict:
    """metrics.jsonl of a run as {"steps": [step records], "evals": [evaluation records]}.

    Each record also gets `tokens`, all tokens generated for training up to then.
    """
    steps, evals, tokens = [], [], 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        tokens += record.get("tokens/generated", 0)
        record["tokens"] = tokens
        (evals if "eval/hard" in record else steps).append(record)
    return {"steps": steps, "evals": evals}


def set_aside(folder: Path) -> None:
    """Moves the folder of an earlier call to <folder>.previous, in place of an older one."""
    if folder.exists():
        previous = folder.with_name(folder.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    folder.mkdir(parents=True)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Plain text, first column left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


def write_summary(folder: Path, summary: dict) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


# ---- demo --------------------------------------------------------------------------------------


def draw_demo(run: dict, path: Path) -> None:
    """Left: un-hinted accuracy by tier. Right: at which hint ratio a problem was first solved."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for tier, label in TIERS.items():
        points = [(record["step"], record[f"eval/{tier}"]) for record in run["evals"]]
        left.plot(*zip(*points), marker="o", label=label)
    left.set(xlabel="step", ylabel="accuracy", title="without hints, fresh problems")
    left.set_ylim(-0.03, 1.03)
    left.legend(fontsize=8)
    steps = [record["step"] for record in run["steps"]]
    ratios = sorted(
        {key.split("@")[1] for r in run["steps"] for key in r if "solved@" in key}, key=float
    )
    shares, names = [], []
    for ratio in ratios:
        shares.append([r.get(f"hint/solved@{ratio}", 0) / r["hint/tried@0"] for r in run["steps"]])
        names.append("no hint" if float(ratio) == 0 else f"{float(ratio):.0%} hint")
    shares.append([record["hint/unsolved"] / record["hint/tried@0"] for record in run["steps"]])
    colours = [plt.cm.viridis(0.85 - 0.7 * i / len(ratios)) for i in range(len(ratios))]
    right.stackplot(steps, shares, labels=[*names, "unsolved"], colors=[*colours, "lightgrey"])
    right.set(xlabel="step", ylabel="share of the step's problems", title="first solved with")
    right.set_ylim(0, 1)
    right.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def greedy_text(model: Path, prompt: str) -> str:
    """What a saved model answers to a rendered prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # slow

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = policy.generate(**inputs, do_sample=False, max_new_tokens=DEMO_TOKENS)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def print_before_and_after(folder: Path) -> None:
    """One hard held-out problem: the base model's answer, and that of the last evaluation."""
    lines = [json.loads(line) for line in (folder / "eval_hard.jsonl").read_text().splitlines()]
    solved = [line for line in lines if line["completions"][0].get("accuracy", 0) > 0]
    line = (solved or lines)[0]
    told = "the first that is solved now" if solved else "not solved yet"
    print(f"\nA hard problem, {told}: {line['problem']}  gold {line['gold']}\n")
    before = greedy_text(ROOT / "tests/tiny/base", line["prompt"])
    for name, text in [("before", before), ("after", line["completions"][0]["text"])]:
        print(f"{name:8}{' '.join(text.split())}")


def demo(settings: list[str]) -> None:
    """Trains GHPO on the tiny task in the foreground, then prints and draws what came of it."""
    folder = ROOT / "runs" / "demo"
    set_aside(folder)
    print("GHPO on running totals: the base model solves easy problems and never a hard one.")
    print("Its hard groups are asked again with 25, 50, 75 % of the solution as a hint, but in the")
    print(
        "first ten steps (start_hint_step): there nothing is learnt, grad_norm is 0.\n", flush=True
    )
    seconds = train(folder, ARMS["ghpo"] + settings)
    run = read_run(folder)
    before, after = run["evals"][0], run["evals"][-1]
    tiers = {t: {"before": before[f"eval/{t}"], "after": after[f"eval/{t}"]} for t in TIERS}
    tokens = after["tokens"]
    write_summary(
        folder, {"tiers": tiers, "generated_tokens": tokens, "seconds": round(seconds, 1)}
    )
    draw_demo(run, folder / "demo.png")
    print("\nAccuracy without hints on problems not trained on, greedy:\n")
    rows = [[TIERS[t], f"{v['before']:.3f}", f"{v['after']:.3f}"] for t, v in tiers.items()]
    print_table(["tier", "before", "after"], rows)
    print_before_and_after(folder)
    print(f"\n{after['step']} steps, {tokens:,} generated tokens, {seconds:.0f} s")
    print("runs/demo/demo.png       the curves")
    print("runs/demo/rollouts/      every prompt, hint and completion")
    print("runs/demo/model/         the trained model, Hugging Face format")


# ---- compare -----------------------------------------------------------------------------------


def run_arm(arm: str, seed: int, folder: Path, settings: list[str]) -> dict:
    """Trains one arm with one seed."""
    extra = [f"seed={seed}", "save_strategy=no", "reliance_steps=10", *settings]
    place, log = folder / arm / str(seed), folder / f"{arm}-{seed}.log"
    seconds = train(place, [*ARMS[arm], *extra], log, PROGRAMS.get(arm, "ghpo.py"))
    run = read_run(place)
    last = run["evals"][-1]
    print(
        f"{arm} seed {seed}: hard {last['eval/hard']:.3f} after {last['step']} steps, "
        f"{last['tokens']:,} tokens, {seconds:.0f} s",
        flush=True,
    )
    return run


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds (0 for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def draw_compare(runs: dict, path: Path) -> None:
    """Left: hard tier against generated tokens, mean and standard error over seeds. Right: the end,
    by tier."""
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4) if len(arms) < 5 else (15, 5))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        colour = COLOURS.get(arm, plt.cm.tab20(i + 2))
        mine = [run for (name, _), run in runs.items() if name == arm]
        tokens, middle, low, high = [], [], [], []
        for records in zip(*(run["evals"] for run in mine)):
            mean, error = mean_and_error([record["eval/hard"] for record in records])
            tokens.append(statistics.mean(record["tokens"] for record in records) / 1000)
            middle.append(mean)
            low.append(mean - error)
            high.append(mean + error)
        left.plot(tokens, middle, marker=".", color=colour, label=arm)
        left.fill_between(tokens, low, high, color=colour, alpha=0.15)
        ends = [mean_and_error([run["evals"][-1][f"eval/{t}"] for run in mine]) for t in TIERS]
        places = [x + (i - (len(arms) - 1) / 2) * width for x in range(len(TIERS))]
        means, errors = zip(*ends)
        right.bar(places, means, width, yerr=errors, color=colour, label=arm, capsize=3)
    left.set(xlabel="generated tokens (thousands)", ylabel="accuracy", title="hard tier, no hints")
    right.set_xticks(range(len(TIERS)), list(TIERS))
    right.set(ylabel="accuracy", title="at the end, mean ± standard error over seeds")
    for axis in (left, right):
        axis.set_ylim(-0.03, 1.06)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run_rows(arm: str, seed: int, run: dict) -> list[dict]:
    """What summary.json keeps of a run: a row a tier."""
    last, rows = run["evals"][-1], []
    for tier in TIERS:
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "tier": tier,
                "accuracy": last[f"eval/{tier}"],
                "generated_tokens": last["tokens"],
                "steps": last["step"],
                "config": ARMS[arm],
                "curve": [[record["tokens"], record[f"eval/{tier}"]] for record in run["evals"]],
            }
        )
    return rows


def hints_row(arm: str, seed: int, run: dict) -> dict:
    """How much was hinted in a run: sums over its steps, reliance first and last."""
    steps = run["steps"]
    counts = {}
    for key in sorted({key for record in steps for key in record}):
        if key.startswith(("hint/tried@", "hint/solved@")) or key == "hint/unsolved":
            counts[key] = sum(record.get(key, 0) for record in steps)
    hard = [record["hard_fraction"] for record in steps if "hard_fraction" in record]
    reliance = [record["hint/reliance"] for record in steps if "hint/reliance" in record]
    return {
        "arm": arm,
        "seed": seed,
        "hard_fraction_first_10": statistics.mean(hard[:10]) if hard else None,
        "hard_fraction_last_10": statistics.mean(hard[-10:]) if hard else None,
        "reliance_first": reliance[0] if reliance else None,
        "reliance_last": reliance[-1] if reliance else None,
        **counts,
    }


def arms_table(rows: list[dict]) -> list[list[str]]:
    """Mean and standard error over seeds by tier, and tokens: a line an arm."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [arm]
        for tier in TIERS:
            values = [row["accuracy"] for row in rows if (row["arm"], row["tier"]) == (arm, tier)]
            mean, error = mean_and_error(values)
            cells.append(f"{mean:.3f} ± {error:.3f}")
        tokens = statistics.mean(row["generated_tokens"] for row in rows if row["arm"] == arm)
        table.append([*cells, f"{tokens:,.0f}"])
    return table


def hints_table(hinted: list[dict]) -> list[list[str]]:
    """What was hard and hinted, a line an arm: means over seeds of the hard fraction, sums of the
    groups solved and tried at each ratio, means of the reliance where there were hints."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in hinted):
        mine = [row for row in hinted if row["arm"] == arm]
        cells = [
            arm,
            mean_of(mine, "hard_fraction_first_10"),
            mean_of(mine, "hard_fraction_last_10"),
        ]
        for ratio in ("0.25", "0.5", "0.75"):
            tried = sum(row.get(f"hint/tried@{ratio}", 0) for row in mine)
            solved = sum(row.get(f"hint/solved@{ratio}", 0) for row in mine)
            cells.append(f"{solved:.0f} of {tried:.0f}" if tried else "-")
        table.append([*cells, mean_of(mine, "reliance_first"), mean_of(mine, "reliance_last")])
    return table


def mean_of(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{statistics.mean(values):.2f}" if values else "-"


def compare(arms: list[str], seeds: int, jobs: int, settings: list[str], folder: Path) -> None:
    """Every arm with seeds 0, 1, ..., seed by seed, so that what is there after an interruption
    compares."""
    set_aside(folder)
    runs = {}
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {}
        for seed in range(seeds):
            for arm in arms:
                waiting[arm, seed] = pool.submit(run_arm, arm, seed, folder, settings)
        for key, future in waiting.items():
            runs[key] = future.result()
    rows = [row for (arm, seed), run in runs.items() for row in run_rows(arm, seed, run)]
    hinted = [hints_row(arm, seed, run) for (arm, seed), run in runs.items()]
    write_summary(folder, {"rows": rows, "hints": hinted})
    draw_compare(runs, folder / "compare.png")
    print("\nAccuracy without hints, greedy, mean ± standard error over seeds:\n")
    print_table(["arm", *TIERS, "tokens"], arms_table(rows))
    print("\nHard fraction, groups solved of tried with a hint, and reliance on it:\n")
    ratios = ["at .25", "at .5", "at .75"]
    print_table(["arm", "first 10", "last 10", *ratios, "first", "last"], hints_table(hinted))
    print(f"\n{folder.relative_to(ROOT)}/compare.png, summary.json, and the folder of every run")


# ---- evals -------------------------------------------------------------------------------------


def evals(folders: list[Path]) -> list[list[str]]:
    """pass@1 with its standard error, a row a benchmark, a column a run, their mean below; a run
    without a benchmark has no mean."""
    tables = []
    for folder in folders:
        path = folder / "eval.json"
        if not path.is_file():
            raise RunFailed(f"{path} is not there: ./run.sh eval CONFIG output_dir={folder}")
        tables.append(json.loads(path.read_text()))
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = []
    for name in names:
        cells = []
        for table in tables:
            found = table.get(name)
            cells.append(f"{found['pass@1']:.3f} ± {found['stderr']:.3f}" if found else "-")
        rows.append([name, *cells])
    means = []
    for table in tables:
        is_whole = set(table) == set(names)
        mean = statistics.mean(found["pass@1"] for found in table.values())
        means.append(f"{mean:.3f}" if is_whole else "-")
    rows.append(["mean", *means])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo")
    one.add_argument("settings", nargs="*", help="key=value for ghpo.py")
    many = commands.add_parser("compare")
    many.add_argument("settings", nargs="*", help="key=value for ghpo.py, every arm")
    many.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=["ghpo", "grpo"])
    many.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    many.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at once")
    many.add_argument("--out", default="compare", help="folder under runs/")
    tables = commands.add_parser("evals")
    tables.add_argument("runs", nargs="+", type=Path, help="folders with an eval.json")
    args = parser.parse_args()
    try:
        if args.command == "demo":
            demo(args.settings)
        elif args.command == "evals":
            names = [folder.name for folder in args.runs]
            print_table(["pass@1", *names], evals(args.runs))
        else:
            arms = list(ARMS) if "all" in args.arms else args.arms
            compare(arms, args.seeds, args.jobs, args.settings, ROOT / "runs" / args.out)
    except RunFailed as failure:
        sys.exit(f"compare.py: {failure}")


if __name__ == "__main__":
    main()
