"""Survival: kills and resume, another number of ranks, HSDP gradients, export. gloo on the CPU."""

import json
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import soak_resume
import torch
import yaml
from conftest import row

import configs.settings
import fsdp_utils
import ghpo
import hints
from rollout import Completion, Group

TINY = Path(__file__).parent / "tiny"


torch.set_num_threads(1)  # before any work: a process with threads of OpenMP must not be forked


def config(**settings):
    base = {
        "model_name_or_path": str(TINY / "base"),
        "max_prompt_length": 128,
        "dataset_name": str(TINY / "data" / "train.jsonl"),
        "torch_dtype": "float64",
        "num_generations": 4,
        "max_completion_length": 48,
        "engine": "hf",
    }
    return configs.settings.make_config(base | settings)


# ---- what runs in forked ranks ----


def recorded_groups(c, n=7):
    """n groups of uneven lengths and rewards; one has no advantage, one is truncated."""
    rng = np.random.default_rng(3)
    prompts = ghpo.Prompts(c, ghpo.State())
    groups = []
    for number, problem in enumerate(ghpo.load_problems(c, prompts)[:n]):
        completions = []
        for _ in range(c.num_generations):
            length = int(rng.integers(1, 30))
            completions.append(
                Completion(
                    prompts.ids(problem)[0],
                    rng.integers(4, 200, length).tolist(),
                    (-rng.uniform(1, 15, length)).tolist(),
                    "length" if number == 2 else "stop",
                    0.0,
                )
            )
        rewards = np.zeros((4, 2)) if number == 1 else rng.integers(0, 2, (4, 2)).astype(float)
        groups.append(
            Group(problem, [hints.Stage([0.0] * 4, [""] * 4)], completions, rewards.tolist())
        )
    return prompts, groups


class Capture(torch.optim.SGD):
    """Keeps the whole gradients instead of taking a step."""

    def step(self):
        self.seen = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def gradients(place, replicas, **settings):
    """Gradients of one step on the recorded groups through ghpo's own rows and loss."""
    c = config(max_grad_norm=0.0, micro_batch_tokens=200, replicas=replicas, **settings)
    run = SimpleNamespace(
        config=c,
        device=place.device,
        rank=place.rank,
        world=place.world,
        master_dtype=torch.float64,
        compute_dtype=torch.float64,
        reference=None,
        state=ghpo.State(),
    )
    prompts, groups = recorded_groups(c)
    run.policy = ghpo.load_policy(c)
    if c.beta:
        run.reference = ghpo.load_policy(c).requires_grad_(False).eval()
        with torch.no_grad():  # another policy than the reference's
            for p in run.reference.parameters():
                p.mul_(1.01)
    run.optimizer = Capture(run.policy.parameters(), lr=1.0)
    metrics = ghpo.optimize(
        run, ghpo.make_rows(groups[place.rank :: place.world], prompts, c, run.state), 1.0
    )
    return run.optimizer.seen, metrics


CASES = [
    {"loss_type": "bnpo"},
    {"loss_type": "dapo", "mask_truncated_completions": True},
    {"loss_type": "grpo", "beta": 0.1},
]


def save_gradients(folder):
    place = fsdp_utils.setup_distributed()
    results = [gradients(place, 2 if place.world == 4 else 1, **case) for case in CASES]
    if place.rank == 0:
        (Path(folder) / f"gradients-{place.world}").write_bytes(pickle.dumps(results))
    fsdp_utils.barrier("gradients are there")


def compare_export(folder, out_file):
    """Greedy text of the resumed trainer and of transformers on the exported folder."""
    from conftest import sampling, unhinted
    from transformers import AutoModelForCausalLM

    from rollout import Request

    saved = yaml.safe_load((Path(folder) / "config.yaml").read_text())
    saved["per_device_train_batch_size"] *= 2  # one rank instead of two: as many prompts a step
    run = ghpo.setup(configs.settings.make_config(saved))
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    texts = []
    for number, problem in enumerate(run.problems[:6]):
        ids = run.prompts.ids(problem)[0]
        run.engine.submit(
            Request(problem, unhinted(1), [ids], [""], number, sampling(0.0, 48), number)
        )
    run.engine.wake()
    ours = {}
    while run.engine.is_busy():
        for request, (completion,) in run.engine.poll():
            ours[request.slot] = completion.token_ids
    for number, problem in enumerate(run.problems[:6]):
        ids = torch.tensor([run.prompts.ids(problem)[0]])
        out = model.generate(
            ids, do_sample=False, max_new_tokens=48, attention_mask=torch.ones_like(ids)
        )
        texts.append((out[0, ids.shape[1] :].tolist(), ours[number]))
    run.pool.close()
    out_file.write_text(json.dumps({"texts": texts, "step": run.state.step}))


# ---- tests ----


def run_ranks(world, log, work):
    soak_resume.end_well(soak_resume.fork(world, log, work), log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def test_killed_runs_end_with_the_same_bits(folder):
    """Three kills over 1 rank inline and 2 ranks deferred, one of them in a checkpoint write."""
    hits, damaged, wrong = soak_resume.soak(folder, kills=3, seed=1)
    assert len(hits) == 3 and "write" in hits
    assert not wrong


def test_what_a_method_remembers_survives_a_kill_and_is_equal_on_two_ranks(tmp_path):
    """state.method holds the ids of every group of every step."""

    def work(folder):
        known = hints.after_step

        def after_step(state, outcomes, config):
            seen = state.method.setdefault("seen", [])
            seen.extend(outcome.problem_id for outcome in outcomes)
            metrics = known(state, outcomes, config)
            os.write(1, f"method {state.step} {seen}\n".encode())  # past pytest's own stdout
            return {**metrics, "seen": len(seen)}

        hints.after_step = after_step
        sys.argv = [
            "ghpo.py",
            "--config",
            "configs/tiny.yaml",
            *soak_resume.SETTINGS,
            "save_steps=1",
            f"output_dir={folder}",
            "per_device_train_batch_size=8",
            "max_steps=4",
        ]
        ghpo.main()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    soak_resume.end_well(soak_resume.fork(2, whole, lambda: work(whole)), whole)
    pids = soak_resume.fork(2, killed, lambda: work(killed))
    while not (killed / "checkpoint-000002").exists():
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    soak_resume.wait(pids)
    assert not (killed / "model").exists()  # it was in the middle
    soak_resume.end_well(soak_resume.fork(2, killed, lambda: work(killed)), killed)
    states = [
        json.loads((folder / "checkpoint-000004" / "state.json").read_text())
        for folder in (whole, killed)
    ]
    assert states[0]["method"] == states[1]["method"]
    assert len(states[0]["method"]["seen"]) == 4 * 4  # 4 problems a step
    assert [line["seen"] for line in conftest.read_jsonl(killed / "metrics.jsonl")] == [
        4,
        8,
        12,
        16,
    ]
    logs = [
        [
            line
            for line in Path(f"{whole}.log{rank}").read_text().splitlines()
            if line.startswith("method")
        ]
        for rank in (0, 1)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_a_signal_finishes_the_step_on_all_ranks_and_saves(number, status, tmp_path):
    """It reaches one of two ranks; the run resumes to the end."""
    folder = tmp_path / "run"
    pids = soak_resume.start(folder, 2, "inline", "save_steps=100", "max_steps=30")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    (second,) = [pid for pid, rank in pids.items() if rank == 1]
    os.kill(second, number)
    statuses = [os.waitstatus_to_exitcode(one) for one in soak_resume.wait(pids).values()]
    assert statuses == [status, status]
    (saved,) = fsdp_utils.checkpoints(folder)
    step = int(saved.name.split("-")[1])
    lines = conftest.read_jsonl(folder / "metrics.jsonl")
    assert lines[-1]["step"] == step < 30  # the step was finished, and no other begun
    soak_resume.finish(folder, 2, "inline", "save_steps=100", f"max_steps={step + 1}")
    assert "resuming" in Path(f"{folder}.log0").read_text()
    assert conftest.read_jsonl(folder / "metrics.jsonl")[:-1] == lines


def test_a_finished_run_can_be_extended(tmp_path):
    """With a constant rate it is the longer run bit for bit; a decaying one tells of its change."""
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = ("lr_scheduler_type=constant", "warmup_steps=0", "save_total_limit=1")
    soak_resume.finish(whole, 1, "inline", *constant, "max_steps=4")
    soak_resume.finish(longer, 1, "inline", *constant, "max_steps=2")
    soak_resume.finish(longer, 1, "inline", *constant, "max_steps=4")
    assert not soak_resume.differences(longer, soak_resume.traces(whole))
    assert "goes on" not in Path(f"{longer}.log0").read_text()
    decaying = tmp_path / "decaying"
    soak_resume.finish(decaying, 1, "inline", "max_steps=2")
    soak_resume.finish(decaying, 1, "inline", "max_steps=3")
    told = Path(f"{decaying}.log0").read_text()
    assert re.search("max_steps.* 2 .* 3: the linear rate goes on by the new one", told)


def test_two_ranks_continue_on_one_with_the_same_data_order(folder):
    soak_resume.finish(folder / "moved", 2, "inline", "max_steps=4")
    config_file = folder / "moved" / "config.yaml"
    config_file.write_text(config_file.read_text().replace("max_steps: 4", "max_steps: 6"))
    soak_resume.finish(folder / "moved", 1, "inline")
    reference = folder / "whole-1-inline"

    def problems(run, step):
        lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return sorted(json.loads(line)["id"] for line in lines)

    for step in range(1, 7):
        assert problems(folder / "moved", step) == problems(reference, step)
        assert len(set(problems(reference, step))) == 8


def test_first_step_samples_the_same_on_any_number_of_ranks(folder):
    """Same problems, seeds and texts; order and rounding (of the trainer) may differ."""
    one, two = (
        {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in (
            folder / f"whole-{kind}" / "rollouts" / "step_000001.jsonl"
            for kind in ("1-inline", "2-deferred")
        )
    )
    assert one == two


def test_export_loads_in_transformers_with_the_same_greedy_text(folder):
    trained = folder / "whole-2-deferred"
    run_ranks(1, folder / "export", lambda: compare_export(trained, folder / "greedy.json"))
    result = json.loads((folder / "greedy.json").read_text())
    assert result["step"] == 6 and sum(len(ids) for ids, _ in result["texts"]) > 60
    assert all(ours == theirs for ours, theirs in result["texts"])


def test_hsdp_two_by_two_gives_the_gradients_of_one_process(folder):
    for ranks in (1, 4):
        run_ranks(ranks, folder / "gradients", lambda: save_gradients(folder))
    alone, four = (pickle.loads((folder / f"gradients-{n}").read_bytes()) for n in (1, 4))
    for (ours, metrics), (theirs, same_metrics), case in zip(alone, four, CASES):
        assert max(g.abs().max() for g in ours) > 1e-3
        worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs))
        assert worst < 1e-9, (case, worst)
        for key in ("loss", "grad_norm", "entropy", "mismatch_k3"):
            assert metrics[key] == pytest.approx(same_metrics[key], abs=1e-9)


TABLES = {"foreign.yaml", "verifier.yaml", "benchmarks.yaml"}  # nothing is trained
CONFIGS = [p for p in sorted((soak_resume.ROOT / "configs").glob("*.yaml")) if p.name not in TABLES]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_their_arithmetic_is_right(path):
    c = ghpo.load_config(path)
    text = path.read_text().replace("\n# ", " ")
    ranks, per_device, accumulation, generations, prompts = map(
        int,
        re.search(
            r"(\d+) ranks? \* (\d+) per device \* (\d+) accumulation / (\d+) generations\s+= (\d+)",
            text,
        ).groups(),
    )
    assert (per_device, accumulation, generations) == (
        c.per_device_train_batch_size,
        c.gradient_accumulation_steps,
        c.num_generations,
    )
    assert ranks * per_device * accumulation == prompts * generations
    assert ranks % c.replicas == 0


def test_padded_micro_batches_hold_three_percent_of_padding():
    """112 problems by 8 samples with a long tail of lengths, as GSM8K and MATH have."""
    lengths = np.random.default_rng(0).lognormal(4.7, 0.6, 896).astype(int) + 20
    rows = [row(n) for n in lengths]
    batches = [[len(row.input_ids) for row in b] for b in ghpo.micro_batches(rows, 16384, False)]
    computed = sum(max(batch) * len(batch) for batch in batches)
    assert sum(map(len, batches)) == 896 and len(batches) < 60
    assert 1 - lengths.sum() / computed < 0.03
