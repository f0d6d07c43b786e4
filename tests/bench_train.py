"""Memory of the LM head, padding of micro-batches, and step time against TRL. Runs on one CPU core.

    python tests/bench_train.py [--trl PYTHON] [--data FILE ...] [--steps 12]

--trl: an interpreter that has TRL (it is no requirement of this project):
    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl "torch==2.13.0" "transformers<5.20"
--data: JSONL with problem and solution_hint, whose lengths are used (default: the tiny task's).
The last line is JSON; what was not measured is null. Lower is better for the first two, and
above 1 means that TRL is slower for the others: CPU seconds of one thread, medians over the steps
of the better of three runs that take turns (neither side waits for anything but its own thread).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TINY = ROOT / "tests" / "tiny"
PROMPTS, SAMPLES, LONGEST = 16, 8, 40


# ---- memory ----


def in_child(work):
    """Peak resident bytes that work() adds, measured in a forked process."""
    read, write = os.pipe()
    if os.fork() == 0:
        status = Path("/proc/self/statm").read_text().split()
        before = int(status[1]) * os.sysconf("SC_PAGE_SIZE")
        work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(write, str(peak - before).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as pipe:
        return int(pipe.read())


def chunked_over_full(vocabulary=152_000, tokens=4096):
    """Peak of forward and backward with Policy's head over that with all logits at once."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import ghpo

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    policy = ghpo.Policy(Qwen2ForCausalLM(config))
    rows = 8  # short rows: the head is measured, not attention
    ids = torch.randint(0, vocabulary, (rows, tokens // rows + 1))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    predict = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    target = ids.flatten()[predict + 1]
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)

    def chunked():
        logp, _ = policy(ids=ids, positions=positions, predict=predict, target=target)
        logp.mean().backward()

    def full():
        logits = policy.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logp = logits[:, :-1].flatten(0, 1).log_softmax(-1).gather(-1, target[:, None])
        logp.mean().backward()

    small, large = in_child(chunked), in_child(full)
    print(
        f"memory: {tokens} tokens, vocabulary {vocabulary}: chunked {small / 2**20:.0f} MiB, "
        f"full logits {large / 2**20:.0f} MiB"
    )
    return small / large


# ---- padding ----


def padding_share(files, ranks, budget=16384, prompts=112):
    """Padding tokens over all tokens of padded micro-batches, for a step of prompts * 8 rows.

    A row is a problem and somebody's solution: 4 characters count as a token.
    """
    import numpy as np

    import ghpo

    lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    length = (
        np.array([[len(line["problem"]), len(line.get("solution_hint") or "")] for line in lines])
        // 4
        + 1
    )
    rng, padded, total, count = np.random.default_rng(0), 0, 0, 0
    for _ in range(5):
        chosen = rng.choice(len(lines), prompts, replace=prompts > len(lines))
        for rank in range(ranks):
            rows = [
                ghpo.Row([0] * (context + solution), context, [], [], [], [], 1.0, 1)
                for context in length[chosen[rank::ranks], 0]
                for solution in rng.choice(length[:, 1], SAMPLES)
            ]
            for batch in ghpo.micro_batches(rows, budget, False):
                lengths = [len(row.input_ids) for row in batch]
                padded += max(lengths) * len(lengths) - sum(lengths)
                total += max(lengths) * len(lengths)
                count += 1
    print(
        f"padding: {ranks} ranks, {prompts * SAMPLES} rows a step, mean {length.sum(1).mean():.0f} "
        f"tokens: {padded / total:.2%} in {count / 5 / ranks:.1f} micro-batches a rank"
    )
    return padded / total


# ---- time ----


def parity(response, gold):
    """A coin's reward that is the same for the same text: every group then has an advantage."""
    return zlib.crc32(response.encode()) % 2


def untrained_model(folder):
    """The tiny model with random weights: all samples run to the full length, on both sides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "base"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)


def time_ours(folder, steps):
    """Medians of seconds and tokens of a GRPO step through ghpo's own loop."""
    import ghpo

    run = ghpo.setup(
        ghpo.load_config(
            ROOT / "configs" / "tiny.yaml",
            [
                f"model_name_or_path={folder}-model",
                f"dataset_name={TINY / 'data' / 'train.jsonl'}",
                "eval_datasets={}",
                "eval_strategy=no",
                f"output_dir={folder}",
                f"max_steps={steps}",
                "rl_type=grpo",
                f"reward_funcs=['{__file__}:parity']",
                "reward_weights=[1.0]",
                f"hint_trigger={__file__}:parity",
                f"max_completion_length={LONGEST}",
                "save_strategy=no",
                "loss_type=dapo",
                f"num_generations={SAMPLES}",
                "learning_rate=1e-6",
                "warmup_steps=0",
                f"per_device_train_batch_size={PROMPTS * SAMPLES}",
                "gradient_accumulation_steps=1",
            ],
        )
    )
    ghpo.train(run, ghpo.Interrupt())
    run.pool.close()
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    parts = [
        (
            sum(line[f"seconds/{k}"] for k in ("sync", "generate")),
            line["seconds/train"],
            line["tokens/generated"],
        )
        for line in lines[2:]
    ]
    generate, train, tokens = zip(*parts)
    return summary(generate, train, tokens)


def time_trl(folder, steps):
    """The same with TRL's GRPOTrainer: same model, prompts, rewards, samples, lengths, rates."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    lines = [json.loads(line) for line in (TINY / "data" / "train.jsonl").read_text().splitlines()]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": line["problem"]}], "solution": line["solution"]}
            for line in lines
        ]
    )

    def scores(completions, **_):
        return [float(parity(c[0]["content"], "")) for c in completions]

    marks, generating, tokens = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            marks.append(time.perf_counter())

    class Timed(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            generating.append(time.perf_counter() - began)
            tokens.append(int(outputs["completion_mask"].sum()))
            return outputs

    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        learning_rate=1e-6,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        gradient_accumulation_steps=1,
        num_generations=SAMPLES,
        max_completion_length=LONGEST,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    Timed(
        model=f"{folder}-model",
        reward_funcs=scores,
        args=config,
        train_dataset=data,
        callbacks=[Clock()],
    ).train()
    whole = [b - a for a, b in zip(marks, marks[1:])]
    train = [step - part for step, part in zip(whole, generating)]
    return summary(generating[2:], train[2:], tokens[2:]) | {"trl": trl.__version__}


def summary(generate, train, tokens):
    step = [a + b for a, b in zip(generate, train)]
    return {
        "step": statistics.median(step),
        "train": statistics.median(train),
        "generate": statistics.median(generate),
        "tokens": statistics.median(tokens),
    }


def against_trl(python, steps, rounds=3):
    """Ratios of medians; runs alternate and a side keeps its fastest round (a shared machine)."""
    best = {}
    for _ in range(rounds):
        for name, interpreter in (("ours", sys.executable), ("trl", python)):
            with tempfile.TemporaryDirectory() as folder:
                untrained_model(f"{folder}/run-model")
                done = subprocess.run(
                    [
                        interpreter,
                        __file__,
                        "--time",
                        name,
                        "--steps",
                        str(steps),
                        "--folder",
                        f"{folder}/run",
                    ],
                    capture_output=True,
                    text=True,
                )
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            result = json.loads(done.stdout.splitlines()[-1])
            if name not in best or result["step"] < best[name]["step"]:
                best[name] = result
    for name, result in best.items():
        print(f"{name}: {result}")
    return {
        f"trl_over_ours_{part}": best["trl"][part] / best["ours"][part]
        for part in ("step", "train", "generate")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", help="Python interpreter that has TRL")
    parser.add_argument("--data", nargs="*", default=[TINY / "data" / "train.jsonl"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4096, help="of the memory measurement")
    parser.add_argument("--time", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        time.perf_counter = time.process_time  # CPU seconds: a busy machine disturbs them less
        print(json.dumps({"ours": time_ours, "trl": time_trl}[args.time](args.folder, args.steps)))
        return
    result = {"chunked_over_full_peak": chunked_over_full(tokens=args.tokens)}
    shares = {ranks: padding_share(args.data, ranks) for ranks in (8, 4, 1)}
    result["padding_share"] = shares[1]
    result |= {f"trl_over_ours_{part}": None for part in ("step", "train", "generate")}
    if args.trl:
        result |= against_trl(args.trl, args.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
