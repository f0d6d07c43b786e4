"""When to hint, how much, what text, where, and what the loss then sees: the method, without torch.

GHPO asks a problem again, with the first part of its solution, when all G samples fail (E2). A new
method is an edit of the variation points, the functions from `needs_hint` to `baseline`. They see a
problem, the tries made at it, the config, the step, and the history, {problem id: {"attempts",
"pass_rate", "ratio"}} of the last step that met a problem, checkpointed and alike on every rank.
"""
import re
from dataclasses import dataclass, replace

import numpy as np

# The reference's sentence, to the letter; the hint text follows it in the user message.
HINT_SENTENCE = ("\n The following text is the beginning part of the answer, "
                 "which you can refer to for solving the problem:\n")
ASSISTANT_OPENING = "<think>\n"  # what stands before the hint when hint_where is assistant
MARKER = re.compile(r"\\boxed|\\fbox|####|answer is|<answer>|\Z", re.IGNORECASE)
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

    ratio = property(lambda self: max(self.ratios))  # the largest one

def needs_hint(tries, config):
    """E2: hard iff no sample of the last try passed (mean trigger reward <= threshold)."""
    return tries[-1].pass_rate <= config.hint_threshold

def next_ratio(problem, tries, config, history, step):
    """Omega of the next or first try, a number or a list (G,); None: the group is final."""
    is_hinting = config.rl_type == "ghpo" and step >= config.start_hint_step  # cold start
    if config.hint_trigger == "always":  # control: every problem is hinted, once
        return None if tries else config.hint_ratio[0] * is_hinting
    if not tries:
        return 0.0
    ladder = config.hint_ratio if is_hinting and needs_hint(tries, config) else []
    return next((omega for omega in ladder if omega > tries[-1].ratio), None)

def make_hint(problem, ratio, limit=float("inf")):
    """(text, was it trimmed): the first `ratio` of the trace, at most `limit` characters, cut at a
    step end and without the answer; empty when nothing can be shown."""
    trace = problem.trace.rstrip()
    starts = [0, *step_ends(trace)]
    leak = answer_start(trace, problem.answer, starts)
    wanted = [end for end in starts if end <= min(round(len(trace) * ratio), limit)]
    allowed = [end for end in wanted if end <= leak]
    return trace[: allowed[-1]].rstrip(), allowed != wanted

def render(problem, hint, config):
    """Where the hint goes: (chat messages, text the assistant's turn already starts with)."""
    if not hint or config.hint_where == "assistant":
        return problem.messages, ASSISTANT_OPENING + hint if hint else ""
    *before, last = problem.messages
    asked = {**last, "content": last["content"] + HINT_SENTENCE + hint}  # E2: q* = q + omega * h
    return [*before, asked], ""

def merge(previous, new):
    """Which rows enter the batch: the new Group replaces the failed or blank one whole; to append:
    replace(new, completions=previous.completions + new.completions, rewards=...)."""
    return new

def loss_view(completion, plain_ids, config):
    """(context ids, target ids, policy weight (T,), likelihood weight (T,)); plain_ids: the prompt
    without hint. Targets may hold tokens of the prompt before those of the completion (hint tokens
    to be learnt); their behaviour log-prob is unknown: policy weight 0."""
    context = plain_ids if config.hint_context == "original" else completion.prompt_ids
    length = len(completion.token_ids)
    return context, completion.token_ids, [1.0] * length, [0.0] * length

def baseline(rewards_G, ratios_G):
    """E3's mean and standard deviation (ddof = 1) of a group, broadcastable to (G,)."""
    mean = rewards_G.mean() if np.ptp(rewards_G) else rewards_G[0]  # equal rewards: exactly zero
    return mean, rewards_G.std(ddof=1) if len(rewards_G) > 1 else 0.0

def plan_try(group, config, history, step, fit=make_hint):
    """(The next Try at a group or None when it is final, its tries so far). A stage whose text is
    empty or that of the stage before joins the tries as skipped, unsampled. fit: as make_hint."""
    tries = group.tries
    while (ratio := next_ratio(group.problem, tries, config, history, step)) is not None:
        wanted = list(ratio) if np.ndim(ratio) else [float(ratio)] * config.num_generations
        cuts = {omega: fit(group.problem, omega) for omega in set(wanted)}
        texts = [cuts[omega][0] for omega in wanted]
        if not tries or (any(texts) and texts != tries[-1].hints):
            ratios = [omega * bool(text) for omega, text in zip(wanted, texts)]
            return Try(ratios, texts, trimmed=any(cut[1] for cut in cuts.values())), tries
        tries = [*tries, replace(tries[-1], ratios=wanted, tokens=0, trimmed=False, skipped=True)]
    return None, tries

def remember(history, problem_id, tries):
    """Updates the history with the sampled tries of one step."""
    last = [tried for tried in tries if not tried.skipped][-1]
    attempts = history.get(problem_id, {"attempts": 0})["attempts"] + 1
    history[problem_id] = {"attempts": attempts, "pass_rate": last.pass_rate, "ratio": last.ratio}

def step_ends(trace):
    """Where a trace may be cut, ascending: at line and sentence ends outside maths."""
    inside, depth = np.zeros(len(trace) + 1, dtype=bool), 0
    for match in ENVIRONMENT.finditer(trace):
        depth = depth + 1 if match[1] else max(depth - 1, 0)
        inside[match.start() + 1 : match.end()] = True
        inside[match.end() :] = depth > 0  # to the end where it is never closed
    for match in DOLLARS.finditer(trace):
        inside[match.start() + 1 : match.end()] = True
    ends = [m.end() for m in SENTENCE_END.finditer(trace)
            if not ENUMERATOR.fullmatch(trace, trace.rfind("\n", 0, m.start()) + 1, m.end())]
    if "\n" not in trace:  # a single line: also at the word ends before its first sentence end
        first = min(ends, default=len(trace))
        ends = [m.start() for m in re.finditer(r"(?<=\S)\s", trace[:first])] + ends
    return [end for end in ends if not inside[end]]

def answer_start(trace, gold, starts):
    """Where a hint stops at the latest: before the last step that derives something ahead of the
    first answer marker (the end counts as one), and before the step with the gold's last place."""
    marker = MARKER.search(trace).start()
    own = max((s for s in starts if re.search(r"[\d=]", trace[s:marker])), default=0)
    gold = gold.strip().strip("$").strip()
    places = re.finditer(rf"(?<![\w.]){re.escape(gold)}(?!\w)", trace) if gold else []
    last = max((place.start() for place in places), default=len(trace))
    return min(own, max(start for start in starts if start <= last))
