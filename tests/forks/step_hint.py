"""StepHint (2507.02841): every problem is asked once, its samples at several hint levels in the
assistant's turn; each level has its own baseline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import ghpo
import hints


def next_ratio(group, config, state):
    if group.stages:
        return None
    levels = [0.0, *config.hint_ratio]
    size = config.num_generations
    return [levels[j * len(levels) // size] for j in range(size)]


def advantages(group, config, state):
    rewards = hints.weighted_rewards(group, config)
    ratios = np.array([completion.hint_ratio for completion in group.completions])
    means = np.array([rewards[ratios == ratio].mean() for ratio in ratios])
    return (rewards - means) / (rewards.std(ddof=1) + hints.STD_FLOOR)


hints.next_ratio, hints.advantages = next_ratio, advantages
sys.argv += ["hint_where=assistant"]
if __name__ == "__main__":
    ghpo.main()
