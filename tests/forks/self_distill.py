"""On-policy self-distillation (2601.19897, 2606.04036): the samples of a failed group are scored by
the same model with the solution in its prompt, and what that adds to a token's log-prob weighs the
token's log-likelihood. Nothing is sampled again. One process only: ranks would not agree on
forwards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ghpo
import hints

LIMIT = 1.0  # of a token's weight
plain_view, plain_optimize = hints.loss_view, ghpo.optimize
problem_of = {}  # {ids of a failed sample: its problem}, of the present step


def loss_view(group, j, advantage, plain_ids, config, state):
    if hints.needs_hint(group, config, state):
        problem_of[(*plain_ids, *group.completions[j].token_ids)] = group.problem
    return plain_view(group, j, advantage, plain_ids, config, state)


@torch.no_grad()
def logp(run, context, targets):
    row = ghpo.Row.weightless(context + targets, len(context))
    inputs, _ = ghpo.collate([row], run.config.packing, run.device, run.master_dtype)
    return run.policy(**inputs, temperature=run.config.temperature)[0]


def optimize(run, rows, lr):
    for row in rows:
        problem = problem_of.get(tuple(row.input_ids))
        if problem is not None:
            context, targets = row.input_ids[: row.n_context], row.input_ids[row.n_context :]
            taught, _ = run.prompts.ids(problem, problem.solution)
            added = logp(run, taught, targets) - logp(run, context, targets)
            row.sft_weight = added.clamp(-LIMIT, LIMIT).tolist()
    problem_of.clear()
    return plain_optimize(run, rows, lr)


hints.loss_view, ghpo.optimize = loss_view, optimize
sys.argv += ["start_hint_step=1000000"]  # solutions are read, no group is asked again
if __name__ == "__main__":
    ghpo.main()
