"""The GPU benchmark at toy size, without TRL."""

import json
import subprocess
import sys

from conftest import ROOT


def test_it_runs_at_toy_size_without_trl():
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "bench_gpu.py",
            "--toy",
            "--steps",
            "1",
            "--peak",
            "1e12",
            "--sides",
            "padded",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["padded"]["engine"] == "hf" and result["trl"] is None
    for key in (
        "seconds_step",
        "tokens_trained_per_s",
        "tokens_generated_per_s",
        "mfu",
        "peak_gib",
    ):
        assert result["padded"][key] > 0
