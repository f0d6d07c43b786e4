"""Each fork is short, trains, and resumes to the same bits."""

import ast
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import soak_resume  # noqa: E402, of the folder above

FORKS = sorted(path for path in HERE.glob("*.py") if not path.name.startswith(("test_", "learn")))
MOST_LINES = 20
LONGER = {"self_distill": 30}  # it scores samples anew, for which hints.py has no place
SETTINGS = """max_steps=3 save_steps=1 eval_strategy=no start_hint_step=0 num_generations=8
    per_device_train_batch_size=32 gradient_accumulation_steps=1 max_completion_length=80""".split()


def lines_that_count(path: Path) -> int:
    """Lines of code but for imports, the docstring and the call of main at the end."""
    tree = ast.parse(path.read_text())
    *body, last = tree.body[1:]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    ghpo.main()"
    lines = set()
    for statement in body:
        is_import = isinstance(statement, ast.Import | ast.ImportFrom)
        if not is_import and "sys.path" not in ast.unparse(statement):
            lines.update(range(statement.lineno, statement.end_lineno + 1))
    text = path.read_text().splitlines()
    return sum(bool(text[number - 1].strip()) for number in lines)


@pytest.mark.parametrize("path", FORKS, ids=lambda path: path.stem)
def test_a_fork_is_short(path):
    assert 0 < lines_that_count(path) <= LONGER.get(path.stem, MOST_LINES)


def run(path: Path, folder: Path, data: Path) -> None:
    def work():
        sys.argv = ["ghpo.py", "--config", "configs/tiny.yaml", *SETTINGS, f"output_dir={folder}",
                    f"dataset_name={data}"]  # fmt: skip
        runpy.run_path(str(path), run_name="__main__")

    soak_resume.end_well(soak_resume.fork(1, folder, work), folder)


@pytest.mark.parametrize("path", FORKS, ids=lambda path: path.stem)
def test_a_fork_trains_and_resumes_exactly(path, tmp_path):
    """The last of three steps again, from the checkpoint before it. All steps have the same four
    problems, so that what a method remembers of them counts."""
    whole, again, data = tmp_path / "whole", tmp_path / "again", tmp_path / "four.jsonl"
    rows = (HERE.parent / "tiny/data/eval_transfer.jsonl").read_text().splitlines()
    data.write_text("\n".join(rows[:4]))
    run(path, whole, data)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-000003")
    shutil.rmtree(again / "model")
    run(path, again, data)
    assert not soak_resume.differences(again, soak_resume.traces(whole))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert any(line["grad_norm"] > 0 for line in lines)
