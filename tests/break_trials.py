"""The trials of break.py: what is done to a run, and what is promised.

One section for each kind of fault in shared/docs/BREAK.md; helpers of a section stand before its
trials. The first two trials of a kind are in the test suite: both must have failed at some time.
"""

import fcntl
import functools
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BASE, DATA = TESTS / "tiny" / "base", TESTS / "tiny" / "data"
OWNED = "owned"  # what a payload would write
MARK = "BREAK_TRIAL"  # in the environment of every process of a trial


@dataclass(frozen=True)
class Trial:
    """One bad thing and what is promised. The run is 2 of 3 steps old, or is_new."""

    kind: int  # of shared/docs/BREAK.md
    name: str
    act: Callable  # act(run folder) does it; it may return a list of settings
    told: tuple = ()  # patterns that the program must print
    status: int = 0
    is_new: bool = False
    is_same: bool = False  # ends with the metrics and weights of the run that nothing happened to
    there: tuple = ()  # paths in the run's folder that must be there at the end
    rotated: tuple = ()  # checkpoints that save_total_limit takes away
    check: Callable | None = None  # check(run folder): what is wrong, or None
    during: Callable | None = None  # during(process id, run folder): while the program runs
    in_child: Callable | None = None  # in the process, before the program begins
    as_command: bool = False
    seconds: float = 60  # that it may take, on a busy machine


# ---- what is looked at -------------------------------------------------------------------------


def timeless(path):
    """Metrics without what the clock gives; NaN is no JSON."""
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(("seconds/", "tokens/s"))}
        for line in lines
    ]


def refuse(word):
    raise ValueError(f"{word} is no JSON")


def processes(place):
    """Ids of the living processes that a trial has started, by the mark in their environment."""
    mark, found = f"{MARK}={place}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark in (path / "environ").read_bytes().split(b"\0")
            is_dead = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:  # it has just ended
            continue
        if is_ours and not is_dead:
            found.append(int(path.name))
    return found


# ---- what is done to a run ---------------------------------------------------------------------


def act(work):
    """work(run folder, ...) as work(...), which gives a function of the run folder."""

    @functools.wraps(work)
    def given(*args, **named):
        return lambda run: work(run, *args, **named)

    return given


@act
def setting(run, *words):
    return list(words)


@act
def both(run, *acts):
    return [word for one in acts for word in one(run) or []]


@act
def edit(run, name, work):
    """A file's new text is work(its text)."""
    path = Path(os.path.normpath(run / name))  # a new run has no folder yet
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(work(path.read_text() if path.exists() else ""))


@act
def gone(run, name):
    path = Path(os.path.normpath(run / name))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@act
def link(run, name, target):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)


def checkpoint(run, step=2):
    return run / f"checkpoint-{step:06d}"


def shard(folder):
    """The file of a checkpoint that has its tensors."""
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def overwrite(path, at, data):
    """Bytes at a place, a share of the file."""
    with open(path, "r+b") as file:
        file.seek(int(at * path.stat().st_size))
        file.write(data)


def flip(path, at):
    """One bit."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    path.write_bytes(data)


def truncate(path, share):
    os.truncate(path, int(share * path.stat().st_size))


def merge(path, **changes):
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(folder, new=()):
    """New checksums of a checkpoint, as its attacker would write them."""
    path = folder / "checksums.json"
    if path.exists():
        names = [*json.loads(path.read_text()), *new]
        sums = {name: hashlib.blake2b((folder / name).read_bytes()).hexdigest() for name in names}
        path.write_text(json.dumps(sums))


def write_sealed(path, contents):
    path.write_bytes(contents)
    seal(path.parent)


# ---- 1: names that are not ours ----------------------------------------------------------------


@act
def foreign(run, name, is_folder=True):
    """Something of the user's beside the checkpoints."""
    if is_folder:
        shutil.copytree(checkpoint(run, 1), run / name)
    else:
        (run / name).write_text("mine\n")
    return ["save_total_limit=2"]


@act
def moved_and_linked(run):
    """An old checkpoint that the user keeps on another disk."""
    shutil.move(checkpoint(run, 1), run.parent / "disk-checkpoint-000001")
    checkpoint(run, 1).symlink_to(run.parent / "disk-checkpoint-000001")
    return ["save_total_limit=2"]


DONE = "done: "  # what a run says at its end
RESUMED = ("resuming .*checkpoint-000002$", DONE)
ROTATED = ("checkpoint-000001",)
TRIALS = [
    Trial(1, name, foreign(name, is_folder), RESUMED, is_same=True, there=(name,), rotated=ROTATED)
    for name, is_folder in [
        ("checkpoint-000002-keep", True),
        ("checkpoint-notes.txt", False),
        ("checkpoint-best", True),
        ("checkpoint-000000-old", True),
        ("checkpoint-", True),
        ("checkpoint-12345", True),
        ("checkpoint-000009.bak", True),
        ("checkpoint--00001", True),
        ("checkpoint-999999.damaged", True),
        ("old_checkpoint-000009", True),
        ("checkpoint-0000009", True),
        ("checkpoint-\u0660\u0660\u0660\u0660\u0660\u0669", True),
        ("checkpoint-000009", False),
    ]
]
TRIALS += [
    Trial(
        1,
        "left_by_a_kill",
        foreign("checkpoint-000003.tmp"),
        RESUMED,
        is_same=True,
        rotated=(*ROTATED, "checkpoint-000003.tmp"),
    ),
    Trial(
        1,
        "linked_checkpoint",
        moved_and_linked(),
        RESUMED,
        is_same=True,
        there=("checkpoint-000001/state.json",),
    ),
    Trial(
        1,
        "file_where_a_checkpoint_goes",
        foreign("checkpoint-000003", False),
        ("^error: .*checkpoint-000003",),
        2,
        there=("checkpoint-000003",),
    ),
]

# ---- 2: damaged checkpoints --------------------------------------------------------------------

ASIDE = ("checkpoint-000002 is damaged and set aside", "resuming .*checkpoint-000001$", DONE)


def damaged(name, work, *told, kind=2):
    """work(newest checkpoint): it is set aside, and the one before resumed to the same numbers."""
    return Trial(
        kind,
        name,
        lambda run: work(checkpoint(run)),
        (*ASIDE, *told),
        is_same=True,
        there=("checkpoint-000002.damaged",),
    )


def damaged_sums(name, contents):
    return damaged(
        f"checksums_{name}",
        lambda it: (it / "checksums.json").write_bytes(contents),
        "set aside: checksums.json|has changed since",
    )


TRIALS += [
    damaged("zeros_in_a_shard", lambda it: overwrite(shard(it), 0.3, bytes(20_000)), "distcp"),
    damaged("empty_state", lambda it: truncate(it / "state.json", 0), "state.json"),
    damaged("truncated_shard", lambda it: truncate(shard(it), 0.5), "distcp"),
    damaged("missing_shard", lambda it: shard(it).unlink(), "distcp is missing"),
    damaged("missing_index", lambda it: (it / ".metadata").unlink(), "metadata is missing"),
    damaged("truncated_index", lambda it: truncate(it / ".metadata", 0.7), "metadata"),
    damaged("bit_in_the_index", lambda it: flip(it / ".metadata", 0.5), "metadata"),
    damaged("bit_in_the_export", lambda it: flip(it / "model" / "model.safetensors", 0.6), "model"),
    damaged("missing_checksums", lambda it: (it / "checksums.json").unlink(), "checksums.json"),
    damaged("a_wrong_checksum", lambda it: flip(it / "checksums.json", 0.95), "changed|checksums"),
    damaged("sealed_half_state", lambda it: write_sealed(it / "state.json", b'{"step": ')),
    damaged_sums("empty", b""),
    damaged_sums("a_list", b"[1]"),
    damaged_sums("of_nothing", b"{}"),
    damaged_sums("deep", b"[" * 100_000),
    damaged_sums("no_text", b"\xff\xfe\x00"),
    *(
        damaged(f"bit_at_{at}", lambda it, at=at: flip(shard(it), at), "distcp has changed")
        for at in (0, 0.0003, 0.37, 1)
    ),
    Trial(
        2,
        "set_aside_twice",
        lambda run: (
            truncate(shard(checkpoint(run)), 0.9),
            shutil.copytree(checkpoint(run, 1), run / "checkpoint-000002.damaged"),
        ),
        ASIDE,
        is_same=True,
        there=("checkpoint-000002.damaged", "checkpoint-000002.damaged2"),
    ),
    Trial(
        2,
        "both_are_damaged",
        lambda run: (
            truncate(shard(checkpoint(run, 1)), 0.5),
            truncate(checkpoint(run) / "state.json", 0.5),
        ),
        (
            "^error: .*no good checkpoint left",
            "000001 is damaged.*distcp",
            "000002 is damaged.*state.json",
        ),
        2,
        there=("checkpoint-000001.damaged", "checkpoint-000002.damaged"),
    ),
    Trial(
        2, "an_old_one", lambda run: truncate(shard(checkpoint(run, 1)), 0.5), RESUMED, is_same=True
    ),
    Trial(
        2,
        "one_file_more",
        foreign("checkpoint-000002/notes.txt", False),
        RESUMED,
        is_same=True,
        rotated=ROTATED,
        there=("checkpoint-000002/notes.txt",),
    ),
]

# ---- 3: verifiers and their deadlines ----------------------------------------------------------

SOME = "if zlib.crc32(response.encode()) % 6 == 0 and response not in ('', gold):\n        "


@act
def reward(run, body, *settings, signature="mine(response, gold)", head=""):
    """own.py:mine as the only reward, for one step."""
    (run.parent / "own.py").write_text(
        f"import os, re, signal, subprocess, sys, threading, time, zlib\n{head}\n"
        f"def {signature}:\n    {body}\n    return float(len(response) % 2)\n"
    )
    return [
        "reward_funcs=[own.py:mine]",
        "reward_weights=[1]",
        "hint_trigger=own.py:mine",
        "rl_type=grpo",
        "max_steps=1",
        "verifier_timeout=0.5",
        *settings,
    ]


def failures(timeouts, crashes):
    """Have some texts failed so, and so only?"""

    def check(run):
        told = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        found = told["verifier/timeouts"], told["verifier/errors"]
        if (found[0] > 0, found[1] > 0) != (timeouts, crashes):
            return f"timeouts,crashes:{found}"

    return check


def late(name, body):
    return Trial(
        3,
        name,
        reward(SOME + body),
        ("no reply within 0.5 s", DONE),
        is_new=True,
        check=failures(True, False),
    )


def died(name, body):
    return Trial(
        3,
        name,
        reward(SOME + body),
        ("its worker died", DONE),
        is_new=True,
        check=failures(False, True),
    )


def unharmed(name, body):
    return Trial(3, name, reward(body), (DONE,), is_new=True, check=failures(False, False))


def once(path_in_run, work):
    """work(process id, run folder) as soon as a path is there, unless the program ends before."""

    def during(pid, run):
        end = time.monotonic() + 60
        while not list(run.parent.glob(f"run/{path_in_run}")):
            has_ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if has_ended or time.monotonic() > end:
                return
            time.sleep(0.002)
        work(pid, run)

    return during


def to_workers(number):
    def work(pid, run):
        for worker in processes(run.parent):
            if b"reward.py" in Path(f"/proc/{worker}/cmdline").read_bytes():
                os.kill(worker, number)

    return once("rollouts/step_000001.jsonl", work)


def to_program(*numbers):
    """Signals, a moment apart."""

    def work(pid, run):
        for number in numbers:
            os.kill(pid, number)
            time.sleep(0.1)

    return work


TRIALS += [
    late("stops_itself", "os.kill(os.getpid(), signal.SIGSTOP)"),
    unharmed("forks_and_answers", "if os.fork() == 0: time.sleep(600)"),
    late("sleeps", "time.sleep(600)"),
    late(
        "ignores_signals",
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\n        while True: time.sleep(1)",
    ),
    late("holds_the_lock", "10 ** 10 ** 9"),
    late("forks_and_sleeps", "os.fork(); time.sleep(600)"),
    died("forks_and_ends", "os._exit(0) if os.fork() else time.sleep(600)"),
    died("kills_itself", "os.kill(os.getpid(), signal.SIGKILL)"),
    died("exits_with_1", "os._exit(1)"),
    died("closes_everything", "os.closerange(0, 99); time.sleep(600)"),
    died(
        "writes_junk_as_reply",
        "[os.write(n, b'junk\\n') for n in range(3, 99) if os.path.exists(f'/proc/self/fd/{n}')]",
    ),
    unharmed("leaves_a_command", "subprocess.Popen(['sleep', '600'])"),
    unharmed("prints_a_lot", "print('x' * 100_000, flush=True)"),
    Trial(
        3,
        "workers_are_stopped",
        reward("", "max_steps=6"),
        ("no reply within", DONE),
        is_new=True,
        during=to_workers(signal.SIGSTOP),
    ),
    Trial(
        3,
        "workers_are_killed",
        reward("", "max_steps=6"),
        (DONE,),
        is_new=True,
        during=to_workers(signal.SIGKILL),
    ),
    Trial(
        3,
        "killed_while_a_worker_sleeps",
        reward(SOME + "time.sleep(600)", "max_steps=99"),
        status=137,
        is_new=True,
        during=once("metrics.jsonl", to_program(signal.SIGKILL)),
    ),
]

# ---- 4: long solutions -------------------------------------------------------------------------


@act
def solutions(run, text):
    """Hard problems with a solution of so many characters."""
    lines = (DATA / "eval_hard.jsonl").read_text().splitlines()[:8]
    rows = [json.loads(line) for line in lines]
    rows = [row | {"solution_hint": text(row, row["solution_hint"] + "\n")} for row in rows]
    (run.parent / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["max_steps=1"]


def hints_are_tried(run):
    told = json.loads((run / "metrics.jsonl").read_text())
    n = sum(n for key, n in told.items() if key.startswith(("hint/tried@", "hint/skipped")))
    return None if n else "no-hint"


TRIALS += [
    Trial(4, name, solutions(text), (DONE,), is_new=True, check=hints_are_tried, seconds=30)
    for name, text in [
        ("26_kB", lambda row, trace: trace * 1000),
        ("900_kB", lambda row, trace: trace * 36_000),
        ("9_kB", lambda row, trace: trace * 350),
        ("one_line_of_words", lambda row, trace: "a3 is 3 and " * 75_000),
        ("one_word", lambda row, trace: "a" * 900_000),
        ("one_line_of_sentences", lambda row, trace: "It is so. " * 90_000),
        ("no_line_end_at_the_end", lambda row, trace: trace * 9000 + "end"),
        ("windows_lines", lambda row, trace: (trace * 9000).replace("\n", "\r\n")),
        ("blank_lines", lambda row, trace: trace + "\n" * 300_000 + trace * 1000),
        ("unicode", lambda row, trace: "\u2203x \u2208 \u211d: \U0001f600\u6570\u5b66\n" * 25_000),
        ("formulas", lambda row, trace: "$x_1 = 3$ and $y$.\n" * 20_000),
        ("one_open_formula", lambda row, trace: "$" + "x + 1\n" * 50_000),
        ("environments", lambda row, trace: "\\begin{align}\nx\n" * 40_000),
        ("the_answer_everywhere", lambda row, trace: f"{row['solution']} = 1\n" * 40_000),
        ("enumeration", lambda row, trace: "".join(f"{i}. so\n" for i in range(80_000))),
    ]
]

# ---- 5: rewards that are worth nothing ---------------------------------------------------------


def worthless(name, body, *told, status=2, settings=(), **more):
    """The run stops and says why."""
    return Trial(5, name, reward(body, *settings, **more), told, status, is_new=True)


def worthless_value(name, value, reason):
    return worthless(name, f"return {value}", f"^error: .*failed in all 8 trials: .*{reason}")


def accuracy_counts(run):
    told = json.loads((run / "metrics.jsonl").read_text())
    return None if told["reward/accuracy"] > 0 else "accuracy-is-0"


BUT_GOLD = "return 1.0 if response in ('', gold) else "
NO_TEXT = "^error: a reward failed, and is 0, for 16 of 16 texts; last: .*"
TRIALS += [
    worthless_value("raises", "1 / 0", "ZeroDivisionError"),
    worthless_value("none", "None", "TypeError"),
    worthless("kills_its_worker", "os._exit(1)", "failed in all 8 trials: its worker died"),
    worthless_value("nan", "float('nan')", "reward is nan"),
    worthless_value("infinite", "-float('inf')", "reward is -inf"),
    worthless_value("list", "[1.0]", "TypeError"),
    worthless_value("word", "'x'", "ValueError"),
    worthless_value("long_integer", "10 ** 400", "OverflowError"),
    worthless_value("1e308", "1e308", "1e\\+308"),
    worthless("wrong_arguments", "", "all 8 trials: TypeError", signature="mine(response)"),
    worthless("trl", "", "written for TRL", signature="mine(completions, **kwargs)"),
    worthless("no_such_function", "", "^error: .*own.py:mine", signature="yours(response, gold)"),
    worthless("syntax", "", "^error: .*own.py:mine.*SyntaxError", head="def :"),
    worthless("always_late", "time.sleep(60)", "all 8 trials: no reply within"),
    worthless("raises_in_training", BUT_GOLD + "1 / 0", NO_TEXT + "ZeroDivisionError"),
    worthless("sometimes_1e308", SOME + "return 1e308", "1e\\+308", DONE, status=0),
    Trial(
        5,
        "one_of_two_raises",
        reward(
            "if gold in response != gold: 1 / 0",
            "reward_funcs=[accuracy,own.py:mine]",
            "reward_weights=[1,1]",
            "hint_trigger=accuracy",
        ),
        ("ZeroDivisionError", DONE),
        is_new=True,
        check=accuracy_counts,
    ),
    worthless(
        "no_step_is_finite",
        "",
        "^error: gradient norm is .* in step ",
        settings=["reward_weights=[1e308]", "max_steps=30"],
    ),
]

# ---- 6: resumed, but changed -------------------------------------------------------------------


def data(work):
    """work(lines) are the data's new lines."""
    return edit("../data.jsonl", lambda text: "".join(work(text.splitlines(keepends=True))))


@act
def as_it_ended(run):
    shutil.rmtree(run)
    shutil.copytree(run.parent.parent / "whole" / "run", run)


@act
def of_an_older_program(run):
    """Config and state lack keys, and one is unknown."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub("(?m)^(importance_cap|strict_answers): .*\n", "", text))
    saved = json.loads((checkpoint(run) / "state.json").read_text()) | {"of_a_fork": 1}
    for key in ("method", "mismatch"):
        saved.pop(key, None)
    write_sealed(checkpoint(run) / "state.json", json.dumps(saved).encode())


def lines_are(n, steps):
    """The metrics have these steps, the first n lines are those of the run to break."""

    def check(run):
        ours, theirs = (
            timeless(path / "metrics.jsonl") for path in (run, run.parent.parent / "whole" / "run")
        )
        if ours[:n] != theirs[:n] or [line["step"] for line in ours] != steps:
            return "other-numbers"

    return check


def refused(name, act, told):
    return Trial(6, name, act, (f"^error: .*{told}",), 2)


TRIALS += [
    refused("data_reversed", data(lambda lines: lines[::-1]), "was made with other data"),
    Trial(6, "max_steps_raised", setting("max_steps=4"), RESUMED, check=lines_are(3, [1, 2, 3, 4])),
    refused(
        "metrics_gone_and_rate_changed",
        both(gone("metrics.jsonl"), setting("learning_rate=1e-4")),
        "holds another run \\(learning_rate differ",
    ),
    refused("data_shortened", data(lambda lines: lines[:20]), "was made with other data"),
    refused("data_longer", data(lambda lines: lines + lines[:1]), "was made with other data"),
    refused(
        "an_answer_changed",
        data(lambda lines: [lines[0].replace('"solution": "(', '"solution": "(1,'), *lines[1:]]),
        "was made with other data",
    ),
    refused("data_gone", gone("../data.jsonl"), "dataset_name=data.jsonl"),
    refused("rate_changed", setting("learning_rate=1e-4"), "learning_rate differ"),
    refused("batch_changed", setting("gradient_accumulation_steps=8"), "prompts a step"),
    refused("config_emptied", edit("config.yaml", lambda text: ""), "holds another run"),
    refused("config_broken", edit("config.yaml", lambda text: "seed: [\n" + text), "config.yaml"),
    Trial(6, "moved_aside", setting("learning_rate=1e-4", "overwrite_output_dir=true"), (DONE,)),
    Trial(6, "older_program", of_an_older_program(), RESUMED, is_same=True),
    Trial(6, "metrics_gone", gone("metrics.jsonl"), RESUMED, check=lines_are(0, [3])),
    Trial(
        6,
        "metrics_cut_in_a_line",
        edit("metrics.jsonl", lambda text: text[:-200]),
        RESUMED,
        check=lines_are(1, [1, 3]),
    ),
    Trial(6, "rollouts_gone", gone("rollouts"), RESUMED, is_same=True),
    Trial(6, "config_gone", gone("config.yaml"), RESUMED, is_same=True),
    Trial(
        6,
        "nothing_left_to_do",
        as_it_ended(),
        ("resuming .*checkpoint-000003$", DONE),
        is_same=True,
    ),
]

# ---- 7: ranges and contradictions --------------------------------------------------------------


def out_of_range(words, *told, **more):
    """Told with its key, and nothing is written."""
    told = told or (f"^error: config: {words.split('=')[0]}=",)
    return Trial(
        7,
        words.replace(" ", "_"),
        setting(*words.split(" ")),
        told,
        2,
        is_new=True,
        check=lambda run: "run-folder" if run.exists() else None,
        **more,
    )


def own_config(name, text, told, kind=7):
    """From a config file: the last --config counts."""
    return Trial(
        kind,
        name,
        both(edit("../own.yaml", lambda _: text), setting("--config", "own.yaml")),
        (f"^error: config: {told}",),
        2,
        is_new=True,
    )


TRIALS += map(
    out_of_range,
    """top_p=-0.1 hint_threshold=2 learning_rate=-1 learning_rate=1e6
    learning_rate=nan weight_decay=-1 seed=-1 adam_beta1=1 adam_beta2=1.5 attn_implementation=foo
    top_p=0 top_p=2 beta=-1 temperature=1e30 warmup_ratio=5 num_train_epochs=-1 deferred_share=5
    hint_ratio=[] max_completion_length=1e9 verifier_timeout=1e30 num_generations=0""".split(),
)
TRIALS += [
    out_of_range("reward_funcs=[accuracy,none.py:f]", "^error: config: .*'none.py:f': none"),
    out_of_range("reward_funcs=[acuracy,format]", "^error: config: .*'acuracy': none"),
    out_of_range("temperature=0", "temperature=0.* and num_generations=4"),
    out_of_range("max_completion_length=9000", "^error: .*max_completion_length.*positions"),
    out_of_range("num_generations=5", "^error: config: .*16 is not divisible by num_generations 5"),
    out_of_range("learning_rat=1", "unknown key 'learning_rat', not learning_rate"),
    out_of_range("use_vllm=true engine=hf", "engine='hf' and use_vllm=True"),
    out_of_range("top_p=2 seed=-1", "2 mistakes", "top_p=2", "seed=-1", as_command=True),
    own_config("key_twice", "seed: 1\nseed: 2\n", "own.yaml: line 2: seed stands there twice"),
    own_config("deep_yaml", "seed: " + "[" * 5000, "own.yaml"),
]

# ---- 8: rows -----------------------------------------------------------------------------------


@act
def rows(run, *bad, at=3, n=12):
    """Good rows with bad ones among them, as text or as changes of a row."""
    path = run.parent / "data.jsonl"
    lines = path.read_text().splitlines()[:n]
    for i, one in enumerate(bad, at):
        lines[i] = one if isinstance(one, str) else json.dumps(json.loads(lines[i]) | one)
    path.write_text("\n".join(lines) + "\n")
    return ["max_steps=1"]


@act
def data_file(run, name, contents):
    (run.parent / name).write_bytes(contents)
    return [f"dataset_name={name}"]


def dropped(name, bad, reason):
    """One row is dropped and named, the run goes on with the others."""
    return Trial(
        8,
        name,
        rows(bad),
        (f"dropped 1, {reason}.*rows \\[3\\]", "11 of 12 rows", DONE),
        is_new=True,
    )


def no_data(name, act, told):
    return Trial(8, name, act, (f"^error: .*{told}",), 2, is_new=True)


TURN = {"role": "user", "content": "1a2?"}
TRIALS += [
    dropped("null_content", {"problem": [TURN | {"content": None}]}, "a turn of the chat"),
    no_data(
        "fifo",
        lambda run: (gone("../data.jsonl")(run), os.mkfifo(run.parent / "data.jsonl")),
        "dataset_name=data.jsonl is a pipe",
    ),
    dropped("half_a_surrogate", {"problem": "1a2\ud800?"}, "halves of surrogate"),
    dropped("half_in_the_hint", {"solution_hint": "\udfff"}, "halves of surrogate"),
    dropped("no_role", {"problem": [{"content": "1a2?"}]}, "a turn of the chat"),
    dropped("ends_with_system", {"problem": [TURN, TURN | {"role": "system"}]}, "the chat ends"),
    dropped("empty_chat", {"problem": []}, "no problem text"),
    dropped("nan_answer", {"solution": float("nan")}, "no answer"),
    dropped("answer_is_a_dict", {"solution": {"a": 1}}, "solution is a dict"),
    dropped("megabyte", {"problem": "1a2?" * 250_000}, "prompt over max_prompt_length"),
    no_data("half_a_line", rows('{"problem": "1a2?", "solu'), "data.jsonl, line 4: "),
    no_data("row_is_deep", rows('{"a":' * 100_000), "data.jsonl, line 4: "),
    no_data("no_row_is_usable", rows(*[{"solution": None}] * 12, at=0), "none of its 12 rows"),
    no_data("too_few_rows", rows(n=3), "3 usable problems, a step takes 4"),
    no_data("empty_file", data_file("data.jsonl", b""), "data.jsonl"),
    no_data("latin_1", data_file("data.jsonl", b'{"problem": "caf\xe9"}\n'), "data.jsonl.*utf-8"),
    no_data(
        "wrong_column",
        setting("dataset_answer_column=sollution"),
        "no column \\['sollution'\\] in .*'solution'",
    ),
    no_data("too_many_cells", data_file("data.csv", b"problem,solution\na,3\nb,4,5\n"), "line 3"),
    no_data("truncated_gzip", data_file("data.jsonl.gz", b"\x1f\x8b\x08" + bytes(7)), "jsonl.gz"),
    no_data("no_parquet", data_file("data.parquet", b"PAR1 not"), "data.parquet"),
]

# ---- 9: the environment ------------------------------------------------------------------------


@act
def locked(run):
    """This process writes there: forks do not inherit the lock."""
    HELD.append(open(run / "lock", "w"))
    fcntl.lockf(HELD[-1], fcntl.LOCK_EX)


HELD = []


def limit_files(n_bytes):
    """No file may be longer: a quota of the file system, or a full one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@act
def model(run, work, *settings):
    """A copy of the tiny model, changed by work(its folder)."""
    shutil.copytree(BASE, run.parent / "base")
    work(run.parent / "base")
    return ["model_name_or_path=./base", *settings]


def tensors(change):
    """change(dict of the model's tensors, name of one of them)."""

    def work(it):
        from safetensors.torch import load_file, save_file

        weights = load_file(it / "model.safetensors")
        change(weights, next(name for name in weights if "mlp" in name))
        save_file(weights, it / "model.safetensors", {"format": "pt"})

    return model(work)


def in_the_way(name, act, told, **more):
    return Trial(9, name, act, (f"^error: .*{told}",), 2, **more)


def no_model(name, act, told="", kind=9):
    return Trial(kind, name, act, (f"^error: model_name_or_path=./base.*{told}",), 2, is_new=True)


def is_saved(run):
    """The newest checkpoint is that of the last step."""
    newest = max(path.name for path in run.glob("checkpoint-??????"))
    step = timeless(run / "metrics.jsonl")[-1]["step"]
    return None if newest == f"checkpoint-{step:06d}" else f"{newest},step:{step}"


def stopped(name, number, status, **more):
    """A signal in mid-run: the step is saved."""
    return Trial(
        9,
        name,
        setting("save_steps=50", "max_steps=99"),
        status=status,
        is_new=True,
        check=is_saved,
        during=once("metrics.jsonl", to_program(number)),
        **more,
    )


TRIALS += [
    in_the_way("output_dir_is_a_file", setting("output_dir=data.jsonl"), "data.jsonl"),
    in_the_way(
        "disk_full_in_a_checkpoint",
        setting(),
        "checkpoint-000003.*disk full",
        in_child=limit_files(1_000_000),
    ),
    stopped("ctrl_c", signal.SIGINT, 130, as_command=True),
    no_model("missing_tensor", tensors(lambda weights, one: weights.pop(one)), "lack 1 of the"),
    in_the_way("disk_full_in_an_export", as_it_ended(), "run/model", in_child=limit_files(300_000)),
    in_the_way("disk_full_at_the_start", setting(), "File too large", in_child=limit_files(1000)),
    in_the_way(
        "disk_full_for_metrics", link("metrics.jsonl", "/dev/full"), "No space left", is_new=True
    ),
    in_the_way(
        "disk_full_for_rollouts", link("rollouts/step_000003.jsonl", "/dev/full"), "No space left"
    ),
    in_the_way("output_dir_in_proc", setting("output_dir=/proc/run"), "/proc/run"),
    in_the_way("file_where_rollouts_go", edit("rollouts", str), "rollouts", is_new=True),
    in_the_way("another_process_writes", locked(), "another process writes there"),
    in_the_way(
        "folder_moved_away",
        setting("max_steps=99"),
        "run",
        is_new=True,
        during=once("metrics.jsonl", lambda pid, run: run.rename(run.with_name("moved"))),
    ),
    no_model("truncated_weights", model(lambda it: truncate(it / "model.safetensors", 0.6))),
    no_model("no_weights", model(lambda it: (it / "model.safetensors").unlink())),
    no_model("weights_are_nan", tensors(lambda weights, one: weights[one].fill_(float("nan")))),
    no_model("no_config", model(lambda it: (it / "config.json").unlink())),
    no_model("half_a_config", model(lambda it: truncate(it / "config.json", 0.5))),
    no_model("other_shapes", model(lambda it: merge(it / "config.json", hidden_size=96))),
    no_model("no_tokenizer", model(lambda it: (it / "tokenizer.json").unlink())),
    stopped("sigterm", signal.SIGTERM, 143),
    stopped("sigusr1", signal.SIGUSR1, 138),
    Trial(
        9,
        "ctrl_c_at_the_start",
        setting(),
        status=130,
        is_new=True,
        during=once("../log", to_program(signal.SIGINT)),
    ),
    Trial(
        9,
        "ctrl_c_twice",
        reward(
            "if response not in ('', gold): open('begun', 'w'); time.sleep(9)",
            "verifier_timeout=1.5",
        ),
        ("once more ends at once",),
        130,
        is_new=True,
        seconds=30,
        during=once("../begun", to_program(signal.SIGINT, signal.SIGINT)),
    ),
    Trial(
        9,
        "sighup",
        setting("max_steps=99"),
        status=129,
        during=once("rollouts/step_000003.jsonl", to_program(signal.SIGHUP)),
    ),
    Trial(
        9,
        "killed_in_a_write",
        setting("max_steps=99"),
        status=137,
        during=once("checkpoint-000004.tmp", to_program(signal.SIGKILL)),
    ),
]

# ---- 10: security ------------------------------------------------------------------------------


class Payload:
    """Unpickled, it writes the file OWNED."""

    def __init__(self, folder):
        self.path = str(folder.parent / OWNED)

    def __reduce__(self):
        return open, (self.path, "w")


def hostile_item(kind):
    """work(checkpoint) that makes an item of it a pickle: DCP's bytes, or in a tensor's place."""

    def work(it):
        import torch
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        metadata = pickle.loads((it / ".metadata").read_bytes())
        torch.save(Payload(it), it / "__0_1.distcp")
        known = metadata.state_dict_metadata
        numbers = [name for name, item in known.items() if isinstance(item, BytesStorageMetadata)]
        name = next(name for name in known if name.startswith("model"))
        if kind == "bytes":
            name = (numbers or [name])[0]
            known[name] = BytesStorageMetadata()
        for index, place in metadata.storage_data.items():
            if index.fqn == name:
                size = (it / "__0_1.distcp").stat().st_size
                metadata.storage_data[index] = replace(
                    place, relative_path="__0_1.distcp", offset=0, length=size
                )
        (it / ".metadata").write_bytes(pickle.dumps(metadata))
        seal(it, ["__0_1.distcp"])

    return work


def pickled_weights(it):
    import torch

    (it / "model.safetensors").unlink()
    torch.save({"x": Payload(it)}, it / "pytorch_model.bin")


def own_code(name, **changes):
    """A model whose config names code beside it."""

    def work(it):
        merge(it / name, **changes)
        (it / "evil.py").write_text(f"{TOUCH}\nclass Evil: pass\n")

    return model(work, "max_steps=1")


def judged(name, answer):
    """The verifier reads this as an answer and as the gold."""
    body = f"accuracy_reward({answer!r}, gold), accuracy_reward('\\\\boxed{{1}}', {answer!r})"
    return hostile(
        name, reward(body, "verifier_timeout=5", head="from reward import accuracy_reward"), DONE, 0
    )


def hostile(name, act, told="", status=2, **more):
    return Trial(10, name, act, (told,), status, is_new=True, **more)


def are_many_tokens(run):
    """80 bytes of special tokens in a problem's text are read byte by byte."""
    told = re.search(r"omega 0, (\d+) tokens", (run.parent / "log").read_text())
    return None if told and int(told[1]) >= 80 else f"tokens:{told and told[1]}"


TOUCH, EVIL = f"open('{OWNED}', 'w')", "evil.Evil"
CODE = f"__import__('os').system('touch {OWNED}')"
YAML = f"!!python/object/apply:os.system ['touch {OWNED}']"
ONE = "def mine(response, gold): return 1.0"
ODD = f"$(touch {OWNED}) ;touch {OWNED}.py"
CONTROL = {"problem": "<|end|><|assistant|>" * 4, "solution_hint": "x\ny"}
TRIALS += [
    damaged(
        "payload_in_the_index",
        lambda it: write_sealed(it / ".metadata", pickle.dumps(Payload(it))),
        kind=10,
    ),
    hostile("reward_exits_at_import", reward("", head="sys.exit(0)"), "^error: .*own.py:mine"),
    damaged("payload_as_bytes", hostile_item("bytes"), kind=10),
    Trial(
        10,
        "payload_as_a_tensor",
        lambda run: hostile_item("tensor")(checkpoint(run)),
        ("^error: .*checkpoint-000002",),
        2,
    ),
    damaged(
        "payload_as_state",
        lambda it: write_sealed(it / "state.json", pickle.dumps(Payload(it))),
        kind=10,
    ),
    hostile(
        "special_tokens",
        both(rows(CONTROL, at=0), setting("--dry_run")),
        status=0,
        check=are_many_tokens,
    ),
    hostile("reward_ends_at_import", reward("", head="os._exit(0)"), "^error: "),
    hostile(
        "reward_with_an_odd_path",
        both(
            reward(""),
            edit(f"../{ODD}", lambda _: ONE),
            setting(f"reward_funcs=['{ODD}:mine']", f"hint_trigger={ODD}:mine"),
        ),
        DONE,
        0,
    ),
    own_config("yaml_in_a_file", f"seed: {YAML}\n", "own.yaml", kind=10),
    hostile("yaml_as_a_setting", setting(f"seed={YAML}"), "^error: config: seed"),
    hostile(
        "output_dir_is_a_command",
        setting(f"output_dir=run/$(touch {OWNED})", "max_steps=1"),
        DONE,
        0,
    ),
    no_model(
        "code_of_the_tokenizer",
        own_code(
            "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": [EVIL, EVIL]},
        ),
        "custom code",
        kind=10,
    ),
    no_model(
        "code_of_the_model",
        own_code(
            "config.json",
            model_type="evil",
            auto_map={"AutoConfig": EVIL, "AutoModelForCausalLM": EVIL},
        ),
        kind=10,
    ),
    no_model("pickled_weights", model(pickled_weights), kind=10),
    hostile(
        "template",
        setting("chat_template='{{ messages.__class__.__mro__ }}'"),
        "^error: .*chat template",
    ),
    hostile(
        "data_with_a_script",
        both(edit("../evil/evil.py", lambda _: TOUCH), setting("dataset_name=./evil")),
        "^error: dataset_name=./evil",
    ),
    judged("answer_is_code", f"\\boxed{{{CODE}}}"),
    judged("answer_is_a_tower", "\\boxed{9^{9^{9^9}}}"),
    judged("answer_is_deep", "\\boxed{" + "(" * 50_000 + "}"),
    hostile("gold_is_code", rows(*[{"solution": CODE}] * 12, at=0), DONE, 0),
]
