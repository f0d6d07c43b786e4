"""The page of a run's rollouts: what stands in it, and that a text cannot leave its element."""

import json
import re

import pytest
import show
from conftest import write_jsonl

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def stage(ratio, passes, is_skipped=False):
    return {
        "ratios": [ratio] * len(passes),
        "hints": [""] * len(passes),
        "passes": passes,
        "lengths": [3] * len(passes),
        "is_trimmed": False,
        "is_skipped": is_skipped,
    }


def group(number, stages, finish_reason="stop", form=1.0, text="a"):
    sample = {
        "text": text, "accuracy": stages[-1]["passes"][0], "format": form, "tokens": 3,
        "finish_reason": finish_reason, "hint_ratio": 0.0,
    }  # fmt: skip
    return {
        "id": number, "problem": "p", "prompt": "q", "hint": "", "hint_ratio": 0.0, "gold": "1",
        "stages": stages, "completions": [sample, sample],
    }  # fmt: skip


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rollouts").mkdir()
    write_jsonl(tmp_path / "metrics.jsonl", [
        {"step": 0, "eval/x": 0.5},
        {"step": 1, "loss": 0.0, "accuracy_without_hint": 0.25, "hard_fraction": 0.5,
         "truncated": 0},
    ])  # fmt: skip
    write_jsonl(tmp_path / "rollouts/step_000001.jsonl", [
        group(1, [stage(0, [1, 0])]),
        group(2, [stage(0, [0, 0]), stage(0.25, [0, 0], True), stage(0.5, [1, 0])], text=HOSTILE),
        group(3, [stage(0, [0, 0]), stage(0.5, [0, 0])], "length", 0.0),
    ])  # fmt: skip
    text = show.page(tmp_path)
    assert "alert(1)</script>" not in text and "<img" not in text
    (found,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_groups_stand_in_the_order_of_their_hardness(data):
    assert [one["id"] for one in data["groups"]] == [3, 2, 1]
    assert [one["outcome"] for one in data["groups"]] == [
        "never solved", "solved with a hint of 0.5", "solved without a hint"]  # fmt: skip
    assert data["groups"][1]["stages"] == "0: 0 of 2, 0.5: 1 of 2"
    assert data["groups"][1]["samples"][0]["text"] == HOSTILE
    assert data["curves"] == {
        "accuracy_without_hint": [0.25], "hard_fraction": [0.5], "truncated": [0]}  # fmt: skip


def test_the_three_filters(data):
    for key, expected in (("only_with_hint", [2]), ("format_failed", [3]), ("truncated", [3])):
        assert [one["id"] for one in data["groups"] if one[key]] == expected


def test_a_run_without_rollouts_is_named(tmp_path):
    with pytest.raises(SystemExit, match="has no step 7"):
        show.page(tmp_path, 7)
