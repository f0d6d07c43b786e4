"""What this code costs beside the libraries that it drives: a real model on one CPU thread.

    python tests/bench_overhead.py MODEL [--only KEY ...] [--into FILE] [--dtype float32]

MODEL: a folder or hub name. Ratios are the median of --pairs rounds in which the sides take turns:

    collect_over_generate  tokens/s of rollout.collect, verdicts included, over a bare LLM.generate
                           on the same engine: the same prompts, seeds, log-probs and lengths
    server_over_generate   the same for collect with engine=server, over HTTP, against that engine
    optimize_over_bare     seconds of ghpo.optimize over a plain step on the same rows: all logits,
                           cross-entropy, backward, clip, AdamW; same model object and checkpointing
    draw_share             of the hf engine's decoding, after the prompts have been read, what the
                           draw of the tokens takes

The others are shares of whole training steps (--steps of them) with engine=vllm, the median step:

    hint_share             all calls into hints.py, with the fitting of hints to the prompt
    verify_share           what the sampling thread spends on handing out texts and taking verdicts
    push_share             weights to the sampler

Prints each number with its limit and a verdict. The last line is JSON, merged with what --into has
from earlier calls. About 20 minutes and 14 GB for 0.5 B parameters; parts run one after another, a
process each. --data: JSONL with problem, solution and solution_hint (default: the tiny task's).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SAMPLES, STEP_PROBLEMS, STEP_SAMPLES, TRAIN_ROWS = 8, 4, 4, 4
LONGEST_PROMPT, MICRO_BATCH, LR = 512, 640, 1e-6
LIMITS = {
    "collect_over_generate": (">=", 0.95),
    "server_over_generate": (">=", 0.85),
    "optimize_over_bare": ("<=", 1.10),
    "draw_share": ("<=", 0.15),
    "hint_share": ("<=", 0.02),
    "verify_share": ("<=", 0.02),
    "push_share": (None, None),
}


# ---- what is measured ----


class Clock:
    """Seconds by name, of functions that it stands before; a call within a call counts once."""

    def __init__(self):
        self.seconds, self.open = Counter(), set()

    def watch(self, owner, function, name):
        """Puts a timed function in the place of owner.function."""
        called = getattr(owner, function)

        def timed(*args, **kwargs):
            if name in self.open:
                return called(*args, **kwargs)
            self.open.add(name)
            began = time.perf_counter()
            result = called(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - began
            self.open.remove(name)
            return result

        setattr(owner, function, timed)


def start(args, folder, **settings):
    """The program's own set-up: GRPO, so that nothing is asked twice, and no checkpoint."""
    import ghpo
    from configs.settings import make_config

    settings = {
        "model_name_or_path": args.model,
        "dataset_name": str(args.data),
        "output_dir": str(Path(folder) / "run"),
        "rl_type": "grpo",
        "torch_dtype": args.dtype,
        "engine": "hf",
        "num_generations": SAMPLES,
        "per_device_train_batch_size": SAMPLES,
        "max_prompt_length": LONGEST_PROMPT,
        "max_completion_length": args.tokens,
        "micro_batch_tokens": MICRO_BATCH,
        "learning_rate": LR,
        "save_strategy": "no",
        "vllm_server_port": args.port,
        **settings,
    }
    return ghpo.setup(make_config(settings))


def push(run, engine):
    """The weights to an engine."""
    import fsdp_utils

    engine.wake()
    engine.update_weights(fsdp_utils.full_tensors(run.policy.model, run.compute_dtype))


def sampling(args, folder):
    """Median ratios of tokens/s: collect, in-process and over HTTP, over LLM.generate."""
    import rollout

    run = start(args, folder)
    longest = LONGEST_PROMPT + args.tokens
    fields = run.config, run.prompts.tokenizer, set(), longest, run.policy  # no EOS: all to the end
    sides, keys = {}, {"collect_over_generate": "vllm", "server_over_generate": "server"}
    with server(args, run.config) if "server_over_generate" in args.only else nullcontext():
        local = rollout.VllmEngine(*fields)
        push(run, local)
        sides["generate"] = lambda salt: bare_generate(run, local, asked(run, args, salt))
        forget = [local.llm.reset_prefix_cache]
        for key in args.only:
            engine = local
            if keys[key] == "server":
                engine = rollout.ServerEngine(*fields)
                push(run, engine)
                forget.append(partial(engine._call, "/reset_prefix_cache"))
            sides[key] = partial(our_collect, run, engine, args)
        speeds = rounds(sides, args.pairs, forget)
    run.pool.close()
    return {
        key: statistics.median(a / b for a, b in zip(speeds[key], speeds["generate"]))
        for key in args.only
    }


def asked(run, args, salt):
    """The groups' requests, as the program makes them."""
    import hints

    blank = [hints.Group(problem) for problem in run.problems[: args.prompts // SAMPLES]]
    fit = run.prompts.fit
    groups = [hints.advance(group, run.config, run.state, fit) for group in blank]
    requests = [run.prompts.request(g, run.config, slot, salt) for slot, g in enumerate(groups)]
    return groups, requests


def our_collect(run, engine, args, salt):
    """(tokens, seconds) of rollout.collect, as ghpo.sample_groups calls it."""
    import hints
    import rollout

    groups, _ = asked(run, args, salt)
    c, state, fit = run.config, run.state, run.prompts.fit
    began = time.perf_counter()
    groups = rollout.collect(
        engine,
        groups,
        run.pool,
        lambda group, slot: run.prompts.request(group, c, slot, salt),
        lambda group, completions, rewards: hints.after_stage(
            group, completions, rewards, run.trigger_column, c, state, fit
        ),
    )
    seconds = time.perf_counter() - began
    return sum(len(c.token_ids) for group in groups for c in group.completions), seconds


def bare_generate(run, engine, groups_and_requests):
    """(tokens, seconds) of LLM.generate on the same prompts."""
    from vllm import SamplingParams

    prompts, params = [], []
    for request in groups_and_requests[1]:
        for j, prompt in enumerate(request.prompts):
            prompts.append({"prompt_token_ids": prompt})
            fields = {"temperature": run.config.temperature, "seed": request.seed + j}
            fields |= {"max_tokens": run.config.max_completion_length, "ignore_eos": True}
            params.append(SamplingParams(**fields, logprobs=0, detokenize=False))
    began = time.perf_counter()
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def rounds(sides, n_rounds, forget):
    """{side: tokens/s of each round}; a first round warms up. The order turns from round to round;
    forget: calls after which prompts are read anew."""
    speeds, names = {name: [] for name in sides}, list(sides)
    for number in range(-1, n_rounds):
        for name in names:
            for call in forget:
                call()
            tokens, seconds = sides[name](f"{number}")
            if number >= 0:
                speeds[name].append(tokens / seconds)
                print(f"{name}: {tokens} tokens in {seconds:.1f} s", file=sys.stderr, flush=True)
        names = names[1:] + names[:1]
    return speeds


@contextmanager
def server(args, config):
    """`./run.sh serve` of this config."""
    from configs.plan import server_arguments

    argv, environment = server_arguments(config, 0)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        try:
            wait_for(process, args.port, log)
            yield
        finally:
            process.terminate()
            process.wait(60)


def wait_for(process, port, log):
    from break_server import is_listening

    deadline = time.monotonic() + 600
    while not is_listening(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {Path(log.name).read_text()[-4000:]}")
        time.sleep(0.5)


def training(args, folder):
    """Median ratio of seconds: ghpo.optimize over a plain step, on the same micro-batches."""
    import ghpo

    run = start(args, folder)
    rows = trained_rows(run, args.tokens)
    batches = ghpo.micro_batches(rows, run.config.micro_batch_tokens, False)
    sides = {"ours": lambda: ghpo.optimize(run, rows, LR), "bare": lambda: bare_step(run, batches)}
    seconds = {name: [] for name in sides}
    for number in range(-1, args.pairs):  # the first makes Adam's moments
        for name in sorted(sides, reverse=number % 2 == 1):
            began = time.perf_counter()
            sides[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    run.pool.close()
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"])]
    return {"optimize_over_bare": statistics.median(ratios)}


def trained_rows(run, n_tokens):
    """Prompts, each with the tokens of other prompts in the place of a completion."""
    import ghpo

    contexts = [run.prompts.ids(problem)[0] for problem in run.problems[:64]]
    text = [token for context in contexts for token in context]
    text *= -(-TRAIN_ROWS * n_tokens // len(text))
    rows, ones, no = [], [1.0] * n_tokens, [0.0] * n_tokens
    for i, context in enumerate(contexts[:TRAIN_ROWS]):
        completion = text[i * n_tokens : (i + 1) * n_tokens]
        row = ghpo.Row([*context, *completion], len(context), no, ones, no, [True] * n_tokens,
                       1.0 - 2 * (i % 2), n_tokens)  # fmt: skip
        row.token_weight = 1 / (TRAIN_ROWS * n_tokens)
        rows.append(row)
    return rows


def bare_step(run, batches):
    """What a plain script would do for the same rows."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    for rows in batches:
        ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], True)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            labels[i, row.n_context : len(row.input_ids)] = ids[i, row.n_context :][: row.n_tokens]
        whole = {"input_ids": ids, "use_cache": False}
        logits = run.policy(whole=whole)[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        (loss / sum(row.n_tokens for batch in batches for row in batch)).backward()
    torch.nn.utils.clip_grad_norm_(run.policy.parameters(), run.config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()


def drawing(args, folder):
    """Median share of the draw in --pairs stretches of the hf engine's decoding."""
    import rollout

    run, draws, call = start(args, folder), [], rollout.SeededDraws.__call__

    def timed(self, *states):
        began = time.perf_counter()
        result = call(self, *states)
        draws.append((began, time.perf_counter()))
        return result

    rollout.SeededDraws.__call__ = timed
    run.engine.wake()
    for request in asked(run, args, "draws")[1]:
        run.engine.submit(request)
    run.engine.poll()
    run.pool.close()
    ends, size = [end for _, end in draws], max(1, (len(draws) - 1) // args.pairs)
    spent, shares = [end - began for began, end in draws], []
    for first in range(1, len(draws) - size + 1, size):  # before the first the prompts are read
        whole = ends[first + size - 1] - ends[first - 1]
        shares.append(sum(spent[first : first + size]) / whole)
    return {"draw_share": statistics.median(shares)}


def stepping(args, folder):
    """Median shares of whole GHPO steps, engine vllm."""
    import ghpo
    import hints

    clock = Clock()
    for name in ("advance", "after_stage", "outcome_of", "enters_batch", "advantages", "loss_view",
                 "after_step", "rollout_metrics", "render", "make_hint"):  # fmt: skip
        clock.watch(hints, name, "hint_share")
    run = start(args, folder, engine="vllm", rl_type="ghpo", num_generations=STEP_SAMPLES,
                per_device_train_batch_size=STEP_PROBLEMS * STEP_SAMPLES,
                max_steps=args.steps)  # fmt: skip
    for name in ("submit", "poll"):
        clock.watch(run.pool, name, "verify_share")
    marks, write_metrics = [(time.perf_counter(), Counter(clock.seconds))], ghpo.write_metrics

    def watched(run, metrics):
        marks.append((time.perf_counter(), Counter(clock.seconds)))
        clock.seconds["push_share"] += metrics["seconds/sync"]
        marks[-1][1]["push_share"] = clock.seconds["push_share"]
        return write_metrics(run, metrics)

    ghpo.write_metrics = watched
    ghpo.train(run, ghpo.Interrupt())
    run.pool.close()
    shares = {}
    for name in ("hint_share", "verify_share", "push_share"):
        parts = [(b[1][name] - a[1][name]) / (b[0] - a[0]) for a, b in zip(marks, marks[1:])]
        shares[name] = statistics.median(parts)
    return {name: shares[name] for name in args.only}


PARTS = {  # a process each
    sampling: ["collect_over_generate", "server_over_generate"],
    training: ["optimize_over_bare"],
    drawing: ["draw_share"],
    stepping: ["hint_share", "verify_share", "push_share"],
}


# ---- the command line ----


def verdict(name, value):
    sign, limit = LIMITS[name]
    if sign is None:
        return f"{name:22}{value:8.3f}   no limit"
    is_kept = value >= limit if sign == ">=" else value <= limit
    return f"{name:22}{value:8.3f}   {sign} {limit}: {'kept' if is_kept else 'NOT KEPT'}"


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--into", type=Path, help="JSON file in which calls are merged")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of the ratios")
    parser.add_argument("--prompts", type=int, default=32, help="sequences sampled at once")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--steps", type=int, default=3, help="training steps of the shares")
    parser.add_argument("--port", type=int, default=8765, help="of the server; the next one, too")
    parser.add_argument("--data", type=Path, default=ROOT / "tests/tiny/data/train.jsonl")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of the processes started below
    return parser.parse_args()


def main():
    args = arguments()
    parts = {part.__name__: part for part in PARTS}
    if args.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(parts[args.part](args, folder)), flush=True)
        os._exit(0)  # vLLM's and gloo's threads do not end by themselves
    found = {"model": Path(args.model).name, "dtype": args.dtype}
    if args.into and args.into.exists():
        found = json.loads(args.into.read_text()) | found
    for part, keys in PARTS.items():
        wanted = [key for key in keys if key in args.only]
        if not wanted:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part.__name__, "--only"]
        done = subprocess.run([*command, *wanted], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{part.__name__} failed with status {done.returncode}")
        found |= json.loads(done.stdout.splitlines()[-1])
        if args.into:
            args.into.write_text(json.dumps(found) + "\n")
        for key in wanted:
            print(f"{verdict(key, found[key])}   {args.dtype}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
