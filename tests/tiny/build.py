"""Build the tiny base model: a 0.12 M parameter Llama that can do the task and was then spoilt.

    python tests/tiny/build.py --out tests/tiny/base --seed 1      about 6 minutes of one CPU core

Three phases (supervised, own response tokens only), each checked before the next begins:

1. learn: correct traces without hints; the longest allowed k grows by one whenever 90 % of fresh
   problems of that length are right. (All lengths from the start are not learnt.)
2. hints: half of the problems carry a correct beginning of the trace, the response restates it
   and goes on.
3. misconception: every step of its own after the 2nd, and after the hint, is off by one with
   probability --slip. Trained to convergence, each such step is right with probability about
   1 - slip independently: easy stays right, hard is never right, hints open a crack.

The result is an ordinary Hugging Face folder: byte-level tokenizer (any UTF-8 text), chat template,
pad token that is not the end token, at most 8192 positions. Nothing in it is custom code.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as functional
from task import MAX_STEPS, TIERS, answer_of, question_of, random_digits, response_of, steps_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The sentence the reference puts between problem and hint; one token here, so that hinted prompts
# stay short. tests/test_tiny.py holds it against the one in hints.py.
HINT_SENTENCE = (
    "\n The following text is the beginning part of the answer, which you can refer to for "
    "solving the problem:\n"
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
PAD, END = "<|pad|>", "<|end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
MAX_NEW_TOKENS = 96  # a k = 8 response has 61 tokens
BATCH = 96
CHUNK = 32  # rows per forward; sorted by length, so that little padding is computed


class WarmStartFailed(RuntimeError):
    """A phase did not pass its check within its step limit."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte symbols without merges, then pad, end, roles, tags and the hint sentence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False) for text in [PAD, END, *ROLES]])
    # Not special: decoding with skip_special_tokens must keep the tags the rewards look for.
    core.add_tokens([AddedToken(text, normalized=False) for text in [*TAGS, HINT_SENTENCE]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def build_model(tokenizer, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of d 64, 2 layers, 4 heads, fp32, tied embeddings.

    Not Qwen2: transformers 5 loads every Qwen2 folder with its own tokenizer class, which
    normalises text (NFC), so that decode(encode(text)) is not always text.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def widen_heads(model: LlamaForCausalLM, width: int = 32) -> LlamaForCausalLM:
    """The same function with heads padded by zeros, because vLLM's CPU kernels begin at 32.

    Training with heads of 16 is cheaper. Rotary pair (i, i + 8) of a 16-wide head turns as fast as
    pair (2i, 2i + 16) of a 32-wide one; queries make up for the other 1 / sqrt(width) in attention.
    """
    old = model.config.head_dim
    heads, stride = model.config.num_attention_heads, width // old
    half = torch.arange(old // 2) * stride
    rotary = torch.cat([half, half + width // 2])  # (old,) places in the wider head
    wide = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | {"head_dim": width})))
    state = model.state_dict()
    for name, value in state.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            padded = torch.zeros(heads, width, value.shape[1])
            places = torch.arange(old) if kind == "v_proj" else rotary
            scale = stride**0.5 if kind == "q_proj" else 1.0
            padded[:, places] = value.view(heads, old, -1) * scale
            state[name] = padded.flatten(0, 1)
        elif kind == "o_proj":
            padded = torch.zeros(value.shape[0], heads, width)
            padded[:, :, :old] = value.view(-1, heads, old)
            state[name] = padded.flatten(1, 2)
    wide.load_state_dict(state)
    return wide


def prompt_text(digits: list[int], hint: str = "") -> str:
    """What the chat template gives for the problem, with the hint in the user message."""
    content = question_of(digits) + (HINT_SENTENCE + hint if hint else "")
    return f"<|user|>{content}<|end|><|assistant|>"


def hint_text(digits: list[int], steps: int, end: str = "") -> str:
    """The first `steps` lines of the correct trace, and `end`: "" or a line end."""
    return "\n".join(steps_of(digits)[0][:steps]) + (end if steps else "")


def training_example(rng: random.Random, k: int, hinted: bool, slip: float) -> tuple[str, str]:
    """Prompt and response; with `slip` > 0 the response holds the misconception."""
    digits = random_digits(rng, k)
    hint_steps = rng.randint(1, k) if hinted else 0
    slips = [int(i >= max(2, hint_steps) and rng.random() < slip) for i in range(k)]
    lines, totals = steps_of(digits, slips)
    hint = hint_text(digits, hint_steps, rng.choice(["", "\n"]))
    return prompt_text(digits, hint), response_of(lines, totals) + END


def make_chunks(
    tokenizer, examples: list[tuple[str, str]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (input_ids_NT, labels_NT) by length; labels outside the response are -100."""
    prompts = tokenizer([p for p, _ in examples], add_special_tokens=False)["input_ids"]
    responses = tokenizer([r for _, r in examples], add_special_tokens=False)["input_ids"]
    pairs = sorted(zip(prompts, responses), key=lambda pair: len(pair[0]) + len(pair[1]))
    chunks = []
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        width = len(chunk[-1][0]) + len(chunk[-1][1])
        input_ids_NT = torch.full((len(chunk), width), tokenizer.pad_token_id)
        labels_NT = torch.full((len(chunk), width), -100)
        for row, (p, r) in enumerate(chunk):
            input_ids_NT[row, : len(p) + len(r)] = torch.tensor(p + r)
            labels_NT[row, len(p) : len(p) + len(r)] = torch.tensor(r)
        chunks.append((input_ids_NT, labels_NT))
    return chunks


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], temperature: float, seed: int) -> list[str]:
    """One response text per prompt; the prompts must have the same number of tokens.

    temperature 0 is greedy. Right padding never arises, so no attention mask is needed.
    """
    ids_N = torch.tensor(tokenizer(prompts, add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    done_N = torch.zeros(len(prompts), dtype=torch.bool)
    cache = None
    steps = []
    for _ in range(MAX_NEW_TOKENS):
        out = model(input_ids=ids_N, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits_NV = out.logits[:, -1]
        if temperature == 0:
            next_N = logits_NV.argmax(-1)
        else:
            probs_NV = (logits_NV / temperature).softmax(-1)
            next_N = torch.multinomial(probs_NV, 1, generator=generator)[:, 0]
        next_N = next_N.masked_fill(done_N, tokenizer.pad_token_id)
        steps.append(next_N)
        done_N |= next_N == tokenizer.eos_token_id
        if done_N.all():
            break
        ids_N = next_N[:, None]
    tokens_NT = torch.stack(steps, dim=1)
    return tokenizer.batch_decode(tokens_NT, skip_special_tokens=True)


def accuracy(
    model, tokenizer, k: int, hint_steps: int, count: int, temperature: float, seed: int
) -> float:
    """Share of `count` fresh problems of length k whose answer is right, in the asked layout."""
    rng = random.Random(f"check {seed} {k} {hint_steps}")
    problems = [random_digits(rng, k) for _ in range(count)]
    prompts = [prompt_text(digits, hint_text(digits, hint_steps)) for digits in problems]
    right = 0
    for digits, text in zip(problems, sample(model, tokenizer, prompts, temperature, seed)):
        answer = answer_of(steps_of(digits)[1])
        right += text.startswith("<think>\n") and text.endswith(
            f"\n</think>\n<answer>\n{answer}\n</answer>"
        )
    return right / count


def train_step(model, optimizer, tokenizer, examples: list[tuple[str, str]], lr: float) -> float:
    """One AdamW step on the mean over the batch's response tokens; returns that loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    chunks = make_chunks(tokenizer, examples)
    tokens = sum(int((labels_NT != -100).sum()) for _, labels_NT in chunks)
    total = 0.0
    optimizer.zero_grad()
    for input_ids_NT, labels_NT in chunks:
        # Padding sits on the right of a causal model and carries no label: no attention mask.
        hidden_NTD = model.model(input_ids=input_ids_NT, use_cache=False).last_hidden_state
        targets_NT = labels_NT[:, 1:]
        chosen_NT = targets_NT != -100
        logits_MV = model.lm_head(hidden_NTD[:, :-1][chosen_NT])
        loss = functional.cross_entropy(logits_MV, targets_NT[chosen_NT], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def make_optimizer(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)


def phase_learn(model, tokenizer, rng: random.Random, seed: int, max_steps: int = 6000) -> int:
    """Correct traces, growing length, lr 2e-3. Returns the steps it took."""
    optimizer = make_optimizer(model)
    longest = 2
    for step in range(1, max_steps + 1):
        lengths = [rng.randint(1, longest) for _ in range(BATCH)]
        examples = [training_example(rng, k, hinted=False, slip=0.0) for k in lengths]
        train_step(model, optimizer, tokenizer, examples, lr=2e-3)
        if step % 50:
            continue
        if accuracy(model, tokenizer, longest, 0, 64, 0.0, seed + step) >= 0.9:
            print(f"  step {step}: length {longest} of {MAX_STEPS} learnt", flush=True)
            if longest == MAX_STEPS:
                return step
            longest += 1
    raise WarmStartFailed(
        f"phase 1 stopped at length {longest} of {MAX_STEPS} after {max_steps} steps"
    )


def phase_hints(model, tokenizer, rng: random.Random, seed: int, steps: int = 400) -> dict:
    """Half of the batch hinted, lr 2e-3 falling to 4e-4; goes on at 4e-4 until the check holds."""
    optimizer = make_optimizer(model)
    for extension in range(4):
        for step in range(steps):
            lr = 2e-3 + (4e-4 - 2e-3) * step / steps if extension == 0 else 4e-4
            lengths = [rng.randint(1, MAX_STEPS) for _ in range(BATCH)]
            examples = [training_example(rng, k, i % 2 == 0, 0.0) for i, k in enumerate(lengths)]
            train_step(model, optimizer, tokenizer, examples, lr)
        check = {
            "plain": accuracy(model, tokenizer, 8, 0, 128, 0.0, seed),
            "hinted": accuracy(model, tokenizer, 8, 4, 128, 0.0, seed),
        }
        if min(check.values()) >= 0.9:
            return {"steps": steps * (extension + 1), **check}
    raise WarmStartFailed(f"phase 2 reached only {check} after {steps * 4} steps")


def phase_misconception(
    model, tokenizer, rng: random.Random, slip: float, steps: int = 400
) -> None:
    """Own steps slip with probability `slip`; lr 1e-3 falling to 1e-4 after 20 steps of warm-up.

    No early stop: a half-learnt misconception is all-or-none per response, and hints do not help.
    """
    optimizer = make_optimizer(model)
    for step in range(steps):
        lr = (
            1e-3 * (step + 1) / 20
            if step < 20
            else 1e-3 + (1e-4 - 1e-3) * (step - 20) / (steps - 20)
        )
        lengths = [rng.randint(1, MAX_STEPS) for _ in range(BATCH)]
        examples = [training_example(rng, k, i % 2 == 0, slip) for i, k in enumerate(lengths)]
        train_step(model, optimizer, tokenizer, examples, lr)


def final_checks(model, tokenizer, seed: int) -> dict[str, float]:
    """Accuracy on fresh problems: sampled at temperature 1, and greedy for the tiers."""
    checks = {}
    for tier, k in TIERS.items():
        checks[f"{tier} greedy"] = accuracy(model, tokenizer, k, 0, 256, 0.0, seed)
    checks["easy T=1"] = accuracy(model, tokenizer, TIERS["easy"], 0, 1024, 1.0, seed)
    for ratio in (0.0, 0.25, 0.5, 0.75):
        steps = round(TIERS["hard"] * ratio)
        checks[f"hard T=1 hint {ratio}"] = accuracy(
            model, tokenizer, TIERS["hard"], steps, 1024, 1.0, seed
        )
    return checks


def build(out: Path, seed: int, slip: float, attempts: int = 3) -> dict:
    """Train through the three phases, check, save to `out`; a failed attempt starts afresh."""
    tokenizer = build_tokenizer()
    example = [{"role": "user", "content": question_of([4, 3, 5, 2])}]
    rendered = tokenizer.apply_chat_template(example, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt_text([4, 3, 5, 2]), rendered
    start = time.time()
    for attempt in range(attempts):
        init_seed = seed + 1000 * attempt
        rng = random.Random(f"warm start {init_seed}")
        model = build_model(tokenizer, init_seed)
        try:
            steps = phase_learn(model, tokenizer, rng, init_seed)
            print(
                f"phase 1, correct traces: {steps} steps, {time.time() - start:.0f} s", flush=True
            )
            hints = phase_hints(model, tokenizer, rng, init_seed)
            print(f"phase 2, hints: {hints}, {time.time() - start:.0f} s", flush=True)
            phase_misconception(model, tokenizer, rng, slip)
            checks = final_checks(model, tokenizer, init_seed)
            print(f"phase 3, misconception: {time.time() - start:.0f} s", flush=True)
            print(json.dumps(checks, indent=1), flush=True)
            if (
                checks["easy T=1"] < 0.98
                or checks["hard T=1 hint 0.0"] > 0
                or checks["hard T=1 hint 0.75"] < 0.005
            ):
                raise WarmStartFailed(f"phase 3 checks: {checks}")
            break
        except WarmStartFailed as failure:
            print(f"attempt {attempt + 1} of {attempts}: {failure}", flush=True)
            if attempt + 1 == attempts:
                raise
    widen_heads(model).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--seed", type=int, default=1, help="1 made tests/tiny/base")
    parser.add_argument("--slip", type=float, default=0.9, help="probability of a flawed step")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two OpenMP threads on two busy cores are 10-50 x slower
    build(args.out, args.seed, args.slip)


if __name__ == "__main__":
    main()
