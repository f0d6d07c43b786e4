"""The method: when to hint, how much, what text, where, what enters the batch, what the loss sees.

GHPO asks a problem again, with the first part of its solution, when all G samples fail (E2):

    group = advance(Group(problem))              first stage: no hint
    while group.next_stage:
        completions = sample(render(problem, hint))      G of them, by rollout.collect
        rewards = verify(completions)                    for many groups at a time
        group = after_stage(group, completions, rewards)

Called by ghpo.py only as `hints.name`, so that a launcher can replace any of them:

    advance       what a group is asked next: next_ratio (which asks needs_hint), then make_hint
    render        where the hint goes in the chat
    after_stage   a stage's samples and rewards: merge, then advance
    enters_batch  which groups are trained on
    advantages    E1, E3
    loss_view     context, targets and weights of one row
    after_step    history, queue and metrics, from what all ranks did

Fork here. Each function gets the whole group or problem, the config and the state, so that
signatures need not grow. state.step is the step (0 is the first), state.history has {problem id:
{"attempts", "pass_rate", "ratio"}}: how many steps met a problem, and how the last of them ended.
state.method is a dict for whatever else a method must remember: JSON, alike on every rank,
checkpointed; its keys are text: str(problem.id). Evaluations, the first of which is before step 0,
go through advance and after_stage too, with the eval set's config (G is eval_samples): one stage,
for which next_ratio is not asked and make_hint gets ratio 0. Neither torch nor vllm is imported.
"""

import bisect
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

# The reference's sentence, to the letter; the hint text follows it in the user message.
HINT_SENTENCE = (
    "\n The following text is the beginning part of the answer, "
    "which you can refer to for solving the problem:\n"
)
ASSISTANT_OPENING = "<think>\n"  # before a hint in the assistant's turn, if the prompt asks for it
MAX_STAGES = 100  # of a group: more are a next_ratio that never ends
STD_FLOOR = 1e-4  # E3: added to the standard deviation, as in the reference

# What announces the answer: "The answer is 5", \boxed{5}; the end of the text where nothing does.
MARKER = re.compile(r"\\boxed|\\fbox|####|answer is|<answer>|\Z", re.IGNORECASE)
# What opens and what closes maths: \[ and \], \begin{align} and \end{align}, [asy] and [/asy].
# The line break \\[4pt] opens nothing.
ENVIRONMENT = re.compile(
    r"(\\begin\{|(?<!\\)\\[\[(]|\[asy\])|(\\end\{[^}]*\}|(?<!\\)\\[\])]|\[/asy\])"
)
# Inline maths by pandoc's rule, so that "$5 and $10" is money: no space inside the dollars and no
# digit after them, or a space on both sides ("$ x $").
DOLLARS = re.compile(
    r"(?<!\\)(?:\$\$.*?\$\$|\$(?=[^\s$])(?:\\.|[^$\\])*?(?<=\S)\$(?!\d)|\$ (?:\\.|[^$\\])*? \$)",
    re.DOTALL,
)
# The end of a line, or of a sentence with its quotes and brackets: 'He said "go." Then'.
SENTENCE_END = re.compile(r"\n|(?<![\s.])[.!?][\"')\]$]*(?=\s)")
WORD_END = re.compile(r"(?<=\S)\s")
ENUMERATOR = re.compile(r"\s*\(?\w{1,2}[.)]\s*")  # "2." opens a list item, ends no sentence
ENUMERATOR_CHARS = 40  # an enumerator's line is looked for so far back


@dataclass(frozen=True)
class Problem:
    """One usable row of the data set."""

    id: int  # row number: seeds, history and checkpoints refer to it
    messages: list[dict]  # chat [{"role", "content"}, ...] without any hint, the problem last
    gold: str  # the answer, as the verifier reads it
    solution: str = ""  # the ground-truth solution, which hints are cut from
    level: float = 0.0  # difficulty for the curriculum
    row: dict = field(default_factory=dict)  # the columns that are JSON, for rewards

    @property
    def text(self) -> str:
        """That of the problem itself: the last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Stage:
    """G samples asked at once: what each was shown, and how it went."""

    ratios: list[float]  # (G,) omega of each sample, 0 without a hint
    hints: list[str]  # (G,) texts shown
    passes: list[float] = field(default_factory=list)  # (G,) trigger rewards; empty: not sampled
    lengths: list[int] = field(default_factory=list)  # (G,) generated tokens
    is_trimmed: bool = False  # the leak guard shortened a hint
    is_skipped: bool = False  # nothing new to show: not sampled, passes are those of the last one

    @property
    def ratio(self) -> float:
        """The largest one."""
        return max(self.ratios)

    @property
    def plain_passes(self) -> list[float]:
        """Trigger rewards of the samples without a hint."""
        return [passed for omega, passed in zip(self.ratios, self.passes) if omega == 0]

    @property
    def pass_rate(self) -> float:
        """Mean trigger reward of its samples."""
        return float(np.mean(self.passes)) if self.passes else 0.0


@dataclass(frozen=True)
class Completion:
    """One sample with exactly the context it was sampled from."""

    prompt_ids: list[int]
    token_ids: list[int]  # the end-of-sequence token included when it was sampled
    behaviour_logp: list[float]  # (T,) the sampler's, at the sampling temperature (1 when greedy)
    finish_reason: str  # "stop" or "length"
    hint_ratio: float = 0.0
    hint: str = ""
    prefix: str = ""  # text the assistant's turn already started with; rewards see prefix + text
    text: str = ""


@dataclass(frozen=True)
class Group:
    """A problem with the samples that enter the batch; replaced whole by each stage."""

    problem: Problem
    stages: list[Stage] = field(default_factory=list)  # so far, those of earlier steps included
    completions: list[Completion] = field(default_factory=list)  # (G,); empty: not sampled yet
    rewards: list[list[float]] = field(default_factory=list)  # (G, F)
    next_stage: Stage | None = None  # None: the group is final
    is_deferred: bool = False  # next_stage is for the next step
    n_earlier: int = 0  # stages of earlier steps


@dataclass(frozen=True)
class Outcome:
    """What a step made of one problem: what history, queue and metrics need of a Group."""

    problem_id: int
    stages: list[Stage]
    n_earlier: int
    is_deferred: bool
    rewards: list[list[float]]  # (G, F)
    lengths: list[int]  # (G,) tokens of the group's completions, trained on or not
    is_truncated: list[bool]  # (G,)


class LossView(NamedTuple):
    """One completion as the loss sees it: T targets, predicted from the context on."""

    context: list[int]  # token ids
    targets: list[int]  # (T,) token ids; may begin with tokens of the prompt (hints to be learnt)
    policy_weight: list[float]  # (T,) of E4, E5; 0 where the behaviour log-prob is unknown
    sft_weight: list[float]  # (T,) of the log-likelihood


def advance(group: Group, config: Any, state: Any, fit: Callable) -> Group:
    """The group with its next stage, or final. A stage whose text is empty or that of the stage
    before joins the stages as skipped, unsampled. fit(problem, ratio) is make_hint, shortened."""
    stages = list(group.stages)
    while True:
        group = replace(group, stages=stages, next_stage=None)
        ratio = ratio_of(group, config, state)
        if ratio is None:
            break
        wanted = as_list(ratio, config.num_generations)
        stage = make_stage(group.problem, wanted, fit)
        if len(stages) >= MAX_STAGES:
            raise ValueError(f"next_ratio gave {ratio} after {len(stages)} stages: it must end")
        if not stages or is_news(stage, stages[-1]):
            is_deferred = config.hint_timing == "deferred" and bool(group.completions)
            return replace(group, next_stage=stage, is_deferred=is_deferred)
        # a skipped stage keeps hints and passes of the one before, whose verdict still holds
        skipped = replace(
            stages[-1], ratios=wanted, lengths=[], is_trimmed=stage.is_trimmed, is_skipped=True
        )
        stages = [*stages, skipped]
    if group.completions:
        return group
    # a deferred problem is back, with stages and no samples, and a fork changed its mind meanwhile
    size = config.num_generations
    return replace(group, next_stage=Stage([0.0] * size, [""] * size))


def ratio_of(group: Group, config: Any, state: Any) -> float | list[float] | None:
    """What next_ratio says. Where hints are off, as in every evaluation, one stage without one."""
    if uses_hints(config):
        return next_ratio(group, config, state)
    return None if group.stages else 0.0


def after_stage(
    group: Group,
    completions: list[Completion],
    rewards: list[list[float]],
    trigger: int,
    config: Any,
    state: Any,
    fit: Callable,
) -> Group:
    """The group after its next stage was sampled. trigger: the reward column that decides."""
    stage = replace(
        group.next_stage,
        passes=[scores[trigger] for scores in rewards],
        lengths=[len(completion.token_ids) for completion in completions],
    )
    new = replace(group, stages=[*group.stages, stage], completions=completions, rewards=rewards)
    return advance(merge(group, new, config, state), config, state, fit)


def needs_hint(group: Group, config: Any, state: Any) -> bool:
    """E2: hard iff no sample of the last stage passed (mean trigger reward <= threshold)."""
    return is_failed(group.stages[-1].passes, config)


def next_ratio(group: Group, config: Any, state: Any) -> float | list[float] | None:
    """Omega of the next or first stage, a number or one a sample (G,); None: the group is final. A
    stage that would show nothing new is skipped, and it is asked again."""
    is_hinting = is_hinting_step(config, state)
    if config.hint_trigger == "always":  # control: every problem is hinted, once
        if group.stages:
            return None
        return config.hint_ratio[0] if is_hinting else 0.0
    if not group.stages:
        return 0.0
    if not is_hinting or not needs_hint(group, config, state):
        return None
    for omega in config.hint_ratio:
        if omega > group.stages[-1].ratio:
            return omega
    return None


def make_hint(
    problem: Problem, ratio: float, config: Any, state: Any, limit: int | None = None
) -> tuple[str, bool]:
    """(text, was it trimmed): the first `ratio` of the solution, at most `limit` characters, cut at
    a step end and without the answer; empty when nothing can be shown."""
    solution = problem.solution.rstrip()
    longest = round(len(solution) * ratio)
    if limit is not None:
        longest = min(longest, limit)
    ends, leak = cuts(solution, problem.gold)
    n_wanted = bisect.bisect_right(ends, longest)
    n_allowed = bisect.bisect_right(ends, min(longest, leak))
    return solution[: ends[n_allowed - 1]].rstrip(), n_allowed < n_wanted


def render(problem: Problem, hint: str, config: Any, state: Any) -> tuple[list[dict], str]:
    """Where the hint goes: (chat messages, text the assistant's turn already starts with)."""
    if not hint:
        return problem.messages, ""
    if config.hint_where == "assistant":
        wants_think = any("<think>" in str(turn["content"]) for turn in problem.messages)
        if wants_think or "format" in config.reward_funcs:
            return problem.messages, ASSISTANT_OPENING + hint
        return problem.messages, hint
    *before, last = problem.messages
    hinted = {**last, "content": last["content"] + HINT_SENTENCE + hint}  # E2: q* = q + omega * h
    return [*before, hinted], ""


def merge(previous: Group, new: Group, config: Any, state: Any) -> Group:
    """Which rows stay: the new Group replaces the failed or blank one whole. To append instead:
    replace(new, completions=previous.completions + new.completions, rewards=...)."""
    return new


def enters_batch(group: Group, config: Any, state: Any) -> bool:
    """Is the group trained on? Not if it has no advantages and flat_groups says so, nor if its
    hints are used up and hint_exhausted says so. Counts (E6) are over the kept ones."""
    if config.flat_groups != "keep" and not advantages(group, config, state).any():
        return False
    if config.hint_exhausted == "keep" or not is_hinting_step(config, state):
        return True
    is_used_up = needs_hint(group, config, state) and not group.is_deferred
    return not is_used_up


def advantages(group: Group, config: Any, state: Any) -> np.ndarray:
    """E3: rewards (G, F) to advantages (G,), float64."""
    rewards_G = weighted_rewards(group, config)
    if np.ptp(rewards_G) == 0:
        return np.zeros_like(rewards_G)  # exactly, so that such rows can be left out
    centred_G = rewards_G - rewards_G.mean()
    if not config.scale_rewards:
        return centred_G
    return centred_G / (rewards_G.std(ddof=1) + STD_FLOOR)  # E3


def weighted_rewards(group: Group, config: Any) -> np.ndarray:
    """(G,) one number a sample."""
    return np.array(group.rewards) @ np.array(config.reward_weights)  # E1


def loss_view(
    group: Group, j: int, advantage: float, plain_ids: list[int], config: Any, state: Any
) -> LossView:
    """Completion j of the group as the loss sees it; plain_ids: the prompt without a hint."""
    completion = group.completions[j]
    context = completion.prompt_ids
    if config.hint_context == "original":
        context = plain_ids  # E7 then weighs each token by p(y | q) / p(y | q*), up to the cap
    length = len(completion.token_ids)
    return LossView(context, completion.token_ids, [1.0] * length, [0.0] * length)


def after_step(state: Any, outcomes: list[Outcome], config: Any) -> dict[str, float]:
    """What is remembered of a step, given the outcomes of all ranks, and its metrics."""
    for outcome in outcomes:
        remember(state.history, outcome.problem_id, outcome.stages)
        if outcome.is_deferred:
            state.queue.append((outcome.problem_id, outcome.stages))
    return {**rollout_metrics(outcomes, config), "queue": len(state.queue)}


def is_failed(passes: list[float], config: Any) -> bool:
    return bool(np.mean(passes) <= config.hint_threshold)


def uses_hints(config: Any) -> bool:
    return config.rl_type == "ghpo"


def is_hinting_step(config: Any, state: Any) -> bool:
    return uses_hints(config) and state.step >= config.start_hint_step  # cold start


def as_list(ratio: float | list[float], size: int) -> list[float]:
    """(G,) what next_ratio gives, one for each sample."""
    if np.ndim(ratio) == 0:
        return [float(ratio)] * size
    if len(ratio) != size:
        raise ValueError(f"next_ratio gave {len(ratio)} ratios for {size} samples")
    return list(ratio)


def is_news(stage: Stage, last: Stage) -> bool:
    """Does a stage show something that the one before did not?"""
    return any(stage.hints) and stage.hints != last.hints


def make_stage(problem: Problem, wanted: list[float], fit: Callable) -> Stage:
    """What G samples are shown at the wanted ratios (G,); ratio 0 where there is no text."""
    text_at, has_trimmed = {}, False
    for omega in set(wanted):
        text_at[omega], is_trimmed = fit(problem, omega)
        has_trimmed = has_trimmed or is_trimmed
    texts = [text_at[omega] for omega in wanted]
    ratios = [omega if text else 0.0 for omega, text in zip(wanted, texts)]
    return Stage(ratios, texts, is_trimmed=has_trimmed)


def outcome_of(group: Group) -> Outcome:
    return Outcome(
        problem_id=group.problem.id,
        stages=group.stages,
        n_earlier=group.n_earlier,
        is_deferred=group.is_deferred,
        rewards=group.rewards,
        lengths=[len(completion.token_ids) for completion in group.completions],
        is_truncated=[completion.finish_reason == "length" for completion in group.completions],
    )


def remember(history: dict, problem_id: int, stages: list[Stage]) -> None:
    """Updates the history with the sampled stages of one step."""
    last = [stage for stage in stages if not stage.is_skipped][-1]
    attempts = 1
    if problem_id in history:
        attempts += history[problem_id]["attempts"]
    history[problem_id] = {
        "attempts": attempts,
        "pass_rate": last.pass_rate,
        "ratio": last.ratio,
    }


def rollout_metrics(outcomes: list[Outcome], config: Any) -> dict[str, float]:
    """Metrics of a step. Means over: fresh un-hinted samples (accuracy_without_hint, by the reward
    that is hint_trigger), fresh problems with such samples (hard_fraction), the samples of last
    stages (the others)."""
    counts, values = Counter(), defaultdict(list)
    counts["hint/unsolved"] = 0
    for outcome in outcomes:
        if is_failed(outcome.stages[-1].passes, config) and not outcome.is_deferred:
            counts["hint/unsolved"] += 1
        for stage in outcome.stages[outcome.n_earlier :]:
            counts.update(stage_counts(stage, config))
        if outcome.n_earlier == 0:
            plain = outcome.stages[0].plain_passes
            values["accuracy_without_hint"].extend(plain)
            if plain:
                values["hard_fraction"].append(is_failed(plain, config))
        values["tokens/completion"].extend(outcome.lengths)
        values["truncated"].extend(outcome.is_truncated)
        for scores in outcome.rewards:
            for name, score in zip(config.reward_funcs, scores):
                values[f"reward/{name}"].append(score)
    means = {key: float(np.mean(items)) for key, items in values.items() if items}
    return {**means, **dict(sorted(counts.items()))}


def stage_counts(stage: Stage, config: Any) -> Counter:
    """Stages tried and solved and tokens generated by ratio, each sample at the nearest rung of the
    ladder, so that continuous ratios do not make more keys."""
    counts = Counter({"hint/trimmed": 0, "hint/skipped": 0})
    if stage.is_trimmed:
        counts["hint/trimmed"] = 1
    if stage.is_skipped:
        counts["hint/skipped"] = 1
    counts["tokens/generated"] = sum(stage.lengths)
    samples_by_rung = defaultdict(list)
    for j, omega in enumerate(stage.ratios):
        samples_by_rung[nearest_rung(omega, config)].append(j)
    for rung, samples in samples_by_rung.items():
        tried, solved, n_tokens = 0, 0, 0
        if not stage.is_skipped:
            tried = 1
            n_tokens = sum(stage.lengths[j] for j in samples)
            if not is_failed([stage.passes[j] for j in samples], config):
                solved = 1
        counts[f"hint/tried@{rung:g}"] = tried
        counts[f"hint/solved@{rung:g}"] = solved
        counts[f"tokens/generated@{rung:g}"] = n_tokens
    return counts


def nearest_rung(omega: float, config: Any) -> float:
    return min([0.0, *config.hint_ratio], key=lambda rung: abs(rung - omega))


@functools.lru_cache(maxsize=256)
def cuts(solution: str, gold: str) -> tuple[list[int], int]:
    """(where a solution may be cut, ascending from 0; where a hint stops at the latest)."""
    ends = [0, *step_ends(solution)]
    return ends, latest_hint_end(solution, gold, ends)


def step_ends(solution: str) -> list[int]:
    """Where a solution may be cut, ascending: at line and sentence ends outside maths."""
    is_inside = maths(solution)
    ends = []
    for match in SENTENCE_END.finditer(solution):
        # where its line begins; 0 where that is further back: too long for an enumerator then
        earliest = max(0, match.start() - ENUMERATOR_CHARS)
        start = solution.rfind("\n", earliest, match.start()) + 1
        if not ENUMERATOR.fullmatch(solution, start, match.end()):
            ends.append(match.end())
    if "\n" not in solution:  # a single line: also at the word ends before its first sentence end
        first = ends[0] if ends else len(solution)
        words = [match.start() for match in WORD_END.finditer(solution[:first])]
        ends = words + ends
    return [end for end in ends if not is_inside[end]]


def maths(solution: str) -> np.ndarray:
    """(characters + 1,) booleans: would a cut here be inside dollars or an environment?"""
    is_inside = np.zeros(len(solution) + 1, dtype=bool)
    depth = 0
    opened = 0  # where the outermost one that is open begins
    for match in ENVIRONMENT.finditer(solution):
        is_inside[match.start() + 1 : match.end()] = True
        opens = bool(match[1])
        if opens:
            if depth == 0:
                opened = match.start()
            depth += 1
        elif depth > 0:
            depth -= 1
            if depth == 0:
                is_inside[opened + 1 : match.end()] = True
    if depth > 0:  # never closed
        is_inside[opened + 1 :] = True
    for match in DOLLARS.finditer(solution):
        is_inside[match.start() + 1 : match.end()] = True
    return is_inside


def latest_hint_end(solution: str, gold: str, ends: list[int]) -> int:
    """The last end of a step that is before both

    - the last digit or equals sign ahead of the first answer marker: its step derives the answer,
    - the last place of the gold (not the first: a gold such as 2 also stands in the working).

    "3 bags of 4. So 3 * 4 = 12. The answer is 12." (gold 12) -> 12, the end of the first step.
    """
    marker = MARKER.search(solution).start()  # the end when there is none
    derived = last_place(r"[\d=]", solution[:marker])
    if derived is None:  # all in words: the last whole step before the marker
        sentences = [match.end() for match in SENTENCE_END.finditer(solution)]
        whole = max(end for end in [0, *sentences, len(solution)] if end <= marker)
        # a place inside that step, so that its own end comes too late
        derived = max(0, len(solution[:whole].rstrip()) - 1)
    places = [derived]
    gold = gold.strip().strip("$").strip()
    if gold:
        told = last_place(rf"(?<![\w.]){re.escape(gold)}(?!\w)", solution)
        if told is not None:
            places.append(told)
    return ends[bisect.bisect_right(ends, min(places)) - 1]


def last_place(pattern: str, text: str) -> int | None:
    places = [match.start() for match in re.finditer(pattern, text)]
    return places[-1] if places else None
