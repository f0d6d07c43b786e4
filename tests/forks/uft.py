"""UFT and Prefix-RFT (2505.16984, 2507.01679): every sample continues a prefix of the solution,
whose length goes to 0 in the run; the prefix is learnt by likelihood, the sample by reward."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ghpo
import hints

LAST_STEP, WEIGHT = 30, 0.1


def next_ratio(group, config, state):
    if group.stages:
        return None
    return max(0.0, config.hint_ratio[-1] * (1 - state.step / LAST_STEP))


def loss_view(group, j, advantage, plain_ids, config, state):
    completion = group.completions[j]
    prefix = completion.prompt_ids[len(plain_ids) :]
    zeros, ones = [0.0] * len(prefix), [1.0] * len(completion.token_ids)
    likelihood = [WEIGHT] * len(prefix) + [0.0] * len(ones)
    return hints.LossView(plain_ids, prefix + completion.token_ids, zeros + ones, likelihood)


hints.next_ratio, hints.loss_view = next_ratio, loss_view
sys.argv += ["hint_where=assistant"]
if __name__ == "__main__":
    ghpo.main()
