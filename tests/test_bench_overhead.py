"""The benchmark of overheads on the tiny model: one part, merged into an earlier result."""

import json
import subprocess
import sys

import bench_overhead
from conftest import ROOT


def test_a_part_is_measured_and_merged(tmp_path):
    earlier = tmp_path / "all.json"
    earlier.write_text('{"push_share": 0.5}\n')
    done = subprocess.run(
        [sys.executable, ROOT / "tests/bench_overhead.py", ROOT / "tests/tiny/base", "--dtype",
         "float32", "--only", "draw_share", "--pairs", "2", "--tokens", "9", "--prompts", "16",
         "--into", earlier],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"push_share", "model", "dtype", "draw_share"}
    assert found["push_share"] == 0.5 and 0 < found["draw_share"] < 1
    assert json.loads(earlier.read_text()) == found
    assert "draw_share" in done.stdout and "<= 0.15: " in done.stdout


def test_verdicts_follow_their_limits():
    for name, value, told in (
        ("collect_over_generate", 0.949, "NOT KEPT"),
        ("collect_over_generate", 0.95, " kept"),
        ("optimize_over_bare", 1.101, "NOT KEPT"),
        ("optimize_over_bare", 1.1, " kept"),
        ("push_share", 0.9, "no limit"),
    ):
        assert told in bench_overhead.verdict(name, value)


def test_a_call_within_a_call_counts_once(monkeypatch):
    now = iter([1.0, 3.0])
    monkeypatch.setattr(bench_overhead.time, "perf_counter", lambda: next(now))

    class Owner:
        def outer(self):
            return self.inner()

        def inner(self):
            return 7

    owner, clock = Owner(), bench_overhead.Clock()
    for name in ("outer", "inner"):
        clock.watch(owner, name, "both")
    assert owner.outer() == 7 and clock.seconds == {"both": 2.0}
