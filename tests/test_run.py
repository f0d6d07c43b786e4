"""The program as a user meets it: bad input, the reference's config, real data, equal runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import BASE, DATA, ROOT, SHARED, ScriptedPool, read_jsonl, settings, write_jsonl

import configs.folder
import ghpo
import hints

MODULES = ("ghpo", "rollout", "hints", "reward", "fsdp_utils")


# ---- bad input ---------------------------------------------------------------------------------


def tokenizer_without(key):
    """A config change that makes the model one whose tokenizer lacks something."""

    def change(folder):
        model = folder / "model"
        shutil.copytree(BASE, model)
        settings_path = model / "tokenizer_config.json"
        kept = json.loads(settings_path.read_text())
        kept.pop(key, None)
        settings_path.write_text(json.dumps(kept))
        if key == "chat_template":
            (model / "chat_template.jinja").unlink()
        return {"model_name_or_path": str(model)}

    return change


@pytest.mark.parametrize("change, message", [
    (lambda folder: {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
     "3 .* 2 = 6 is not divisible by num_generations 4"),
    (tokenizer_without("chat_template"), "no chat template"),
    (lambda folder: {"model_name_or_path": str(folder / "no_model")}, "no_model"),
])  # fmt: skip
def test_bad_input_ends_with_one_message(change, message, main, tmp_path):
    done = main(tmp_path, "--dry_run", **change(tmp_path))
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, done.err)
    assert "Traceback" not in done.err


def test_output_folder_of_another_run(main, tmp_path):
    first = main(tmp_path, max_steps=1)
    assert first.status == 0 and (first.folder / "model" / "config.json").is_file()
    again = main(tmp_path, max_steps=1)  # the same run: resumed, nothing left to do
    assert again.status == 0 and "resuming" in again.err
    other = main(tmp_path, max_steps=1, learning_rate=0.5)
    assert other.status == 2 and "Traceback" not in other.err
    assert re.search("error: output_dir=.* holds another run .*learning_rate.*", other.err)
    lines = read_jsonl(first.folder / "metrics.jsonl")
    moved = main(tmp_path, max_steps=1, learning_rate=0.5, overwrite_output_dir=True)
    assert moved.status == 0
    old = [p for p in tmp_path.iterdir() if p.is_dir() and p != moved.folder]
    assert [read_jsonl(p / "metrics.jsonl") for p in old] == [lines]


def test_exit_status_of_the_process(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(hint_ratio=[0.5, 1.5], output_dir=str(tmp_path / "out"))))
    done = subprocess.run([sys.executable, "ghpo.py", "--config", str(config)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: config: hint_ratio=[0.5, 1.5]")
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


# ---- the reference's config, dry run -----------------------------------------------------------


def test_dry_run_shows_every_stage(main, tmp_path):
    rows = read_jsonl(DATA / "eval_hard.jsonl")[:9]
    done = main(tmp_path, "--dry_run", dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows))
    assert done.status == 0 and not done.folder.exists()
    assert "4 prompts a step" in done.err and "9 of 9 rows usable" in done.err
    printed = yaml.safe_load(done.out.split("\n----")[0])
    assert printed["num_generations"] == 4 and printed["hint_ratio"] == [0.25, 0.5, 0.75]
    trace = rows[0]["solution_hint"]
    head = f"<|user|>{rows[0]['problem']}"
    tail = "<|end|><|assistant|>\n"
    assert head + tail in done.out
    for end in (7, 15, 23):  # 2, 4 and 6 steps
        assert f"{head}{hints.HINT_SENTENCE}{trace[:end]}{tail}" in done.out
    for omega in ("0", "0.25", "0.5", "0.75"):
        assert f"omega {omega}, " in done.out
    assert "bytes per GPU" in done.out


# ---- real data: acceptance 3 -------------------------------------------------------------------


def acceptance_arguments(data, folder):
    return [
        "--config", str(SHARED / "config_ghpo.yaml"), "hint_ratio=[0.25,0.5,0.75]",
        f"model_name_or_path={BASE}", f"dataset_name={data}", "max_steps=2",
        "use_vllm=false", "bf16=false", "torch_dtype=float32", "attn_implementation=sdpa",
        "push_to_hub=false", "report_to=[]", "gradient_accumulation_steps=4",
        "max_completion_length=32", f"output_dir={folder}", "num_generations=4",
        "per_device_train_batch_size=4"]  # fmt: skip


@pytest.mark.parametrize("name", ["gsm8k_train", "math500_dev"])
def test_real_problems(name, main, tmp_path):
    if not (SHARED / f"{name}.jsonl").exists():
        pytest.skip("no shared data")
    source = read_jsonl(SHARED / f"{name}.jsonl")  # shorter ones: this model reads bytes
    source = [r for r in source if len(r["problem"]) + len(r["solution_hint"]) < 700][:60]
    arguments = acceptance_arguments(write_jsonl(tmp_path / "data.jsonl", source), tmp_path / "out")
    if name == "gsm8k_train":
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "1",
            "ghpo.py",
        ]
        done = subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, capture_output=True,
                              text=True, timeout=180)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert main.command(*arguments).status == 0
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    ratios = set()
    for step, told in zip((1, 2), metrics):
        lines = read_jsonl(tmp_path / "out" / "rollouts" / f"step_{step:06d}.jsonl")
        assert len(lines) == 4 and len({line["id"] for line in lines}) == 4
        for line in lines:
            row = source[line["id"]]
            check_line(line, row)
            ratios |= {max(s["ratios"]) for s in line["stages"] if not s["is_skipped"]}
        stages = [s for line in lines for s in line["stages"]]
        assert told["tokens/generated"] == sum(sum(s["lengths"]) for s in stages)
        assert told["hint/skipped"] == sum(s["is_skipped"] for s in stages)
        assert told["hint/trimmed"] == sum(s["is_trimmed"] for s in stages)
        for omega in ("0", "0.25", "0.5", "0.75"):
            at = [s for s in stages if max(s["ratios"]) == float(omega) and not s["is_skipped"]]
            assert told.get(f"hint/tried@{omega}", 0) == len(at)
            assert told.get(f"hint/solved@{omega}", 0) == sum(any(s["passes"]) for s in at)
            assert told.get(f"tokens/generated@{omega}", 0) == sum(sum(s["lengths"]) for s in at)
        plain = [line["stages"][0]["passes"] for line in lines]
        assert told["accuracy_without_hint"] == sum(map(sum, plain)) / 16
        assert told["hard_fraction"] == sum(not any(passes) for passes in plain) / 4
        assert told["hint/unsolved"] == sum(not any(line["stages"][-1]["passes"]) for line in lines)
        for phase in ("generate", "train"):
            assert told[f"seconds/{phase}"] > 0
        assert told["mismatch_k3"] < 1e-4
    assert len(ratios) > 1  # the ladder shows


def check_line(line, row):
    """One group of a rollouts file against its row of the data set."""
    assert line["problem"] == row["problem"] and row["problem"] in line["prompt"]
    assert len(line["completions"]) == 4
    for sample in line["completions"]:
        assert set(sample) >= {"text", "accuracy", "format", "finish_reason"}
        assert sample["accuracy"] in (0, 1) and sample["format"] in (0, 1)
        assert sample["finish_reason"] in ("stop", "length")
    hint, trace = line["hint"], row["solution_hint"].rstrip()
    assert (line["hint_ratio"] > 0) == bool(hint)
    assert trace.startswith(hint) and len(hint) <= line["hint_ratio"] * len(trace) + 1
    if hint:
        assert line["prompt"].count(hints.HINT_SENTENCE + hint) == 1
        markers = [m for m in ("\\boxed", "####", "answer is", "<answer>") if m in trace.lower()]
        assert not any(m in hint.lower() for m in markers)
    else:
        assert hints.HINT_SENTENCE not in line["prompt"]
    ratios = [max(s["ratios"]) for s in line["stages"]]
    assert ratios == sorted(ratios) and ratios[0] == 0
    if not any(line["stages"][-1]["passes"]):
        assert ratios == [0, 0.25, 0.5, 0.75]
    last = [s for s in line["stages"] if not s["is_skipped"]][-1]
    assert last["hints"] == [hint] * 4 and max(last["ratios"]) == line["hint_ratio"]


# ---- equal runs --------------------------------------------------------------------------------


def timeless(path):
    return [{k: v for k, v in line.items() if not k.startswith("seconds/") and k != "tokens/s"}
            for line in read_jsonl(path)]  # fmt: skip


def test_two_runs_with_one_seed_are_bit_identical(main, tmp_path):
    """One in this process, one in its own, where strings hash differently."""
    rows = read_jsonl(DATA / "eval_hard.jsonl")[:30] + read_jsonl(DATA / "eval_easy.jsonl")[:30]
    changes = dict(dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows), max_steps=3, beta=0.01,
                   temperature=1.3, learning_rate=1e-2, num_iterations=2)  # fmt: skip
    here = main(tmp_path, **changes)
    assert here.status == 0
    there = tmp_path / "there"
    command = [sys.executable, "ghpo.py", "--config", str(tmp_path / "config.json")]
    done = subprocess.run(
        [*command, f"output_dir={there}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert timeless(here.folder / "metrics.jsonl") == timeless(there / "metrics.jsonl")
    for step in (1, 2, 3):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (here.folder / name).read_text() == (there / name).read_text()
    name = "model/model.safetensors"
    assert (here.folder / name).read_bytes() == (there / name).read_bytes()
    assert (here.folder / name).read_bytes() != (BASE / "model.safetensors").read_bytes()
    other = main(tmp_path, **changes, seed=1, output_dir=str(tmp_path / "other"))
    names = [line["id"] for line in read_jsonl(other.folder / "rollouts" / "step_000001.jsonl")]
    assert names != [line["id"] for line in read_jsonl(there / "rollouts" / "step_000001.jsonl")]


def test_first_groups_are_the_same_on_two_ranks(two_ranks, main, tmp_path):
    ours = main(tmp_path, max_steps=1)
    by_id = []
    for folder in (ours.folder, two_ranks / "run"):
        lines = read_jsonl(folder / "rollouts" / "step_000001.jsonl")
        by_id.append({line["id"]: line for line in lines})
    assert len(by_id[0]) == 4 and by_id[0] == by_id[1]
    one, two = (timeless(f / "metrics.jsonl")[0] for f in (ours.folder, two_ranks / "run"))
    assert set(one) == set(two)
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key


# ---- the loop ----------------------------------------------------------------------------------


def hard_rows(n=12):
    return read_jsonl(DATA / "eval_hard.jsonl")[:n]


def metrics_of(run):
    return read_jsonl(run.folder / "metrics.jsonl")


def test_deferred_hints_come_in_the_next_step(scripted_training):
    """Slot 3 passes at once, the others with their first hint."""
    run, seen, steps = scripted_training(
        lambda step, slot: int(slot < 3), hard_rows(), hint_timing="deferred", max_steps=3,
        max_completion_length=8)  # fmt: skip
    ratios = [[line["hint_ratio"] for line in lines] for lines in steps]
    assert ratios == [[0] * 4, [0.25, 0.25, 0, 0], [0.25, 0.25, 0, 0]]  # half the places return
    assert [[len(line["stages"]) for line in lines] for lines in steps] == [
        [1] * 4, [2, 2, 1, 1], [2, 2, 1, 1]]  # fmt: skip
    ids = [[line["id"] for line in lines] for lines in steps]
    assert ids[1][:2] == ids[0][:2] and ids[2][:2] == [ids[0][2], ids[1][2]]  # first in, first out
    assert len({*ids[0], *ids[1][2:], *ids[2][2:]}) == 8
    metrics = metrics_of(run)
    assert [line["queue"] for line in metrics] == [3, 2, 1]
    assert [i for i, _ in run.state.queue] == [ids[2][2]]
    # a group that passes has one right sample of 4; returning problems are left out of two lines
    assert [line["accuracy_without_hint"] for line in metrics] == [0.25 / 4, 0.25 / 2, 0.25 / 2]
    assert [line["hard_fraction"] for line in metrics] == [0.75, 0.5, 0.5]
    assert [line["reward/accuracy"] for line in metrics] == [1 / 16, 3 / 16, 3 / 16]
    for groups, rows in seen:  # a failed group is trained on as it is; one generation a step
        assert len(groups) == 4 and len(rows) == 16
    generated = [len(c.token_ids) for groups, _ in seen for g in groups for c in g.completions]
    logged = [sum(line["stages"][-1]["lengths"]) for lines in steps for line in lines]
    assert sum(generated) == sum(logged)


def test_no_problem_is_twice_in_a_step(scripted_training):
    """6 problems, 4 a step, none ever solved: those that return are soon due as fresh ones too."""
    changes = {"reward_weights": [1.0, 0.0], "max_completion_length": 2, "learning_rate": 0.0}
    run, _, steps = scripted_training(
        lambda step, slot: 9, hard_rows(6), hint_timing="deferred", max_steps=9, **changes
    )
    ids = [[line["id"] for line in lines] for lines in steps]
    assert [len(set(step)) for step in ids] == [4] * 9
    assert set().union(*ids) == {0, 1, 2, 3, 4, 5}
    run, _, steps = scripted_training(
        lambda step, slot: 9, hard_rows(6), rl_type="grpo", flat_groups="replace",
        replace_rounds=3, max_steps=3, **changes)  # fmt: skip
    for lines in steps:  # 4 and the 2 others, for no more are left
        assert sorted(line["id"] for line in lines) == [0, 1, 2, 3, 4, 5]


def test_generated_tokens_count_every_sample_once(scripted_training):
    for timing in ("inline", "deferred"):
        run, seen, _ = scripted_training(
            lambda step, slot: 1, hard_rows(), hint_timing=timing, max_steps=2,
            max_completion_length=8, learning_rate=0.0)  # fmt: skip
        # all 8 tokens are used: 4 groups x 4 samples x 8 tokens, twice when inline
        expected = 128 * (2 if timing == "inline" else 1)
        assert [line["tokens/generated"] for line in metrics_of(run)] == [expected] * 2


def test_curriculum_goes_from_easy_to_hard(scripted_training):
    rows = [row | {"level": f"Level {(7 * i) % 12}"} for i, row in enumerate(hard_rows())]
    for curriculum in (True, False):
        run, _, steps = scripted_training(
            lambda step, slot: 0, rows, rl_type="grpo", curriculum=curriculum, max_steps=3,
            max_completion_length=4)  # fmt: skip
        levels = [(7 * line["id"]) % 12 for lines in steps for line in lines]
        assert sorted(levels) == list(range(12))
        assert (levels == list(range(12))) == curriculum


def test_a_curriculum_leaves_out_some_problems_not_the_hardest(scripted_training):
    rows = [row | {"level": i} for i, row in enumerate(hard_rows(10))]
    run, _, steps = scripted_training(
        lambda step, slot: 0, rows, rl_type="grpo", curriculum=True, max_steps=8,
        max_completion_length=2)  # fmt: skip
    levels = [[line["id"] for line in lines] for lines in steps]
    epochs = [levels[i] + levels[i + 1] for i in (0, 2, 4, 6)]
    assert all(epoch == sorted(set(epoch)) and len(epoch) == 8 for epoch in epochs)
    assert any(8 in epoch or 9 in epoch for epoch in epochs)


@pytest.mark.parametrize("changes, kept", [
    ({"hint_exhausted": "drop"}, [0, 2]),
    ({"hint_exhausted": "keep"}, [0, 1, 2, 3]),
    ({"hint_exhausted": "drop", "rl_type": "grpo"}, [0, 1, 2, 3]),
    ({"hint_exhausted": "drop", "start_hint_step": 1}, [0, 1, 2, 3]),
    ({"hint_exhausted": "drop", "hint_ratio": []}, [0, 2]),  # detection only
])  # fmt: skip
def test_groups_that_fail_the_last_stage(changes, kept, scripted_training):
    """Slots 1 and 3 fail everything."""
    run, seen, lines = scripted_training(
        lambda step, slot: 9 * (slot % 2), hard_rows(), max_steps=1, max_completion_length=4,
        loss_type="grpo", **changes)  # fmt: skip
    groups, rows = seen[0]
    assert [g.problem.id for g in groups] == [lines[0][slot]["id"] for slot in kept]
    weight = 1 / (4 * len(kept)) / 4  # counts of the kept
    assert [row.token_weight for row in rows] == [weight] * 4 * len(kept)
    assert len(lines[0]) == 4 and metrics_of(run)[0]["hint/unsolved"] == 2


@pytest.mark.parametrize("flat, n_sampled, n_trained", [
    ("keep", 4, 4), ("drop", 4, 2), ("replace", 7, 4)])  # fmt: skip
def test_groups_whose_rewards_are_all_alike(flat, n_sampled, n_trained, scripted_training):
    """Odd slots fail. Replaced: slots 1 and 3 by two fresh problems, the second of them by one."""
    run, seen, lines = scripted_training(
        lambda step, slot: 9 * (slot % 2), hard_rows(20), rl_type="grpo", flat_groups=flat,
        reward_weights=[1.0, 0.0], max_steps=2, max_completion_length=4,
        loss_type="grpo")  # fmt: skip
    for (groups, rows), step in zip(seen, lines, strict=True):
        assert len(step) == n_sampled and len({line["id"] for line in step}) == n_sampled
        assert len(groups) == n_trained and len(rows) == 4 * n_trained
        assert all(row.token_weight == 1 / (4 * n_trained) / 4 for row in rows)
    assert run.state.cursor == 2 * n_sampled
    generated = [line["tokens/generated"] for line in metrics_of(run)]
    assert generated == [n_sampled * 4 * 4] * 2, "what was thrown away was generated too"


def test_how_much_hinted_samples_owe_to_their_hints(scripted_training):
    """Against the model's own logits, one sample at a time."""
    run, seen, lines = scripted_training(
        lambda step, slot: slot % 2, hard_rows(), max_steps=1, max_completion_length=60,
        learning_rate=0.0, reliance_steps=1)  # fmt: skip
    groups, _ = seen[0]
    model, gaps = run.policy.model, []
    for completion in [c for group in groups for c in group.completions if c.hint]:
        (group,) = [group for group in groups if completion in group.completions]
        sums = []
        for context in (completion.prompt_ids, run.prompts.ids(group.problem)[0]):
            ids = torch.tensor([[*context, *completion.token_ids]])
            logp = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
            sums.append(logp.gather(-1, ids[0, len(context) :, None]).squeeze(-1))
        gaps.append(sums[0] - sums[1])
    expected = torch.cat(gaps).mean().item()
    assert len(gaps) == 8 and abs(expected) > 1e-3
    assert metrics_of(run)[0]["hint/reliance"] == pytest.approx(expected, rel=1e-3)


def test_replacing_ends_when_nothing_helps(scripted_training):
    run, seen, lines = scripted_training(
        lambda step, slot: 9, hard_rows(20), rl_type="grpo", flat_groups="replace",
        reward_weights=[1.0, 0.0], replace_rounds=2, max_steps=1,
        max_completion_length=4)  # fmt: skip
    assert len(lines[0]) == 12 and seen[0] == ([], [])
    assert metrics_of(run)[0]["grad_norm"] == 0


def test_an_epoch_meets_every_problem_once_and_no_step_has_one_twice(scripted_training):
    run, _, steps = scripted_training(
        lambda step, slot: 0, hard_rows(10), rl_type="grpo", max_steps=6, max_completion_length=2
    )
    ids = [[line["id"] for line in lines] for lines in steps]
    assert all(len(set(step)) == 4 for step in ids)
    for epoch in (0, 2, 4):  # two whole steps of ten problems; the rest of an epoch is left out
        assert len({*ids[epoch], *ids[epoch + 1]}) == 8
    assert ids[:2] != ids[2:4]


def test_evaluation_is_in_the_metrics(main, tmp_path):
    sets = {}
    for tier in ("easy", "hard"):
        sets[tier] = write_jsonl(
            tmp_path / f"{tier}.jsonl", read_jsonl(DATA / f"eval_{tier}.jsonl")[:3]
        )
    sets["short"] = {"dataset_name": sets["easy"], "max_completion_length": 3, "eval_samples": 1}
    done = main(tmp_path, eval_strategy="steps", eval_steps=2, eval_samples=2, eval_temperature=1.0,
                eval_datasets=sets, max_steps=3, max_completion_length=70)  # fmt: skip
    assert done.status == 0
    lines = read_jsonl(done.folder / "metrics.jsonl")
    tested = [line for line in lines if "eval/easy" in line]
    assert [line["step"] for line in tested] == [0, 2, 3]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    first = tested[0]
    assert (first["eval/easy"], first["eval/hard"], first["eval/short"]) == (1.0, 0.0, 0.0)
    assert first["eval/easy_pass@2"] == 1.0 and first["eval/hard_pass@2"] == 0.0
    assert first["eval/easy_stderr"] == first["eval/hard_stderr"] == 0.0
    assert not any(key.startswith("eval/short_pass") for key in first)
    only = main(tmp_path, "--eval", eval_datasets=sets, max_completion_length=70,
                output_dir=str(tmp_path / "only"))  # fmt: skip
    lines = read_jsonl(only.folder / "eval.jsonl")
    assert only.status == 0 and len(lines) == 1 and lines[0]["eval/easy"] == 1.0
    table = json.loads((only.folder / "eval.json").read_text())
    assert list(table) == ["easy", "hard", "short"]
    assert table["easy"] == {
        "n": 3, "k": 1, "pass@1": 1.0, "stderr": 0.0, "truncated": 0.0,
        "mean_tokens": table["easy"]["mean_tokens"]}  # fmt: skip
    assert table["short"]["truncated"] == 1.0 and table["short"]["mean_tokens"] == 3
    assert json.loads(only.out) == table
    texts = read_jsonl(only.folder / "eval_hard.jsonl")
    assert len(texts) == 3 and all(len(line["completions"]) == 1 for line in texts)


@pytest.mark.parametrize(
    "body, status, told",
    [
        ("return 1 / 0", 2, "failed in all 8 trials: ZeroDivisionError"),
        ("return None", 2, "failed in all 8 trials"),
        # fine with golds and empty texts, which are tried at the start
        (
            "return 1.0 if response in ('', gold) else 1 / (zlib.crc32(response.encode()) % 2)",
            0,
            "texts; last: Zero",
        ),
    ],
)
def test_a_reward_that_fails_is_told(body, status, told, main, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(f"import zlib\ndef boom(response, gold):\n    {body}\n")
    done = main(
        tmp_path,
        reward_funcs=[f"{own}:boom"],
        reward_weights=[1.0],
        max_steps=1,
        hint_trigger=f"{own}:boom",
    )
    assert done.status == status and told in done.err and "Traceback" not in done.err


def test_a_run_that_cannot_learn_ends(main, tmp_path):
    """Rewards that fail for every text but golds and empty ones."""
    own = tmp_path / "own.py"
    own.write_text(
        "def boom(response, gold):\n    return 1.0 if response in ('', gold) else 1 / 0\n"
    )
    done = main(
        tmp_path,
        reward_funcs=[f"{own}:boom"],
        reward_weights=[1.0],
        max_steps=3,
        hint_trigger=f"{own}:boom",
        rl_type="grpo",
    )
    assert done.status == 2 and "Traceback" not in done.err
    assert (
        "error: a reward failed, and is 0, for 16 of 16 texts; last: ZeroDivisionError" in done.err
    )


def test_metrics_are_json_whatever_the_numbers_are(setup):
    run = setup()
    ghpo.write_metrics(run, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    line = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 0,
        "loss": None,
        "grad_norm": None,
        "tokens": 3,
    }


def test_a_folder_that_cannot_be_written_is_one_line(main, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    done = main(tmp_path, output_dir=str(file / "run"))
    assert done.status == 2 and "Traceback" not in done.err
    assert re.search("error: .*Not a directory", done.err) and file.read_text() == "mine"


def test_one_process_at_a_time_writes_a_folder(main, tmp_path):
    first = main(tmp_path, max_steps=1)
    code = (
        f"import fcntl, time; file = open({str(first.folder / 'lock')!r}, 'w'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    configs.folder.locks.clear()  # a process ends with its locks
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    second = main(tmp_path, max_steps=1)
    other.kill()
    assert second.status == 2 and "another process writes there" in second.err


def test_a_folder_in_use_is_not_moved_and_evaluation_moves_none(main, tmp_path):
    first = main(tmp_path, max_steps=1)
    again = {"max_steps": 1, "seed": 5, "overwrite_output_dir": True}
    done = main(tmp_path, "--eval", **again, eval_datasets={"x": str(DATA / "eval_easy.jsonl")})
    assert done.status == 2 and "holds another run (seed differ)" in done.err
    code = (
        f"import fcntl, time; file = open({str(first.folder / 'lock')!r}, 'w'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    configs.folder.locks.clear()  # a process ends with its locks
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    done = main(tmp_path, **again)
    other.kill()
    assert done.status == 2 and "another process writes there" in done.err
    assert (first.folder / "metrics.jsonl").exists()
    assert main(tmp_path, **again).status == 0  # now it is moved
    assert len(list(tmp_path.glob("out.*/metrics.jsonl"))) == 1


def test_a_start_that_failed_claims_no_folder(main, tmp_path):
    first = main(tmp_path, max_steps=1, save_strategy="no")
    (first.folder / "metrics.jsonl").unlink()  # as when it failed before its first step
    shutil.rmtree(first.folder / "checkpoint-000001")
    assert main(tmp_path, max_steps=2, save_strategy="no").status == 0


def test_evaluation_twice_keeps_both_lines(main, tmp_path):
    changes = {
        "eval_datasets": {"x": {"dataset_name": str(DATA / "eval_easy.jsonl")}},
        "eval_max_completion_length": 2,
        "system_prompt": "Think.\n\nThen: answer.",
    }
    for count in (1, 2):
        done = main(tmp_path, "--eval", **changes)
        assert done.status == 0 and len(read_jsonl(done.folder / "eval.jsonl")) == count


def test_own_rewards_decide_what_is_hard_and_what_is_right(setup, tmp_path):
    """Without a reward named accuracy the trigger reward is reported, whatever its place."""
    own = tmp_path / "own.py"
    own.write_text("def right(response, gold):\n    return 0.0\n")
    names = ["format", f"{own}:right"]
    for order in (names, names[::-1]):
        run = setup(reward_funcs=order, hint_trigger=names[1], reward_weights=[1.0, 1.0])
        assert order[run.trigger_column] == order[run.accuracy_column] == names[1]
    run = setup(reward_funcs=["format", "accuracy"], hint_trigger="always")
    assert run.trigger_column == run.accuracy_column == 1


def test_the_start_up_pass_changes_no_bit(main, tmp_path):
    own = tmp_path / "own.py"  # rewards that differ, for gradients
    own.write_text("import zlib\ndef coin(text, gold):\n    return zlib.crc32(text.encode()) % 2\n")
    lines = []
    for is_on in (False, True):
        changes = {
            "output_dir": str(tmp_path / f"{is_on}"),
            "startup_pass": is_on,
            "micro_batch_tokens": 400,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "reward_funcs": [f"{own}:coin"],
            "hint_trigger": f"{own}:coin",
            "reward_weights": [1.0],
            "temperature": 2.0,
        }
        done = main(tmp_path, **changes)
        assert done.status == 0 and ("start-up pass: 2 rows of 192 tokens" in done.err) == is_on
        lines.append((timeless(done.folder / "metrics.jsonl"),
                      (done.folder / "model" / "model.safetensors").read_bytes()))  # fmt: skip
    assert lines[0] == lines[1]
    assert lines[0][0][-1]["grad_norm"] > 0


def test_evaluation_numbers_by_hand(setup, prompts):
    """Verdicts of 4 samples: 1, 0, 2, 4 right of 4."""
    rights = [1, 0, 2, 4]

    class Verdicts(ScriptedPool):
        def submit(self, key, texts, gold, row=None):
            assert len(texts) == 4
            assert not row["strict_answers"] and key[0].stage.hints == [""] * 4
            right = rights[key[0].slot]
            self.waiting.append((0, key, [[float(j < right), 0.0] for j in range(4)]))

    run = setup(eval_datasets={"x": str(DATA / "eval_easy.jsonl")}, eval_samples=4,
                eval_temperature=1.0, eval_max_completion_length=3)  # fmt: skip
    run.pool.close()
    run.eval_sets["x"] = run.eval_sets["x"][0], run.eval_sets["x"][1][:4]
    run = replace(run, pool=Verdicts(None))
    ghpo.evaluate(run)
    told = metrics_of(run)[0]
    assert told["eval/x"] == 7 / 16
    # means .25 0 .5 1: deviations from .4375 squared sum to .546875; / 3 / 4
    assert told["eval/x_stderr"] == pytest.approx((0.546875 / 12) ** 0.5)
    # one of 2: 1 - C(3,2)/C(4,2) = .5; 0; 1 - C(2,2)/6 = 5/6; 1
    assert told["eval/x_pass@2"] == pytest.approx((0.5 + 0 + 5 / 6 + 1) / 4)


class Answers:
    """An engine whose samples are what answer(gold) says, in a box."""

    deterministic = True

    def __init__(self, answer):
        self.answer, self.asked, self.progress = answer, [], None

    def is_busy(self):
        return bool(self.asked)

    def submit(self, request):
        self.asked.append(request)

    def poll(self):
        asked, self.asked = self.asked, []
        for request in asked:
            text = f"So it is \\boxed{{{self.answer(request.problem.gold)}}}."
            done = hints.Completion(request.prompts[0], [1, 2], [0.0, 0.0], "stop", text=text)
            yield request, [done] * len(request.prompts)

    def wake(self):
        pass

    sleep = close = wake

    def update_weights(self, tensors):
        pass


def near_miss(gold):
    """The gold with its last digit one higher; the next letter; else with something added."""
    digits = list(re.finditer(r"\d", gold))
    if digits:
        start, end = digits[-1].span()
        return gold[:start] + str((int(gold[start]) + 1) % 10) + gold[end:]
    letter = re.search(r"(?<=\()[A-Y](?=\))|^[A-Ya-y]$", gold)
    if letter:
        start, end = letter.span()
        return gold[:start] + chr(ord(letter[0]) + 1) + gold[end:]
    return f"{gold} + 1"


GPQA = [  # rows in the format of the hub's gpqa_diamond, of our own
    {"Question": "Which particle mediates the strong force?", "Correct Answer": "The gluon",
     "Incorrect Answer 1": "The photon", "Incorrect Answer 2": "The W boson",
     "Incorrect Answer 3": "The graviton"},
    {"Question": "What is the order of the group $S_4$?", "Correct Answer": "24",
     "Incorrect Answer 1": "4", "Incorrect Answer 2": "16", "Incorrect Answer 3": "256"},
    {"Question": "Which energy has a photon of 1240 nm?", "Correct Answer": "about 1 eV",
     "Incorrect Answer 1": "about 10 eV", "Incorrect Answer 2": "about 0.1 eV",
     "Incorrect Answer 3": "about 1 keV"},
] * 4  # fmt: skip


def test_a_multiple_choice_is_asked_for_its_letter(setup, tmp_path):
    spec = {"dataset_name": write_jsonl(tmp_path / "gpqa.jsonl", GPQA),
            "dataset_prompt_column": "Question", "dataset_answer_column": "Correct Answer",
            "dataset_choice_columns": [f"Incorrect Answer {i}" for i in (1, 2, 3)],
            "max_prompt_length": 400}  # fmt: skip
    run = setup(eval_datasets={"gpqa": spec})
    _, problems = run.eval_sets["gpqa"]
    for row, problem in zip(GPQA, problems, strict=True):
        question, _, *lines = problem.text.split("\n")
        assert question == row["Question"] and [line[:3] for line in lines] == [
            "A) ",
            "B) ",
            "C) ",
            "D) ",
        ]
        options = {line[0]: line[3:] for line in lines}
        assert options[problem.gold] == row["Correct Answer"]
        assert sorted(options.values()) == sorted(list(row.values())[1:])
    assert len({problem.gold for problem in problems}) > 2, "shuffled"
    again = setup(eval_datasets={"gpqa": spec})
    assert again.eval_sets["gpqa"][1] == problems, "by the seed"
    for answer, expected in ((str, 1.0), (near_miss, 0.0)):
        table = ghpo.evaluate(replace(run, engine=Answers(answer)))
        assert table["gpqa"]["pass@1"] == expected


def test_a_missing_option_is_named(main, tmp_path):
    rows = [GPQA[0], GPQA[1] | {"Incorrect Answer 2": None}]
    spec = {"dataset_name": write_jsonl(tmp_path / "gpqa.jsonl", rows),
            "dataset_prompt_column": "Question", "dataset_answer_column": "Correct Answer",
            "dataset_choice_columns": "Incorrect Answer 2"}  # fmt: skip
    done = main(tmp_path, "--eval", eval_datasets={"gpqa": spec})
    assert "gpqa.jsonl: counted as wrong 1" not in done.err
    assert "an option of the multiple choice is missing" in done.err


BENCHMARKS = ["aime24", "amc23", "math500_dev", "minerva_dev", "olympiadbench_dev"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' rows are not there")
def test_golds_are_right_and_near_misses_wrong_on_benchmarks(setup):
    sets = {name: {"dataset_name": str(SHARED / f"{name}.jsonl"), "max_prompt_length": 8000,
                   "max_completion_length": 9} for name in BENCHMARKS}  # fmt: skip
    run = setup(eval_datasets=sets)
    for answer, expected in ((str, 1.0), (near_miss, 0.0)):
        table = ghpo.evaluate(replace(run, engine=Answers(answer)))
        assert {name: row["pass@1"] for name, row in table.items()} == dict.fromkeys(sets, expected)


def test_training_problems_in_an_eval_set_are_counted(main, tmp_path):
    held_out = read_jsonl(DATA / "eval_hard.jsonl")[:6]
    train = hard_rows(8)
    train[3]["problem"] = held_out[1]["problem"] = "4a3b5c2?"
    sets = {"x": write_jsonl(tmp_path / "x.jsonl", held_out)}
    data = write_jsonl(tmp_path / "train.jsonl", train)
    done = main(tmp_path, max_steps=1, dataset_name=data, eval_datasets=sets, eval_strategy="steps",
                max_completion_length=2)  # fmt: skip
    n = len({row["problem"] for row in train} & {row["problem"] for row in held_out})
    assert f"{n} training problems also stand in the eval set x" in done.err


def test_eval_limit_takes_the_first_problems(setup):
    spec = {"dataset_name": str(DATA / "eval_easy.jsonl"), "eval_limit": 3}
    run = setup(eval_datasets={"x": spec})
    assert [problem.id for problem in run.eval_sets["x"][1]] == [0, 1, 2]


# ---- the equations in the code -----------------------------------------------------------------


@pytest.mark.parametrize("equation", [f"E{i}" for i in range(1, 9)])
def test_every_equation_has_its_anchor(equation):
    texts = [(ROOT / f"{name}.py").read_text().splitlines() for name in MODULES]
    anchors = [line for text in texts for line in text
               if re.search(rf"#.*\b{equation}\b", line)]  # fmt: skip
    assert anchors


def test_the_readmes_table_names_the_functions_of_the_equations():
    """Each row links a module and names the function whose body has the equation's anchor."""
    found = set()
    for line in (ROOT / "README.md").read_text().splitlines():
        row = re.match(r"\|\s*(E\d)\s*\|.*\[`(\w+)`\]\((\w+\.py)\)", line)
        if row:
            equation, name, file = row.groups()
            text = (ROOT / file).read_text()
            (function,) = [
                node
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef) and node.name == name
            ]
            body = "\n".join(text.splitlines()[function.lineno - 1 : function.end_lineno])
            assert re.search(rf"#.*\b{equation}\b", body), f"{equation} is not in {file} {name}"
            found.add(equation)
    assert sorted(found) == [f"E{i}" for i in range(1, 9)]


def test_hints_and_reward_import_neither_torch_nor_vllm():
    for name in ("hints", "reward"):
        assert not re.search(
            r"^\s*(import|from) (torch|vllm)", (Path(ROOT) / f"{name}.py").read_text(), re.M
        )


def test_the_hub_gets_the_finished_folder(main, tmp_path, monkeypatch):
    """With the dtype of the weights in its config, which transformers itself does not put there."""
    uploads = []

    def upload_folder(repo_id, folder_path):
        uploads.append((repo_id, json.loads((folder_path / "config.json").read_text())["dtype"]))

    monkeypatch.setattr(ghpo, "create_repo", lambda name, exist_ok: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(ghpo, "upload_folder", upload_folder)
    done = main(tmp_path, max_steps=1, torch_dtype="bfloat16", push_to_hub=True, hub_model_id="a/b")
    assert done.status == 0 and uploads == [("a/b", "bfloat16")]


def test_failed_rewards_are_told_in_the_step_in_which_they_fail(main, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "calls = []\n"
        "def mine(response, gold):\n"
        "    calls.append(response)\n"
        "    if len(calls) % 40 == 20:\n"
        "        raise ValueError('no reward here')\n"
        "    return 0.5\n")  # fmt: skip
    done = main(tmp_path, max_steps=3, reward_funcs=[f"{own}:mine"], reward_weights=[1.0],
                rl_type="grpo", max_completion_length=2)  # fmt: skip
    told = [line for line in done.err.splitlines() if "a reward failed, and is 0, for" in line]
    failed = [line["verifier/errors"] for line in read_jsonl(done.folder / "metrics.jsonl")]
    steps = sum(after > before for before, after in zip([0, *failed], failed))
    assert failed[-1] > 0 and len(told) == steps
    assert all("no reward here" in line for line in told)


def test_rewards_that_fail_in_an_evaluation_are_told(main, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def mine(response, gold):\n"
        "    if gold == 'none such':\n"
        "        raise ValueError('no reward here')\n"
        "    return 0.5\n")  # fmt: skip
    rows = read_jsonl(DATA / "eval_easy.jsonl")[:3]
    rows[1]["solution"] = "none such"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = main(tmp_path, max_steps=1, reward_funcs=[f"{own}:mine"], reward_weights=[1.0],
                rl_type="grpo", max_completion_length=2, eval_strategy="steps",
                eval_datasets={"held": str(held_out)})  # fmt: skip
    told = "a reward failed, and is 0, for 1 of 3 texts; last: ValueError('no reward here')"
    assert (
        done.status == 0 and done.err.count(told) == 2
    )  # before the first step and after the last
