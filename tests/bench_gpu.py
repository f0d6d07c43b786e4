"""Speed and memory of the real loop on a GPU: Qwen2.5-1.5B's shape, random weights, no download.

    python tests/bench_gpu.py                          one NVIDIA GPU of 40 GB or more
    torchrun --nproc_per_node 8 tests/bench_gpu.py     one model over eight
    python tests/bench_gpu.py --toy                    toy sizes on a CPU, to see that it runs

Needs torch with CUDA; vllm for --engine vllm (otherwise --engine hf samples, slowly); flash-attn for
packing (without it packing is skipped). Text is Latin-1 bytes by the tiny task's tokenizer, samples
run to their full length, and the reward is a coin, so that every row is trained on.
Prints a table; the last line is JSON: for packing on and off seconds and tokens/s of training and of
sampling, MFU of the training pass, peak memory. --peak: the GPU's dense bf16 FLOP/s for MFU.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def parity(response, gold):
    """A coin's reward, the same for the same text."""
    return zlib.crc32(response.encode()) % 2


def write_model_and_data(folder, toy):
    """A random model in Qwen2.5-1.5B's shape with the tiny tokenizer, and problems of 50-400 bytes."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    if toy:
        shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
                 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "tiny" / "base")
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=32768,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(400):
            text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(50, 400)))
            file.write(json.dumps({"problem": text, "solution": "1"}) + "\n")


def flops_per_token(run):
    """Forward and backward of one token: 6 per weight of a matrix product (the head's included)."""
    config = run.policy.model.config
    blocks = sum(p.numel() for p in run.policy.model.base_model.layers.parameters())
    return 6 * (blocks + config.vocab_size * config.hidden_size)


def measure(folder, args, packings):
    """Medians over the steps of ghpo's own loop, packed and padded taking turns."""
    import ghpo

    longest, budget, per_device = (24, 512, 16) if args.toy else (args.length, 16384, 64)
    run = ghpo.setup(ghpo.make_config({
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data.jsonl"),
        "rl_type": "grpo", "engine": args.engine, "output_dir": str(folder / "run"),
        "attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16",
        "reward_funcs": [f"{__file__}:parity"], "hint_trigger": f"{__file__}:parity",
        "reward_weights": [1.0], "num_generations": 8, "per_device_train_batch_size": per_device,
        "max_prompt_length": 512, "max_completion_length": longest, "micro_batch_tokens": budget,
        "gradient_checkpointing": not args.toy, "sharding": args.sharding, "save_strategy": "no",
        "max_steps": len(packings) * (args.steps + 1), "loss_type": "dapo",
        "vllm_gpu_memory_utilization": 0.35}))
    seen, optimize, cuda = [], ghpo.optimize, torch.cuda.is_available()

    def counted(run, rows, *rest):
        run.is_packed = packings[len(seen) % len(packings)]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics = optimize(run, rows, *rest)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        seen.append((sum(len(row.input_ids) for row in rows if row.advantage), peak))
        return metrics

    ghpo.optimize = counted
    ghpo.train(run)
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    results = {}
    for number, is_packed in enumerate(packings):
        chosen = range(len(packings) + number, len(lines), len(packings))  # without the first of each
        train = statistics.median(lines[i]["seconds/train"] for i in chosen)
        generate = statistics.median(lines[i]["seconds/generate"] for i in chosen)
        tokens = statistics.median(seen[i][0] for i in chosen)
        made = statistics.median(lines[i]["tokens/generated"] for i in chosen)
        results["packed" if is_packed else "padded"] = {
            "seconds_train": train, "seconds_generate": generate,
            "tokens_trained_per_s_and_rank": tokens / train, "tokens_generated_per_s": made / generate,
            "peak_gib": cuda and max(seen[i][1] for i in chosen) or None,
            "mfu": args.peak and tokens * flops_per_token(run) / train / args.peak}
    run.engine.close()
    run.judge.pool.close()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--sharding", choices=["zero3", "zero2", "ddp"], default="zero2")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=3, help="measured, of each kind")
    parser.add_argument("--peak", type=float, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.toy:
        sys.exit("no GPU found: this needs one NVIDIA GPU of 40 GB or more, or --toy")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    args.peak = args.peak or next((flops for key, flops in PEAK.items() if key in name), None)
    packings = [True, False]
    if not importlib.util.find_spec("flash_attn") and not args.toy:
        print("packing is left out: flash-attn is not installed")
        packings = [False]
    rank, job = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"bench_gpu_{job}"
    if rank == "0":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_model_and_data(folder, args.toy)
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        time.sleep(0.1)
    results = measure(folder, args, packings)
    if rank == "0":
        shutil.rmtree(folder)
        for kind, result in results.items():
            print(kind, {key: value and round(value, 3) for key, value in result.items()})
        print(json.dumps({"gpu": name, "engine": args.engine, "toy": args.toy, **results}))


if __name__ == "__main__":
    main()
