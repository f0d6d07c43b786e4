"""The real run's config stays loadable, and its table stays what the committed metrics say."""

import json
from pathlib import Path

import pytest
import real_run

from configs.plan import make_plan
from configs.settings import load_config

ASSETS = Path(__file__).parent / "assets/real_run"


def test_config_is_the_one_of_the_readme():
    config = load_config(real_run.CONFIG)
    assert config.dataset_name == "openai/gsm8k" and config.dataset_config == "main"
    assert config.dataset_hint_column == config.dataset_answer_column == "answer"
    assert config.reward_funcs == ("accuracy",), "a format reward taught it to answer at once"
    assert "\\boxed{}" in config.system_prompt
    assert config.eval_datasets["heldout"]["dataset_split"] == "test[:40]"


def test_a_step_is_four_problems(capsys):
    plan = make_plan(load_config(real_run.CONFIG), 1, 1000)
    assert plan.prompts == 4 and plan.steps == 24


def problem(number: int, level: int = 0) -> dict:
    return {"problem": f"p{number}", "solution": str(number), "level": level,
            "solution_hint": f"It is {number}.\n#### {number}"}  # fmt: skip


def test_prepared_rows_are_disjoint(tmp_path):
    real_run.write_jsonl(tmp_path / "gsm8k_train.jsonl", [problem(i) for i in range(200)])
    levels = [1, 3, 4, 5]
    math = [problem(1000 + i, levels[i % 4]) for i in range(80)]
    real_run.write_jsonl(tmp_path / "math500_dev.jsonl", math)
    real_run.prepare(tmp_path, tmp_path / "out")
    rows = {name: real_run.read_jsonl(tmp_path / f"out/{name}.jsonl")
            for name in ("train", "heldout", "ladder")}  # fmt: skip
    assert [len(rows[name]) for name in rows] == [136, 40, 36]
    questions = [row["question"] for part in rows.values() for row in part]
    assert len(set(questions)) == len(questions)
    assert [row["level"] for row in rows["ladder"]] == [0] * 24 + [3] * 4 + [4] * 4 + [5] * 4
    assert rows["train"][7] == {
        "question": "p7", "answer": "It is 7.\n#### 7", "gold": "7", "level": 0}  # fmt: skip


def test_counts_of_stages_are_summed_over_steps():
    steps = [
        {"hint/solved@0.25": 1, "hint/tried@0.25": 3, "hint/tried@0.5": 2},
        {"hint/solved@0.25": 0, "hint/tried@0.25": 1, "hint/solved@0.75": 2, "hint/tried@0.75": 2},
    ]
    assert real_run.stage_counts(steps) == "1 of 4 / 0 of 2 / 2 of 2"


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the recorded run is not there")
def test_recorded_run_is_whole():
    lines = [json.loads(line) for line in (ASSETS / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    assert max(line["mismatch_k3"] for line in lines if "loss" in line) < 1e-2
    evaluations = [real_run.evaluation(path) for path in sorted(ASSETS.glob("heldout_*.jsonl"))]
    assert [found["step"] for found in evaluations] == [0, len(steps)]
    assert all(found["problems"] == real_run.HELD_OUT for found in evaluations)
