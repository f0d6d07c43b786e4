"""The tiny task "running totals": add up digits modulo 10, one step per line.

    problem   4a3b5c2?                     a start digit, then k labelled digits
    trace     a37 / b52 / c24 / end        one line a step: label, its digit, the total so far
    answer    (7,2,4)                      every total, so that a guess is right once in 10^k

Three tiers differ in k. RL trains on easy and hard, half of each; transfer is only evaluated.

    python tests/tiny/task.py DIR          write train.jsonl and eval_<tier>.jsonl to DIR

To fork: write another `make_problem`; the columns are what any data set of this project has
(`problem`, `solution` = answer, `solution_hint` = trace, `level`).
"""

import json
import random
import sys
from pathlib import Path

TIERS = {"easy": 2, "transfer": 4, "hard": 8}
LABELS = "abcdefgh"
MAX_STEPS = len(LABELS)


def steps_of(digits: list[int], slips: list[int] | None = None) -> tuple[list, list]:
    """Lines and totals of the steps that add digits[1:] to digits[0].

    slips[i] is added to the i-th total (a mistake the later steps carry on from); None means none.
    """
    total = digits[0]
    lines, totals = [], []
    for i, digit in enumerate(digits[1:]):
        total = (total + digit + (slips[i] if slips else 0)) % 10
        lines.append(f"{LABELS[i]}{digit}{total}")
        totals.append(total)
    return lines, totals


def question_of(digits: list[int]) -> str:
    """`4a3b5c2?` for [4, 3, 5, 2]."""
    labelled = "".join(f"{label}{digit}" for label, digit in zip(LABELS, digits[1:]))
    return f"{digits[0]}{labelled}?"


def answer_of(totals: list[int]) -> str:
    """`(7,2,4)`: a tuple, because a verifier would read 7,2,4 or 724 as a number."""
    return "(" + ",".join(map(str, totals)) + ")"


def response_of(lines: list[str], totals: list[int]) -> str:
    """A whole response in the tag layout that the format reward asks for."""
    trace = "\n".join(lines)
    return f"<think>\n{trace}\n</think>\n<answer>\n{answer_of(totals)}\n</answer>"


def make_problem(digits: list[int]) -> dict:
    """One data set row.

    The closing line of the trace makes .25/.5/.75 of a k = 8 trace 2, 4 and 6 whole steps: hints
    are cut back to a line end, and without it .75 would fall one character short of the 6th.
    """
    lines, totals = steps_of(digits)
    return {
        "problem": question_of(digits),
        "solution": answer_of(totals),
        "solution_hint": "\n".join([*lines, "end"]),
        "level": len(totals),
    }


def random_digits(rng: random.Random, k: int) -> list[int]:
    """k + 1 digits: the start and k to add."""
    return [rng.randrange(10) for _ in range(k + 1)]


def make_splits(
    train_size: int = 2000, eval_size: int = 200, seed: int = 0
) -> dict[str, list[dict]]:
    """`train` (easy:hard 1:1) and `eval_<tier>`; no evaluation problem is in train.

    There are only 1000 easy problems: 200 are kept for evaluation and training repeats the others.
    """
    rng = random.Random(seed)
    splits = {}
    for tier, k in TIERS.items():
        chosen = {}
        while len(chosen) < eval_size:
            row = make_problem(random_digits(rng, k))
            chosen[row["problem"]] = row
        splits[f"eval_{tier}"] = list(chosen.values())
    held_out = {row["problem"] for rows in splits.values() for row in rows}
    train = []
    while len(train) < train_size:
        k = TIERS["easy"] if len(train) % 2 == 0 else TIERS["hard"]
        row = make_problem(random_digits(rng, k))
        if row["problem"] not in held_out:
            train.append(row)
    rng.shuffle(train)
    return {"train": train, **splits}


def write_splits(folder: Path) -> None:
    """Write every split of `make_splits` as JSONL into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_splits().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny/task.py DIR")
    write_splits(Path(sys.argv[1]))
