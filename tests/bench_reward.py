"""CPU seconds of accuracy_reward and of math-verify on the same labelled answers, in one run.

    python tests/bench_reward.py [verifier_dev.jsonl] [items]

Every `step`-th item is taken when `items` is given. Both read each response and gold from text;
math-verify gets its gold as $gold$, which is how it scores best.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from reward import accuracy_reward, readings, tokenise  # noqa: E402


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
    return {"cpu_s_per_1000": 1000 * cpu / len(items), "median_us": 1e6 * statistics.median(walls),
            "max_us": 1e6 * max(walls), "accuracy_%": 100 * right / len(items)}


def main() -> None:
    path = ROOT.parent / "shared" / "data" / "verifier_dev.jsonl"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else path
    items = [json.loads(line) for line in path.open(encoding="utf-8")]
    items = [item for item in items if item["label"] is not None]
    if len(sys.argv) > 2:
        items = items[::max(1, len(items) // int(sys.argv[2]))]
    accuracy_reward("\\boxed{\\sqrt{2}}", "\\sqrt[4]{4}")  # imports and first-call costs
    for cached in (readings, tokenise):
        getattr(cached, "cache_clear", lambda: None)()
    ours = measure(accuracy_reward, items)
    print(f"{len(items)} items")
    print("accuracy_reward", {key: round(value, 3) for key, value in ours.items()})
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
