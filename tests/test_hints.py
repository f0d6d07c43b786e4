"""What is hinted, when and how: cuts, leaks, stages; and that other methods fit in."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, SHARED, ScriptedPool, make_config, problem, read_jsonl, unhinted

import ghpo
import hints
from rollout import Completion, Group

CONFIG, STATE = make_config(), ghpo.State()
HARD = "a37\nb52\nc24\nd81\ne90\nf13\ng44\nh27\nend"  # 35 characters


def cuts(trace):
    """The texts that a trace may be cut to."""
    return list(dict.fromkeys(trace[:end].rstrip() for end in hints.step_ends(trace)))


@pytest.mark.parametrize("trace, pieces", [
    # every cut adds one piece; the rest of the trace is never a hint of its own
    ("a37\nb52\nc24\nend", ["a37", "\nb52", "\nc24"]),
    ("One is 3.5 m. Two? Three! And\nfour", ["One is 3.5 m.", " Two?", " Three!", " And"]),
    ("Let $x = 1. So y$ be. Then\nend", ["Let $x = 1. So y$ be.", " Then"]),
    ("Let $$x. y\nz$$ be. Then\nend", ["Let $$x. y\nz$$ be.", " Then"]),
    ("Let $ x. y $ be. Then\nend", ["Let $ x. y $ be.", " Then"]),
    ("So \\[ x. y\nz \\] is. Then\nend", ["So \\[ x. y\nz \\] is.", " Then"]),
    ("So \\( x. y \\) is. Then\nend", ["So \\( x. y \\) is.", " Then"]),
    ("A\n\\begin{align} a. b\nc \\end{align}\nB\nC",
     ["A", "\n\\begin{align} a. b\nc \\end{align}", "\nB"]),
    ("A\n\\begin{a} \\begin{b} x.\n \\end{b}\ny \\end{a}\nB",
     ["A", "\n\\begin{a} \\begin{b} x.\n \\end{b}\ny \\end{a}"]),
    ("A\n[asy] draw. x\n[/asy]\nB\nC", ["A", "\n[asy] draw. x\n[/asy]", "\nB"]),
    ("First. \\begin{align} a. b\nc", ["First."]),  # never closed
    ("He pays $5 now. She pays $10 more. So\nend",
     ["He pays $5 now.", " She pays $10 more.", " So"]),
    ("He pays \\$5 now. She pays \\$6. So\nend", ["He pays \\$5 now.", " She pays \\$6.", " So"]),
    ("So $x = 5.$ Then 6.) Go\nend", ["So $x = 5.$", " Then 6.)", " Go"]),
    ("It goes on... and on. So\nend", ["It goes on... and on.", " So"]),
    ("1. Add two.\n2. Add three.\nend", ["1. Add two.", "\n2. Add three."]),
    ('He said "go." Then went.\nend', ['He said "go."', " Then went."]),
    # a single line: at word ends, up to its first sentence end
    ("one two three", ["one", " two"]),
    ("one two. three four. five", ["one", " two.", " three four."]),
    ("let $a b$ be c", ["let", " $a b$", " be"]),
    ("", []),
])  # fmt: skip
def test_where_a_trace_may_be_cut(trace, pieces):
    assert cuts(trace) == ["".join(pieces[: i + 1]) for i in range(len(pieces))]


@pytest.mark.parametrize("ratio, expected", [
    (0.0, ""), (0.08, ""), (0.1, "a37"), (0.25, "a37\nb52"), (0.3, "a37\nb52"),
    (0.5, "a37\nb52\nc24\nd81"), (0.75, "a37\nb52\nc24\nd81\ne90\nf13"),
    (1.0, "a37\nb52\nc24\nd81\ne90\nf13\ng44"),  # not the last step
])  # fmt: skip
def test_ratio_of_characters_back_to_a_step_end(ratio, expected):
    one = problem(solution=HARD, gold="(7,2,4,1,0,3,4,7)")
    hint, is_trimmed = hints.make_hint(one, ratio, CONFIG, STATE)
    assert (hint, is_trimmed) == (expected, ratio == 1.0)


@pytest.mark.parametrize("trace, gold, expected", [
    # the marker, and the last step before it
    ("A sold 24.\nB sold 72 in all.\n#### 72", "72", "A sold 24."),
    ("A = 1.\nB = 2.\nC = 3.\nThe answer is 3.", "3", "A = 1.\nB = 2."),
    ("A = 1.\nB = 2.\nC = 3.\nSo the Final Answer is 3.\nBye.", "3", "A = 1.\nB = 2."),
    ("A = 1.\nB = 2.\nC = 3.\n<answer>3</answer>", "3", "A = 1.\nB = 2."),
    ("A = 1.\nB = 2.\nThe value is $\\boxed{5}$.\nE", "5", "A = 1."),
    ("A = 1.\nB = 2.\nThe value is $\\fbox{5}$.\nE", "5", "A = 1."),
    # the marker's own step derives the answer: it is the last step
    ("A = 1.\nB = 2.\nSo C = 1 + 2 = \\boxed{3}.", "3", "A = 1.\nB = 2."),
    # an early marker counts, whatever follows
    ("A = 1.\nB = 2.\nThe box: \\boxed{2}.\nC = 3.\nD = 4.", "4", "A = 1."),
    # no marker: the end counts as one
    ("A = 1.\nB = 2.\nC = 3.\nend", "9", "A = 1.\nB = 2."),
    ("A = 1.\nB = 2.\nC = 3.", "9", "A = 1.\nB = 2."),
    # the last occurrence of the gold, earlier ones are no leak
    ("It is 12.\nCheck 3.\nCheck 4.\nDone 5.\nend", "12", ""),
    ("Take 2.\nThen 3.\nSo 2 left.\nDone 9.\nDone 8.", "2", "Take 2.\nThen 3."),
    ("Take 12.\nThen 25.\nSo 7.2 left.\nDone 9.", "2", "Take 12.\nThen 25.\nSo 7.2 left."),
    ("Take x.\nIt is $\\frac12$.\nCheck 3.\nDone 9.", "$\\frac12$", "Take x."),
    # all in words: the last sentence before the marker derives it
    ("Foxes are red. Hens are white. So it is the hen. The answer is hen.", "hen",
     "Foxes are red. Hens are white."),
    ("All cats purr.\nTom is a cat.\nThus Tom purrs.\n#### yes", "yes",
     "All cats purr.\nTom is a cat."),
    ("Men are mortal. She is one. So she is mortal.", "yes", "Men are mortal. She is one."),
    ("One to any power is one, so our answer is \\boxed{one}.", "one", ""),
    # nothing may be shown
    ("\\boxed{3}", "3", ""),
    ("\\boxed{3} it is", "3", ""),
    ("", "5", ""),
])  # fmt: skip
def test_a_whole_trace_stops_before_the_answer(trace, gold, expected):
    one = problem(solution=trace, gold=gold)
    hint, is_trimmed = hints.make_hint(one, 1.0, CONFIG, STATE)
    assert hint == expected
    assert is_trimmed == (len(cuts(trace)) > 0 and hint != cuts(trace)[-1])


def whole_word_places(text, word):
    """Where word stands in text by itself, by a plain scan."""
    is_part = lambda c: c.isalnum() or c == "_"  # noqa: E731
    places, start = [], text.find(word)
    while start >= 0:
        before, after = text[max(start - 1, 0) : start], text[start + len(word) :][:1]
        if not (is_part(before) if before else False) and before != "." and not is_part(after):
            places.append(start)
        start = text.find(word, start + 1)
    return places


@pytest.mark.parametrize("name", ["gsm8k_train", "math500_dev"])
def test_no_hint_leaks_or_cuts_into_maths_on_real_traces(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("no shared data")
    shown = 0
    for i, row in enumerate(read_jsonl(path)):
        trace, gold = row["solution_hint"].rstrip(), str(row["solution"]).strip().strip("$").strip()
        one = problem(i, "", str(row["solution"]), row["solution_hint"])
        lower = trace.lower()
        markers = [
            lower.find(m) for m in ("\\boxed", "####", "answer is", "<answer>") if m in lower
        ]
        marker = min(markers, default=len(trace))
        golds, previous = whole_word_places(trace, gold), ""
        for ratio in (0.25, 0.5, 0.75, 1.0):
            hint, _ = hints.make_hint(one, ratio, CONFIG, STATE)
            assert trace.startswith(hint) and hint.startswith(previous), i
            assert len(hint) <= round(len(trace) * ratio), i
            previous = hint
            if not hint:
                continue
            shown += 1
            assert len(hint) <= marker, i
            # something is still to be derived or said between the hint and the marker
            assert re.search(r"[\d=]|\w[^\n]*[.!?\n]\s", trace[len(hint) : marker]), i
            assert not golds or len(hint) <= golds[-1], i
            if "####" in trace:
                assert trace[:marker].rstrip().split("\n")[-1] not in hint.split("\n"), i
            assert trace[len(hint)].isspace(), i  # no half words
            if name == "math500_dev":
                assert hint.replace("\\$", "").count("$") % 2 == 0, i
            for opening, closing in (("\\begin{", "\\end{"), ("\\[", "\\]"), ("[asy]", "[/asy]")):
                assert hint.count(opening) == hint.count(closing), i
    assert shown > 100


# ---- stages ------------------------------------------------------------------------------------


def cut(config, state):
    """hints.advance's fit, without a limit of length."""
    return lambda one, ratio: hints.make_hint(one, ratio, config, state)


def walk(config, one, passes, step=0):
    """[(ratio, skipped)] of the stages of a problem whose sampled stages go as `passes` says."""
    state = ghpo.State(step=step)
    group = hints.advance(Group(one), config, state, cut(config, state))
    passes, completions = iter(passes), [Completion([65], [66], [0.0], "stop")] * 4
    while group.next_stage:
        rewards = [[next(passes), 0.0]] * 4
        group = hints.after_stage(group, completions, rewards, 0, config, state, cut(config, state))
    return [(stage.ratio, stage.is_skipped) for stage in group.stages]


FAIL = [0.0] * 9


@pytest.mark.parametrize("changes, passes, step, ratios", [
    ({}, FAIL, 0, [0, 0.25, 0.5, 0.75]),
    ({}, [0.25], 0, [0]),
    ({}, [0, 0.25], 0, [0, 0.25]),
    ({}, [0, 0, 0, 1], 0, [0, 0.25, 0.5, 0.75]),
    ({"hint_ratio": 0.5}, FAIL, 0, [0, 0.5]),  # fixed ratio
    ({"hint_ratio": [], "hint_exhausted": "drop"}, FAIL, 0, [0]),
    ({"hint_ratio": [0.3, 0.6]}, FAIL, 0, [0, 0.3, 0.6]),
    ({"rl_type": "grpo"}, FAIL, 0, [0]),
    ({"start_hint_step": 5}, FAIL, 4, [0]),  # cold start
    ({"start_hint_step": 5}, FAIL, 5, [0, 0.25, 0.5, 0.75]),
    ({"hint_trigger": "always"}, [1.0], 0, [0.25]),
    ({"hint_trigger": "always", "hint_ratio": 0.5}, FAIL, 0, [0.5]),
    ({"hint_trigger": "always", "start_hint_step": 1}, FAIL, 0, [0]),
    ({"hint_trigger": "always", "rl_type": "grpo"}, FAIL, 0, [0]),
    ({"hint_threshold": 0.5}, [0.5, 0.25, 0.75], 0, [0, 0.25, 0.5]),
])  # fmt: skip
def test_stages(changes, passes, step, ratios):
    config = make_config(**changes)
    assert walk(config, problem(solution=HARD, gold="x"), passes, step) == [
        (r, False) for r in ratios
    ]


@pytest.mark.parametrize("trace, expected", [
    # .25 and .5 are empty, .75 shows the first line
    ("a long first line\nb\nc 5", [(0, False), (0.25, True), (0.5, True), (0.75, True)]),
    ("a long first\nbb\ncc 1\nd", [(0, False), (0.25, True), (0.5, True), (0.75, False)]),
    # .5 is what .25 was
    ("aa 1\nb is a long line\nc\nd 2", [(0, False), (0.25, False), (0.5, True), (0.75, True)]),
    ("", [(0, False), (0.25, True), (0.5, True), (0.75, True)]),
])  # fmt: skip
def test_stages_with_nothing_new_are_skipped_and_recorded(trace, expected):
    assert walk(make_config(), problem(solution=trace, gold="x"), FAIL) == expected


def test_skipped_stages_cost_nothing():
    sampled = replace(unhinted(4), passes=[0.0] * 4, lengths=[7] * 4)
    group = Group(problem(solution=""), [sampled], [Completion([65], [66], [0.0], "stop")] * 4)
    group = hints.advance(group, CONFIG, STATE, cut(CONFIG, STATE))
    assert group.next_stage is None
    assert [sum(stage.lengths) for stage in group.stages] == [28, 0, 0, 0]
    assert [stage.is_skipped for stage in group.stages] == [False, True, True, True]
    assert all(stage.hints == [""] * 4 for stage in group.stages)


def test_history_counts_sampled_stages():
    history = {}
    tried = replace(unhinted(2), passes=[1.0, 0.0])
    hints.remember(history, 3, [tried, replace(tried, ratios=[0.5, 0.5], is_skipped=True)])
    hints.remember(history, 3, [tried, replace(tried, ratios=[0.25, 0.25])])
    assert history == {3: {"attempts": 2, "pass_rate": 0.5, "ratio": 0.25}}


# ---- where, and what the loss sees -------------------------------------------------------------


def test_user_message_has_the_references_sentence():
    one = replace(problem(), messages=[{"role": "system", "content": "S"}, *problem().messages])
    messages, prefix = hints.render(one, "a37", CONFIG, STATE)
    assert prefix == ""
    assert [m["role"] for m in messages] == ["system", "user"] and messages[0]["content"] == "S"
    assert messages[1]["content"] == (
        "4a3b5c2?\n The following text is the beginning part of the answer, "
        "which you can refer to for solving the problem:\na37"
    )
    assert one.messages[1]["content"] == "4a3b5c2?"
    assert hints.render(one, "", CONFIG, STATE) == (one.messages, "")


def test_assistant_prefix_is_context_and_seen_by_the_rewards(scripted_training, prompts):
    run, seen, lines = scripted_training(
        lambda step, slot: 1, read_jsonl(DATA / "eval_hard.jsonl")[:8], hint_where="assistant",
        max_steps=1, max_completion_length=70)  # fmt: skip
    groups, rows = seen[0]
    for group, line in zip(groups, lines[0]):
        hint, _ = hints.make_hint(group.problem, 0.25, CONFIG, STATE)
        assert line["hint"] == hint and line["hint_ratio"] == 0.25
        plain = run.prompts.tokenizer.decode(prompts.ids(group.problem)[0])
        assert line["prompt"] == f"{plain}<think>\n{hint}"
        assert [c.prefix for c in group.completions] == [f"<think>\n{hint}"] * 4
    for row, completion in zip(rows, [c for g in groups for c in g.completions]):
        assert row.n_context == len(completion.prompt_ids)  # the loss covers the completion only
        assert row.input_ids[row.n_context :] == completion.token_ids
        assert len(row.behaviour_logp) == len(completion.token_ids)


def test_hint_context(prompts):
    """hinted (paper) scores under what was sampled from, original under the plain prompt."""
    hinted = prompts.ids(problem(), "a37")[0]
    completion = Completion(hinted, [65, 66], [-1.0, -2.0], "stop", 0.25)
    plain_ids = prompts.ids(problem())[0]
    for where, context in (("hinted", hinted), ("original", plain_ids)):
        config = make_config(hint_context=where)
        group = Group(problem(), [], [completion], [[1.0, 0.0]])
        view = hints.loss_view(group, 0, 1.0, plain_ids, config, STATE)
        assert (view.context, view.targets) == (context, [65, 66])
        assert (view.policy_weight, view.sft_weight) == ([1.0, 1.0], [0.0, 0.0])


def test_original_context_is_not_compared_with_the_sampler(prompts, alone, make_run):
    config = make_config(hint_context="original")
    sampled = [prompts.ids(problem(), hint)[0] for hint in ("a37", "")]
    completions = [Completion(ids, [65, 66], [-1.0, -2.0], "stop", 0.25) for ids in sampled]
    group = Group(problem(), [], completions, [[1.0, 0.0], [0.0, 0.0]])
    rows = ghpo.make_rows([group], prompts, config, STATE)
    assert [any(row.is_comparable) for row in rows] == [False, True]
    assert [row.input_ids for row in rows] == [sampled[1] + [65, 66]] * 2
    metrics = ghpo.optimize(make_run(config), rows, 0.0)
    only = ghpo.optimize(
        make_run(config),
        ghpo.make_rows([replace(group, completions=completions[1:] * 2)], prompts, config, STATE),
        0.0,
    )
    assert metrics["mismatch_k3"] == pytest.approx(only["mismatch_k3"])


def test_merge_replaces():
    one, two = Group(problem(), [], [1], [[0.0]]), Group(problem(), [], [2], [[1.0]])
    assert hints.merge(one, two, CONFIG, STATE) is two


@pytest.mark.parametrize(
    "rewards, said, opening",
    [
        (["accuracy"], "Please reason, and put the answer into a box.", ""),
        (["accuracy"], "First <think> ... </think>, then answer.", "<think>\n"),
        (["accuracy", "format"], "Please reason.", "<think>\n"),
    ],
)
def test_a_hint_in_the_assistants_turn_thinks_only_if_it_is_to(rewards, said, opening):
    """An opened <think> that the model was not asked to close would hide its box."""
    config = make_config(
        hint_where="assistant", reward_funcs=rewards, reward_weights=[1.0] * len(rewards)
    )
    messages = [{"role": "system", "content": said}, {"role": "user", "content": "1 + 1?"}]
    one = replace(problem(), messages=messages)
    assert hints.render(one, "So 1", config, STATE) == (messages, opening + "So 1")


def test_long_hints_are_shortened_and_problems_never(prompts):
    one = problem(solution=HARD, gold="x")
    plain = prompts.ids(one)[0]
    whole = len(prompts.ids(one, "a")[0]) - 1  # a character of a hint is a token
    texts = []
    for room in (99, 23, 22, 15, 12, 9, 6, 2, 0):
        prompts.config = make_config(max_prompt_length=whole + room)
        hint, _ = hints.make_hint(one, 0.75, CONFIG, STATE)
        stage = hints.make_stage(one, [0.75] * 2, prompts.fit)
        asked = prompts.request(Group(one, next_stage=stage), prompts.config, 0, 0)
        text = prompts.tokenizer.decode(asked.prompts[0])
        assert len(asked.prompts[0]) <= whole + room and one.messages[0]["content"] in text
        texts.append(asked.stage.hints[0])
        assert text.endswith(f"{texts[-1]}<|end|><|assistant|>") and hint.startswith(texts[-1])
        assert asked.stage.ratios == [0.75 if texts[-1] else 0.0] * 2
    prompts.config = make_config()
    assert list(asked.prompts[0]) == list(plain) and texts[-1] == ""
    assert texts[:2] == [hint] * 2 and [len(t) for t in texts[2:]] == [19, 15, 11, 7, 3, 0, 0]
    assert sorted(texts, key=len, reverse=True) == texts
    assert set(texts) <= {"", *cuts(HARD)}  # a shortened hint still ends at a step


# ---- other methods: one or two functions each --------------------------------------------------


def hard_rows(n=8):
    return read_jsonl(DATA / "eval_hard.jsonl")[:n]


def metrics_of(run):
    return read_jsonl(run.folder / "metrics.jsonl")


def test_guide_appends_hinted_samples(scripted_training, monkeypatch):
    """Guide-GRPO: one hint for failed groups, both kinds of samples in one group."""

    def merge(previous, new, config, state):
        return replace(new, completions=previous.completions + new.completions,
                       rewards=previous.rewards + new.rewards)  # fmt: skip

    monkeypatch.setattr(hints, "merge", merge)
    run, seen, lines = scripted_training(
        lambda step, slot: slot % 2, hard_rows(), hint_ratio=0.5, hint_context="original",
        max_completion_length=8)  # fmt: skip
    assert len(seen) == 2
    for (groups, rows), step in zip(seen, lines):
        assert (
            [len(g.completions) for g in groups]
            == [4, 8, 4, 8]
            == [len(line["completions"]) for line in step]
        )
        ratios = [c["hint_ratio"] for c in step[1]["completions"]]
        assert ratios == [0.0] * 4 + [0.5] * 4
        assert len(rows) == 24
        plain = run.prompts.ids(groups[1].problem)[0]
        assert all(row.input_ids[: row.n_context] == list(plain) for row in rows[4:12])
        joint = [row.advantage for row in rows[4:12]]  # one baseline over both kinds
        assert sum(joint) == pytest.approx(0.0, abs=1e-9) and max(joint) == joint[4]
    assert read_jsonl(run.folder / "metrics.jsonl")[-1]["grad_norm"] > 0


def test_stephint_gives_every_sample_its_ratio(scripted_training, monkeypatch):
    """StepHint: always, one level per sample, advantages within a level."""
    levels = [0.0, 0.0, 0.5, 0.5]

    def next_ratio(group, config, state):
        return None if group.stages else levels

    def advantages(group, config, state):
        rewards = np.array(group.rewards) @ np.array(config.reward_weights)
        ratios = np.array([c.hint_ratio for c in group.completions])
        means = np.array([rewards[ratios == omega].mean() for omega in ratios])
        return (rewards - means) / (rewards.std(ddof=1) + 1e-4)

    monkeypatch.setattr(hints, "next_ratio", next_ratio)
    monkeypatch.setattr(hints, "advantages", advantages)
    run, seen, lines = scripted_training(
        lambda step, slot: 0, hard_rows(), hint_where="assistant", max_completion_length=8
    )
    for groups, rows in seen:
        for group in groups:
            plain = list(run.prompts.ids(group.problem)[0])
            prompts = [list(c.prompt_ids) for c in group.completions]
            assert prompts[0] == prompts[1] == plain
            assert prompts[2] == prompts[3] and prompts[2][: len(plain)] == plain != prompts[2]
            assert [c.hint_ratio for c in group.completions] == levels
        # rewards 1 .5 0 .5 -> within the levels .25 -.25 -.25 .25
        signs = [row.advantage > 0 for row in rows[:4]]
        assert signs == [True, False, False, True]
        assert sum(row.advantage for row in rows[:2]) == pytest.approx(0.0)
    assert lines[0][0]["stages"][0]["ratios"] == levels
    assert read_jsonl(run.folder / "metrics.jsonl")[-1]["mismatch_max"] < 1e-4


def test_bread_bisects_to_the_shortest_prefix(scripted_training, monkeypatch):
    """BREAD: between the longest prefix that fails and the shortest that works."""

    def next_ratio(group, config, state):
        if not group.stages:
            return 0.0
        works = [s.ratio for s in group.stages if not hints.is_failed(s.passes, config)]
        fails = [s.ratio for s in group.stages if hints.is_failed(s.passes, config)]
        if not fails or len(group.stages) > 4:
            return None
        return (max(fails) + min(works, default=1.0)) / 2

    class NeedsHalf(ScriptedPool):
        def submit(self, key, texts, gold, row=None):
            passes = float(key[0].stage.ratio >= 0.4)
            self.waiting.append((0, key, [[passes, 0.0]] * len(texts)))

    monkeypatch.setattr(hints, "next_ratio", next_ratio)
    run, seen, lines = scripted_training(None, hard_rows(), pool=NeedsHalf, max_completion_length=8)
    assert len(seen) == 2
    for line in [line for step in lines for line in step]:
        sampled = [(max(s["ratios"]), s["passes"]) for s in line["stages"] if not s["is_skipped"]]
        assert sampled[:2] == [(0.0, [0.0] * 4), (0.5, [1.0] * 4)]
        assert [max(s["ratios"]) for s in line["stages"]] == [0.0, 0.5, 0.25, 0.375, 0.4375]
    keys = [key for line in metrics_of(run) for key in line if "@" in key]
    assert {key.split("@")[1] for key in keys} <= {
        "0",
        "0.25",
        "0.5",
        "0.75",
    }  # few, whatever omega


def test_uft_learns_the_hint_by_likelihood(scripted_training, monkeypatch):
    """UFT: hint tokens of the assistant prefix are targets with a likelihood weight."""

    def loss_view(group, j, advantage, plain_ids, config, state):
        completion = group.completions[j]
        hint = list(completion.prompt_ids[len(plain_ids) :])
        own = [1.0] * len(completion.token_ids)
        return hints.LossView(
            plain_ids,
            hint + completion.token_ids,
            [0.0] * len(hint) + own,
            [0.1] * len(hint) + [0.0] * len(own),
        )

    monkeypatch.setattr(hints, "loss_view", loss_view)
    run, seen, _ = scripted_training(
        lambda step, slot: 9, hard_rows(), hint_where="assistant", max_completion_length=8,
        reward_weights=[1.0, 0.0])  # fmt: skip
    for groups, rows in seen:
        for row, completion in zip(rows, [c for g in groups for c in g.completions]):
            taken_over = len(row.policy_weight) - len(completion.token_ids)
            assert taken_over > 20 and row.advantage == 0
            assert row.input_ids == [*completion.prompt_ids, *completion.token_ids]
            assert row.n_tokens == len(completion.token_ids)
    metrics = read_jsonl(run.folder / "metrics.jsonl")
    assert all(line["grad_norm"] > 0 and line["loss"] > 0 for line in metrics)
    assert all(line["mismatch_max"] < 1e-4 for line in metrics)  # only what was sampled is compared


def test_hints_that_do_not_fit_are_skipped_and_end(scripted_training, prompts):
    """A hard problem near max_prompt_length: no stage is sampled twice with the same prompt."""
    rows = hard_rows()
    plain = len(prompts.ids(problem(question=rows[0]["problem"]))[0])
    sentence = len(prompts.ids(problem(question=rows[0]["problem"]), "a")[0]) - plain - 1
    for room, shown in (
        (0, [""]),
        (sentence + 2, [""]),
        (sentence + 9, ["", rows[0]["solution_hint"][:7]]),
    ):
        calls = []

        def fails(step, slot, calls=calls):
            calls.append(slot)
            assert len(calls) <= 40  # a ladder that never ends
            return 99

        _, _, lines = scripted_training(
            fails, rows, max_prompt_length=plain + room, max_steps=1, max_completion_length=4
        )
        for line in lines[0]:
            ratios = [max(s["ratios"]) for s in line["stages"]]
            assert ratios == [0, 0.25, 0.5, 0.75]
            sampled = [s["hints"][0] for s in line["stages"] if not s["is_skipped"]]
            assert [len(text) for text in sampled] == [len(text) for text in shown]


def test_a_line_break_with_a_length_is_no_opening_of_maths():
    solution = "\\begin{align}\na &= 1 \\\\[4pt]\nb &= 2\n\\end{align}\nSecond.\nThird.\nIt is 5."
    assert "[4pt]" in solution
    ends = hints.step_ends(solution)
    assert solution.index("Second") in ends and solution.index("Third") in ends
    assert not any(0 < end < solution.index("\\end") for end in ends)


def test_a_list_of_ratios_has_one_for_each_sample():
    assert hints.as_list([0.0, 0.5], 2) == [0.0, 0.5]
    with pytest.raises(ValueError, match="next_ratio gave 0 ratios for 1 samples"):
        hints.as_list([], 1)


def test_stages_that_are_sampled_for_ever_are_an_error(monkeypatch):
    monkeypatch.setattr(hints, "next_ratio", lambda group, config, state: 0.5)
    config = SimpleNamespace(rl_type="ghpo", num_generations=1, hint_timing="inline")
    stages = [hints.Stage([0.5], [str(number)], [0.0]) for number in range(100)]
    with pytest.raises(ValueError, match="after 100 stages: it must end"):
        hints.advance(
            hints.Group(hints.Problem(0, [], "1"), stages), config, None, lambda *_: ("new", False)
        )


def test_a_ratio_that_is_given_for_ever_is_an_error(monkeypatch):
    monkeypatch.setattr(hints, "next_ratio", lambda group, config, state: 0.0)
    config = SimpleNamespace(rl_type="ghpo", num_generations=2, hint_timing="inline")
    group = hints.Group(hints.Problem(0, [], "1"), [hints.Stage([0.0, 0.0], ["", ""], [0.0, 0.0])])
    with pytest.raises(ValueError, match="next_ratio gave 0.0 after 100 stages: it must end"):
        hints.advance(group, config, None, lambda problem, ratio: ("", False))


def test_next_ratio_is_not_asked_where_hints_are_off(monkeypatch):
    """As in evaluations, whose problems have ids of their own and whose G may be 1."""
    monkeypatch.setattr(hints, "next_ratio", lambda group, config, state: [0.5] * 0)
    config = SimpleNamespace(rl_type="grpo", num_generations=1, hint_timing="inline")
    group = hints.advance(
        hints.Group(hints.Problem(0, [], "1")), config, None, lambda problem, ratio: ("", False)
    )
    assert group.next_stage == hints.Stage([0.0], [""])
