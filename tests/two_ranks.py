"""What two gloo ranks do, for the tests of one process to compare with (fixture two_ranks).

    torchrun --standalone --nproc_per_node 2 tests/two_ranks.py DIR

A step of the real program first, then gradients under every sharding, then uneven sampling.
"""

import json
import os
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import (
    ScriptedPool,
    compute_exactly,
    make_config,
    new_engine,
    problem,
    recorded_groups,
    sampling,
    settings,
)
from torch import distributed as dist

import fsdp_utils
import ghpo
from rollout import Group


def one_step(folder):
    """ghpo.py itself; both ranks together take the batch that one process takes in test_run."""
    config = folder / "config.json"
    config.write_text(json.dumps(settings(
        max_steps=1, per_device_train_batch_size=2, output_dir=str(folder / "run"))))  # fmt: skip
    sys.argv = ["ghpo.py", "--config", str(config)]
    ghpo.main()


def new_run(rank, sharding, **changes):
    config = make_config(torch_dtype="float64", max_grad_norm=0.0, sharding=sharding,
                         micro_batch_tokens=40, gradient_checkpointing=sharding == "zero2",
                         **changes)  # fmt: skip
    run = SimpleNamespace(config=config, compute_dtype=torch.float64, master_dtype=torch.float64,
                          rank=rank, world=2, reference=None, trigger_column=0,
                          state=ghpo.State(), device=torch.device("cpu"))  # fmt: skip
    run.policy = compute_exactly(ghpo.load_policy(config))
    run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=0.0)
    return run


def weights_of(policy):
    return torch.cat([t.flatten().clone() for _, t in fsdp_utils.full_tensors(policy)])


def gradients(rank, folder):
    """How far one step of plain descent moves the weights, groups split 3:1 and 4:0."""
    for sharding, (split, loss_type) in product(
        ("zero3", "zero2", "ddp"), ((3, "bnpo"), (4, "dapo"))
    ):
        run = new_run(rank, sharding, loss_type=loss_type)
        groups = recorded_groups(sizes=(4, 4, 4, 4))
        groups = groups[:split] if rank == 0 else groups[split:]
        before = weights_of(run.policy)
        prompts = ghpo.Prompts(run.config, run.state)
        rows = ghpo.make_rows(groups, prompts, run.config, run.state)
        used = [row for row in rows if row.advantage]
        counts = fsdp_utils.gather_objects(
            len(ghpo.micro_batches(used, run.config.micro_batch_tokens, False))
        )
        metrics = ghpo.optimize(run, rows, 1.0)
        moved = before - weights_of(run.policy)
        if rank == 0:
            torch.save({"moved": moved, "metrics": metrics, "micro_batches": counts},
                       folder / f"moved_{sharding}_{loss_type}.pt")  # fmt: skip


def uneven_sampling(rank, folder):
    """Rank 0 decodes 60 tokens of 3 problems, rank 1 two tokens of one, then none at all."""
    run = new_run(rank, "zero3")
    run.prompts = ghpo.Prompts(run.config, run.state)
    run.engine, run.pool = new_engine(run.policy), ScriptedPool(lambda step, slot: 0)
    run.rank, run.world = 0, 1  # so that each samples all that it is given
    tokens = []
    for count in ([3, 1][rank], [2, 0][rank]):
        blank = [Group(problem(i)) for i in range(count)]
        groups = ghpo.sample_groups(run, blank, sampling(1.0, [60, 2][rank]), 0)
        tokens.append([[c.token_ids for c in group.completions] for group in groups])
    gathered = fsdp_utils.gather_objects(tokens)
    ghpo.optimize(
        run, ghpo.make_rows([], run.prompts, run.config, run.state), 0.0
    )  # the shards are back
    if rank == 0:
        (folder / "uneven.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    one_step(folder)
    gradients(dist.get_rank(), folder)
    uneven_sampling(dist.get_rank(), folder)
    fsdp_utils.barrier("done")
    os._exit(0)  # as ghpo.py ends
