"""POPE (2601.18779): problems that once failed without a hint form the hard set; from then on half
of their samples are hinted, the others plain, each kind with its own baseline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import ghpo
import hints

after_step = hints.after_step


def next_ratio(group, config, state):
    if group.stages:
        return None
    half = config.num_generations // 2
    is_hard = group.problem.id in state.method.get("hard", [])
    return [0.0] * half + [config.hint_ratio[-1]] * half if is_hard else 0.0


def advantages(group, config, state):
    rewards = hints.weighted_rewards(group, config)
    is_hinted = np.array([bool(completion.hint) for completion in group.completions])
    means = np.array([rewards[is_hinted == kind].mean() for kind in is_hinted])
    return (rewards - means) / (rewards.std(ddof=1) + hints.STD_FLOOR)


def remember(state, outcomes, config):
    failed = {o.problem_id for o in outcomes if hints.is_failed(o.stages[0].passes, config)}
    state.method["hard"] = sorted({*state.method.get("hard", []), *failed})
    return after_step(state, outcomes, config)


hints.next_ratio, hints.advantages, hints.after_step = next_ratio, advantages, remember
if __name__ == "__main__":
    ghpo.main()
