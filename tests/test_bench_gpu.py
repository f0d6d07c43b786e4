"""The GPU benchmark at toy size, without TRL."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from tests import bench_gpu


@pytest.mark.parametrize(
    "is_gpu, installed, side, taken",
    [
        (False, "flash_attn", "packed", "sdpa"),
        (True, "flash_attn", "packed", "flash_attention_2"),
        (True, "flash_attn", "trl", "flash_attention_2"),
        (True, "flash_attn_4", "packed", "varlen"),
        (True, "flash_attn_4", "trl", "sdpa"),
        (True, None, "padded", "varlen"),
    ],
)
def test_attention_goes_by_the_distribution(is_gpu, installed, side, taken, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()  # both have a module of this name
    (tmp_path / "flash_attn/__init__.py").touch()
    if installed:
        (tmp_path / f"{installed}-1.0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {installed.replace('_', '-')}\nVersion: 1.0\n"
        (tmp_path / f"{installed}-1.0.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench_gpu, "IS_GPU", is_gpu)
    assert bench_gpu.attention(side) == taken


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
