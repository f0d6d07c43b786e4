"""What accuracy_reward costs beside math-verify, and what copying the question earns.

    python tests/bench_reward.py [verifier_dev.jsonl] [items]

CPU seconds on the same labelled answers in one run (every n-th when `items` is given); both read
each response and gold from text, math-verify gets its gold as $gold$, which is how it scores best.
Then math500_dev.jsonl: the problems on which some formula of the problem's text, as it stands and
unless it is the gold's own string, scores 1 as the answer; and the right answers of both files that
strict_answers loses.
"""

import json
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from reward import accuracy_reward, equal, is_plain, read, squeezed  # noqa: E402


def math_verify_reward(response: str, gold: str) -> float:
    from math_verify import parse, verify

    return float(verify(parse(f"${gold}$"), parse(response)))


def measure(function, items: list[dict]) -> dict:
    """CPU s per 1000 items, median and worst wall time of one item in us, and % agreeing."""
    walls, right = [], 0
    cpu = time.process_time()
    for item in items:
        start = time.perf_counter()
        try:
            score = function(item["response"], item["gold"])
        except Exception:
            score = 0.0
        walls.append(time.perf_counter() - start)
        right += (score >= 0.5) == bool(item["label"])
    cpu = time.process_time() - cpu
    return {
        "cpu_s_per_1000": 1000 * cpu / len(items),
        "median_us": 1e6 * statistics.median(walls),
        "max_us": 1e6 * max(walls),
        "accuracy_%": 100 * right / len(items),
    }


FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


def copies(problem: str, gold: str) -> list[str]:
    """Formulas of a problem's text, whole and the sides of their equations, but not the gold."""
    formulas = [next(filter(None, groups)) for groups in FORMULA.findall(problem)]
    parts = [part for formula in formulas for part in [formula, *formula.split("=")]]
    texts = dict.fromkeys(part.strip(" .,;\n") for part in parts)
    return [text for text in texts if text and squeezed(text) != squeezed(gold)]


def is_expression(text: str) -> bool:
    """Has it an operator or a function? Numbers and letters may well be the answer."""
    tree = read(text).tree
    return tree is not None and not is_plain(tree)


def copied(problems: list[dict], with_row: bool, strict: bool) -> float:
    """% of problems on which a copy scores 1."""
    hits = 0
    for item in problems:
        row = {"problem": item["problem"]} if with_row else {}
        texts = filter(is_expression, copies(item["problem"], item["solution"]))
        hits += any(
            accuracy_reward("\\boxed{%s}" % text, item["solution"], strict_answers=strict, **row)
            for text in texts
        )
    return 100 * hits / len(problems)


def lost(items: list[tuple[str, str, str | None]]) -> int:
    """Right answers (response, gold, problem) that only strict_answers refuses."""
    right = [item for item in items if accuracy_reward(*item[:2], strict_answers=False)]
    return sum(not accuracy_reward(*item) for item in right)


def report_copies(data: Path, labelled: list[dict]) -> None:
    problems = [json.loads(line) for line in (data / "math500_dev.jsonl").open(encoding="utf-8")]
    print(
        f"copies of the question on {len(problems)} problems: "
        f"{copied(problems, True, True):.1f} % with the row, "
        f"{copied(problems, False, True):.1f} % without, "
        f"{copied(problems, False, False):.1f} % with strict_answers off"
    )
    right = [(item["response"], item["gold"], None) for item in labelled if item["label"]]
    golds = [
        ("\\boxed{%s}" % item["solution"], item["solution"], item["problem"]) for item in problems
    ]
    print(
        f"right answers lost by strict_answers: {lost(right)} of {len(right)} labelled, "
        f"{lost(golds)} of {len(golds)} golds"
    )


def main() -> None:
    path = ROOT.parent / "shared" / "data" / "verifier_dev.jsonl"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else path
    items = [json.loads(line) for line in path.open(encoding="utf-8")]
    items = [item for item in items if item["label"] is not None]
    if len(sys.argv) > 2:
        items = items[:: max(1, len(items) // int(sys.argv[2]))]
    accuracy_reward("\\boxed{\\sqrt{2}}", "\\sqrt[4]{4}")  # imports and first-call costs
    read.cache_clear()
    equal.cache_clear()
    ours = measure(accuracy_reward, items)
    print(f"{len(items)} items")
    print("accuracy_reward", {key: round(value, 3) for key, value in ours.items()})
    report_copies(path.parent, items)
    try:
        import math_verify  # noqa: F401
    except ImportError:
        print("math-verify is not installed: no comparison")
        return
    math_verify_reward("\\boxed{\\sqrt{2}}", "\\sqrt{2}")
    theirs = measure(math_verify_reward, items)
    print("math-verify    ", {key: round(value, 3) for key, value in theirs.items()})
    print(f"{theirs['cpu_s_per_1000'] / ours['cpu_s_per_1000']:.0f}x less CPU")


if __name__ == "__main__":
    main()
