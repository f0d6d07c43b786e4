"""When to hint, how much, what text, where, and what the loss then sees: the method, without torch.

GHPO asks a problem again, with the first part of its solution, when all G samples fail (E2). Its
follow-ups differ from it in the plain functions under "variation points" and nowhere else: a new
method is an edit there. They see a problem, the tries made at it, the config, the step, and the
history, {problem id: {"attempts", "pass_rate", "ratio"}} of the last step that met a problem,
which is checkpointed and alike on every rank.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

# The reference's sentence, to the letter; the hint text follows it in the user message.
HINT_SENTENCE = ("\n The following text is the beginning part of the answer, "
                 "which you can refer to for solving the problem:\n")
ASSISTANT_OPENING = "<think>\n"  # what stands before the hint when hint_where is assistant
MARKER = re.compile(r"\\boxed|\\fbox|####|answer is|<answer>", re.IGNORECASE)
ENVIRONMENT = re.compile(r"(\\begin\{|\\\[|\\\(|\[asy\])|(\\end\{[^}]*\}|\\\]|\\\)|\[/asy\])")
# Inline maths by pandoc's rule, so that "$5 and $10" is money: no space inside the dollars and no
# digit after them, or a space on both sides ("$ x $").
DOLLARS = re.compile(
    r"(?<!\\)(?:\$\$.*?\$\$|\$(?=[^\s$])(?:\\.|[^$\\])*?(?<=\S)\$(?!\d)|\$ (?:\\.|[^$\\])*? \$)",
    re.DOTALL)
SENTENCE_END = re.compile(r"\n|(?<![\s.])[.!?][\"')\]$]*(?=\s)")
ENUMERATOR = re.compile(r"\s*\(?\w{1,2}[.)]\s*")  # "2." opens a list item, ends no sentence

@dataclass(frozen=True)
class Problem:
    """One usable row of the data set."""
    id: int  # row number: seeds, history and checkpoints refer to it
    messages: list  # chat [{"role", "content"}, ...] without any hint, the problem last
    answer: str  # gold, as the verifier reads it
    trace: str = ""  # ground-truth solution, the source of hints
    level: float = 0.0  # difficulty for the curriculum

@dataclass(frozen=True)
class Try:
    """One stage at one problem: what was shown, and how it went."""
    ratios: list  # (G,) omega of each sample, 0 without a hint
    hints: list  # (G,) texts shown
    pass_rate: float = 0.0  # mean of the trigger reward over the samples
    tokens: int = 0  # generated
    trimmed: bool = False  # the leak guard shortened a hint
    skipped: bool = False  # nothing new to show: not sampled

    @property
    def ratio(self):
        """The largest ratio of the try."""
        return max(self.ratios)

# ---- variation points --------------------------------------------------------------------------

def needs_hint(tries, config):
    """E2: hard iff no sample of the last try passed (mean trigger reward <= threshold)."""
    return tries[-1].pass_rate <= config.hint_threshold

def next_ratio(problem, tries, config, history, step):
    """Omega of the next try, a number or a list (G,); None: the group is final. No tries yet: the
    first. Cold start: no hints in the first start_hint_step steps."""
    is_hinting = config.rl_type == "ghpo" and step >= config.start_hint_step
    if config.hint_trigger == "always":  # control: every problem is hinted, once
        return None if tries else config.hint_ratio[0] * is_hinting
    if not tries:
        return 0.0
    if not is_hinting or not needs_hint(tries, config):
        return None
    return next((omega for omega in config.hint_ratio if omega > tries[-1].ratio), None)

def make_hint(problem, ratio, limit=None):
    """(text, was it trimmed): the first `ratio` of the trace, at most `limit` characters, cut at a
    step end and without the answer; empty when nothing can be shown."""
    trace = problem.trace.rstrip()
    ends = step_ends(trace)
    wanted = min(round(len(trace) * ratio), len(trace) if limit is None else limit)
    unguarded = max((end for end in ends if end <= wanted), default=0)
    allowed = answer_start(trace, problem.answer, ends)
    end = max((end for end in ends if end <= min(wanted, allowed)), default=0)
    return trace[:end].rstrip(), end < unguarded

def render(problem, hint, config):
    """Where the hint goes: (chat messages, text the assistant's turn already starts with)."""
    if not hint:
        return problem.messages, ""
    if config.hint_where == "assistant":
        return problem.messages, ASSISTANT_OPENING + hint
    *before, last = problem.messages
    asked = {**last, "content": last["content"] + HINT_SENTENCE + hint}  # E2: q* = q + omega * h
    return [*before, asked], ""

def merge(previous, new):
    """Which rows enter the batch: the new Group replaces the failed or blank one whole; to append:
    replace(new, completions=previous.completions + new.completions, rewards=...)."""
    return new

def loss_view(completion, plain_ids, config):
    """What the loss sees: (context ids, target ids, policy weight (T,), likelihood weight (T,)).

    plain_ids: the prompt without hint. Targets may hold tokens of the prompt before those of the
    completion (hint tokens to be learnt); their behaviour log-prob is unknown: policy weight 0.
    """
    context = plain_ids if config.hint_context == "original" else completion.prompt_ids
    length = len(completion.token_ids)
    return context, completion.token_ids, [1.0] * length, [0.0] * length

def baseline(rewards_G, ratios_G):
    """E3's mean and standard deviation (ddof = 1) of a group, broadcastable to (G,)."""
    mean = rewards_G.mean() if np.ptp(rewards_G) else rewards_G[0]  # equal rewards: exactly zero
    return mean, rewards_G.std(ddof=1) if len(rewards_G) > 1 else 0.0

# ---- the machinery they share ------------------------------------------------------------------

def unhinted(size):
    """A Try of `size` samples that shows nothing."""
    return Try([0.0] * size, [""] * size)

def plan_try(group, config, history, step, fit=make_hint):
    """(The next Try at a group or None when it is final, its tries so far). A stage whose text is
    empty or that of the stage before joins the tries as skipped, unsampled. fit: as make_hint."""
    tries = group.tries
    while True:
        ratio = next_ratio(group.problem, tries, config, history, step)
        if ratio is None:
            return None, tries
        wanted = list(ratio) if np.ndim(ratio) else [float(ratio)] * config.num_generations
        cuts = {omega: fit(group.problem, omega) for omega in set(wanted)}
        texts = [cuts[omega][0] for omega in wanted]
        if not tries or (any(texts) and texts != tries[-1].hints):
            ratios = [omega * bool(text) for omega, text in zip(wanted, texts)]
            return Try(ratios, texts, trimmed=any(cut[1] for cut in cuts.values())), tries
        tries = [*tries, replace(tries[-1], ratios=wanted, tokens=0, trimmed=False, skipped=True)]

def remember(history, problem_id, tries):
    """Updates the history with the sampled tries of one step."""
    last = [tried for tried in tries if not tried.skipped][-1]
    attempts = history.get(problem_id, {"attempts": 0})["attempts"] + 1
    history[problem_id] = {"attempts": attempts, "pass_rate": last.pass_rate, "ratio": last.ratio}

def step_ends(trace):
    """Where a trace may be cut, ascending: line and sentence ends outside maths; one of a single
    line also at the word ends before the first of them."""
    inside = np.zeros(len(trace) + 1, dtype=bool)
    for match in DOLLARS.finditer(trace):
        inside[match.start() + 1 : match.end()] = True
    depth, start = 0, 0
    for match in ENVIRONMENT.finditer(trace):
        start = match.start() if depth == 0 else start
        depth = depth + 1 if match[1] else max(depth - 1, 0)
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
        words = [m.start() for m in re.finditer(r"(?<=\S)\s", trace)]
        ends = [end for end in words if end < first] + ends
    return [end for end in ends if not inside[end]]

def answer_start(trace, gold, ends):
    """Where a hint stops at the latest: before the last step that derives something ahead of the
    first answer marker (an end without marker counts as one), and before the step with the last
    occurrence of the gold."""
    starts = [0, *ends]
    found = MARKER.search(trace)
    marker = found.start() if found else len(trace)
    own = max((s for s in starts if re.search(r"[\d=]", trace[s:marker])), default=0)
    gold = gold.strip().strip("$").strip()
    places = list(re.finditer(rf"(?<![\w.]){re.escape(gold)}(?!\w)", trace)) if gold else []
    last = places[-1].start() if places else len(trace)
    return min(own, max(start for start in starts if start <= last))
