"""Rewards for mathematical answers, and a pool of processes that scores them.

A recursive-descent reader turns model text into trees of exact numbers; nothing is ever handed to
eval, sympify or parse_expr. Structure (set, tuple, interval, equation, matrix) is compared before
value: Fractions while they can be, then 100-digit mpmath numbers; expressions are equal when they
agree at fixed sample points. Sizes are checked before any arithmetic; what cannot be read is
compared as text; in doubt the reward is 0. More notation goes into configs/verifier.yaml, another
reward into REWARDS, or into the config as "path/to/file.py:function", f(response, gold) -> float.
"""
import contextlib
import faulthandler
import functools
import itertools
import json
import math
import os
import re
import runpy
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from subprocess import PIPE, Popen

import yaml
from mpmath.ctx_mp import MPContext

from configs import UserError

MAX_CHARS, MAX_ITEMS = 3000, 60  # of an answer that is read
MAX_SIZE = 60_000  # bits of exact operands and powers; logarithm of another power; argument

NOTATION = yaml.safe_load((Path(__file__).parent / "configs/verifier.yaml").read_text("utf-8"))
COMMANDS, UNITS = ({word: sign for sign, words in NOTATION[table].items() for word in words.split()}
                   for table in ("commands", "units"))
FUNCTIONS, PAIRS, INFIX, BRACKETS = map(NOTATION.get, ("functions", "pairs", "infix", "brackets"))
ENDS = {token for closings, _ in BRACKETS.values() for token in closings}
REWRITES = [(re.compile(pattern), new) for pattern, new in NOTATION["rewrites"]]
NAME = r"[^\W_]|∅|∞|" + NOTATION["tokens"]["opaque"]
TOKEN = re.compile("|".join(NOTATION["tokens"].values()))
ITEM = re.compile(r"\\[{}]|(?:\([^()]*\)|\\[^{}]|[^,\\])+")  # of a list; (a, b) is one
SIGNS = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")

def tokenise(text: str) -> list[str]:
    for pattern, new in () if text.isascii() else NOTATION["unicode"]:
        text = re.sub(pattern, new, text)
    text = unicodedata.normalize("NFKC", text.strip())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"\\([A-Za-z]+)", lambda run: COMMANDS.get(run[1], run[0] + " "), text)
    if "±" in text:  # an item with it stands for two
        text = ITEM.sub(lambda run: ",".join(dict.fromkeys(map(run[0].translate, SIGNS))), text)
    return [token.lower() if token[0] == '"' else token for token in TOKEN.findall(text)]

CHAINS = {"+", "product", "list", "and", "or", "row", "cell", ":", "rel"}
ARGUMENT = 15  # without brackets: the product up to the next function
ZERO, X = ("num", Fraction(0)), ("var", "")  # X: what an interval is about

class Reader:
    """Precedence climbing over tokens. A tree is (kind, *parts), its leaves ("num", Fraction)."""

    def __init__(self, tokens: list[str]):
        self.tokens = ["", *reversed(tokens)]

    def tree(self, level: int = 1):
        """A prefix and all operators of at least this strength; two factors are a product."""
        left = self.prefix(level)
        while (token := self.tokens[-1]) not in ENDS:
            joins = level == ARGUMENT and token not in "([" and token[1:] not in FUNCTIONS
            default = (12, "unit") if token[0] == '"' else (14 + joins, "product")
            strength, kind = INFIX.get(token, default)
            if strength < level:
                break
            if token in INFIX and kind != "unit":
                self.tokens.pop()
            right = self.prefix() if kind == "unit" else self.tree(strength + (kind != "power"))
            link = (token, right) if kind == "rel" else (right,)
            left = (*left, *link) if kind == left[0] and kind in CHAINS else (kind, left, *link)
        return left

    def prefix(self, level: int = 16):
        token = self.tokens.pop()
        if token in ("+", "-"):
            return (token, ZERO, self.tree(max(level, 14)))
        if token in BRACKETS:
            return self.bracket(token)
        if token in PAIRS:
            return (PAIRS[token], self.prefix(), self.prefix())
        if token[1:] in FUNCTIONS:  # f_b^n x
            base, exponent = (self.tokens[-1] == mark and self.tokens.pop() and self.prefix()
                              for mark in "_^")
            argument = self.prefix() if self.tokens[-1] in "({" else self.tree(ARGUMENT)
            tree = ("/", ("ln", argument), ("ln", base)) if base else (token[1:], argument)
            return ("power", tree, exponent) if exponent else tree
        if token.replace(".", "", 1).isdecimal():
            return ("num", Fraction(token))
        if token[0] == '"':
            words = (UNITS.get(word, word.rstrip("s")) for word in token.strip('"').split())
            return ('"' + " ".join(words),)
        if not re.match(NAME, token):
            raise ValueError(token)
        return (token,) if token in "πei∞" else ("var", re.sub("[{} ]", "", token))

    def bracket(self, opening: str):
        inner = self.tree() if self.tokens[-1] not in ENDS else ("list",)
        closings, kind = BRACKETS[opening]
        closing = self.tokens.pop()
        if closing not in closings:
            raise ValueError(f"{opening} is closed by {closing}")
        if opening in ("(", "[") and inner[0] == "list":
            return ("tuple", opening + closing, *inner[1:])
        return (kind, inner) if kind else inner

MP, LOCK = MPContext(), threading.Lock()  # its precision is not thread-safe
MP.dps = 100
TINY = MP.mpf(10) ** -30

def bits(value) -> int:
    """The size of an exact number."""
    return max(map(int.bit_length, value.as_integer_ratio())) if isinstance(value, Fraction) else 0

def power(base, exponent):
    """Exact where base and exponent say so, after a look at the size of the result."""
    if base == 0 < exponent:
        return base
    is_exact = isinstance(base, Fraction) and getattr(exponent, "denominator", 0) == 1
    if abs(exponent) * (bits(base) if is_exact else abs(MP.ln(base))) > MAX_SIZE:
        raise ValueError("power too large")
    return base ** int(exponent) if is_exact else MP.power(base, exponent)

OPERATIONS = {
    "+": lambda *values: sum(values), "-": lambda a, b: a + -b, "/": lambda a, b: a * (1 / b),
    "product": lambda *values: math.prod(values), "unit": lambda a, b: a * b,
    "power": power, "root": lambda index, base: power(base, 1 / index),
    '"%': lambda: Fraction(1, 100), '"°': lambda: MP.pi / 180,
    "π": lambda: +MP.pi, "e": lambda: +MP.e, "i": lambda: MP.j, "∞": lambda: MP.inf}
UNBOUNDED = {"ln", "fabs", "floor", "ceil"}  # their arguments may have any size
COUNTS, COUNTED = {"fac": math.factorial, "binomial": math.comb}, set(range(3001))

def sample(name: str, point: int) -> Fraction:
    """A variable's fixed value at point 0, 1, 2: in (0, 1), in (1, 4), negative."""
    share = Fraction(int.from_bytes(f"{name} {point}".encode(), "big") % 9973 + 1, 9974)
    return (share, 1 + 3 * share, -2 * share - Fraction(1, 2))[point]

def evaluate(tree, point=0):
    """The value at a sample point (an int), or with all variables equal to the Fraction `point`."""
    kind, *parts = tree
    if kind == "num":
        return parts[0]
    if kind == "var":
        return sample(parts[0], point) if isinstance(point, int) else point
    if kind == "scaled":  # 2x - 2 and x - 1 become the same
        return evaluate(parts[0], point) * (1 / evaluate(parts[0]))
    values = [evaluate(part, point) for part in parts if isinstance(part, tuple)]
    if sum(map(bits, values)) > MAX_SIZE:
        raise ValueError("too large")
    if kind in OPERATIONS:
        return OPERATIONS[kind](*values)
    if kind in COUNTS and COUNTED.issuperset(values):
        return Fraction(COUNTS[kind](*map(int, values)))
    if kind not in FUNCTIONS or kind not in UNBOUNDED and any(abs(v) > MAX_SIZE for v in values):
        raise ValueError(f"{kind} has no value, or too large an argument")
    return getattr(MP, kind)(*map(MP.convert, values))

def variables(tree) -> set[str]:
    return {tree[1]} if tree[0] == "var" else set().union(
        *(variables(part) for part in tree[1:] if isinstance(part, tuple)))

def near(a, b) -> bool:
    """Equal: exactly for Fractions, else to 60 digits."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = MP.convert(a), MP.convert(b)
    return abs(a - b) <= max(abs(a), abs(b)) / 10**60 < MP.inf

@functools.lru_cache(maxsize=4096)
def equal(a, b) -> bool:
    """Equal at every sample point where both are real, and at two of the points at least."""
    names, agreed = variables(a), []
    for point in range(3 if names else 1) if names == variables(b) else ():
        with contextlib.suppress(ValueError, ArithmeticError):
            x, y = evaluate(a, point), evaluate(b, point)
            agreed.append(near(x, y) or (None if MP.im(x) or MP.im(y) else False))
    return False not in agreed and agreed.count(True) >= (2 if names else 1)

SETS = {"list", "set"}  # 1, 2 and {1, 2}
REGIONS = {"rel", "∪", "∩", "∖"}
STRUCTURES = REGIONS | {*SETS, "tuple", "and", "or", "row", "cell", "matrix", ":"}

def settle(tree):
    """The tree as an answer: lists opened, names and equations set apart."""
    kind, *parts = tree
    if kind not in STRUCTURES:
        return tree
    parts = [settle(part) if isinstance(part, tuple) else part for part in parts]
    if kind in ("and", "or") and all(part[0] in REGIONS for part in parts):
        return ("∪" if kind == "or" else "∩", *parts)
    if kind in ("list", "set", "and", "or"):
        parts = [item for part in parts for item in (part[1:] if part[0] == "list" else [part])]
        if not 0 < len(parts) <= MAX_ITEMS:
            raise ValueError("no items, or too many")
        return ("set" if kind == "set" else "list", *parts) if len(parts) > 1 else parts[0]
    if kind != "rel":
        return (kind, *parts)
    signs, sides = parts[1::2], parts[::2]
    if set(signs) - set("=∈≈"):
        return ("rel", "".join(signs), *sides)
    # name = value, 3/4 = 0.75 (but not 7 = 5), or an equation
    names = [side for side in sides if side[0] == "var" or len(side) == 1]
    values = [side for side in sides if side not in names] or names[-1:]
    value = values[0] if all(equal(values[0], other) for other in values[1:]) else None
    whole = ("scaled", ("-", *sides)) if signs == ["="] and variables(tree) else None
    return ("equation", names[0] if names else None, value, whole)

def same(a, b) -> bool:
    """Do two settled trees mean the same answer? Symmetric."""
    if a == b or isinstance(a, str) or "text" in (a[0], b[0]):
        return a == b
    kinds = {a[0], b[0]}
    if "equation" in kinds:
        parts = (t[1:] if t[0] == "equation" else (None, t, None) for t in (a, b))
        names, values, wholes = zip(*parts)
        is_named_alike = len({*names, None}) < 3
        return all(wholes) and equal(*wholes) or all(values) and is_named_alike and same(*values)
    if kinds & REGIONS:  # do they agree at all their ends and on both sides of each?
        (ends, in_a), (more, in_b) = region(a), region(b)
        points = [end + step for end in (*ends, *more, TINY) for step in (-TINY, 0, TINY)]
        is_small = len(points) <= 3 * MAX_ITEMS and len(variables(a) | variables(b)) < 2
        return is_small and all(in_a(x) == in_b(x) for x in points)
    if kinds <= SETS:  # every item of the one takes its own item of the other
        rest = list(b[1:])
        matches = (next((other for other in rest if same(item, other)), None) for item in a[1:])
        return len(a) == len(b) and all(match and not rest.remove(match) for match in matches)
    if kinds & STRUCTURES:
        return a[0] == b[0] and len(a) == len(b) and all(map(same, a[1:], b[1:]))
    # values, with units ignored when one side has none; a % or ° may also be a factor
    (bare_a, unit_a), (bare_b, unit_b) = (t[1:] if t[0] == "unit" else (t, None) for t in (a, b))
    if unit_a and unit_b:
        return unit_a == unit_b and equal(bare_a, bare_b)
    return equal(bare_a, bare_b) or equal(a, b)

JOINTS = {"∪": any, "list": any, "set": any, "∩": all, "∖": lambda tests: tests == [True, False]}

def region(tree) -> tuple:
    """(ends, membership test) of a part of the real line."""
    kind, *parts = tree
    if kind in JOINTS:
        ends, tests = zip(*map(region, parts))
        return sum(ends, []), lambda x: JOINTS[kind]([test(x) for test in tests])
    if kind == "tuple" and len(parts) == 3:
        parts = ["".join("<≤"[bracket in "[]"] for bracket in parts[0]), parts[1], X, parts[2]]
    elif kind != "rel":
        parts = ["=", X, tree]
    signs, *sides = parts
    ends = []
    for left, right in itertools.pairwise(sides):
        u, v, w = (MP.convert(evaluate(("-", left, right), Fraction(x))) for x in range(3))
        if not near(u + w, 2 * v):
            raise ValueError("not linear")
        ends += [] if near(u, v) else [u / (u - v)]

    def inside(x) -> bool:
        values = [MP.convert(evaluate(side, x)) for side in sides]
        return all(sign in ("=≤≥" if near(a, b) else "<≤≠" if a < b else ">≥≠")
                   for a, sign, b in zip(values, signs, values[1:]))
    return ends, inside

JOINT = re.compile(
    r"\}(?!\})(?:\\text|\\quad|\\[()\[\] ,;]|[${}\s.]|(or)|(and|[,;])){1,30}\\boxed\s*\{")

def boxed(text: str) -> str | None:
    """The last box and those joined to it: by a comma or "and" to a list, by "or" unreadably."""
    text = JOINT.sub(lambda run: r"\or " if run[1] else "," if run[2] else run[0], text)
    box = text.rpartition("\\boxed")[2].lstrip()
    depths = itertools.accumulate((char == "{") - (char == "}") for char in box)
    end = next((index for index, depth in enumerate(depths) if depth <= 0), 0)
    return box[1:end].rstrip("\\") or None

def extract_answer(response: str) -> str | None:
    r"""The one final answer in `response`, or None.

    After the last </think> (a <think> never closed has no answer): in the <answer> block, if there
    is one (two different ones are no answer), the last \boxed{} or the whole block; without it the
    last \boxed{} (or a list of boxes joined by "," or "and"), else the usual phrases.
    """
    _, think, text = response.rpartition("</think>")
    blocks = {block.partition("</answer>")[0].strip() for block in text.split("<answer>")[1:]}
    if len(blocks) > 1 or not think and "<think>" in response:
        return None
    text = min(blocks, default=text)
    if "\\boxed" in text:
        return boxed(text)
    *before, last = re.split(r"(?i)####|\banswer is\b|\banswer:", text)
    line = last[:MAX_CHARS].lstrip(" :*\n").partition("\n")[0].partition("<|")[0]
    sentence = re.split(r"\.\s", line + " ")[0].strip(" *")
    return sentence if before else text if blocks else None

REFUSED = (RecursionError, ValueError, ArithmeticError, TypeError, LookupError)
SIMPLE = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?\Z")

@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple:
    """What an answer may stand for: its string and, when it can be read, its settled tree."""
    tokens = tokenise(text) if len(text) <= MAX_CHARS else []
    plain = re.sub('[" ]', "", "".join(tokens))
    if not re.search(r"[\w∅∞]", plain):
        return ()
    has_words = '"' in "".join(tokens) or plain.isalpha() and len(plain) > 2
    found = [("text", plain.lower() if has_words else plain)]
    with contextlib.suppress(*REFUSED):
        found.append(settle(Reader(tokens).bracket("")))
    return tuple(found)

def parse_gold(gold: str) -> str | None:
    """Why `gold` cannot be compared as mathematics or as words, or None when it can."""
    with LOCK:
        if re.sub(r"\\text|[${}.\s]", "", gold).isalpha() or len(readings(gold)) > 1:
            return None
    return f"answer not read, or longer than {MAX_CHARS}" if gold.strip() else "no answer"

def accuracy_reward(response: str, gold: str) -> float:
    """1.0 when the answer in `response` (see extract_answer) has the value of `gold`, else 0.0.

    A list or set needs all elements of the gold and no others: naming candidates earns nothing.
    """
    answer, gold = (extract_answer(response) or "").strip(), gold.strip()
    if SIMPLE.match(answer) and SIMPLE.match(gold):
        return float(Fraction(answer) == Fraction(gold))
    with LOCK, contextlib.suppress(*REFUSED):
        pairs = itertools.product(readings(answer), readings(gold))
        return float(any(same(a, b) for a, b in pairs))
    return 0.0

def format_reward(response: str, gold: str = "") -> float:
    """1.0 for exactly <think>..</think><answer>..</answer> with two non-blank bodies, else 0.0."""
    parts = re.split("(</?think>|</?answer>)", response)
    is_filled = [bool(part.strip()) for part in parts[::2]] == [False, True, False, True, False]
    return float(is_filled and parts[1::2] == ["<think>", "</think>", "<answer>", "</answer>"])

REWARDS = {"accuracy": accuracy_reward, "format": format_reward}

def resolve_reward(name: str):
    """The f(response, gold) -> float behind a key of REWARDS or "path/to/file.py:function"."""
    source, _, function = name.rpartition(":")
    try:
        return REWARDS[name] if name in REWARDS else runpy.run_path(source)[function]
    except Exception as error:  # whatever the user's file does when it is imported
        raise UserError(f"reward {name!r}: none of {', '.join(REWARDS)}; {error!r}") from error

def serve(timeout: str, *names: str) -> None:
    """A worker's life: lines of [text, gold] in, of its rewards or an error out."""
    functions = [resolve_reward(name) for name in names]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what functions print does not mix with the replies
    for line in sys.stdin:
        faulthandler.dump_traceback_later(float(timeout), exit=True)  # even out of a long C call
        try:
            reply = json.dumps([float(f(*json.loads(line))) for f in functions], allow_nan=False)
        except Exception as error:  # a user's function may raise anything
            reply = json.dumps(repr(error))
        faulthandler.cancel_dump_traceback_later()
        print(reply, file=replies, flush=True)

class VerifierPool:
    """Scores groups of texts in worker processes; nothing that a text does reaches the caller.
    A text that takes longer than `timeout` s costs its worker its life and scores 0; when a worker
    dies otherwise its text is tried once more. `stats` counts both, and functions that raise.
    """

    def __init__(self, reward_funcs: list[str], workers: int, timeout: float = 5.0):
        self.zeros, self.error = [0.0 for name in reward_funcs if resolve_reward(name)], None
        command = [sys.executable, os.path.abspath(__file__), str(timeout), *reward_funcs]
        self.start = functools.partial(Popen, command, stdin=PIPE, stdout=PIPE, bufsize=0)
        self.stats = {"timeouts": 0, "crashes": 0}
        self.groups = {}  # the futures of a group's texts: its key
        self.threads = ThreadPoolExecutor(workers)
        self.idle = [self.start() for _ in range(workers)]  # one worker for each thread

    def submit(self, key, texts: list[str], gold: str) -> None:
        """Queue the G `texts` of one problem; returns at once."""
        self.groups[tuple(self.threads.submit(self._ask, text, gold) for text in texts)] = key

    def poll(self, wait: bool) -> list[tuple]:
        """(key, rewards_GF) of the groups that are ready; with `wait`, of all submitted ones."""
        ready = [texts for texts in self.groups if wait or all(text.done() for text in texts)]
        return [(self.groups.pop(texts), [text.result() for text in texts]) for texts in ready]

    def close(self) -> None:
        """Drop what is still queued and stop the workers. Can be called twice."""
        self.threads.shutdown(cancel_futures=True)
        for worker in self.idle:
            worker.kill()

    def _ask(self, text: str, gold: str, may_retry: bool = True) -> list[float]:
        """In a thread: the rewards of one text."""
        worker = self.idle.pop()
        with contextlib.suppress(OSError):  # it was killed while it was idle
            worker.stdin.write(json.dumps([text, gold]).encode() + b"\n")
        reply = worker.stdout.readline()
        is_late = not reply and worker.wait() == 1  # the exit status that faulthandler gives
        self.idle.append(worker if reply else self.start())
        if not (reply or is_late) and may_retry:
            return self._ask(text, gold, may_retry=False)
        rewards = json.loads(reply or "null")
        if not isinstance(rewards, list):
            with LOCK:
                self.stats["timeouts" if is_late else "crashes"] += 1
            self.error, rewards = rewards or "its worker died", self.zeros
        return rewards

if __name__ == "__main__":
    serve(*sys.argv[1:])
