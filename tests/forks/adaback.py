"""AdaBack (2506.18110): each problem has an interval of ratios, remembered across steps; a ratio is
drawn in it, and the interval ends there when the group does well, begins there when it does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import ghpo
import hints

AIM = 0.5
after_step = hints.after_step


def next_ratio(group, config, state):
    if group.stages:
        return None
    low, high = state.method.get(str(group.problem.id), [0.0, 1.0])
    rng = np.random.default_rng([config.seed, state.step, group.problem.id])
    return float(rng.uniform(low, high))


def remember(state, outcomes, config):
    for outcome in outcomes:
        (stage,) = outcome.stages
        low, high = state.method.get(str(outcome.problem_id), [0.0, 1.0])
        if stage.pass_rate >= AIM:
            high = stage.ratio
        else:
            low = stage.ratio
        state.method[str(outcome.problem_id)] = [low, high]
    return after_step(state, outcomes, config)


hints.next_ratio, hints.after_step = next_ratio, remember
if __name__ == "__main__":
    ghpo.main()
