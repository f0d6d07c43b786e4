"""Rows to problems: the data sets that people use, in exactly their columns, and broken ones."""

import gzip
import json
import os
import random
import re
import signal
import sys

import pytest
from conftest import DATA, SHARED, make_config, read_jsonl, write_jsonl

import ghpo
import hints
from reward import accuracy_reward

GSM = [  # our own problems in the columns of openai/gsm8k
    {"question": "Tom has 3 bags of 4 apples. He eats 2. How many are left?",
     "answer": "Tom has 3*4 = <<3*4=12>>12 apples.\nThen 12-2 = <<12-2=10>>10 are left.\n#### 10"},
    {"question": "A book of 1200 pages is read in 2 equal parts, twice. Pages read?",
     "answer": "Each time 1200 are read.\nTwice that is 2*1200 = <<2*1200=2400>>2400.\n#### 2,400"},
    {"question": "Ann saves $5 a week. After 6 weeks she spends $12. What is left?",
     "answer": "She saves 5*6 = $<<5*6=30>>30.\nShe keeps 30-12 = $<<30-12=18>>18.\n#### 18"},
    {"question": "Half of 50 people leave. 5 come back. How many are there?",
     "answer": "50/2 = <<50/2=25>>25 stay.\n25+5 = <<25+5=30>>30 are there.\n#### 30"},
]  # fmt: skip
GSM_GOLDS = ["10", "2,400", "18", "30"]
MATH = [  # in the columns of EleutherAI/hendrycks_math
    {"problem": "What is $\\frac12+\\frac13$?", "level": "Level 2", "type": "Prealgebra",
     "solution": "The common denominator is $6$.\nNow $\\frac12=\\frac36$.\n"
                 "We get $\\frac36+\\frac26=\\boxed{\\frac56}$."},
    {"problem": "Solve $x^2=9$ for $x>0$.", "level": "Level 5", "type": "Algebra",
     "solution": "Take square roots.\nEither $x=3$ or $x=-3$.\nOnly $\\boxed{3}$ is positive."},
    {"problem": "Factor $x^2-1$.", "level": "Level ?", "type": "Algebra",
     "solution": "A difference of squares.\nHere $b=1$.\nIt is $\\boxed{(x-1)(x+1)}$."},
    {"problem": "List the roots of $x^2=4$.", "level": "Level 1", "type": "Algebra",
     "solution": "Since $2^2=4$, $2$ is a root.\nThe other is $-2$.\n"
                 "All: $\\boxed{-2}$, $\\boxed{2}$."},
]  # fmt: skip
MATH_GOLDS = ["\\frac56", "3", "(x-1)(x+1)", "-2,2"]


HINTS = [  # all but the last step, in MATH and in GSM
    ["The common denominator is $6$.\nNow $\\frac12=\\frac36$.", "Take square roots.",
     "A difference of squares.", "Since $2^2=4$, $2$ is a root."],
    [row["answer"].split("\n")[0] for row in GSM]]  # fmt: skip


def chat(*texts, first="user"):
    """Turns of the user and the assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def load(rows, tmp_path, keep_all=False, **changes):
    """Problems of rows that are written as JSON lines."""
    changes = {"max_prompt_length": 2048, **changes}
    config = make_config(dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows), **changes)
    return ghpo.load_problems(config, ghpo.Prompts(config), keep_all)


def columns(prompt, answer, hint):
    return {"dataset_prompt_column": prompt, "dataset_answer_column": answer,
            "dataset_hint_column": hint}  # fmt: skip


# ---- data sets as they are ---------------------------------------------------------------------


def numina(row):
    messages = chat(row["problem"], row["solution"])
    return {"source": "synthetic_math", "problem": row["problem"], "solution": row["solution"],
            "messages": messages}  # fmt: skip


def openr1(row, gold):
    generation = f"<think>\nHm.\n</think>\n{row['solution']}"
    return {
        "problem": row["problem"], "solution": row["solution"], "answer": gold,
        "problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads",
        "uuid": "0a1b", "is_reasoning_complete": [True, True], "generations": [generation] * 2,
        "correctness_math_verify": [True, False], "correctness_llama": None,
        "finish_reasons": None, "correctness_count": 1,
        "messages": chat(row["problem"], generation)}  # fmt: skip


def dapo(row, gold):
    text = (
        "Solve the following math problem step by step. The last line of your response should "
        f"be of the form Answer: $Answer.\n\n{row['problem']}\n\nRemember to put it there."
    )
    return {
        "data_source": "math_dapo", "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"}}  # fmt: skip


SOLUTIONS = [row["solution"] for row in MATH]
TALKS = [chat(row["problem"], row["solution"]) for row in MATH]
FORMATS = {  # name: rows, columns, golds, solutions
    "gsm8k": (GSM, ("question", "answer", "answer"), GSM_GOLDS, [row["answer"] for row in GSM]),
    "math": (MATH, ("problem", "solution", "solution"), MATH_GOLDS, SOLUTIONS),
    "numina": ([*map(numina, MATH)], ("problem", "solution", "solution"), MATH_GOLDS, SOLUTIONS),
    "numina chat": ([*map(numina, MATH)], ("messages", "solution", "nowhere"),
                    MATH_GOLDS, SOLUTIONS),
    "openr1": ([*map(openr1, MATH, MATH_GOLDS)], ("problem", "answer", "solution"),
               MATH_GOLDS, SOLUTIONS),
    "chat alone": ([{"messages": talk} for talk in TALKS], ("messages", "messages", "messages"),
                   MATH_GOLDS, SOLUTIONS),
    "dapo": ([*map(dapo, MATH, MATH_GOLDS)], ("prompt", "reward_model.ground_truth", "nowhere"),
             MATH_GOLDS, [""] * 4),
    "trl": ([{"prompt": talk[:1], "solution": f"${gold}$"}
             for talk, gold in zip(TALKS, MATH_GOLDS)],
            ("prompt", "solution", "nowhere"), [f"${gold}$" for gold in MATH_GOLDS], [""] * 4),
    "prompt and completion": (
        [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS],
        ("prompt", "completion", "completion"), MATH_GOLDS, SOLUTIONS),
    "reference": ([{"problem": row["problem"], "solution": gold, "solution_hint": row["solution"]}
                   for row, gold in zip(MATH, MATH_GOLDS)],
                  ("problem", "solution", "solution_hint"), MATH_GOLDS, SOLUTIONS),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_data_sets_people_use(name, tmp_path, capsys):
    rows, names, golds, solutions = FORMATS[name]
    problems = load(rows, tmp_path, **columns(*names), system_prompt="Think.")
    assert [p.gold for p in problems] == golds
    assert [p.solution for p in problems] == solutions
    assert "4 of 4 rows usable" in capsys.readouterr().err
    sources = GSM if name == "gsm8k" else MATH
    prompts = ghpo.Prompts(make_config(max_prompt_length=2048))
    for problem, source, row in zip(problems, sources, rows):
        question = source.get("question", source.get("problem"))
        whole = source.get("answer", source.get("solution"))
        assert [turn["role"] for turn in problem.messages] == ["system", "user"]
        assert problem.messages[0]["content"] == "Think." and question in problem.text
        assert problem.row == row
        prompt = prompts.tokenizer.decode(prompts.ids(problem)[0])
        assert question in prompt
        for line in whole.splitlines():  # nothing of a solution in a prompt
            assert line not in prompt
        hint, _ = hints.make_hint(problem, 0.99, None, None)
        assert hint == (HINTS[name == "gsm8k"][problem.id] if problem.solution else "")
        answer = f"<think>so</think><answer>{golds[problem.id]}</answer>"
        assert accuracy_reward(answer, problem.gold) == 1.0


@pytest.mark.parametrize("name, prompt, answer", [
    ("gsm8k_train", "question", "answer"), ("math500_dev", "problem", "solution")])  # fmt: skip
def test_golds_are_found_in_real_solutions(name, prompt, answer, tmp_path):
    """Against the golds that the files' authors cut out."""
    if not (SHARED / f"{name}.jsonl").exists():
        pytest.skip("no shared data")
    source = read_jsonl(SHARED / f"{name}.jsonl")
    rows = [{prompt: row["problem"], answer: row["solution_hint"]} for row in source]
    problems = load(rows, tmp_path, **columns(prompt, answer, answer))
    assert len(problems) >= 0.99 * len(rows)
    for problem in problems:
        response = f"\\boxed{{{source[problem.id]['solution']}}}"
        assert accuracy_reward(response, problem.gold) == 1.0, (problem.gold, response)
        assert problem.solution == source[problem.id]["solution_hint"]


def rows_for_the_loop(name):
    """Rows in hub columns, the columns, and solutions by row; our own when there are no others."""
    names = ("question", "answer") if name.startswith("gsm8k") else ("problem", "solution")
    if name in ("gsm8k", "math"):
        rows = GSM if name == "gsm8k" else MATH
    elif (SHARED / f"{name}.jsonl").exists():
        short = [row for row in read_jsonl(SHARED / f"{name}.jsonl")
                 if len(row["problem"]) + len(row["solution_hint"]) < 700][:40]  # fmt: skip
        rows = [{names[0]: row["problem"], names[1]: row["solution_hint"], "level": "Level 3"}
                for row in short]  # fmt: skip
    else:
        pytest.skip("no shared data")
    return rows, columns(names[0], names[1], names[1])


@pytest.mark.parametrize("name", ["gsm8k", "math", "gsm8k_train", "math500_dev"])
def test_hub_columns_through_the_whole_loop(name, main, tmp_path):
    rows, changes = rows_for_the_loop(name)
    done = main(tmp_path, dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows), max_steps=2,
                max_prompt_length=1024, max_completion_length=8, **changes)  # fmt: skip
    assert done.status == 0, done.err
    shown = 0
    for step in (1, 2):
        for line in read_jsonl(done.folder / "rollouts" / f"step_{step:06d}.jsonl"):
            row = rows[line["id"]]
            solution = row[changes["dataset_answer_column"]]
            assert row[changes["dataset_prompt_column"]] in line["prompt"]
            assert solution.startswith(line["hint"]) and len(line["hint"]) < len(solution)
            rest = line["prompt"].replace(line["hint"], "") if line["hint"] else line["prompt"]
            assert not any(part in rest for part in solution.splitlines() if len(part) > 9)
            assert "####" not in line["prompt"] and "boxed{" not in line["hint"]
            shown += bool(line["hint"])
    assert shown > 0


# ---- kinds of files ----------------------------------------------------------------------------

TABLE = [dict(zip(("problem", "solution", "solution_hint", "level"), row)) for row in (
    ('Say "hi", 2+2?\nNow.', "007", "a\tb\nend", "3"), ("π·2?", "2\\pi", "", ""),
    ("NA", "1e5", "so,\n1e5", "Level 5"))]  # fmt: skip


def as_table(separator):
    quote = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
    lines = [list(TABLE[0]), *(row.values() for row in TABLE)]
    return "".join(separator.join(map(quote, line)) + "\r\n" for line in lines)


def write_kind(kind, folder):
    """The rows of TABLE in a file or folder of some kind; its path."""
    import datasets

    lines = "".join(json.dumps(row) + "\n" for row in TABLE)
    texts = {
        "rows.jsonl": lines, "blank.jsonl": lines.replace("\n", "\n\n  \n"),
        "crlf.jsonl": lines.replace("\n", "\r\n"), "bom.jsonl": "\ufeff" + lines,
        "lines.json": lines, "array.json": json.dumps(TABLE, indent=2),
        "array.jsonl": "\ufeff " + json.dumps(TABLE), "rows.csv": as_table(","),
        "bom.csv": "\ufeff" + as_table(","), "rows.tsv": as_table("\t"), "rows.jsonl.gz": lines,
        "array.json.gz": json.dumps(TABLE), "rows.csv.gz": as_table(",")}  # fmt: skip
    path = folder / kind
    if kind in texts:
        opened = gzip.open if kind.endswith("gz") else open
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            file.write(texts[kind])
        return str(path)
    data = datasets.Dataset.from_list(TABLE)
    if kind == "rows.parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    elif kind == "folder of parquet":
        path.mkdir()
        data.to_parquet(path / "train-00000-of-00001.parquet")
    elif kind == "folder.jsonl":
        path.mkdir()
        (path / "train.jsonl").write_text(lines)
    return str(path)


KINDS = ["rows.jsonl", "blank.jsonl", "crlf.jsonl", "bom.jsonl", "lines.json", "array.json",
         "array.jsonl", "rows.csv", "bom.csv", "rows.tsv", "rows.jsonl.gz", "array.json.gz",
         "rows.csv.gz"]  # fmt: skip
LIBRARY_KINDS = ["rows.parquet", "saved", "saved splits", "folder of parquet", "folder.jsonl"]


@pytest.mark.parametrize("kind", KINDS + LIBRARY_KINDS)
def test_kinds_of_files(kind, tmp_path, prompts, monkeypatch):
    path = write_kind(kind, tmp_path)
    if kind in KINDS:
        monkeypatch.setitem(sys.modules, "datasets", None)  # they need no library
    problems = ghpo.load_problems(make_config(dataset_name=path), prompts)
    assert [p.id for p in problems] == [0, 1, 2]
    assert [p.text for p in problems] == [row["problem"] for row in TABLE]
    assert [p.gold for p in problems] == ["007", "2\\pi", "1e5"]
    assert [p.solution for p in problems] == ["a\tb\nend", "", "so,\n1e5"]
    assert [p.level for p in problems] == [3.0, 0.0, 5.0]
    assert [p.row for p in problems] == TABLE


def test_a_split_of_a_saved_folder(tmp_path, prompts):
    path = write_kind("saved splits", tmp_path)
    config = make_config(dataset_name=path, dataset_split="test")
    assert len(ghpo.load_problems(config, prompts)) == 1


def test_a_hub_name_is_asked_for_with_its_config_and_split(tmp_path, prompts, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(GSM)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = make_config(dataset_name="openai/gsm8k", dataset_config="main", dataset_split="test",
                         max_prompt_length=500,
                         **columns("question", "answer", "answer"))  # fmt: skip
    assert [p.gold for p in ghpo.load_problems(config, prompts)] == GSM_GOLDS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def file_with(name, content):
    def make(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def pipe(folder):
    os.mkfifo(folder / "pipe.jsonl")
    return str(folder / "pipe.jsonl")


def empty_folder(folder):
    (folder / "nothing").mkdir()
    return str(folder / "nothing")


def folder_of_bad_csv(folder):
    """Read by the library, which hides what was wrong behind a message of its own."""
    (folder / "bad").mkdir()
    (folder / "bad" / "train.csv").write_text("problem,solution\na,1\nHi, you,2\n")
    return str(folder / "bad")


GOOD = json.dumps(TABLE[0]) + "\n"


@pytest.mark.parametrize("make, message", [
    (file_with("x.jsonl", GOOD + "\n" + '{"problem": "4a\n' + GOOD),
     "x.jsonl, line 3: .*nterminated"),
    (file_with("x.jsonl", GOOD * 2 + "[1, 2]\n"),
     "x.jsonl, line 3: 'list' object is not a mapping"),
    (file_with("x.jsonl", GOOD + "null\n"), "x.jsonl, line 2"),
    (file_with("x.jsonl", '{"a":' * 100_000), "x.jsonl, line 1: .*recursion"),
    (file_with("x.jsonl", "[1, 2]\n" + GOOD), "x.jsonl: Extra data: line 2"),
    (file_with("x.json", '[{"problem": "a"},\n {"problem": b}]'), "x.json: .*line 2 column"),
    (file_with("x.json", '[{"problem": "a"}, 5]'), "x.json, row 1: 'int' object is not a mapping"),
    (file_with("x.jsonl", b'{"problem": "\xff"}\n'), "x.jsonl: 'utf-8' codec can't decode"),
    (file_with("x.csv", "problem,solution\na,1\nHi, you,2\n"), "x.csv, line 3: more cells"),
    (file_with("x.csv", 'problem,solution\na,1\n"b,2\nc,3\n'), "x.csv.* unexpected end of data"),
    (file_with("x.jsonl.gz", GOOD), "x.jsonl.gz: Not a gzipped file"),
    (file_with("x.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-20]),
     "x.jsonl.gz: .*end-of-stream"),
    (file_with("x.parquet", "no parquet"), "x.parquet .*file\\): .*[Pp]arquet"),
    (file_with("x.txt", "what"), "x.txt .*\\.jsonl, \\.json, \\.csv"),
    (lambda folder: str(folder / "none.jsonl"), "none.jsonl: .*No such file"),
    (lambda folder: str(folder / "none.tsv"), "none.tsv: .*No such file"),
    (lambda folder: str(folder / "none.parquet"), "none.parquet"),
    (lambda folder: "not a name", "not a name .a hub name"),
    (folder_of_bad_csv, "bad .*: .*Error tokenizing data.*line 3"),
    (empty_folder, "nothing .*: .*any data files"),
    (pipe, "pipe.jsonl is a pipe: write a file"),
])  # fmt: skip
def test_files_that_cannot_be_read(make, message, tmp_path, prompts):
    config = make_config(dataset_name=make(tmp_path))

    def give_up(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    try:
        with pytest.raises(ghpo.UserError, match=message) as error:
            ghpo.load_problems(config, prompts)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in str(error.value)


def test_parquet_without_the_library_names_it(tmp_path, prompts, monkeypatch):
    path = write_kind("rows.parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ghpo.UserError, match=r"rows.parquet .*file\): .*datasets"):
        ghpo.load_problems(make_config(dataset_name=path), prompts)


# ---- cells -------------------------------------------------------------------------------------

ROW = {"problem": "4a3b5?", "solution": "(7,2)", "solution_hint": "a37\nb52\nend"}


def test_unusable_rows_are_dropped_counted_and_named(tmp_path, capsys):
    rows = [
        ROW,
        ROW | {"problem": ""},
        ROW | {"solution": None},
        ROW | {"solution": "  "},
        ROW | {"solution": 0, "level": "Level 5"},
        ROW | {"problem": "4a3b5?" * 50},
        ROW | {"problem": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"},
                           {"role": "user", "content": "4a3b5?"}]},
        ROW | {"solution_hint": None, "level": 3},
        ROW | {"solution_hint": "(7,2)", "level": "7.5"},
    ]  # fmt: skip
    problems = load(rows, tmp_path, system_prompt="S", max_prompt_length=128)
    told = capsys.readouterr().err
    assert [p.id for p in problems] == [0, 4, 6, 7, 8]
    assert [p.level for p in problems] == [0.0, 5.0, 0.0, 3.0, 7.5]
    assert problems[1].gold == "0"
    assert problems[0].messages == [{"role": "system", "content": "S"},
                                    {"role": "user", "content": "4a3b5?"}]  # fmt: skip
    assert [m["role"] for m in problems[2].messages] == ["system", "user", "assistant", "user"]
    assert "5 of 9 rows usable" in told
    assert re.search("dropped 1, no problem text: rows .1.", told)
    assert re.search("dropped 2, no answer: rows .2, 3.", told)
    assert re.search("dropped 1, prompt over max_prompt_length=128 tokens: rows .5.", told)
    assert re.search(
        "kept 2, without a solution to hint from: rows .7, 8.", told
    )  # an answer is no solution


@pytest.mark.parametrize("cell, gold", [
    ("72", "72"), (72, "72"), (72.0, "72.0"), ("1,000", "1,000"), (True, "True"), (0, "0"),
    ([4], "4"), (["\\frac12"], "\\frac12"), (["So it is \\boxed{4}"], "4"),
    (0.30000000000000004, "0.3"), ("0.30000000000000004", "0.3"), (0.7999999999999999, "0.8"),
    (-2.0000000000000004, "-2"), ("3.14159265358979", "3.14159265358979"),
    ("0.99999999", "0.99999999"),
    ("The answer is 4.", "4"), ("The answer is: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
    ("We add.\nSo 2+2=4.\nThe answer is: 4", "4"), ("First \\boxed{1}, then \\boxed{2}.", "2"),
    ("It is 5.\n#### 1,234", "1,234"),
    ("<think>\\boxed{1}</think>\n\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    (chat("Two?", "It is \\boxed{2}."), "2"), ([{"role": "assistant", "content": "#### 3"}], "3"),
])  # fmt: skip
def test_golds_that_are_read(cell, gold, tmp_path):
    (problem,) = load([ROW | {"solution": cell}], tmp_path)
    assert problem.gold == gold
    assert accuracy_reward(f"\\boxed{{{gold}}}", problem.gold) == 1.0


NO_GOLDS = [
    (None, "no answer"), ("", "no answer"), (float("nan"), "no answer"), ("NaN", "no answer"),
    (float("inf"), "no answer"), ([], "solution is a list"), (["2", "3"], "solution is a list"),
    ([2, 3], "solution is a list"), ({"value": "2"}, "solution is a dict"), ("#### ", "no answer"),
    ([{"value": "8"}], "no role"), ("x+" * 4000, "longer than 3000"), ("\\frac{", "not read"),
    ("['2', '3']", "not read"),
]  # fmt: skip


@pytest.mark.parametrize("cell, reason", NO_GOLDS)
def test_golds_that_are_dropped(cell, reason, tmp_path, capsys):
    problems = load([ROW, ROW | {"solution": cell}, ROW], tmp_path)
    told = capsys.readouterr().err
    assert [p.id for p in problems] == [0, 2] and "2 of 3 rows usable" in told
    assert re.search(f"dropped 1, [^\n]*{reason}[^\n]*: rows .1.", told)


@pytest.mark.parametrize("cell, reason", NO_GOLDS)
def test_evaluation_drops_no_row(cell, reason, tmp_path, capsys):
    problems = load([ROW, ROW | {"solution": cell}], tmp_path, keep_all=True, rl_type="grpo")
    told = capsys.readouterr().err
    assert [p.id for p in problems] == [0, 1] and "2 of 2 rows usable" in told
    assert re.search(f"counted as wrong 1, [^\n]*{reason}[^\n]*: rows .1.", told)
    for answer in (str(cell), "", "(7,2)"):  # nothing is right
        assert accuracy_reward(f"\\boxed{{{answer}}}", problems[1].gold) == 0.0


@pytest.mark.parametrize(
    "cells, reason",
    [
        ({"problem": None}, "no problem text"),
        ({"problem": "x" * 300}, "prompt over max_prompt_length=128 tokens"),
        ({"problem": [{"role": "user", "content": None}]}, "content that is no text"),
    ],
)
def test_an_evaluation_set_with_a_row_that_cannot_be_asked(cells, reason, tmp_path):
    with pytest.raises(ghpo.UserError, match=f"rows.jsonl, row 1: [^;]*{reason};"):
        load([ROW, ROW | cells], tmp_path, keep_all=True, rl_type="grpo", max_prompt_length=128)


def test_cells_that_are_no_number(tmp_path):
    """NaN is how tables say that there is nothing."""
    nan = float("nan")
    rows = [ROW | {"solution_hint": nan, "level": nan}, ROW | {"problem": nan}]
    (problem,) = load(rows, tmp_path)
    assert (problem.id, problem.solution, problem.level) == (0, "", 0.0)


def test_own_rewards_take_any_gold(tmp_path):
    """What accuracy cannot read is dropped only where accuracy is asked."""
    own = tmp_path / "own.py"
    own.write_text("def runs(response, gold):\n    return 0.0\n")
    changes = {"reward_funcs": [f"{own}:runs"], "reward_weights": [1.0],
               "hint_trigger": f"{own}:runs"}  # fmt: skip
    rows = [ROW, ROW | {"solution": "assert f(2) == {"}, ROW | {"solution": None}]
    problems = load(rows, tmp_path, **changes)
    assert [p.gold for p in problems] == ["(7,2)", "assert f(2) == {"]


def test_rewards_get_the_columns_that_are_json(tmp_path, prompts, capsys):
    import datasets

    image = {"bytes": b"\x89", "path": None}
    tests = [{"input": "1", "output": None}]
    rows = [ROW | {"tests": tests, "image": image, "score": float("nan")},
            ROW | {"tests": [], "image": image, "score": 2.5}]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    problems = ghpo.load_problems(make_config(dataset_name=str(tmp_path / "saved")), prompts)
    told = capsys.readouterr().err
    assert problems[0].row == ROW | {"tests": tests}
    assert problems[1].row == ROW | {"tests": [], "score": 2.5}
    assert told.count("image") == told.count("score") == 1
    assert re.search("kept 2, but rewards do not get image, which is no JSON: rows .0, 1.", told)
    assert re.search("kept 1, but rewards do not get score, which is no JSON: rows .0.", told)


def test_dotted_columns(tmp_path):
    rows = [{"a.b": "is its own name", "a": {"b": "not me", "c": {"d": "5"}}, "q": {"t": "Five?"}},
            {"a": None, "q": {"t": "No a?"}}, {"q": "no dict"}]  # fmt: skip
    problems = load(rows, tmp_path, **columns("q.t", "a.c.d", "a.b"))
    assert [(p.id, p.text, p.gold, p.solution) for p in problems] == [
        (0, "Five?", "5", "is its own name")]  # fmt: skip


def test_deep_cells(tmp_path, capsys):
    """As deep as the JSON reader goes, dicts and lists: no row stops the load."""
    deep = {"a": 1}
    for _ in range(700):
        deep = {"b": deep, "c": [deep["a"]] if "a" in deep else []}
    lists = []
    for _ in range(700):
        lists = [lists]
    rows = [ROW | {"deep": deep}, ROW | {"deep": lists}, ROW | {"solution": lists}]
    problems = load(rows, tmp_path)
    assert [p.id for p in problems] == [0, 1]


@pytest.mark.parametrize("rows, changes, message", [
    ([{"problem": "4a3b5?", "answer": "(7,2)"}] * 3, {},
     "no column .'solution', 'solution_hint'. in .'answer', 'problem'."),
    ([{k: ROW[k] for k in ("problem", "solution")}] * 3, {},
     "no column .'solution_hint'. in .'problem', 'solution'"),
    ([dapo(MATH[0], "1")] * 3, columns("prompt", "reward_model.ground_thruth", "x"),
     "no column .'reward_model.ground_thruth'. in .*'reward_model.ground_truth'"),
    ([ROW] * 3, {"curriculum": True}, "no column .'level'"),
    ([ROW] * 3, {"dataset_prompt_column": "Problem"},
     "no column .'Problem'. in .'problem', 'solution'"),
    ([openr1(MATH[0], "1")] * 3, {"dataset_hint_column": "generations"},
     "none of its 3 rows is usable; generations is a list, not a text"),
    ([], {}, "none of its 0 rows is usable"),
    ([ROW | {"solution": None}] * 3, {}, "none of its 3 rows is usable; no answer"),
])  # fmt: skip
def test_columns_that_are_missing(rows, changes, message, tmp_path):
    with pytest.raises(ghpo.UserError, match=message):
        load(rows, tmp_path, **changes)


@pytest.mark.parametrize("lines, changes, message", [
    ([json.dumps(ROW)] * 3, {}, "3 usable problems, a step takes 4"),
    ([json.dumps(ROW), '{"problem": "4a', *[json.dumps(ROW)] * 9], {},
     "rows.jsonl, line 2.*Unterminated"),
    ([json.dumps({"problem": "4a3b5?", "answer": "(7,2)"})] * 9, {},
     "no column .'solution', 'solution_hint'"),
    ([json.dumps(ROW | {"solution_hint": ["a", "b"]})] * 9, {}, "solution_hint is a list"),
    ([json.dumps(ROW)] * 9, {"curriculum": True, "dataset_level_column": "nowhere"}, "nowhere"),
    ([json.dumps(ROW)] * 9, {"dataset_name": "none.jsonl"}, "none.jsonl"),
])  # fmt: skip
def test_bad_data_ends_with_one_message(lines, changes, message, main, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    done = main(tmp_path, "--dry_run", **{"dataset_name": str(tmp_path / "rows.jsonl"), **changes})
    assert done.status == 2 and "Traceback" not in done.err
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error)


def test_a_row_may_lack_a_column(tmp_path):
    rows = [{k: ROW[k] for k in ("problem", "solution")}, ROW | {"level": 2}, {"problem": "?"}, {}]
    problems = load(rows, tmp_path, curriculum=True)
    assert [(p.id, p.level) for p in problems] == [(0, 0.0), (1, 2.0)]
    assert [p.solution for p in problems] == ["", ROW["solution_hint"]]
    rows = [{k: ROW[k] for k in ("problem", "solution")}] * 2  # grpo needs no hints
    assert len(load(rows, tmp_path, rl_type="grpo")) == 2


# ---- chats -------------------------------------------------------------------------------------


def test_turns_after_the_users_last_are_the_solution(tmp_path, capsys):
    shots = chat("1+1?", "It is 2.", "2+2?")
    rows = [
        {"problem": shots, "solution": "4"},  # few-shot turns stay
        {"problem": [*shots, {"role": "assistant", "content": "2 and 2.\nSo 4."}], "solution": "4"},
        {"problem": [*shots, {"role": "assistant", "content": "2 and 2."},
                     {"role": "assistant", "content": "So 4."}], "solution": "4"},
        {"problem": 2 * chat("1+1?", "One and one.\nIt is 2."), "solution": "2"},
        {"problem": [*shots, {"role": "assistant", "content": "No."}], "solution": "4",
         "solution_hint": "Mine."},
        {"problem": [*shots, {"role": "assistant", "content": ""}], "solution": "4"},
        {"problem": "Show that 2 is 1+1. Since 1+1 is 2.", "solution": "2",
         "solution_hint": "Since 1+1 is 2."},
        {"problem": "Is 2 even? 2", "solution": "2", "solution_hint": "2"},  # no solution to betray
    ]  # fmt: skip
    problems = load(rows, tmp_path)
    told = capsys.readouterr().err
    assert [p.solution for p in problems] == [
        "", "2 and 2.\nSo 4.", "2 and 2.\nSo 4.", "One and one.\nIt is 2.", "Mine.", "",
        "Since 1+1 is 2.", "2"]  # fmt: skip
    for problem in problems[:6]:
        assert [turn["role"] for turn in problem.messages] == ["user", "assistant", "user"]
    assert problems[1].messages == shots and problems[1].text == "2+2?"
    assert re.search("kept 2, but the prompt shows the whole solution: rows .3, 6.", told)


def test_the_trailing_turn_is_cut_without_hints_too(tmp_path):
    rows = [{"problem": chat("2+2?", "So \\boxed{4}."), "solution": "4"}]
    for changes in ({"rl_type": "grpo"}, {"rl_type": "ghpo"}):
        (problem,) = load(rows, tmp_path, **changes)
        assert problem.messages == [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("question, reason", [
    ([{"content": "2+2?"}], "no role"),
    ([{"role": None, "content": "2+2?"}], "no role"),
    ([{"from": "human", "value": "2+2?"}], "no role"),
    (["2+2?", "4"], "no role"),
    ([{"role": "user", "content": None}], "content that is no text"),
    ([{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}], "content that is no text"),
    ([{"role": "user", "content": "2+2?"}, {"role": "tool", "content": "4"}], "the chat ends with"),
    (chat("2+2?", "4", first="assistant")[:1], "no problem text"),
    ([], "no problem text"),
    ([{"role": "user", "content": " "}], "no problem text"),
    ({"text": "2+2?"}, "problem is a dict"),
    ("2+2? \ud800", "surrogate"),
    ([{"role": "user", "content": "\udfff"}], "surrogate"),
])  # fmt: skip
def test_malformed_problems_are_dropped_with_the_reason(question, reason, tmp_path, capsys):
    problems = load([ROW, ROW | {"problem": question}], tmp_path)
    told = capsys.readouterr().err
    assert [p.id for p in problems] == [0] and "1 of 2 rows usable" in told
    assert re.search(f"dropped 1, [^\n]*{reason}[^\n]*: rows .1.", told)


def test_a_list_of_one_is_a_text(tmp_path):
    (problem,) = load([ROW | {"solution_hint": ["a37\nend"]}], tmp_path)
    assert problem.solution == "a37\nend"


def test_a_template_that_refuses_a_chat_drops_the_row(tmp_path, capsys):
    config = make_config(dataset_name=write_jsonl(tmp_path / "rows.jsonl", [
        ROW, ROW | {"problem": [{"role": "critic", "content": "No."}, *chat("2+2?")]},
    ]))  # fmt: skip
    prompts = ghpo.Prompts(config)
    prompts.tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if m.role == 'critic' -%}{{ raise_exception('no critics') }}"
        "{%- endif -%}{{ m.content }}{%- endfor -%}"
    )
    assert [p.id for p in ghpo.load_problems(config, prompts)] == [0]
    assert "dropped 1, chat template: no critics: rows [1]" in capsys.readouterr().err


def test_the_configs_system_prompt_replaces_the_rows(tmp_path):
    rows = [ROW | {"problem": [{"role": "system", "content": "Old."}, *chat("2+2?")]}]
    (own,), (ours,) = load(rows, tmp_path), load(rows, tmp_path, system_prompt="New.")
    assert [turn["content"] for turn in own.messages] == ["Old.", "2+2?"]
    assert [turn["content"] for turn in ours.messages] == ["New.", "2+2?"]


# ---- length, hash, speed -----------------------------------------------------------------------


@pytest.mark.parametrize("system_prompt", [None, "Think first." * 5])
def test_length_is_exact_though_few_prompts_are_tokenised(system_prompt, tmp_path, monkeypatch):
    """Against tokenising every prompt: random texts, chats and limits; bytes are tokens here."""
    rng = random.Random(0)
    rows = []
    for _ in range(120):
        text = "".join(rng.choice("ab 1é漢<|user|>") for _ in range(rng.randrange(1, 60)))
        shots = chat("x" * rng.randrange(1, 20), "y") if rng.random() < 0.3 else []
        rows.append(ROW | {"problem": [*shots, *chat("q" + text)] if shots else "q" + text})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(dataset_name=str(tmp_path / "rows.jsonl"), system_prompt=system_prompt,
                         max_prompt_length=10_000)  # fmt: skip
    prompts = ghpo.Prompts(config)
    lengths = [len(prompts.ids(p)[0]) for p in ghpo.load_problems(config, prompts)]
    assert len(lengths) == len(rows)
    calls = []
    ids = ghpo.Prompts.ids
    monkeypatch.setattr(ghpo.Prompts, "ids", lambda self, *a: calls.append(a) or ids(self, *a))
    for limit in sorted({*lengths}):
        short = make_config(dataset_name=config.dataset_name, system_prompt=system_prompt,
                            max_prompt_length=limit)  # fmt: skip
        kept = [i for i, length in enumerate(lengths) if length <= limit]
        assert [p.id for p in ghpo.load_problems(short, prompts)] == kept
    calls.clear()
    ghpo.load_problems(make_config(dataset_name=str(DATA / "train.jsonl")), prompts)
    assert len(calls) == 1  # the template alone


def test_fingerprint(tmp_path):
    rows = [ROW | {"problem": f"{i}a3?", "solution": f"({i})"} for i in range(9)]
    seen = {}
    for name, other in {
        "same": rows, "reversed": rows[::-1], "doubled": rows * 2, "shortened": rows[:-1],
        "gold": [*rows[:-1], rows[-1] | {"solution": "(7)"}],
        "prompt": [*rows[:-1], rows[-1] | {"problem": "other"}],
        "moved": [ROW | {"problem": ""}, *rows],
    }.items():  # fmt: skip
        seen[name] = ghpo.fingerprint(load(other, tmp_path))
    assert len(set(seen.values())) == 7
    assert seen["same"] == ghpo.fingerprint(load([row | {"more": 1} for row in rows], tmp_path))
    assert seen["same"] == "6a17b4b3edae4eef"
