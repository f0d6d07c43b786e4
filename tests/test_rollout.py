"""The hf engine against transformers and trainer; collect; what is scored is what was sampled."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    DATA,
    EOS,
    PAD,
    ScriptedPool,
    make_config,
    new_engine,
    problem,
    read_jsonl,
    request,
    run_engine,
    sampling,
    unhinted,
)

import ghpo
import hints
import rollout
from rollout import Completion, Group, Progress, SeededDraws, draw

QUESTIONS = ["4a3b5c2?", "1a1b4?", "6a3b3c1d8e9f9g2h7?", "0a9?", "2a2b2c3d2e3f0g8h2?"]


@pytest.fixture(scope="module")
def prompt_ids(prompts):
    """Prompts of five lengths."""
    return [prompts.ids(problem(question=q))[0] for q in QUESTIONS]


def tokens_of(completions):
    return [c.token_ids for c in completions]


def full_logits(engine, completion):
    """(T, V) logits of the completion's tokens by one plain forward."""
    ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = engine.policy.model(input_ids=ids).logits[0]
    return logits[len(completion.prompt_ids) - 1 : -1]


# ---- the hf engine -----------------------------------------------------------------------------


def test_greedy_equals_generate(engine, prompt_ids):
    engine = engine()
    config = sampling(0.0, 70)
    done = run_engine(engine, [request(p, 2, slot=i, config=config)
                               for i, p in enumerate(prompt_ids)])  # fmt: skip
    reasons = set()
    for i, prompt in enumerate(prompt_ids):
        ids = torch.tensor([prompt])
        theirs = engine.policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=70,
            eos_token_id=EOS, pad_token_id=PAD)[0, len(prompt) :].tolist()  # fmt: skip
        assert tokens_of(done[i]) == [theirs, theirs]
        reasons |= {(c.finish_reason, c.token_ids[-1] == EOS) for c in done[i]}
    assert reasons == {("stop", True)}


def test_greedy_log_probs_are_those_of_temperature_1(engine, prompt_ids):
    engine = engine()
    [completion] = run_engine(engine, [request(prompt_ids[0], 1, config=sampling(0.0, 8))])[0]
    logits = full_logits(engine, completion)
    assert completion.token_ids == logits.argmax(-1).tolist()
    logp = logits.log_softmax(-1).max(-1).values
    assert completion.behaviour_logp == pytest.approx(logp.tolist(), abs=1e-4)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 8)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_behaviour_log_probs_equal_the_trainers(temperature, engine, prompt_ids, make_run, prompts):
    config = make_config(temperature=temperature, micro_batch_tokens=300)
    engine = engine(max_rows=8)
    config = sampling(temperature, 40)
    done = run_engine(engine, [request(p, 4, seed=10 * i, slot=i, config=config)
                               for i, p in enumerate(prompt_ids)])  # fmt: skip
    groups = [Group(problem(), [], done[i], [[float(j % 2), 0.0] for j in range(4)]) for i in done]
    rows = ghpo.make_rows(groups, prompts, config, ghpo.State())
    for is_packed in (False, True):
        compared = 0
        for batch in ghpo.micro_batches(rows, 300, is_packed):
            inputs, loss_inputs = ghpo.collate(batch, is_packed, torch.device("cpu"), torch.float32)
            with torch.no_grad():
                logp, _ = engine.policy(**inputs, temperature=temperature)
            difference = (logp - loss_inputs["behaviour_logp"]).abs().max()
            assert difference <= 1e-4
            compared += len(logp)
        assert compared == sum(len(c.token_ids) for g in groups for c in g.completions)
    metrics = ghpo.optimize(make_run(config), rows, 0.0)
    assert 0 < metrics["mismatch_max"] <= 1e-4
    flat = [x for g in groups for c in g.completions for x in c.behaviour_logp]
    assert min(flat) < -0.02  # not all certain: the temperature matters


@pytest.fixture(scope="module")
def reference_samples(make_run, prompt_ids):
    """Each request sampled alone."""
    run = make_run(make_config())
    done = {}
    for i, prompt in enumerate(prompt_ids):
        one = request(prompt, 3, seed=100 * i, slot=i, config=sampling(1.4, 40))
        done |= run_engine(new_engine(run.policy), [one])
    return done


def same(done, reference):
    assert set(done) == set(reference)
    for slot, completions in reference.items():
        assert tokens_of(done[slot]) == tokens_of(completions)
        for ours, theirs in zip(done[slot], completions):
            assert ours.behaviour_logp == pytest.approx(theirs.behaviour_logp, abs=1e-4)
            assert (ours.prompt_ids, ours.finish_reason) == (
                theirs.prompt_ids,
                theirs.finish_reason,
            )


@pytest.mark.parametrize("max_rows", [256, 7, 6, 1])
def test_samples_do_not_depend_on_the_batch(max_rows, engine, prompt_ids, reference_samples):
    assert len({tuple(t) for c in reference_samples.values() for t in tokens_of(c)}) > 7
    config = sampling(1.4, 40)
    requests = [request(p, 3, seed=100 * i, slot=i, config=config)
                for i, p in enumerate(prompt_ids)]  # fmt: skip
    same(run_engine(engine(max_rows=max_rows), requests[::-1]), reference_samples)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [2, 3, 4, 0, 1]])
def test_a_request_that_comes_later_is_sampled_as_alone(
    order, engine, prompt_ids, reference_samples
):
    engine = engine(max_rows=6)
    done, entering = {}, list(order)
    engine.wake()
    while engine.is_busy() or entering:
        for i in entering[:2]:
            engine.submit(request(prompt_ids[i], 3, seed=100 * i, slot=i, config=sampling(1.4, 40)))
        entering = entering[2:]
        done |= {one.slot: completions for one, completions in engine.poll()}
    engine.sleep()
    same(done, reference_samples)


def test_sample_j_uses_seed_plus_j(engine, prompt_ids):
    config = sampling(2.0, 20)
    four = run_engine(engine(), [request(prompt_ids[0], 4, seed=5, config=config)])[0]
    one = run_engine(engine(), [request(prompt_ids[0], 1, seed=7, config=config)])[0]
    assert tokens_of(one) == tokens_of(four[2:3])
    assert len({tuple(t) for t in tokens_of(four)}) == 4


def test_samples_follow_the_distribution(engine, prompt_ids):
    """Frequencies of 4000 first tokens at a high temperature, within 5 standard deviations."""
    engine, n = engine(max_rows=4000), 4000
    done = run_engine(engine, [request(prompt_ids[0], n, config=sampling(4.0, 1))])[0]
    counts = np.bincount([c.token_ids[0] for c in done], minlength=266)
    p = (full_logits(engine, done[0])[0] / 4.0).softmax(-1).double().numpy()
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()
    assert (p > 0.01).sum() >= 3 and (counts > 0).sum() > 30


def drawn(logits_BV, seeds, **how):
    """(tokens, log-probs) of one draw a row."""
    draws = SeededDraws(sampling(length=1, **how), seeds, [EOS], Progress())
    shown_BV = draws(torch.zeros(len(seeds), 1, dtype=torch.long), logits_BV)
    return shown_BV.argmax(-1), draws.logp[0], draws.uniform_BT


@pytest.mark.parametrize("size", [300, 512, 3000, 151_936])
def test_a_draw_inverts_the_distribution_function(size):
    """Against the plain way: a cumulative sum over the whole vocabulary, in float64."""
    n = 64 if size > 10_000 else 2000
    logits_BV = 3 * torch.randn(n, size, generator=torch.Generator().manual_seed(size))
    tokens, logp, uniform_B1 = drawn(logits_BV, range(n))
    expected_BV = logits_BV.double().log_softmax(-1)
    cdf_BV = expected_BV.exp().cumsum(-1)
    plain = (cdf_BV <= uniform_B1 * cdf_BV[:, -1:]).sum(-1)
    assert int((tokens != plain).sum()) <= n // 500  # at the edge of a token
    expected = expected_BV.gather(-1, tokens[:, None]).squeeze(1)
    assert float((logp - expected).abs().max()) < 1e-5


def test_draws_are_distributed_as_the_model_says():
    """Chi-square over 1200 tokens, in three blocks, of 60,000 draws."""
    logits_V = torch.randn(1200, generator=torch.Generator().manual_seed(0))
    n, counts = 2000, torch.zeros(1200)
    for start in range(0, 60_000, n):
        tokens, _, _ = drawn(logits_V.expand(n, -1), range(start, start + n), temperature=0.8)
        counts += torch.bincount(tokens, minlength=1200)
    expected = 60_000 * (logits_V / 0.8).double().softmax(-1)
    is_rare = expected < 5
    seen = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]]).double()
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    chi2, freedom = float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1
    assert freedom > 1000 and abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_weight_is_never_drawn(uniform):
    """Neither inside nor at the ends, where the first and the last tokens have none."""
    rng = torch.Generator().manual_seed(1)
    shape = (200, 40)
    weights = torch.rand(shape, generator=rng) * 10.0 ** torch.randint(-9, 9, shape, generator=rng)
    weights[torch.rand(shape, generator=rng) < 0.6] = 0
    weights[:, :8] = weights[:, -8:] = 0
    weights[:, 19] = 1.0
    levels = torch.full((200, 1), uniform, dtype=torch.float64)
    for cdf in (weights.cumsum(-1), weights.double().cumsum(-1)):
        end = (cdf[:, 19:20].double() / cdf[:, -1:]).clamp(max=1 - 2**-53)  # of a token
        for uniform_B1 in (levels, end):
            assert (weights.gather(1, draw(cdf, uniform_B1)) > 0).all()


@pytest.mark.parametrize("top_p, top_k", [(1.0, 1), (1.0, 3), (0.8, 0), (0.5, 4)])
def test_top_p_and_top_k(top_p, top_k, engine, prompt_ids):
    engine = engine()
    config = sampling(6.0, 25, top_p, top_k)
    done = run_engine(engine, [request(p, 4, seed=i, slot=i, config=config)
                               for i, p in enumerate(prompt_ids)])  # fmt: skip
    beyond_greedy = 0
    for completion in itertools.chain(*done.values()):
        lines = (full_logits(engine, completion).double() / 6.0).tolist()
        for line, token, logp in zip(lines, completion.token_ids, completion.behaviour_logp):
            order = sorted(range(len(line)), key=lambda v: -line[v])
            kept = order[:top_k] if top_k else order
            weights = np.exp([line[v] for v in kept])
            weights /= weights.sum()
            size = int((np.cumsum(weights) < top_p).sum()) + 1  # the smallest set of that mass
            kept, weights = kept[:size], weights[:size] / weights[:size].sum()
            assert token in kept
            assert logp == pytest.approx(np.log(weights[kept.index(token)]), abs=1e-4)
            beyond_greedy += token != order[0]
    assert (beyond_greedy > 0) == (top_k != 1)


def test_the_models_own_generation_config_plays_no_part(engine, prompt_ids):
    """Some released models ship a repetition penalty, which the trainer knows nothing of."""
    engine, one = engine(), request(prompt_ids[2], 4, seed=3, config=sampling(1.4, 40))
    plain = run_engine(engine, [one])[0]
    theirs = engine.policy.model.generation_config
    theirs.repetition_penalty, theirs.top_k, theirs.temperature = 1.5, 3, 0.2
    try:
        assert run_engine(engine, [one])[0] == plain
    finally:
        theirs.repetition_penalty, theirs.top_k, theirs.temperature = None, None, None


def test_a_request_of_different_prompts(engine, prompt_ids):
    """Per-sample hints: each sample of a group has its own prompt."""
    config = sampling(1.4, 20)
    mixed = replace(request(prompt_ids[0], 3, seed=9, config=config), prompts=prompt_ids[:3])
    done = run_engine(engine(), [mixed])[0]
    for j, completion in enumerate(done):
        alone = run_engine(engine(), [request(prompt_ids[j], 1, seed=9 + j, config=config)])[0]
        assert completion.prompt_ids == prompt_ids[j]
        assert completion.token_ids == alone[0].token_ids


def test_seed_of_a_request(prompts):
    """It differs with run seed, step, problem and stage; the place in the batch plays no part."""

    def seed(run_seed=0, step=0, number=0, stage=0, slot=0):
        group = Group(problem(number), [unhinted(2)] * stage, next_stage=unhinted(2))
        return prompts.request(group, make_config(seed=run_seed), slot, step).seed

    seeds = [seed(*place) for place in itertools.product((0, 1), repeat=4)]
    assert len(set(seeds)) == 16 and all(0 <= s < 2**63 for s in seeds)
    assert seed(slot=5) == seed(slot=0) == seeds[0]


# ---- collect -----------------------------------------------------------------------------------


def sample(engine, problems, pool, prompts, config):
    """Groups of the training loop, inline."""
    state = ghpo.State()

    def ask(group, slot):
        return prompts.request(group, config, slot, 0)

    def after_stage(group, completions, rewards):
        return hints.after_stage(group, completions, rewards, 0, config, state, prompts.fit)

    blank = [hints.advance(Group(p), config, state, prompts.fit) for p in problems]
    return rollout.collect(engine, blank, pool, ask, after_stage)


def hard_problems(n):
    rows = read_jsonl(DATA / "eval_hard.jsonl")[:n]
    return [problem(i, r["problem"], r["solution"], r["solution_hint"]) for i, r in enumerate(rows)]


class Clock:
    """An engine that only keeps time: slot i takes lengths[i] polls a stage."""

    deterministic = False

    def __init__(self, lengths):
        self.lengths, self.running, self.events = lengths, [], []
        self.asked = Counter()  # stages by slot

    def is_busy(self):
        return bool(self.running)

    def submit(self, request):
        self.events.append(("asked", request.slot, self.asked[request.slot]))
        self.asked[request.slot] += 1
        self.running.append([self.lengths[request.slot], request])

    def poll(self):
        self.running = [[left - 1, request] for left, request in self.running]
        done = [request for left, request in self.running if not left]
        self.running = [item for item in self.running if item[0]]
        self.events += [("sampled", r.slot, self.asked[r.slot] - 1) for r in done]
        return [(r, [Completion(p, [65], [0.0], "stop", 0.0) for p in r.prompts]) for r in done]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_failed_group_is_asked_again_while_others_still_run(deterministic, prompts):
    config = make_config()
    engine = Clock([3, 40])
    engine.deterministic = deterministic
    pool = ScriptedPool(lambda step, slot: [3, 1][slot])
    groups = sample(engine, hard_problems(2), pool, prompts, config)
    first = engine.events.index(("sampled", 1, 0))
    assert engine.events.index(("sampled", 0, 3)) < first  # a whole ladder while 1 generates
    assert [len(g.stages) for g in groups] == [4, 2]


@pytest.mark.parametrize("delay", [0, 3])
def test_late_verdicts_change_nothing(delay, make_run, prompts):
    """An engine that does not wait for verdicts ends with the same groups."""

    class Impatient(rollout.HfEngine):
        deterministic = False

    config = make_config(max_completion_length=20)
    fails = [2, 0, 1, 3, 9]
    results = []
    for kind, late in ((rollout.HfEngine, 0), (Impatient, delay)):
        engine = new_engine(make_run(config).policy, kind, max_rows=8)
        pool = ScriptedPool(lambda step, slot: fails[slot], late)
        results.append(sample(engine, hard_problems(5), pool, prompts, config))
        assert not engine.is_busy() and not pool.waiting
    for one, two in zip(*results):
        assert one.stages == two.stages and one.rewards == two.rewards
        assert tokens_of(one.completions) == tokens_of(two.completions)
    assert [len(g.stages) for g in results[0]] == [3, 1, 2, 4, 4]
    assert [g.problem.id for g in results[0]] == [0, 1, 2, 3, 4]


def test_every_sequence_of_stages_is_scored_as_it_was_sampled(scripted_training):
    """Three groups fail 0 to 3 stages in all 64 combinations, in 64 steps of the real loop."""
    script = list(itertools.product(range(4), repeat=3))
    run, seen, _ = scripted_training(
        lambda step, slot: script[step][slot], read_jsonl(DATA / "eval_hard.jsonl")[:30],
        num_generations=2, per_device_train_batch_size=6, gradient_accumulation_steps=1,
        max_steps=64, max_completion_length=4, learning_rate=0.0)  # fmt: skip
    assert len(seen) == 64
    stages = [0.0, 0.25, 0.5, 0.75]
    for step, (groups, rows) in enumerate(seen):
        scored = iter(rows)
        for slot, group in enumerate(groups):
            failed = script[step][slot]
            assert [s.ratio for s in group.stages] == stages[: failed + 1]
            hint, _ = hints.make_hint(group.problem, stages[failed], run.config, run.state)
            assert len(hint) == [0, 7, 15, 23][failed]  # 2, 4, 6 lines of "a37"
            expected = run.prompts.ids(group.problem, hint)[0]
            assert len(group.completions) == len(group.rewards) == 2
            for completion in group.completions:
                row = next(scored)
                assert expected == list(completion.prompt_ids)
                assert list(row.input_ids) == [*expected, *completion.token_ids]
                assert row.n_context == len(expected) and all(row.is_comparable)
                assert list(row.behaviour_logp) == completion.behaviour_logp
                assert completion.hint_ratio == stages[failed]
            if (step + slot) % 8 == 0:  # all samples are of the last stage
                *before, last = group.stages
                again = replace(group, stages=before, next_stage=last)
                alone = run_engine(
                    run.engine, [run.prompts.request(again, run.config, slot, step)]
                )[slot]
                assert tokens_of(alone) == tokens_of(group.completions)
        assert next(scored, None) is None
    for line in read_jsonl(run.folder / "metrics.jsonl"):
        assert line["mismatch_max"] < 1e-4


def test_ranks_may_sample_different_lengths(two_ranks, make_run, prompts):
    """Under zero3: 60 tokens against 2, then two problems against none; no hang, same tokens."""
    gathered = json.loads((two_ranks / "uneven.json").read_text())
    policy = make_run(make_config(torch_dtype="float64")).policy
    lengths = [[[len(t) for t in tokens] for call in rank for tokens in call] for rank in gathered]
    assert max(lengths[0][0]) > 20 and max(lengths[1][0]) == 2 and gathered[1][1] == []
    for rank, calls in enumerate(gathered):
        config = sampling(1.0, [60, 2][rank])
        for call in calls:
            asked = [
                prompts.request(Group(problem(i), next_stage=unhinted(4)), config, i, 0)
                for i in range(len(call))
            ]
            done = run_engine(new_engine(policy), asked)
            assert [tokens_of(done[i]) for i in range(len(call))] == call
