"""The README: its recipes run as they are written, its links and names exist, it can be read."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, read_jsonl

import fsdp_utils
import ghpo
import hints
import rollout

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```(?:python|diff)\n# (my_\w+\.\w+)\n(.*?)```", TEXT, re.DOTALL))
SMALL = """max_steps=1 start_hint_step=0 eval_strategy=no eval_datasets={} save_strategy=no
    num_generations=4 per_device_train_batch_size=4 gradient_accumulation_steps=2
    max_completion_length=40 hint_ratio=[0.75]""".split()
COLUMNS, PARAGRAPH, RECIPE = 100, 5, 20


def command_of(name: str) -> list[str]:
    """The words of the command in a recipe's second line."""
    return shlex.split(RECIPES[name].splitlines()[0].removeprefix("# "))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the project with the recipes as files, as the current folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/tiny").symlink_to(ROOT / "tests/tiny")
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(f"# {name}\n{text}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, alone, monkeypatch):
    """run(name, more settings): the command of a recipe in this process; (metrics, rollouts)."""
    torch.set_num_threads(1)
    for module in (ghpo, hints, rollout):  # what a recipe assigns is taken back
        for name, value in list(vars(module).items()):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(rollout, "ENGINES", dict(rollout.ENGINES))
    monkeypatch.setattr(fsdp_utils, "setup_distributed", lambda *a: alone)
    monkeypatch.setattr(ghpo, "Interrupt", lambda: SimpleNamespace(received=0))

    def go(name, *more):
        python, program, *words = command_of(name)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [program, *words, *SMALL, "output_dir=out", *more])
        monkeypatch.setattr(ghpo.os, "_exit", sys.exit)
        if program == "ghpo.py":
            ghpo.main()
        else:
            runpy.run_path(program, run_name="__main__")
        lines = [read_jsonl(path) for path in sorted((folder / "out/rollouts").iterdir())]
        return read_jsonl(folder / "out/metrics.jsonl"), lines

    return go


def test_there_is_a_short_recipe_for_each_of_five_things():
    assert sorted(RECIPES) == ["my_engine.py", "my_method.py", "my_metric.py", "my_rewards.py",
                               "my_setting.diff"]  # fmt: skip
    for name, text in RECIPES.items():
        lines = [line for line in text.splitlines()[1:] if line and "import" not in line]
        assert len(lines) <= RECIPE, name


def test_the_recipe_of_a_method(run):
    """Half of each group is hinted, and the controller's ratio goes from step to step."""
    held_out = "eval_datasets={easy: tests/tiny/data/eval_easy.jsonl}"
    evaluated = [held_out, "eval_strategy=steps", "eval_limit=1", "eval_steps=5"]
    records, lines = run("my_method.py", "max_steps=2", "gradient_accumulation_steps=4", *evaluated)
    metrics = [record for record in records if "loss" in record]
    assert len(records) == len(metrics) + 2  # it is evaluated with one sample, before and after
    for line in lines[0]:
        assert [sample["hint_ratio"] for sample in line["completions"]] == [0, 0.5, 0, 0.5]
    omegas = [0.5, *[line["hint/omega"] for line in metrics]]
    for before, after, line in zip(omegas, omegas[1:], metrics):
        change = 0.05 if line["reward/accuracy"] < 0.5 else -0.05
        assert after == pytest.approx(min(0.75, before + change))


def test_the_recipe_of_a_metric(run):
    metrics, lines = run("my_metric.py", "max_steps=2")
    for line, step in zip(metrics, lines, strict=True):
        always = [min(group["stages"][0]["passes"]) > 0 for group in step]
        assert line["always_right"] == np.mean(always)
    assert metrics[0]["always_right"] > 0


def test_the_recipe_of_an_engine(run, monkeypatch):
    """Its log-probs are the trainer's, its texts are right as often as they should."""
    metrics, lines = run("my_engine.py", "gradient_accumulation_steps=3")
    assert rollout.ENGINES["hf"].__name__ == "MyEngine"
    (line,) = metrics
    assert line["compared"] == 0 or line["mismatch_k3"] < 1e-8
    assert line["accuracy_without_hint"] >= 0.25  # the easy problems
    reasons = [sample["finish_reason"] for group in lines[0] for sample in group["completions"]]
    assert set(reasons) == {"stop", "length"}


def test_the_recipe_of_a_reward(run):
    metrics, lines = run("my_rewards.py")
    name = "my_rewards.py:brevity"
    for group in lines[0]:
        for sample in group["completions"]:
            expected = max(0.0, 1 - len(sample["text"]) / (20 * len(group["problem"])))
            assert sample[name] == pytest.approx(expected)
    assert 0 < metrics[0][f"reward/{name}"] < 1


def test_the_recipe_of_a_setting(folder):
    """The patch applies; the setting is known, kept with the run, and does what it says."""
    words = command_of("my_setting.diff")
    middle = words.index("&&")
    subprocess.run(words[:middle], check=True)
    python, *command = words[middle + 1 :]
    assert python == "python"
    done = subprocess.run([sys.executable, *command, *SMALL, "output_dir=out"],
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((folder / "out/config.yaml").read_text())["reward_limit"] == 1.0
    patched = runpy.run_path("hints.py")
    config = SimpleNamespace(reward_weights=[1.0, 0.5], reward_limit=1.0, scale_rewards=False)
    group = SimpleNamespace(rewards=[[1.0, 1.0], [0.0, 0.0]])
    assert list(patched["advantages"](group, config, None)) == [0.5, -0.5]


# ---- the page itself -----------------------------------------------------------------------------


def paragraphs() -> list[list[str]]:
    """Lines that stand together, without code, tables and pictures; a list item is one."""
    found = [[]]
    for line in re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).splitlines():
        is_text = line and not line.startswith(("|", "#", "!"))
        if not is_text or line.startswith("- "):
            found.append([])
        if is_text:
            found[-1].append(line)
    return [lines for lines in found if lines]


def test_the_page_can_be_read():
    lines = TEXT.splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert [text for text in paragraphs() if len(text) > PARAGRAPH] == []


def test_files_that_the_page_links_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_chapters_that_the_page_links_are_there():
    titles = [line.lstrip("# ").lower() for line in TEXT.splitlines() if line.startswith("#")]
    anchors = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert len(links) > 5 and links <= anchors, links - anchors


def test_functions_that_the_page_names_are_there():
    """`module.name` everywhere, as the loop's pseudo-code has them."""
    modules = {"ghpo": ghpo, "hints": hints, "rollout": rollout, "fsdp_utils": fsdp_utils}
    names = re.findall(r"\b(ghpo|hints|rollout|fsdp_utils)\.(\w+)\b", TEXT)
    names = {(module, name) for module, name in names if name not in ("py", "NAME")}
    assert len(names) > 15
    assert [name for name in names if not hasattr(modules[name[0]], name[1])] == []
