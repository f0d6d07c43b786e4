"""BREAD (2506.17211): a failed problem is asked again from a prefix of the solution in the
assistant's turn, bisected to the shortest one that works."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ghpo
import hints

TRIES = 4


def next_ratio(group, config, state):
    if not group.stages:
        return 0.0
    works, fails = [1.0], []
    for stage in group.stages:
        is_failed = hints.is_failed(stage.passes, config)
        (fails if is_failed else works).append(stage.ratio)
    if not fails or len(group.stages) > TRIES:
        return None
    return (max(fails) + min(works)) / 2


hints.next_ratio = next_ratio
sys.argv += ["hint_where=assistant"]
if __name__ == "__main__":
    ghpo.main()
