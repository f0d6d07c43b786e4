"""When to hint, how much, what text, where, and what the loss then sees: the method, without torch.

GHPO asks a problem again, with the first part of its solution, when all G samples fail (METHOD E2).
Its follow-ups differ from it in the plain functions under "variation points" and nowhere else, so a
new method is an edit here: `needs_hint`, `next_ratio`, `make_hint`, `render`, `merge`, `loss_view`
and `baseline`. They see a problem, the tries made at it so far, the config, the per-problem history
(checkpointed, the same on every rank) and the step; a ratio is a number or a list, one per sample.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

# The reference's sentence, to the letter; the hint text follows it in the user message.
HINT_SENTENCE = (
    "\n The following text is the beginning part of the answer, "
    "which you can refer to for solving the problem:\n"
)
ASSISTANT_OPENING = "<think>\n"  # what stands before the hint when hint_where is "assistant"
MARKER = re.compile(r"\\f?boxed|####|(?:final )?answer is|<answer>", re.IGNORECASE)
ENVIRONMENT = re.compile(r"(\\begin\{|\\\[|\\\(|\[asy\])|(\\end\{[^}]*\}|\\\]|\\\)|\[/asy\])")
# Inline maths by pandoc's rule, so that "$5 and $10" is money: no space inside the dollars, no
# digit after them, or a space on both sides ("$ x $").
DOLLARS = re.compile(
    r"(?<!\\)(?:\$\$.*?\$\$|\$(?=[^\s$])(?:\\.|[^$\\])*?(?<=\S)\$(?!\d)|\$ (?:\\.|[^$\\])*? \$)",
    re.DOTALL,
)
SENTENCE_END = re.compile(r"\n|(?<![\s.])[.!?][\"')\]]*(?=\s)")
ENUMERATOR = re.compile(r"\s*\(?\w{1,2}[.)]\s*")  # "2." opens a list item, ends no sentence


@dataclass(frozen=True)
class Problem:
    """One usable row of the data set; `messages` is the chat without any hint."""

    id: int  # row number in the data set: seeds, history and checkpoints refer to it
    messages: list  # [{"role", "content"}, ...], the problem in the last one
    answer: str  # gold, as the verifier reads it
    trace: str = ""  # ground-truth solution, the source of hints; may be empty
    level: float = 0.0  # difficulty for the curriculum, higher is harder


@dataclass(frozen=True)
class Try:
    """One stage at one problem: what was shown, how it went. `skipped`: nothing new to show."""

    ratios: list  # (G,) omega of each sample, 0 without a hint
    hints: list  # (G,) the texts shown
    pass_rate: float = 0.0  # mean of the trigger reward over the samples
    tokens: int = 0  # generated
    trimmed: bool = False  # the leak guard shortened the hint
    skipped: bool = False

    @property
    def ratio(self):
        """The largest ratio of the try."""
        return max(self.ratios)


# ---- variation points --------------------------------------------------------------------------


def needs_hint(tries, config):
    """E2: hard iff no sample of the last try passed (mean trigger reward <= threshold)."""
    return tries[-1].pass_rate <= config.hint_threshold


def next_ratio(problem, tries, config, history, step):
    """Omega of the next try, one number or (G,) list; None: the group is final.

    `tries` is empty at the first call. `history` maps problem ids to {"attempts", "pass_rate",
    "ratio"} of the last step that met them. Cold start: no hints in the first start_hint_step.
    """
    hinting = config.rl_type == "ghpo" and step >= config.start_hint_step
    if config.hint_trigger == "always":  # control: everybody is hinted, once
        return None if tries else config.hint_ratio[0] * hinting
    if not tries:
        return 0.0
    if not hinting or not needs_hint(tries, config):
        return None
    return next((omega for omega in config.hint_ratio if omega > tries[-1].ratio), None)


def make_hint(problem, ratio, limit=None):
    """The first `ratio` of the trace, cut at a step end, without the answer: (text, trimmed?).

    limit: at most so many characters (to fit the prompt). May be empty: nothing can be shown.
    """
    trace = problem.trace.rstrip()
    wanted = round(len(trace) * ratio)
    ends = step_ends(trace)
    guard = answer_start(trace, problem.answer, ends)
    target = min(wanted, len(trace) if limit is None else limit)
    end = max((e for e in ends if e <= min(target, guard)), default=0)
    unguarded = max((e for e in ends if e <= target), default=0)
    return trace[:end].rstrip(), end < unguarded


def render(problem, hint, config):
    """Where the hint goes: (chat messages, text the assistant's turn already starts with)."""
    if not hint:
        return problem.messages, ""
    if config.hint_where == "assistant":
        return problem.messages, ASSISTANT_OPENING + hint
    *before, last = problem.messages
    content = last["content"] + HINT_SENTENCE + hint  # GHPO eq. 2 (E2): q* = q + omega * h
    return [*before, {**last, "content": content}], ""


def merge(previous, new):
    """Which rows of a problem enter the batch: the new group replaces the failed one whole.

    previous: the Group of the try before, or the blank one. Appending instead is
    `replace(new, completions=previous.completions + new.completions, rewards=...)`.
    """
    return new


def loss_view(completion, plain_ids, config):
    """What the loss sees: (context_ids, target_ids, policy_weight, likelihood_weight), the weights
    (T,) over target_ids. Targets may be longer than the completion at their start only (hint tokens
    taken over from the prompt, behaviour log-prob unknown: give them policy_weight 0).
    """
    context = plain_ids if config.hint_context == "original" else completion.prompt_ids
    length = len(completion.token_ids)
    return context, completion.token_ids, [1.0] * length, [0.0] * length


def baseline(rewards_G, ratios_G):
    """E3's mean and standard deviation (ddof = 1) of a group, broadcastable to (G,)."""
    spread = rewards_G.std(ddof=1) if len(rewards_G) > 1 else 0.0
    return rewards_G.mean(), spread


# ---- the machinery they share ------------------------------------------------------------------


def unhinted(size):
    """A Try of `size` samples that shows nothing."""
    return Try([0.0] * size, [""] * size)


def plan_try(group, config, history, step):
    """The next Try at a group, None when it is final, and its tries so far.

    A stage whose text is empty or that of the stage before joins the tries as skipped, unsampled.
    """
    tries = group.tries
    while True:
        ratio = next_ratio(group.problem, tries, config, history, step)
        if ratio is None:
            return None, tries
        wanted = list(ratio) if np.ndim(ratio) else [float(ratio)] * config.num_generations
        cuts = [make_hint(group.problem, omega) for omega in wanted]
        hints = [text for text, _ in cuts]
        ratios = [omega * bool(text) for omega, text in zip(wanted, hints)]
        if not tries or (any(hints) and hints != tries[-1].hints):
            return Try(ratios, hints, trimmed=any(trimmed for _, trimmed in cuts)), tries
        tries = [*tries, replace(tries[-1], ratios=wanted, tokens=0, trimmed=False, skipped=True)]


def remember(history, problem_id, tries):
    """Updates the per-problem history with the sampled tries of one step."""
    last = [t for t in tries if not t.skipped][-1]
    seen = history.get(problem_id, {"attempts": 0})
    attempts = seen["attempts"] + 1
    history[problem_id] = {"attempts": attempts, "pass_rate": last.pass_rate, "ratio": last.ratio}


def step_ends(trace):
    """Where a trace may be cut: line and sentence ends outside maths, ascending.

    A trace of a single line may also be cut before the first of them, at word ends.
    """
    inside = np.zeros(len(trace) + 1, dtype=bool)
    for match in DOLLARS.finditer(trace):
        inside[match.start() + 1 : match.end()] = True
    depth, start = 0, 0
    for match in ENVIRONMENT.finditer(trace):
        start = match.start() if depth == 0 else start
        depth = depth + 1 if match[1] else max(depth - 1, 0)
        if depth == 0:
            inside[start + 1 : match.end()] = True
    if depth:
        inside[start + 1 :] = True  # never closed
    ends = []
    for match in SENTENCE_END.finditer(trace):
        line = trace[trace.rfind("\n", 0, match.start()) + 1 : match.end()]
        if not ENUMERATOR.fullmatch(line):
            ends.append(match.end())
    if "\n" not in trace:
        first = min(ends, default=len(trace))
        ends = [m.start() for m in re.finditer(r"(?<=\S)\s", trace) if m.start() < first] + ends
    return [e for e in ends if not inside[e]]


def answer_start(trace, gold, ends):
    """Where a hint must stop at the latest: the step that gives the answer away begins there.

    That is the first final-answer marker with the last step before it, and the step with the last
    occurrence of the gold; an end without a marker counts as one. A marker's own step is the last
    step if it derives something (a digit or maths before the marker), else the one before is.
    """
    starts = [0, *ends]
    found = MARKER.search(trace)
    marker = found.start() if found else len(trace)
    own = max(s for s in starts if s <= marker and (s < len(trace)))
    if not re.search(r"[\d=]", trace[own:marker]):
        own = max((s for s in starts if s < own), default=0)
    gold = gold.strip().strip("$").strip()
    places = list(re.finditer(rf"(?<![\w.]){re.escape(gold)}(?!\w)", trace)) if gold else []
    last = places[-1].start() if places else len(trace)
    return min(own, max(s for s in starts if s <= last))
