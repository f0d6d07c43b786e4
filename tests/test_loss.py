"""E1-E8 by hand and against slow float64 loops; the objective does not depend on batching."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_config, problem, recorded_groups, row

import ghpo
import hints
from rollout import Completion, Group


def float64(**changes):
    return make_config(torch_dtype="float64", max_grad_norm=0.0, **changes)


def slow_objective(model, groups, config, likelihood=0.0, old=None, reference=None):
    """-J of E4-E7 (plus weighted likelihood) in loops, one full forward a row, and its log-probs.

    old: {(group, row): log-probs before the first update}; None: those of now.
    """

    def score(net, completion):
        ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
        logits = net(input_ids=ids).logits[0].double() / config.temperature
        logits = logits[len(completion.prompt_ids) - 1 : -1]
        lines = zip(logits, completion.token_ids)
        return [line[token] - torch.logsumexp(line, 0) for line, token in lines]

    low, high, cap = config.epsilon, config.epsilon_high, config.importance_cap
    high = low if high is None else high
    kept, sums = {}, []  # per group: [(sum of token losses, tokens) per row]
    for i, group in enumerate(groups):
        rewards = []
        for scores in group.rewards:
            rewards.append(sum(w * s for w, s in zip(config.reward_weights, scores)))  # E1
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        rows = []
        for j, (completion, reward) in enumerate(zip(group.completions, rewards)):
            advantage = (reward - mean) / (std + 1e-4 if config.scale_rewards else 1.0)  # E3
            logp = score(model, completion)
            kept[i, j] = [x.item() for x in logp]
            before = kept[i, j] if old is None else old[i, j]
            ref_logp = [x.item() for x in score(reference, completion)] if config.beta else None
            if config.mask_truncated_completions and completion.finish_reason == "length":
                rows.append((0.0, 0))
                continue
            total = 0.0
            for t in range(len(logp)):
                rho = torch.exp(logp[t] - before[t])
                bounded = min(max(rho.item(), 1 - low), 1 + high)
                inside = 1 - low <= rho.item() <= 1 + high
                clipped = rho if inside else torch.tensor(bounded, dtype=torch.float64)
                loss = -min(rho * advantage, clipped * advantage)  # E4
                if cap is not None:
                    loss = loss * min(math.exp(before[t] - completion.behaviour_logp[t]), cap)  # E7
                if config.beta:
                    d = ref_logp[t] - logp[t]
                    loss = loss + config.beta * (torch.exp(d) - d - 1)  # E5
                total = total + loss - likelihood * logp[t]
            rows.append((total, len(logp)))
        sums.append(rows)
    flat = [row for rows in sums for row in rows]
    if config.loss_type == "bnpo":  # E6
        means = [sum(s for s, _ in rows) / max(1, sum(n for _, n in rows)) for rows in sums]
        return sum(means) / len(means), kept
    if config.loss_type == "dapo":
        return sum(s for s, _ in flat) / sum(n for _, n in flat), kept
    if config.loss_type == "grpo":
        return sum(s / max(n, 1) for s, n in flat) / len(flat), kept
    return sum(s for s, _ in flat) / (len(flat) * config.max_completion_length), kept


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def step_of(run, groups, prompts, lr=1.0):
    """(metrics, how far the weights moved) of one ghpo.optimize on groups."""
    before = weights_of(run).clone()
    rows = ghpo.make_rows(groups, prompts, run.config, ghpo.State())
    metrics = ghpo.optimize(run, rows, lr)
    return metrics, before - weights_of(run)


def slow_step(run, objective, lr=1.0):
    """Plain gradient descent on an objective: how far the weights moved."""
    before = weights_of(run).clone()
    run.policy.zero_grad()
    objective.backward()
    with torch.no_grad():
        for p in run.policy.parameters():
            p -= lr * p.grad
    run.policy.zero_grad()
    return before - weights_of(run)


OBJECTIVES = [
    *({"loss_type": name} for name in ("bnpo", "dapo", "grpo", "dr_grpo")),
    *(
        {"loss_type": name, "mask_truncated_completions": True}
        for name in ("bnpo", "dapo", "grpo", "dr_grpo")
    ),
    {"importance_cap": None},
    {"importance_cap": 0.5, "loss_type": "dapo"},
    {"scale_rewards": False, "temperature": 1.3},
    {"beta": 0.1, "loss_type": "grpo"},
    {"beta": 0.1, "mask_truncated_completions": True, "loss_type": "bnpo"},
    {"reward_weights": [0.3, 2.0], "temperature": 0.6},
]


@pytest.mark.parametrize("changes", OBJECTIVES, ids=str)
def test_objective_equals_slow_loops(changes, make_run, prompts):
    config = float64(**changes)
    groups = recorded_groups()
    run = make_run(config)
    if config.beta:
        reference = make_other_model(run)
        run.reference = ghpo.Policy(reference)
    else:
        reference = None
    metrics, moved = step_of(run, groups, prompts)
    run = make_run(config)
    objective, _ = slow_objective(run.policy.model, groups, config, reference=reference)
    assert metrics["loss"] == pytest.approx(objective.item(), abs=1e-9)
    assert metrics["grad_norm"] == pytest.approx(float((moved**2).sum().sqrt()), rel=1e-6)
    expected = slow_step(run, objective)
    assert expected.abs().max() > 1e-5
    assert torch.allclose(moved, expected, rtol=0, atol=1e-9)


def make_other_model(run):
    """A copy whose weights differ, so that the KL is not 0."""
    import copy

    other = copy.deepcopy(run.policy.model)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return other


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_likelihood_weights_add_to_the_objective(loss_type, make_run, prompts, monkeypatch):
    config = float64(loss_type=loss_type)
    view = hints.loss_view

    def with_likelihood(*args):
        seen = view(*args)
        return seen._replace(sft_weight=[0.7] * len(seen.targets))

    monkeypatch.setattr(hints, "loss_view", with_likelihood)
    run = make_run(config)
    metrics, moved = step_of(run, recorded_groups(), prompts)
    run = make_run(config)
    objective, _ = slow_objective(run.policy.model, recorded_groups(), config, likelihood=0.7)
    assert metrics["loss"] == pytest.approx(objective.item(), abs=1e-9)
    assert torch.allclose(moved, slow_step(run, objective), rtol=0, atol=1e-9)


@pytest.mark.parametrize("high", [None, 0.01])
def test_second_iteration_uses_log_probs_from_before_the_first_update(high, make_run, prompts):
    lr = 0.2
    config = float64(num_iterations=2, epsilon=0.05, epsilon_high=high, loss_type="dapo")
    groups = recorded_groups()
    run = make_run(config)
    metrics, moved = step_of(run, groups, prompts, lr)
    run = make_run(config)
    first, old = slow_objective(run.policy.model, groups, config)
    expected = slow_step(run, first, lr)
    second, new = slow_objective(run.policy.model, groups, config, old=old)
    ratios = [math.exp(n - o) for key in new for n, o in zip(new[key], old[key])]
    assert min(ratios) < 0.95 and max(ratios) > 1.05  # the clip is at work
    expected += slow_step(run, second, lr)
    assert torch.allclose(moved, expected, rtol=0, atol=1e-9)
    assert metrics["clipped"] > 0
    assert metrics["loss"] == pytest.approx((first + second).item(), abs=1e-9)


def one_token_loss(logp, old, behaviour, advantage, ref=None, **changes):
    batch = {
        "advantage": advantage,
        "behaviour_logp": behaviour,
        "policy_weight": 1.0,
        "sft_weight": 0.0,
    }
    batch = {key: torch.tensor([value]).double() for key, value in batch.items()}
    ref = None if ref is None else torch.tensor([ref]).double()
    args = torch.tensor([logp]).double(), torch.tensor([old]).double()
    return float(ghpo.token_loss(*args, ref, batch, make_config(**changes))[0])


@pytest.mark.parametrize("ratio, advantage, high, expected", [
    (1.0, 2.0, None, -2.0),
    (1.5, 2.0, None, -2.4),  # clipped at 1.2
    (1.5, -2.0, None, 3.0),  # the pessimistic side is not clipped
    (0.5, 2.0, None, -1.0),
    (0.5, -2.0, None, 1.6),  # clipped at 0.8
    (1.5, 2.0, 0.28, -2.56),  # epsilon_high
    (1.25, 2.0, 0.28, -2.5),
    (1.1, 2.0, 0.0, -2.0),  # epsilon_high 0 is not "unset"
])  # fmt: skip
def test_clip_by_hand(ratio, advantage, high, expected):
    logp = math.log(ratio)
    assert one_token_loss(logp, 0.0, 0.0, advantage, epsilon_high=high) == pytest.approx(expected)


@pytest.mark.parametrize("behaviour, cap, expected", [
    (math.log(0.5), 2.0, -2.0),  # exp(old - behaviour) = 2: at the cap
    (math.log(0.1), 2.0, -2.0),  # 10: truncated
    (math.log(0.1), None, -1.0),  # no correction
    (math.log(0.1), 20.0, -10.0),
    (math.log(2.0), 2.0, -0.5),  # below 1 it is kept
])  # fmt: skip
def test_importance_cap_by_hand(behaviour, cap, expected):
    assert one_token_loss(0.0, 0.0, behaviour, 1.0, importance_cap=cap) == pytest.approx(expected)


def test_kl_by_hand():
    """k3 at ref / pi = 2 is 2 - ln 2 - 1."""
    loss = one_token_loss(0.0, 0.0, 0.0, 0.0, ref=math.log(2), beta=0.5)
    assert loss == pytest.approx(0.5 * (1 - math.log(2)))


@pytest.mark.parametrize("rewards, changes, expected", [
    # r = 1.5, .5, 0, 1; mean .75; deviations .75, -.25, -.75, .25; variance 1.25 / 3
    ([[1, 1], [0, 1], [0, 0], [1, 0]], {"scale_rewards": False}, [0.75, -0.25, -0.75, 0.25]),
    ([[1, 1], [0, 1], [0, 0], [1, 0]], {},
     [x / (0.6454972243679028 + 1e-4) for x in (0.75, -0.25, -0.75, 0.25)]),
    # r = 1, 0 -> std = 1 / sqrt 2
    ([[1, 0], [0, 0]], {}, [0.5 / 0.7072067811865476, -0.5 / 0.7072067811865476]),
    ([[1, 0], [0, 1]], {"reward_weights": [2.0, 2.0]}, [0.0, 0.0]),
    ([[0, 1]] * 3, {}, [0.0, 0.0, 0.0]),
])  # fmt: skip
def test_advantages_by_hand(rewards, changes, expected):
    completions = [Completion([1], [2], [0.0], "stop", 0.0) for _ in rewards]
    group = Group(problem(), [], completions, rewards)
    assert hints.advantages(group, make_config(**changes), ghpo.State()) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    "n, c, k", [(4, 1, 2), (4, 0, 2), (4, 4, 2), (8, 3, 4), (6, 5, 2), (5, 2, 5)]
)
def test_pass_at_k_counts_subsets(n, c, k):
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert ghpo.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand():
    assert ghpo.pass_at_k(4, 1, 2) == 0.5  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6


@pytest.mark.parametrize("shape, warmup, expected", [
    # 8 steps: the first one already moves (differs from reference), the last one still does
    ("constant", {}, [1] * 8),
    ("constant_with_warmup", {"warmup_steps": 2}, [1 / 2, 1, 1, 1, 1, 1, 1, 1]),
    ("linear", {"warmup_ratio": 0.25}, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("cosine", {"warmup_steps": 2, "warmup_ratio": 0.9},
     [1 / 2, 1, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]),
    ("cosine", {}, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
])  # fmt: skip
def test_learning_rate_shapes(shape, warmup, expected, setup):
    run = setup(learning_rate=0.5, lr_scheduler_type=shape, max_steps=8, **warmup)
    assert [2 * run.learning_rate(i) for i in range(8)] == pytest.approx(expected)


# ---- batching does not matter ------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo"])
def test_gradients_do_not_depend_on_micro_batches(loss_type, make_run, prompts):
    groups = recorded_groups(sizes=(4, 4), longest=40)
    groups[1].rewards[0] = [0.0, 1.0]  # all 8 rows have an advantage
    moves, counts = [], []
    for budget in (1, 70, 150, 10_000):
        config = float64(loss_type=loss_type, micro_batch_tokens=budget)
        rows = ghpo.make_rows(groups, prompts, config, ghpo.State())
        counts.append(len(ghpo.micro_batches(rows, budget, False)))
        moves.append(step_of(make_run(config), groups, prompts)[1])
    assert counts[0] == 8 and counts[-1] == 1 and len(set(counts)) == 4
    assert moves[0].abs().max() > 1e-5
    for moved in moves[1:]:
        assert torch.allclose(moved, moves[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_device, accumulation", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_equal_rows_split_as_asked(per_device, accumulation, make_run, prompts):
    """1x8, 2x4, 4x2, 8x1: rows of equal length make exactly these micro-batches."""
    groups = recorded_groups(sizes=(4, 4), longest=1)
    groups[1].rewards[0] = [0.0, 1.0]
    for group in groups:
        for completion in group.completions:
            completion.prompt_ids[:] = [65] * 9
    config = float64(micro_batch_tokens=10 * per_device, gradient_accumulation_steps=accumulation,
                     per_device_train_batch_size=per_device)  # fmt: skip
    rows = ghpo.make_rows(groups, prompts, config, ghpo.State())
    batches = ghpo.micro_batches(rows, config.micro_batch_tokens, False)
    assert [len(batch) for batch in batches] == [per_device] * accumulation
    moved = step_of(make_run(config), groups, prompts)[1]
    run = make_run(config)
    objective, _ = slow_objective(run.policy.model, groups, config)
    assert torch.allclose(moved, slow_step(run, objective), rtol=0, atol=1e-9)


@pytest.mark.parametrize("budget", [60, 10_000])
def test_packed_rows_do_not_see_each_other(budget, make_run, prompts):
    config = float64(micro_batch_tokens=budget, temperature=0.9)
    groups = recorded_groups()
    _, padded = step_of(make_run(config), groups, prompts)
    metrics, packed = step_of(make_run(replace(config, packing=True)), groups, prompts)
    rows = ghpo.make_rows(groups, prompts, config, ghpo.State())
    assert max(len(b) for b in ghpo.micro_batches(rows, budget, True)) > 1
    assert torch.allclose(packed, padded, rtol=0, atol=1e-9)
    assert padded.abs().max() > 1e-5


def test_micro_batches_keep_the_budget_and_every_row():
    rng = np.random.default_rng(0)
    rows = [row(n) for n in rng.integers(2, 60, 50)]
    for is_packed in (False, True):
        for budget in (30, 64, 200):
            batches = ghpo.micro_batches(rows, budget, is_packed)
            assert sorted(id(r) for b in batches for r in b) == sorted(id(r) for r in rows)
            for batch in batches:
                lengths = [len(r.input_ids) for r in batch]
                tokens = sum(lengths) if is_packed else len(batch) * max(lengths)
                assert tokens <= budget or len(batch) == 1
            assert max(len(b) for b in batches) > 1


def test_rows_without_advantage_count_but_need_no_forward(make_run, prompts):
    """Group 1 of the recording has equal rewards: without it the scale of the rest would change."""
    config = float64(loss_type="dapo")
    groups = recorded_groups()
    _, moved = step_of(make_run(config), groups, prompts)
    _, without = step_of(make_run(config), [groups[0], groups[2]], prompts)
    tokens = [sum(len(c.token_ids) for c in g.completions) for g in groups]
    ratio = (tokens[0] + tokens[2]) / sum(tokens)
    assert torch.allclose(moved, without * ratio, rtol=0, atol=1e-9)


def test_chunked_log_probs_equal_full_ones(make_run, monkeypatch):
    """Vocabulary declared large, so that the LM head runs in chunks of 64 tokens."""
    run = make_run(float64())
    policy, model = run.policy, run.policy.model
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    predict = torch.arange(199)[torch.arange(199) % 100 < 99]
    target = ids.flatten()[predict + 1]
    weight = torch.randn(len(predict), generator=torch.Generator().manual_seed(1)).double()
    temperature = 0.7
    logits = model(input_ids=ids).logits.flatten(0, 1)[predict] / temperature
    full = logits - logits.logsumexp(-1, keepdim=True)
    (full.gather(1, target[:, None]).squeeze(1) * weight).sum().backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    sizes, score = [], policy._score
    monkeypatch.setattr(model.config, "vocab_size", 2**26)
    monkeypatch.setattr(policy, "_score", lambda h, t, s: sizes.append(len(t)) or score(h, t, s))
    positions = torch.arange(100).expand(2, -1)
    logp, entropy = policy(ids, positions, predict=predict, target=target, temperature=temperature)
    (logp * weight).sum().backward()
    assert sizes[:4] == [64, 64, 64, 6]
    assert torch.allclose(logp, full.gather(1, target[:, None]).squeeze(1), rtol=0, atol=1e-9)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1), rtol=0, atol=1e-9)
    for p, gradient in zip(policy.parameters(), expected):
        assert torch.allclose(p.grad, gradient, rtol=0, atol=1e-9)
    policy.zero_grad()


def test_a_gradient_that_is_not_finite_stops_the_run(make_run, prompts):
    groups = recorded_groups()
    groups[0].completions[0].behaviour_logp[0] = float("nan")
    run = make_run(float64())
    before = weights_of(run).clone()
    with pytest.raises(ghpo.UserError, match="gradient norm is nan in step 1: is learning_rate"):
        step_of(run, groups, prompts)
    assert torch.equal(weights_of(run), before)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@pytest.mark.parametrize("sharding", ["zero3", "zero2", "ddp"])
def test_gradients_do_not_depend_on_ranks(sharding, loss_type, two_ranks, make_run, prompts):
    """Of 4 groups rank 1 has one (bnpo) or none (dapo): fillers run there."""
    ours = torch.load(two_ranks / f"moved_{sharding}_{loss_type}.pt")
    run = make_run(float64(loss_type=loss_type))
    metrics, moved = step_of(run, recorded_groups(sizes=(4, 4, 4, 4)), prompts)
    assert ours["micro_batches"][0] > max(1, ours["micro_batches"][1])
    assert moved.abs().max() > 1e-5
    assert torch.allclose(ours["moved"], moved, rtol=0, atol=1e-9)
    for key in ("loss", "grad_norm", "entropy", "mismatch_k3", "importance_capped", "mismatch_max"):
        assert ours["metrics"][key] == pytest.approx(metrics[key], rel=1e-6), key


def test_rows_that_are_masked_do_not_run(prompts):
    groups = recorded_groups()
    config = float64(mask_truncated_completions=True)
    rows = ghpo.make_rows(groups, prompts, config, ghpo.State())
    completions = [c for group in groups for c in group.completions]
    cut = [c.finish_reason == "length" for c in completions]
    assert any(cut) and not all(cut)
    for one, is_cut in zip(rows, cut, strict=True):
        assert one.has_gradient(config) == (one.advantage != 0 and not is_cut)


def test_the_reference_goes_back_to_its_shards(make_run, prompts, monkeypatch):
    run = make_run(float64(beta=0.1))
    run.reference = ghpo.Policy(make_other_model(run))
    calls = []
    monkeypatch.setattr(ghpo.fsdp_utils, "reshard", calls.append)
    step_of(run, recorded_groups(), prompts)
    assert calls == [run.reference]
