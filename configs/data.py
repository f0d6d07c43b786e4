"""What dataset_name and the columns of a config stand for: rows of a file or the hub, as problems.

Called by ghpo.py: load_problems. Rows that cannot be used are counted and shown, never silently
dropped; what is wrong with a file is one line that names file and line.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from configs import UserError, as_user_error, need, say
from hints import Problem, uses_hints
from reward import extract_answer, gold_answer, gold_fault

FLOAT_NOISE = re.compile(r"-?\d*\.\d*(?:0{7,}|9{7,})\d{1,2}")  # 0.1 + 0.2 is 0.30000000000000004
TEMPLATE_SLACK = 16  # tokens that a text in its template may take beyond those of both alone


def read_rows(config: Any) -> list[dict]:
    """Rows of the data set as dicts; UserError names the file, and the line where it is known."""
    name, path = config.dataset_name, Path(config.dataset_name)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    need(not path.is_fifo(), f"dataset_name={name} is a pipe: write a file, every rank reads it")
    if kind in ("jsonl", "json", "csv", "tsv") and not path.is_dir():
        return read_text_rows(path, kind)
    kinds = "a hub name, a folder, or a .jsonl, .json, .csv, .tsv or .parquet file"
    with as_user_error(f"dataset_name={name} ({kinds})"):
        import datasets

        if (path / "state.json").is_file():  # by save_to_disk
            data = datasets.load_from_disk(name)
        elif kind == "parquet" and not path.is_dir():
            data = datasets.load_dataset(kind, data_files=name, split="train")
        else:
            data = datasets.load_dataset(name, config.dataset_config, split=config.dataset_split)
        return data.to_list()


def read_text_rows(path: Path, kind: str) -> list[dict]:
    """Rows of a .jsonl, .json, .csv or .tsv file, plain or gzipped, without `datasets`."""
    rows, name = [], f"dataset_name={path}"
    opened = gzip.open if path.suffix == ".gz" else open
    with as_user_error(name), opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in ("csv", "tsv"):  # all cells are text: 007 is not 7.0
            csv.field_size_limit(2**31 - 1)
            table = csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",", strict=True)
            for row in table:
                place = f"{name}, line {table.line_num}"
                need(None not in row, f"{place}: more cells than columns: is a separator unquoted?")
                rows.append(row)
            return rows
        text = file.read()
        if text.lstrip().startswith("["):
            for number, row in enumerate(json.loads(text)):
                with as_user_error(f"{name}, row {number}"):
                    rows.append({**row})
            return rows
        for number, line in enumerate(text.split("\n"), 1):
            with as_user_error(f"{name}, line {number}"):
                if line.strip():
                    rows.append({**json.loads(line)})
    return rows


def flat(row: dict, levels: int = 4) -> dict:
    """A row's columns, and what is in dicts by dotted names: {"a": {"b": 1}, "a.b": 1}."""
    cells = dict(row)
    for key, value in row.items():
        if isinstance(value, dict) and levels:
            for inner, part in flat(value, levels - 1).items():
                cells.setdefault(f"{key}.{inner}", part)
    return cells


def check_columns(config: Any, table: list[dict]) -> None:
    """UserError with the columns there are when no row has a wanted one."""
    c, columns = config, sorted(set().union(*table))
    wanted = [c.dataset_prompt_column, c.dataset_answer_column, *c.dataset_choice_columns]
    has_chats = any(isinstance(cells.get(c.dataset_prompt_column), list) for cells in table)
    if uses_hints(c) and not has_chats:  # a chat can end with the solution
        wanted.append(c.dataset_hint_column)
    if c.curriculum:
        wanted.append(c.dataset_level_column)
    missing = [column for column in wanted if column not in columns]
    need(
        not table or not missing,
        f"{c.dataset_name}: no column {missing} in {columns}: set "
        "dataset_prompt_column and so on (eval_datasets: in a set's own settings)",
    )


# What is wrong with a row is raised as a UserError by the functions that read it.


def split_chat(turns: list[dict]) -> tuple[list[dict], str]:
    """(turns up to the user's last, text of the assistant's after it: a solution)."""
    messages, solution = [], ""
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role"), turn.get("content")
        is_text = isinstance(role, str) and isinstance(content, str)
        need(is_text, "a turn of the chat has no role, or content that is no text")
        messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] == "assistant":
        solution = messages.pop()["content"] + "\n" + solution
    is_asked = not messages or messages[-1]["role"] == "user"
    need(is_asked, "the chat ends with neither the user's turn nor the assistant's")
    return messages, solution.rstrip()


def cell_text(cells: dict, column: str) -> str:
    """Text of a cell, "" when it is empty: of a chat its solution, of a list of one its item."""
    value = cells.get(column)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return split_chat(value)[1]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    need(not isinstance(value, list | dict), f"{column} is a {type(value).__name__}, not a text")
    return "" if value is None or value != value else str(value)  # NaN is not itself


def read_gold(text: str) -> str:
    """The answer in a text that may be a whole solution."""
    if FLOAT_NOISE.fullmatch(text):
        text = f"{float(text):.15g}"
    gold = gold_answer(text).strip()
    if gold == text:
        gold = extract_answer(text) or text  # "The answer is 4."
    need(gold.lower() not in ("", "nan", "inf", "-inf"), "no answer")
    return gold


def as_choice(question: str, options: list[str], seed: list[int]) -> tuple[str, str]:
    """(the question with its options in an order of the seed's, the letter of the first one)."""
    need("" not in options, "an option of the multiple choice is missing")
    order = np.random.default_rng(seed).permutation(len(options)).tolist()
    lines = [f"{letter}) {options[i]}" for letter, i in zip(ascii_uppercase, order)]
    return "\n".join([question, "", *lines]), ascii_uppercase[order.index(0)]


def read_messages(cells: dict, config: Any) -> tuple[list[dict], str]:
    """(turns of the problem, a solution after them) of the prompt column."""
    value, solution = cells.get(config.dataset_prompt_column), ""
    if isinstance(value, list):
        messages, solution = split_chat(value)
    else:
        messages = [{"role": "user", "content": cell_text(cells, config.dataset_prompt_column)}]
    need(messages and messages[-1]["content"].strip(), "no problem text")
    if config.system_prompt:
        others = [turn for turn in messages if turn["role"] != "system"]
        messages = [{"role": "system", "content": config.system_prompt}, *others]
    return messages, solution


def read_problem(number: int, row: dict, cells: dict, config: Any) -> tuple[Problem, str | None]:
    """(Problem, why its gold is of no use or None) of a row."""
    c, gold, reason = config, "", None
    messages, own_solution = read_messages(cells, c)
    solution = cell_text(cells, c.dataset_hint_column) if uses_hints(c) else ""
    if not solution.strip():
        solution = own_solution
    try:
        gold = read_gold(cell_text(cells, c.dataset_answer_column).strip())
        if c.dataset_choice_columns:
            columns = (c.dataset_answer_column, *c.dataset_choice_columns)
            options = [cell_text(cells, column).strip() for column in columns]
            text, gold = as_choice(messages[-1]["content"], options, [c.seed, number])
            messages[-1] = {**messages[-1], "content": text}
        elif "accuracy" in c.reward_funcs:
            reason = gold_fault(gold)
    except UserError as error:
        gold, reason = "", str(error)
    texts = [solution, gold, *(turn["content"] for turn in messages)]
    has_halves = re.search("[\ud800-\udfff]", "".join(texts))
    need(not has_halves, "halves of surrogate pairs, which are no text")
    level = re.search(r"\d+\.?\d*|$", str(cells.get(c.dataset_level_column)))[0]  # "Level 5" is 5
    columns = {}
    for column, value in row.items():
        with contextlib.suppress(TypeError, ValueError, RecursionError):  # not JSON: left out
            json.dumps(value, allow_nan=False)
            columns[column] = value
    return Problem(number, messages, gold, solution, float(level or 0), columns), reason


def load_problems(config: Any, prompts: Any, keep_all: bool = False) -> list[Problem]:
    """Usable problems, ids = row numbers; what is dropped is counted and shown. keep_all, for an
    evaluation: no row is dropped, an answer that cannot be read counts as wrong."""
    c, name, rows = config, config.dataset_name, read_rows(config)
    if keep_all:
        rows = rows[: c.eval_limit]
    table = [flat(row) for row in rows]
    check_columns(c, table)
    # most prompts need not be tokenised: a token is at least a byte, and the template around the
    # usual turns takes about as many tokens as around a problem of one letter
    blank, _ = read_problem(0, {}, {c.dataset_prompt_column: "x"}, c)
    frame = len(prompts.ids(blank)[0]) + TEMPLATE_SLACK
    problems, told = [], defaultdict(list)  # told: {(what became of rows, why): their numbers}
    for number, (row, cells) in enumerate(zip(rows, table)):
        try:
            problem, reason = read_problem(number, row, cells, c)
            n_tokens = frame + len(problem.text.encode())
            if n_tokens > c.max_prompt_length or len(problem.messages) > len(blank.messages):
                n_tokens = len(prompts.ids(problem)[0])
            is_short = n_tokens <= c.max_prompt_length
            need(is_short, f"prompt over max_prompt_length={c.max_prompt_length} tokens")
            need(keep_all or not reason, reason)
        except UserError as error:
            reason = str(error).removeprefix(f"row {number}: ")  # of a chat template
            need(not keep_all, f"{name}, row {number}: {reason}; evaluation drops no row, mend it")
            told["dropped", reason].append(number)
            continue
        if reason:
            problem = replace(problem, gold="")
            told["counted as wrong", reason].append(number)
        if uses_hints(c) and problem.solution.strip() in ("", problem.gold):
            told["kept", "without a solution to hint from"].append(number)
        shown = "\n".join(turn["content"] for turn in problem.messages)
        if problem.solution not in ("", problem.gold) and problem.solution.strip() in shown:
            told["kept", "but the prompt shows the whole solution"].append(number)
        for column in row.keys() - problem.row.keys():
            told["kept", f"but rewards do not get {column}, which is no JSON"].append(number)
        problems.append(problem)
    say(f"data: {name}: {len(problems)} of {len(rows)} rows usable")
    for (fate, reason), numbers in told.items():
        say(f"data: {fate} {len(numbers)}, {reason}: rows {numbers[:5]}")
    reasons = "".join(f"; {reason}" for _, reason in told)
    need(problems, f"dataset_name={name}: none of its {len(rows)} rows is usable{reasons}")
    return problems


def fingerprint(problems: list[Problem]) -> str:
    """A short hash of ids, prompts and golds: a resumed run must meet the data it began with."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.messages, problem.gold]).encode())
    return digest.hexdigest()[:16]
