"""What forks rely on: modules stand alone, hooks take effect, what a method remembers is kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    DATA,
    ROOT,
    ScriptedPool,
    make_config,
    new_engine,
    problem,
    read_jsonl,
    sampling,
    settings,
    write_jsonl,
)
from safetensors.torch import load_file

import fsdp_utils
import ghpo
import hints
import rollout
from hints import Group

MODULES = ("ghpo", "rollout", "reward", "hints", "fsdp_utils")


def hard_rows(n=8):
    return read_jsonl(DATA / "eval_hard.jsonl")[:n]


def test_the_five_modules_and_configs_stand_alone(tmp_path):
    """In a folder of their own, with a model and data elsewhere: train, kill, resume, evaluate."""
    home = tmp_path / "a fork of it"
    home.mkdir()
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", home)
    shutil.copytree(
        ROOT / "configs", home / "configs", ignore=shutil.ignore_patterns("__pycache__")
    )
    out = tmp_path / "out"
    config = tmp_path / "config.json"
    eval_rows = write_jsonl(tmp_path / "eval.jsonl", read_jsonl(DATA / "eval_easy.jsonl")[:4])
    config.write_text(
        json.dumps(
            settings(
                output_dir=str(out),
                save_strategy="steps",
                save_steps=1,
                eval_datasets={"x": eval_rows},
            )
        )
    )
    command = [sys.executable, "ghpo.py", "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.Popen(command, cwd=home, env=environment, stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoint-000001").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.kill()
    run.communicate()
    for more in ([], ["--eval", f"output_dir={tmp_path / 'evaluated'}"], ["--dry_run"]):
        done = subprocess.run(
            [*command, *more],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        if not more:
            assert "resuming" in done.stderr
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [1, 2]
    assert (out / "model" / "model.safetensors").is_file()
    assert "eval/x" in read_jsonl(tmp_path / "evaluated" / "eval.jsonl")[0]


def test_the_program_imports_nothing_from_tests():
    for path in [*ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        assert "import tests" not in path.read_text() and "from tests" not in path.read_text(), path


@pytest.mark.skipif(not shutil.which("ruff"), reason="ruff is not installed")
def test_one_format_and_no_finding_of_the_linter():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_verifier_worker_stays_light():
    code = (
        "import runpy, sys; runpy.run_path('reward.py'); "
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_run_goes_on_after_a_setting_or_a_state_key_was_added_or_cut(main, tmp_path):
    """Config and state were saved by a program that did not know some and still had others."""
    first = main(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert first.status == 0
    saved = yaml.safe_load((first.folder / "config.yaml").read_text())
    for key in ("importance_cap", "hint_threshold"):
        del saved[key]
    (first.folder / "config.yaml").write_text(yaml.safe_dump(saved | {"nonfinite": "skip"}))
    state = first.folder / "checkpoint-000001" / "state.json"
    kept = json.loads(state.read_text())
    del kept["method"], kept["mismatch"]
    state.write_text(json.dumps(kept | {"of_another_fork": 1}))
    sums = state.with_name("checksums.json")
    known = json.loads(sums.read_text()) | {"state.json": fsdp_utils.checksum(state)}
    sums.write_text(json.dumps(known))
    again = main(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert again.status == 0 and "resuming" in again.err
    other = main(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, hint_threshold=0.25)
    assert other.status == 2 and "hint_threshold" in other.err  # not at its default


class HalfRight(ScriptedPool):
    """Samples with a hint are right, samples without one are wrong; slot 0's first is right too."""

    def submit(self, key, texts, gold, row=None):
        request, completions = key
        rewards = [[float(bool(c.hint)), 0.0] for c in completions]
        if request.slot == 0:
            rewards[0] = [1.0, 0.0]
        self.waiting.append((0, key, rewards))


def test_a_mixed_group_is_counted_and_shown_sample_by_sample(scripted_training, monkeypatch):
    """Half of each group has a hint: accuracy without hints is that of the other half."""
    omegas = [0.0, 0.0, 0.3, 0.5]

    def next_ratio(group, config, state):
        return None if group.stages else omegas

    monkeypatch.setattr(hints, "next_ratio", next_ratio)
    run, seen, steps = scripted_training(
        None, hard_rows(), pool=HalfRight, max_steps=1, max_completion_length=8
    )
    (told,) = read_jsonl(run.folder / "metrics.jsonl")
    assert told["accuracy_without_hint"] == 1 / 8  # of 8 samples without a hint
    assert told["hard_fraction"] == 3 / 4  # of 4 problems, by their samples without a hint
    assert told["reward/accuracy"] == (4 * 2 + 1) / 16
    # .3 is counted at the nearest rung, .25
    assert {key: value for key, value in told.items() if "@" in key} == {
        "hint/tried@0": 4,
        "hint/solved@0": 1,
        "tokens/generated@0": 64,
        "hint/tried@0.25": 4,
        "hint/solved@0.25": 4,
        "tokens/generated@0.25": 32,
        "hint/tried@0.5": 4,
        "hint/solved@0.5": 4,
        "tokens/generated@0.5": 32,
    }
    for group, line in zip(seen[0][0], steps[0]):
        assert line["hint"] == "" and line["hint_ratio"] == 0
        shown = line["completions"]
        assert [sample["hint_ratio"] for sample in shown] == omegas
        assert ["prompt" in sample for sample in shown] == [False, False, True, True]
        for sample, omega in zip(shown[2:], omegas[2:]):
            hint, _ = hints.make_hint(group.problem, omega, run.config, run.state)
            assert hint and sample["hint"] == hint and hint in sample["prompt"]


def test_a_launcher_may_replace_advantages_and_the_loss(tmp_path):
    """GSPO's ratio of whole sequences, and advantages without a mean: 12 lines, own process."""
    launcher = tmp_path / "gspo.py"
    launcher.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import torch
import fsdp_utils
import ghpo
import hints

def advantages(group, config, state):
    state.method["groups"] = state.method.get("groups", 0) + 1
    return np.array(group.rewards)[:, 1] - 0.25

def sequence_loss(logp, old_logp, ref_logp, batch, config):
    row = batch["row"]
    count = torch.bincount(row).to(logp.dtype)
    mean = torch.zeros_like(count).index_add(0, row, logp - old_logp) / count
    print("rows", len(count), "tokens", len(row))
    return -torch.exp(mean)[row] * batch["advantage"], torch.zeros_like(logp, dtype=torch.bool)

hints.advantages = advantages
ghpo.token_loss = sequence_loss
ghpo.main()
""")
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            settings(
                output_dir=str(tmp_path / "out"), max_steps=1, save_strategy="steps", save_steps=1
            )
        )
    )
    done = subprocess.run(
        [sys.executable, str(launcher), "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("rows")]
    assert sum(rows) == 16  # every row is used: no advantage is 0
    state = json.loads((tmp_path / "out" / "checkpoint-000001" / "state.json").read_text())
    assert state["method"] == {"groups": 4}
    (told,) = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    samples = [
        sample
        for line in read_jsonl(tmp_path / "out" / "rollouts" / "step_000001.jsonl")
        for sample in line["completions"]
    ]
    assert told["grad_norm"] > 0
    # bnpo: mean over groups of the token mean; with a ratio of 1 the value is minus the advantage
    groups = [samples[i : i + 4] for i in range(0, 16, 4)]
    expected = [
        -sum(s["tokens"] * (s["format"] - 0.25) for s in group) / sum(s["tokens"] for s in group)
        for group in groups
    ]
    assert told["loss"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_loss_sees_which_row_a_token_belongs_to():
    lengths = [3, 1, 2]
    for is_packed in (False, True):
        rows = [
            ghpo.Row([5] * (2 + n), 2, [0.0] * n, [1.0] * n, [0.0] * n, [True] * n, float(n), n)
            for n in lengths
        ]
        _, batch = ghpo.collate(rows, is_packed, torch.device("cpu"), torch.float32)
        assert batch["row"].tolist() == [0, 0, 0, 1, 2, 2]
        assert batch["advantage"].tolist() == [3, 3, 3, 1, 2, 2]


class Watched:
    """A run as watch_mismatch sees it; counts checkpoints."""

    def __init__(self, **changes):
        self.config, self.state = make_config(**changes), ghpo.State()

    def go(self, values, monkeypatch, capsys):
        """(steps until it stopped or None, steps that warned, checkpoints)."""
        saved, warned = [], []
        monkeypatch.setattr(ghpo, "save", saved.append)
        for step, k3 in enumerate(values):
            capsys.readouterr()
            metrics = {"mismatch_k3": k3 or 0.0, "compared": 0 if k3 is None else 9}
            try:
                ghpo.watch_mismatch(self, metrics)
            except ghpo.UserError as error:
                assert "mismatch_limit=null" in str(error)
                return step, warned, len(saved)
            if "disagree" in capsys.readouterr().err:
                warned.append(step)
        return None, warned, len(saved)


GOOD, BAD = 1e-6, 1e-3  # the limit in float32 is 1e-4


@pytest.mark.parametrize(
    "changes, values, expected",
    [
        ({}, [GOOD] * 20, (None, [], 0)),
        ({}, [BAD], (0, [], 1)),  # the first step that compared tokens
        ({}, [GOOD, float("inf")], (1, [], 1)),
        ({}, [None, None, None, None, BAD], (4, [], 1)),  # whenever that comes
        ({}, [GOOD] * 9 + [3e-4] + [GOOD] * 12, (None, [9], 0)),  # one step alone warns
        ({}, [GOOD] * 9 + [BAD] * 2, (9, [], 1)),  # the mean of ten is 1.009e-4
        ({}, [GOOD] * 9 + [8e-4] * 5, (10, [9], 1)),  # 8.1e-5, then 1.6e-4
        ({"mismatch_limit": 1e-2}, [BAD] * 5, (None, [], 0)),
        ({"mismatch_limit": None}, [0.1] * 3, (None, [0, 1, 2], 0)),
        ({"top_p": 0.9}, [BAD] * 3, (None, [0, 1, 2], 0)),
        ({"top_k": 20}, [BAD], (None, [0], 0)),
    ],
)
def test_when_a_mismatch_warns_and_when_it_stops(changes, values, expected, monkeypatch, capsys):
    assert Watched(**changes).go(values, monkeypatch, capsys) == expected


COLLAPSE = {  # as measured on GSM8K with a format reward of weight .5 (README, troubleshooting)
    "format": [0.19, 0.31, 0.53, 0.72, 0.84, 0.94],
    "accuracy": [0.09, 0.06, 0.03, 0.0, 0.0, 0.0],
    "tokens": [137, 120, 100, 80, 62, 50],
}
FLAT = [0.5] * 6


@pytest.mark.parametrize(
    "changes, warns",
    [
        ({}, True),
        ({"format": FLAT}, False),
        ({"accuracy": FLAT}, False),  # a model that learns the format and stays as good
        ({"accuracy": [0.0] * 6}, False),  # there is nothing to lose
        ({"tokens": FLAT}, False),
        ({"accuracy": [0.5, 0.6, 0.4, 0.5, 0.4, 0.5]}, False),  # noise
    ],
)
def test_a_collapse_to_format_is_told(changes, warns, capsys):
    config = make_config(reward_funcs=["accuracy", "format"], reward_weights=[1, 1])
    run = SimpleNamespace(config=config, state=ghpo.State(), trigger_column=0)
    curves = COLLAPSE | changes
    for values in zip(*curves.values(), strict=True):
        assert "collapse" not in capsys.readouterr().err
        line = dict(zip(curves, values))
        ghpo.watch_collapse(run, {
            "reward/format": line["format"], "accuracy_without_hint": line["accuracy"],
            "tokens/completion": line["tokens"],
        })  # fmt: skip
    told = capsys.readouterr().err
    assert ("reward/format 0.343 -> 0.833" in told and "reward_weights" in told) == warns


def test_accuracy_alone_cannot_collapse_to_something_else():
    config = make_config(reward_funcs=["accuracy"], reward_weights=[1])
    run = SimpleNamespace(config=config, state=ghpo.State(), trigger_column=0)
    ghpo.watch_collapse(run, {"accuracy_without_hint": 0.5, "tokens/completion": 9.0})
    assert run.state.trend == []


def test_steps_without_a_gradient_are_told(capsys):
    """A policy that a learning rate of 1 has destroyed says nothing by itself."""
    run = SimpleNamespace(config=make_config(), state=ghpo.State())
    metrics = {"grad_norm": 0.0, "truncated": 1.0, "reward/accuracy": 0.0}
    told = []
    for step, norm in enumerate([0.5, 0, 0, 0.1, 0, 0, 0, 0, 0, 0], 1):
        run.state.step = step
        ghpo.watch_idle(run, metrics | {"grad_norm": norm})
        text = capsys.readouterr().err
        if text:
            told.append(step)
            assert "reward/accuracy 0, truncated 1" in text and f"step_{step:06d}.jsonl" in text
    assert told == [7, 10]
    run.config = make_config(start_hint_step=20)  # GHPO's cold start
    for _ in range(9):
        ghpo.watch_idle(run, metrics)
    assert capsys.readouterr().err == ""


def test_a_long_step_is_visible(make_run, prompts, monkeypatch):
    """Tokens as they are drawn, groups as they are done; each token once, ended rows no more."""
    texts = []
    monkeypatch.setattr(rollout, "SHOW_SECONDS", -1.0)
    run = make_run(make_config())
    run.prompts, run.engine, run.pool = prompts, new_engine(run.policy), ScriptedPool(lambda *_: 0)
    run.trigger_column, run.compute_dtype = 0, torch.float32
    blank = [Group(problem(i)) for i in range(3)]
    groups = ghpo.sample_groups(run, blank, sampling(1.0, 30), 0, texts.append)
    n_tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    assert re.match(r"0/3 groups, stage 0, 12 tokens, \d+/s", texts[0])
    assert re.match(rf"3/3 groups, stage 0, {n_tokens} tokens, \d+/s", texts[-1])
    assert len(texts) >= 30  # with every token


def test_no_bar_where_nobody_looks(main, tmp_path):
    done = main(tmp_path, max_steps=1)
    assert done.status == 0 and "it/s" not in done.err and "%|" not in done.err


def test_an_export_names_the_dtype_of_its_weights(main, tmp_path):
    done = main(tmp_path, max_steps=1, torch_dtype="bfloat16")
    assert done.status == 0
    config = json.loads((done.folder / "model" / "config.json").read_text())
    weights = load_file(done.folder / "model" / "model.safetensors")
    assert config["dtype"] == "bfloat16" and {w.dtype for w in weights.values()} == {torch.bfloat16}
