"""The reports of compare.py, on a made-up run."""

import json

import compare
import pytest
from conftest import DATA, read_jsonl, write_jsonl


@pytest.fixture
def run_folder(tmp_path):
    records = [
        {"step": 0, "eval/easy": 1.0, "eval/transfer": 0.0, "eval/hard": 0.0},
        *[
            {
                "step": step,
                "tokens/generated": 300,
                "tokens/generated@0": 100,
                "hint/tried@0": 4,
                "hint/solved@0": step,
                "hint/solved@0.5": 1,
                "hint/unsolved": 3 - step,
            }
            for step in (1, 2)
        ],
        {"step": 2, "eval/easy": 1.0, "eval/transfer": 0.5, "eval/hard": 0.75},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_tokens_are_summed_up_to_each_record(run_folder):
    run = compare.read_run(run_folder)
    assert [record["tokens"] for record in run["steps"]] == [300, 600]
    assert [(record["step"], record["tokens"]) for record in run["evals"]] == [(0, 0), (2, 600)]


def test_a_run_becomes_rows_and_what_it_hinted(run_folder):
    run = compare.read_run(run_folder)
    rows = compare.run_rows("ghpo", 3, run)
    assert [row["accuracy"] for row in rows] == [1.0, 0.5, 0.75]
    assert rows[2]["curve"] == [[0, 0.0], [600, 0.75]]
    assert (rows[0]["generated_tokens"], rows[0]["config"]) == (600, ["rl_type=ghpo"])
    hinted = compare.hints_row("ghpo", 3, run)
    assert (hinted["hint/solved@0.5"], hinted["hint/unsolved"]) == (2, 3)
    assert hinted["hard_fraction_last_10"] is None


def test_mean_and_standard_error():
    assert compare.mean_and_error([0.25]) == (0.25, 0.0)
    mean, error = compare.mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / 3**0.5))


def test_pictures_are_drawn(run_folder):
    run = compare.read_run(run_folder)
    compare.draw_demo(run, run_folder / "demo.png")
    compare.draw_compare({("ghpo", 0): run, ("ghpo", 1): run}, run_folder / "compare.png")
    assert (run_folder / "demo.png").stat().st_size > 5000
    assert (run_folder / "compare.png").stat().st_size > 5000


def test_an_earlier_folder_is_kept_aside_once(tmp_path):
    folder = tmp_path / "demo"
    for text in ("first", "second", "third"):
        compare.set_aside(folder)
        (folder / "summary.json").write_text(text)
    assert (folder / "summary.json").read_text() == "third"
    assert (tmp_path / "demo.previous" / "summary.json").read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 2


def test_every_arm_is_a_config_that_loads():
    import ghpo

    for settings in compare.ARMS.values():
        ghpo.load_config(compare.ROOT / compare.CONFIG, settings)


def test_experiments_say_what_the_runs_on_record_gave():
    record = json.loads((compare.ROOT / "tests/assets/ablation.json").read_text())
    text = (compare.ROOT / "tests/EXPERIMENTS.md").read_text()
    arms = {row["arm"] for row in record["rows"]}
    assert len(arms) >= 10
    for arm in arms:
        mine = [row for row in record["rows"] if row["arm"] == arm]
        assert {row["seed"] for row in mine} == {0, 1, 2, 3, 4}
        assert all(row["config"] == compare.ARMS[arm] for row in mine)
    for table in (compare.arms_table(record["rows"]), compare.hints_table(record["hints"])):
        for cells in table:
            assert f"| {' | '.join(cells)} |" in text


def test_evaluations_stand_side_by_side(tmp_path):
    tables = {
        "one": {"a": {"pass@1": 0.25, "stderr": 0.05}, "b": {"pass@1": 0.75, "stderr": 0.1}},
        "two": {"a": {"pass@1": 0.5, "stderr": 0.0}},
    }
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps(table))
    rows = compare.evals([tmp_path / "one", tmp_path / "two"])
    assert rows == [
        ["a", "0.250 ± 0.050", "0.500 ± 0.000"],
        ["b", "0.750 ± 0.100", "-"],
        ["mean", "0.500", "-"],
    ]
    with pytest.raises(compare.RunFailed, match="three/eval.json is not there"):
        compare.evals([tmp_path / "three"])


def test_the_demo_prints_a_hard_problem_before_and_after(tmp_path, capsys):
    """Of two held-out problems the one that is solved now; the base model slips at its third step,
    the task's planted misconception."""
    rows = read_jsonl(DATA / "eval_hard.jsonl")[:2]
    lines = []
    for row, score in zip(rows, (0.0, 1.0)):
        sample = {"text": f"{row['solution_hint']}\n{row['solution']}", "accuracy": score}
        prompt = f"<|user|>{row['problem']}<|end|><|assistant|>"
        lines.append({"problem": row["problem"], "prompt": prompt, "gold": row["solution"],
                      "completions": [sample]})  # fmt: skip
    write_jsonl(tmp_path / "eval_hard.jsonl", lines)
    compare.print_before_and_after(tmp_path)
    told = capsys.readouterr().out
    assert f"solved now: {rows[1]['problem']}  gold {rows[1]['solution']}" in told
    before, after = (line.split() for line in told.splitlines()[3:])
    steps = rows[1]["solution_hint"].split()
    assert after == ["after", *steps, rows[1]["solution"]]
    assert before[:4] == ["before", "<think>", *steps[:2]] and before[4] != steps[2]
