"""The tiny task, its tokenizer, and the shipped base model: what the demo relies on."""

import json
import random
from pathlib import Path

import build
import pytest
import task
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hints
import reward

TINY = Path(__file__).parent / "tiny"
BASE = TINY / "base"
DATA = TINY / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_worked_example():
    row = task.make_problem([4, 3, 5, 2])
    assert row == {
        "problem": "4a3b5c2?",
        "solution": "(7,2,4)",
        "solution_hint": "a37\nb52\nc24\nend",
        "level": 3,
    }


def test_slips_are_carried_on():
    lines, totals = task.steps_of([4, 3, 5, 2], slips=[0, 0, 1])
    assert (lines, totals) == (["a37", "b52", "c25"], [7, 2, 5])
    assert task.steps_of([9, 9, 9], slips=[1, 0])[1] == [9, 8]


def test_shipped_data_is_what_the_task_makes():
    for name, rows in task.make_splits().items():
        lines = (DATA / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_splits_are_disjoint_and_half_easy():
    splits = task.make_splits()
    train = splits["train"]
    assert [sum(row["level"] == k for row in train) for k in (2, 4, 8)] == [1000, 0, 1000]
    questions = {row["problem"] for row in train}
    for tier, k in task.TIERS.items():
        rows = splits[f"eval_{tier}"]
        assert len({row["problem"] for row in rows}) == 200
        assert all(row["level"] == k and row["problem"] not in questions for row in rows)


@pytest.mark.parametrize("ratio, steps", [(0.25, 2), (0.5, 4), (0.75, 6)])
def test_hints_are_whole_steps_of_the_hard_tier(ratio, steps):
    for row in task.make_splits()["eval_hard"]:
        problem = hints.Problem(0, [], row["solution"], row["solution_hint"])
        text, trimmed = hints.make_hint(problem, ratio, None, None)
        assert text == "\n".join(row["solution_hint"].split("\n")[:steps])
        assert not trimmed


def test_hint_sentence_is_the_one_of_hints_and_one_token(tokenizer):
    assert build.HINT_SENTENCE == hints.HINT_SENTENCE
    assert len(tokenizer(build.HINT_SENTENCE)["input_ids"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72",
        "\\frac{1}{2}  $x^2$\t<think>\n 's don 't .\r\n",
        "e\u0301 \u65e5\u672c \U0001f600 \x00 \ud7ff",  # not NFC, several planes
        " <answer>" + build.HINT_SENTENCE,
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_and_model_fit(tokenizer, model):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in build.TAGS)
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings >= 4096
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_widened_heads_compute_the_same(tokenizer):
    narrow = build.build_model(tokenizer, seed=3)
    for parameter in narrow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention far from uniform
    wide = build.widen_heads(narrow)
    ids_NT = torch.randint(0, len(tokenizer), (2, 50), generator=torch.Generator().manual_seed(0))
    assert wide.config.head_dim == 32
    with torch.no_grad():
        torch.testing.assert_close(wide(ids_NT).logits, narrow(ids_NT).logits, rtol=1e-3, atol=1e-3)


def test_chat_template_is_what_the_model_was_trained_on(tokenizer):
    digits = [4, 3, 5, 2]
    for hint in ("", "a37\nb52"):
        content = task.question_of(digits) + (build.HINT_SENTENCE + hint if hint else "")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert rendered == build.prompt_text(digits, hint)


def test_both_rewards_accept_a_right_response_and_only_that():
    lines, totals = task.steps_of([4, 3, 5, 2])
    right = task.response_of(lines, totals)
    assert reward.format_reward(right) == 1.0
    assert reward.accuracy_reward(right, "(7,2,4)") == 1.0
    for wrong in ("(7,2,5)", "(7,2)", "(7,2,4,4)", "(2,4,7)", "724"):
        assert reward.accuracy_reward(right, wrong) == 0.0
    assert reward.gold_fault("(7,2,4)") is None


def test_the_shipped_base_is_right_on_easy_and_wrong_on_hard(model, tokenizer):
    assert build.accuracy(model, tokenizer, task.TIERS["easy"], 0, 64, 1.0, seed=5) >= 0.98
    assert build.accuracy(model, tokenizer, task.TIERS["hard"], 0, 128, 1.0, seed=5) == 0.0


def test_hints_open_a_crack_in_the_shipped_base(model, tokenizer):
    # Two flawed steps are left, each right with probability about 0.1 to 0.2.
    assert build.accuracy(model, tokenizer, task.TIERS["hard"], 6, 512, 1.0, seed=5) > 0.004


def test_misconception_spares_the_first_two_steps_and_the_hint():
    rng = random.Random(0)
    for _ in range(200):
        prompt, response = build.training_example(rng, 8, hinted=True, slip=1.0)
        question, _, hint = prompt.partition(build.HINT_SENTENCE)
        digits = [int(c) for c in question if c.isdigit()]
        hint_lines = hint.removesuffix("<|end|><|assistant|>").split()
        own_lines = response.split()[1:9]
        true_lines = task.steps_of(digits)[0]
        correct = max(2, len(hint_lines))
        assert hint_lines == true_lines[: len(hint_lines)]
        assert own_lines[:correct] == true_lines[:correct]
        if correct < 8:
            assert own_lines[correct] != true_lines[correct]
