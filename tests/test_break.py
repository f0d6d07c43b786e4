"""A fixed sample of the breaking trials: the first two of each kind, those that once found a fault.

`python tests/break.py` runs all of them. They run in a process of their own, which may fork.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

SAMPLE = 20
breaking = importlib.import_module("break")  # a word of the language


@pytest.fixture(scope="module")
def lines():
    """{name: the line that was printed}, and the last line."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "tests/break.py", "--sample", str(SAMPLE), "--folder", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            env=os.environ,
        )
    *trials, last = done.stdout.splitlines() or [done.stderr]
    return {line.split()[1]: line for line in trials} | {"": last}


@pytest.mark.parametrize("trial", breaking.sample(SAMPLE), ids=lambda trial: trial.name)
def test_the_program_keeps_its_promises(trial, lines):
    assert " ok " in lines.get(trial.name, ""), lines.get(trial.name, lines[""])


def test_nothing_is_lost(lines):
    assert json.loads(lines[""]) == {"trials": SAMPLE, "as_promised": SAMPLE, "lost": 0}


def test_the_sample_has_two_trials_of_each_kind_and_all_have_eight():
    kinds = [trial.kind for trial in breaking.sample(SAMPLE)]
    assert sorted(kinds) == sorted(2 * list(range(1, 11)))
    known = [trial.kind for trial in breaking.TRIALS]
    assert len(known) >= 120 and all(known.count(kind) >= 8 for kind in range(1, 11))
    assert len({trial.name for trial in breaking.TRIALS}) == len(known)


def test_a_loss_is_counted(tmp_path):
    """A checkpoint, a line of metrics and one of a rollout are gone; what was set aside is not."""
    run = tmp_path / "run"
    for name in ("checkpoint-000001", "checkpoint-000002", "checkpoint-mine", "rollouts"):
        (run / name).mkdir(parents=True)
        (run / name / "a.jsonl").write_text(f"{name}\n1\n")
    (run / "metrics.jsonl").write_text("1\n2\n")
    before = breaking.inventory(tmp_path)
    intact = {one for one, name in before[0] if name == "checkpoint-000001"}
    (run / "checkpoint-000002").rename(run / "checkpoint-000002.damaged")
    (run / "metrics.jsonl").rename(run / "metrics.jsonl.stale")
    assert breaking.lost(before, breaking.inventory(tmp_path), intact, ()) == 0
    (run / "checkpoint-000001").rename(run / "checkpoint-000001.damaged")  # it was whole
    (run / "checkpoint-mine").rename(run / "checkpoint-yours")
    (run / "metrics.jsonl.stale").write_text("2\n")
    (run / "rollouts" / "a.jsonl").write_text("1\n")
    after = breaking.inventory(tmp_path)
    assert breaking.lost(before, after, intact, ()) == 4
    assert breaking.lost(before, after, intact, ("checkpoint-000001",)) == 3
