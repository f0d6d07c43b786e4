"""Seconds of a rollout with hints, against plain GRPO, with the real vLLM and the real `collect`.

    python tests/bench_rollout.py [--prompts 8] [--rounds 10]       one process, CPU or GPU

Which prompts are hard (60 %, at every stage) and how long each sample gets (a long tail) is drawn
from seeds, the same for every variant; the engine generates exactly so many tokens. The variants
take turns in each round, so that a noisy machine disturbs all of them alike:

    grpo       every group once
    ladder     the reference: stages 0, .25, .50, .75 in turn, each waiting for its slowest sample
    inline     `collect` with escalation the moment a group has failed
    deferred   a failed group returns in one of the next steps, at most half of a step returns

On a CPU the seconds are CPU seconds of this process: the engine runs in its one thread and never
waits, so they are the wall-clock of an idle machine; the wall-clock of this one stands beside them.
What `inline` saves depends on the tail: when every group has a sample at the length limit, four
stages in a row take four times the limit however they are streamed. Try --spread 0.8 --median 0.17.
It depends on the batch too: barriers waste the fixed cost of an engine step, which is most of the
cost up to some hundred samples on a GPU, but only up to some thirty on a CPU. Hence few prompts.
The last line is JSON: medians of the rounds' ratios, since a round draws the same for all.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from hints import Problem, Stage  # noqa: E402
from rollout import Group, Request, VllmEngine, collect  # noqa: E402

SAMPLES = 8
RATIOS = (0.0, 0.25, 0.5, 0.75)
PROMPT, TRACE = 64, 128  # tokens
VOCABULARY = 512


class Engine(VllmEngine):
    """vLLM that ends every sample at a log-normal length drawn from the sample's seed."""

    cap, median, spread = 256, 0.05, 1.2

    def _start(self, prompt, fields):
        drawn = random.Random(fields["seed"]).lognormvariate(0, self.spread)
        fields["max_tokens"] = max(4, min(self.cap, round(drawn * self.median * self.cap)))
        return super()._start(prompt, fields)


class Verdicts:
    """Instant verdicts: hard problems (level 1) fail at every stage, the others never do."""

    def __init__(self):
        self.ready = []
        self.tokens = 0

    def submit(self, key, texts, gold, row=None):
        request, completions = key
        self.tokens += sum(len(c.token_ids) for c in completions)
        self.ready.append((key, [[1.0 - request.problem.level]] * len(completions)))

    def poll(self, wait):
        ready, self.ready = self.ready, []
        return ready


def new_stage(number):
    return Stage([RATIOS[number]] * SAMPLES, [f"hint {number}"] * SAMPLES)


def blank(problem, number=0):
    return Group(problem, next_stage=new_stage(number))


def asker(step):
    """collect's `ask`: the same prompt, and after it the first part of the solution."""

    def ask(group, slot):
        problem, stage = group.problem, group.next_stage
        tokens = random.Random(problem.id)
        text = [tokens.randrange(VOCABULARY) for _ in range(PROMPT + TRACE)]
        prompt = text[: PROMPT + round(stage.ratio * TRACE)]
        seed = random.Random(f"{problem.id} {stage.hints[0]} {step}").getrandbits(60)
        config = SimpleNamespace(
            temperature=1.0,
            max_completion_length=Engine.cap,
            top_p=1.0,
            top_k=0,
            strict_answers=True,
        )
        return Request(problem, stage, [prompt] * SAMPLES, [""] * SAMPLES, seed, config, slot)

    return ask


def final(group, completions, rewards):
    """collect's `after_stage` of variants that ask once."""
    stages = [*group.stages, group.next_stage]
    return Group(group.problem, stages, completions, rewards)


def escalated(group, completions, rewards):
    """collect's `after_stage` of the ladder."""
    group = final(group, completions, rewards)
    if failed(group) and len(group.stages) < len(RATIOS):
        return replace(group, next_stage=new_stage(len(group.stages)))
    return group


def failed(group):
    return not any(scores[0] for scores in group.rewards)


def run_grpo(engine, pool, problems, step):
    return collect(engine, [blank(p) for p in problems], pool, asker(step), final)


def run_inline(engine, pool, problems, step):
    return collect(engine, [blank(p) for p in problems], pool, asker(step), escalated)


def run_ladder(engine, pool, problems, step):
    done = {}
    for number in range(len(RATIOS)):
        asked = [blank(problem, number) for problem in problems]
        groups = collect(engine, asked, pool, asker(step), final)
        done |= {group.problem.id: group for group in groups}
        problems = [group.problem for group in groups if failed(group)]
    return list(done.values())


class Deferred:
    """The queue between steps: failed problems come back with their next hint."""

    def __init__(self):
        self.queue = []

    def __call__(self, engine, pool, problems, step):
        back = self.queue[: len(problems) // 2]
        self.queue = self.queue[len(back) :]
        asked = back + [(problem, 0) for problem in problems[: len(problems) - len(back)]]
        groups = [blank(problem, number) for problem, number in asked]
        groups = collect(engine, groups, pool, asker(step), final)
        for group, (_, number) in zip(groups, asked):
            if failed(group) and number + 1 < len(RATIOS):
                self.queue.append((group.problem, number + 1))
        return groups


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="a step and engine")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cap", type=int, default=256, help="longest completion, tokens")
    parser.add_argument("--median", type=float, default=0.05, help="of the lengths, over cap")
    parser.add_argument("--spread", type=float, default=1.2, help="of the logarithm of the lengths")
    args = parser.parse_args()
    Engine.cap, Engine.median, Engine.spread = args.cap, args.median, args.spread
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        )).save_pretrained(folder)  # fmt: skip
        config = SimpleNamespace(
            model_name_or_path=folder, model_revision="main", torch_dtype="float32",
            vllm_gpu_memory_utilization=0.3,
        )  # fmt: skip
        no_text = SimpleNamespace(decode=lambda ids: "", added_tokens_decoder={})
        engine = Engine(config, no_text, [], PROMPT + TRACE + args.cap, None)
    variants = {"grpo": run_grpo, "ladder": run_ladder, "inline": run_inline}
    variants["deferred"] = Deferred()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds, wall, tokens, wasted = ({name: [] for name in variants} for _ in range(4))
    for step in range(-3, args.rounds):  # the first three warm up and fill the deferred queue
        hard = random.Random(step).sample(range(args.prompts), round(0.6 * args.prompts))
        problems = []
        for i in range(args.prompts):
            chat = [{"role": "user", "content": ""}]
            problems.append(Problem(1000 * step + i, chat, "", level=float(i in hard)))
        for name, variant in variants.items():
            pool = Verdicts()
            assert engine.llm.reset_prefix_cache()
            started = clock(), time.perf_counter()
            kept = variant(engine, pool, problems, step)
            if step >= 0:
                seconds[name].append(clock() - started[0])
                wall[name].append(time.perf_counter() - started[1])
                tokens[name].append(pool.tokens)
                kept = sum(len(c.token_ids) for group in kept for c in group.completions)
                wasted[name].append(pool.tokens - kept)

    def ratio(name, other):
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))

    for name in variants:
        print(
            f"{name:9s}{statistics.median(seconds[name]):6.2f} s ({min(seconds[name]):.2f} to "
            f"{max(seconds[name]):.2f}; wall-clock {statistics.median(wall[name]):.2f} s), "
            f"{ratio(name, 'grpo'):.2f} x grpo; "
            f"{statistics.mean(tokens[name]):6.0f} tokens, "
            f"{statistics.mean(tokens[name]) / statistics.mean(tokens['grpo']):.2f} x grpo, "
            f"{statistics.mean(wasted[name]):.0f} of them wasted"
        )
    print(json.dumps({
        "ladder_over_grpo": round(ratio("ladder", "grpo"), 3),
        "inline_over_ladder": round(ratio("inline", "ladder"), 3),
        "deferred_over_grpo": round(ratio("deferred", "grpo"), 3),
    }))  # fmt: skip
    engine.close()


if __name__ == "__main__":
    main()
