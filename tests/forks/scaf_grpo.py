"""Scaf-GRPO (2510.19807): of a failed group one sample is replaced by the success with the least
hint; the loss sees it under the plain prompt."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ghpo
import hints


def merge(previous, new, config, state):
    if not previous.completions:
        return new
    completions, rewards = list(previous.completions), list(previous.rewards)
    for j, passed in enumerate(new.stages[-1].passes):
        if passed > config.hint_threshold:
            completions[0], rewards[0] = new.completions[j], new.rewards[j]
            break
    return replace(new, completions=completions, rewards=rewards)


hints.merge = merge
sys.argv += ["hint_context=original"]
if __name__ == "__main__":
    ghpo.main()
