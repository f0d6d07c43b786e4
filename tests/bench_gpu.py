"""Speed and memory of the real loop and of TRL: Qwen2.5-1.5B's shape, random weights, no download.

    python tests/bench_gpu.py                  one NVIDIA GPU of 48 GB or more
    python tests/bench_gpu.py --gpus 8         one model over eight (TRL: a copy on each)
    python tests/bench_gpu.py --toy            toy sizes on a CPU, to see that it runs

Needs torch with CUDA. Better with vllm (else transformers' generate samples, slowly), flash-attn
(else we take torch's own kernel, TRL sdpa) and TRL, here or in the Python that --trl names (no
requirement of this project: pip install trl). TRL gets the same model folder, prompts, number and
length of samples, types, and at most as many tokens a forward. Samples run to full length and the
reward is a coin, so that every row is trained on. Prints a table, then a line of JSON, null for
what was not measured. "generate" has weight transfer, sampling and our rewards, "train" the rest;
tokens/s and MFU are of one GPU. peak_gib is what torch allocates in the training pass (CPU: the
process), used_gib what the driver counts after it, less what a sleeping vLLM has given back.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from tests.bench_train import TINY, parity  # noqa: E402  (sets the number of threads)

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SAMPLES, LONGEST_PROMPT, WARM_UP = 8, 512, 2
IS_GPU = torch.cuda.is_available()


def attention(side):
    """The fastest that is there; flash-attn-4 has flash-attn's module name, and is not it."""
    if not IS_GPU:
        return "sdpa"
    if any(importlib.metadata.distributions(name="flash-attn")):
        return "flash_attention_2"
    return "sdpa" if side == "trl" else "varlen"


def write_model_and_data(folder, toy):
    """A random model with the tiny tokenizer, and problems of 50-400 bytes; its parameter count."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    shape = dict(zip(names, (1024, 64, 128, 2, 4, 2) if toy else (151936, 1536, 8960, 28, 12, 2)))
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    config = Qwen2Config(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)  # not on the GPU: others measure there
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(50, 400))) for _ in range(400)]
    lines = [json.dumps({"problem": text, "solution": "1"}) + "\n" for text in texts]
    (folder / "data.jsonl").write_text("".join(lines))
    return model.num_parameters()


def now():
    if IS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def memory():
    """GiB in use, and the most since the last call."""
    if not IS_GPU:
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    (free, whole), peak = torch.cuda.mem_get_info(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gib": peak / 2**30, "used_gib": (whole - free) / 2**30}


def run_ours(args):
    """Steps of ghpo's own loop."""
    import configs.settings
    import ghpo

    reward = f"{sys.modules[parity.__module__].__file__}:parity"
    run = ghpo.setup(
        configs.settings.make_config(
            {
                "model_name_or_path": f"{args.folder}/model",
                "dataset_name": f"{args.folder}/data.jsonl",
                "rl_type": "grpo",
                "engine": args.engine,
                "output_dir": f"{args.folder}/{args.side}",
                "attn_implementation": args.attention,
                "torch_dtype": "bfloat16",
                "packing": args.side == "packed",
                "reward_funcs": [reward],
                "hint_trigger": reward,
                "reward_weights": [1.0],
                "num_generations": SAMPLES,
                "loss_type": "dapo",
                "per_device_train_batch_size": args.rows,
                "max_prompt_length": LONGEST_PROMPT,
                "max_completion_length": args.length,
                "micro_batch_tokens": args.budget,
                "gradient_checkpointing": not args.toy,
                "sharding": args.sharding,
                "save_strategy": "no",
                "max_steps": args.steps + WARM_UP,
                "vllm_gpu_memory_utilization": 0.35,
            }
        )
    )
    steps, ended, optimize = [], [0.0], ghpo.optimize

    def watched(run, rows, *rest):
        began, _ = now(), memory()
        metrics = optimize(run, rows, *rest)
        steps.append(
            {
                "generate": began - ended[-1],
                "train": now() - began,
                "generated": sum(len(row.input_ids) - row.n_context for row in rows),
                "trained": sum(len(row.input_ids) for row in rows if row.advantage),
                **memory(),
            }
        )
        ended.append(now())
        return metrics

    ghpo.optimize = watched
    ghpo.train(run, ghpo.Interrupt())
    run.engine.close()
    return steps


def run_trl(args):
    """The same by TRL's GRPOTrainer: float32 weights, bfloat16 compute, a vLLM that sleeps."""
    import trl
    from datasets import Dataset

    lines = Path(args.folder, "data.jsonl").read_text().splitlines()
    texts, steps = [json.loads(line)["problem"] for line in lines], []
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])

    def scores(completions, **_):
        return [float(parity(message["content"], "")) for (message,) in completions]

    class Watched(trl.GRPOTrainer):
        def _generate(self, prompts):  # once a step, for all its rows; the step before has ended
            began = now()
            if steps:
                steps[-1] |= {"train": began - self.ended, **memory()}
            prompt_ids, completion_ids, *rest = super()._generate(prompts)
            made = sum(map(len, completion_ids))
            steps.append(
                {
                    "generate": now() - began,
                    "generated": made,
                    "trained": made + sum(map(len, prompt_ids)),
                }
            )
            self.ended, _ = now(), memory()
            return prompt_ids, completion_ids, *rest

    width = LONGEST_PROMPT + args.length
    batch = 1 << max(1, args.budget // width).bit_length() - 1  # a power of two, as args.rows is
    config = trl.GRPOConfig(
        output_dir=f"{args.folder}/trl",
        use_cpu=not IS_GPU,
        bf16=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": args.attention},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=args.rows // batch,
        num_generations=SAMPLES,
        max_completion_length=args.length,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        max_steps=args.steps + WARM_UP + 1,
        gradient_checkpointing=not args.toy,
        use_vllm=args.engine == "vllm",
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.35,
        vllm_max_model_length=width,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Watched(f"{args.folder}/model", scores, args=config, train_dataset=data).train()
    return steps[:-1]


def measure(args):
    """Medians over the steps of one side, which has this process for itself; rank 0 writes them."""
    is_fast = IS_GPU and importlib.util.find_spec("vllm")
    args.engine = args.engine or ("vllm" if is_fast else "hf")
    args.attention = attention(args.side)
    args.rows, args.budget = 64, 16384  # samples a step and GPU, tokens a forward
    if args.toy:
        args.rows, args.budget, args.length = 16, 4 * (LONGEST_PROMPT + 24), 24
    steps = (run_trl if args.side == "trl" else run_ours)(args)[WARM_UP:]
    step = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    name = torch.cuda.get_device_name() if IS_GPU else "cpu"
    peak = args.peak or next((flops for key, flops in PEAK.items() if key in name), None)
    speed = step["trained"] / step["train"]
    flops = 6 * int(args.parameters) * speed  # a forward and a backward, that is twice as much
    result = {
        "engine": args.engine,
        "attention": args.attention,
        "gpu": name,
        "seconds_step": statistics.median(s["generate"] + s["train"] for s in steps),
        "seconds_generate": step["generate"],
        "seconds_train": step["train"],
        "tokens_generated_per_s": step["generated"] / step["generate"],
        "tokens_trained_per_s": speed,
        "mfu": peak and flops / peak,
        "peak_gib": step["peak_gib"],
        "used_gib": step.get("used_gib"),
    }
    if os.environ.get("RANK", "0") == "0":
        Path(args.folder, f"{args.side}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def report(results, our):
    """Prints the sides beside each other; returns TRL's numbers over ours."""
    trl, our, ratios = results["trl"], results[our], None
    columns = {f"{side}, {result['engine']}": result for side, result in results.items() if result}
    if trl and our:
        ratios = {key: trl[key] / our[key] for key in our if isinstance(our[key], float)}
        columns["trl / ours"] = ratios
    print(" " * 24 + "".join(f"{name:>14}" for name in columns))
    for key, value in next(iter(columns.values()), {}).items():
        if isinstance(value, float):
            print(f"{key:24}" + "".join(f"{column[key]:14.4g}" for column in columns.values()))
    return ratios


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["packed", "padded", "trl"])
    parser.add_argument("--trl", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--engine", choices=["hf", "vllm"], help="default: vllm if there is one")
    parser.add_argument("--sharding", choices=["zero3", "zero2", "ddp"], default="zero2")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=3, help="measured, on each side")
    parser.add_argument("--peak", type=float, help="dense bf16 FLOP/s of the GPU, for MFU")
    for name in ("--side", "--folder", "--parameters"):  # of the processes started below
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure(args)
    if not IS_GPU and not args.toy:
        sys.exit("no GPU found: this needs one NVIDIA GPU of 48 GB or more, or --toy")
    sides = set(args.sides)
    if (
        "trl" in sides
        and subprocess.run([args.trl, "-c", "import trl"], stderr=subprocess.DEVNULL).returncode
    ):
        print("TRL is left out: it is not installed here (pip install trl, or --trl PYTHON)")
        sides.remove("trl")
    results, launcher = dict.fromkeys(["packed", "padded", "trl"]), []
    if args.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
    else:  # with more GPUs in sight, TRL would spread its one process over them
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory() as folder:
        count = write_model_and_data(Path(folder), args.toy)
        for side in [side for side in results if side in sides]:
            # A process each: memory, process groups and patches do not mix, and one may fail.
            subprocess.run(
                [
                    args.trl if side == "trl" else sys.executable,
                    *launcher,
                    __file__,
                    *sys.argv[1:],
                    "--side",
                    side,
                    "--folder",
                    folder,
                    "--parameters",
                    str(count),
                ],
                stdout=sys.stderr,
            )
            path = Path(folder, f"{side}.json")
            results[side] = json.loads(path.read_text()) if path.exists() else None
    ratios = report(results, "packed" if IS_GPU else "padded")  # as ghpo.py chooses by itself
    print(json.dumps({"toy": args.toy, "gpus": args.gpus, **results, "trl_over_ours": ratios}))
    sys.exit(not all(results[side] for side in sides))


if __name__ == "__main__":
    main()
