"""Guide-GRPO (2506.13923): a failed group is asked once more with a hint, both kinds of samples
stay under one baseline, and the loss sees the plain prompt, weighted by E7."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ghpo
import hints


def merge(previous, new, config, state):
    return replace(
        new,
        completions=previous.completions + new.completions,
        rewards=previous.rewards + new.rewards,
    )


hints.merge = merge
sys.argv += ["hint_ratio=[0.75]", "hint_context=original"]
if __name__ == "__main__":
    ghpo.main()
