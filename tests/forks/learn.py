"""Trains every fork on the tiny task, one after the other, and writes learned.md beside this file.

    python tests/forks/learn.py [NAME ...] [key=value ...]        100 s each -> runs/forks/NAME

A line of the table: un-hinted greedy accuracy at the end, the generated tokens until the hard tier
was at .9, in thousands and in times GHPO's. Methods that remember problems get 160 of them, so that
they meet each in five epochs.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import compare  # noqa: E402, of the folder above

GOAL = 0.9
FEW = 160
REMEMBERS = ("adaback", "pope")
NO_FORKS = ("test_", "learn", "self_distill")  # the last is an arm of tests/EXPERIMENTS.md
FORKS = sorted(path.stem for path in HERE.glob("*.py") if not path.name.startswith(NO_FORKS))


def train(name: str, settings: list[str]) -> dict:
    """One run of a fork, or of ghpo itself; what compare.read_run makes of it."""
    folder = ROOT / "runs/forks" / name
    compare.set_aside(folder)
    program = ROOT / "ghpo.py" if name == "ghpo" else HERE / f"{name}.py"
    if name in REMEMBERS:
        few = folder / "few.jsonl"
        rows = (ROOT / "tests/tiny/data/train.jsonl").read_text().splitlines()
        few.write_text("\n".join(rows[:FEW]))
        settings = [*settings, f"dataset_name={few}"]
    command = [sys.executable, str(program), "--config", str(ROOT / compare.CONFIG)]
    command += [f"output_dir={folder}", "save_strategy=no", *settings]
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    return compare.read_run(folder)


def tokens_to_goal(run: dict) -> float:
    for record in run["evals"]:
        if record["eval/hard"] >= GOAL:
            return record["tokens"]
    return float("inf")


def main() -> None:
    names = [word for word in sys.argv[1:] if "=" not in word]
    settings = [word for word in sys.argv[1:] if "=" in word]
    runs = {name: train(name, settings) for name in ["ghpo", *(names or FORKS)]}
    base = tokens_to_goal(runs["ghpo"])
    lines = [
        "| fork | easy | transfer | hard | tokens to .9 on hard | times GHPO's | tokens in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        last, needed = run["evals"][-1], tokens_to_goal(run)
        tiers = " | ".join(f"{last[f'eval/{tier}']:.2f}" for tier in compare.TIERS)
        lines.append(
            f"| {name} | {tiers} | {needed / 1000:.0f}k | {needed / base:.2f} "
            f"| {last['tokens'] / 1000:.0f}k |"
        )
        print(lines[-1], flush=True)
    (HERE / "learned.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
