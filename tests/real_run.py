"""A real model on real mathematics, on one CPU thread: what the README's section of it shows.

    python tests/real_run.py ladder MODEL    hints at every ratio, before training: 36 problems x 8
    python tests/real_run.py train MODEL     configs/gsm8k_cpu.yaml with evaluations and proofs that
                                             the sampler has the new weights; again: it resumes
    python tests/real_run.py collapse MODEL  six steps with the paper's prompt and format reward
    python tests/real_run.py after           the exported model in transformers and vLLM, one text
    python tests/real_run.py report          tables, picture and tests/assets/real_run

MODEL: a folder or hub name. --until N ends training after N steps; --first N
begins the ladder at problem N (24: MATH); --data FOLDER has the rows,
gsm8k_train.jsonl and math500_dev.jsonl (columns problem, solution, solution_hint, level); --out is
where all is written; key=value settings go through to the program. The README has the time it took.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads are many times slower
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import fsdp_utils  # noqa: E402
import ghpo  # noqa: E402
import hints  # noqa: E402
import rollout  # noqa: E402
from configs.settings import load_config  # noqa: E402

CONFIG = ROOT / "configs/gsm8k_cpu.yaml"
ASSETS = ROOT / "tests/assets/real_run"
HELD_OUT = 40  # problems at the end of the file that are never trained on
LADDER_GSM8K, LADDER_MATH, LADDER_PART = 24, 12, 12
PROOFS, PROOF_PROBLEMS, PROOF_TOKENS = (0, 1, 3), 5, 64  # and after the last step
CONTROL_NOISE = 0.02
EVALUATIONS = (0, 12)  # and after the last step
COLLAPSE_STEPS = 6


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def hub_row(row: dict) -> dict:
    """A row with the columns of openai/gsm8k, and its short answer beside them."""
    return {
        "question": row["problem"], "answer": row["solution_hint"], "gold": row["solution"],
        "level": row.get("level", 0),
    }  # fmt: skip


def prepare(source: Path, target: Path) -> None:
    """Writes the rows to train on, the held-out ones and those of the ladder table."""
    gsm8k = [hub_row(row) for row in read_jsonl(source / "gsm8k_train.jsonl")]
    math = [hub_row(row) for row in read_jsonl(source / "math500_dev.jsonl")]
    by_level = [[row for row in math if row["level"] == level] for level in (3, 4, 5)]
    ladder = gsm8k[-HELD_OUT - LADDER_GSM8K : -HELD_OUT]
    for rows in by_level:
        ladder = ladder + rows[: LADDER_MATH // len(by_level)]
    write_jsonl(target / "train.jsonl", gsm8k[: -HELD_OUT - LADDER_GSM8K])
    write_jsonl(target / "heldout.jsonl", gsm8k[-HELD_OUT:])
    write_jsonl(target / "ladder.jsonl", ladder)


def start(args: argparse.Namespace, settings: list[str]):
    """The program's own set-up, with our rows in the place of the hub's."""
    data = args.out / "data"
    prepare(args.data, data)
    heldout = {"heldout": {"dataset_name": str(data / "heldout.jsonl"), "dataset_split": "train"}}
    settings = [
        f"model_name_or_path={args.model}", f"dataset_name={data / 'train.jsonl'}",
        "dataset_answer_column=gold", f"eval_datasets={json.dumps(heldout)}",
        f"output_dir={args.out / 'run'}", *settings, *args.settings,
    ]  # fmt: skip
    return ghpo.setup(load_config(CONFIG, settings, will_run=True))


# ---- (a) the ladder before training


def ladder(args: argparse.Namespace) -> None:
    """Every problem of the ladder file once, a part of them at a time, without any training."""
    run = start(args, [
        f"dataset_name={args.out / 'data/ladder.jsonl'}", f"output_dir={args.out / 'ladder'}",
        f"gradient_accumulation_steps={LADDER_PART}", "max_completion_length=512", "max_steps=1",
    ])  # fmt: skip
    run.engine.wake()
    run.engine.update_weights(fsdp_utils.full_tensors(run.policy.model, run.compute_dtype))
    run = replace(run, policy=None, optimizer=None)  # the engine has the weights: 2 GB less
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    c, state, fit = run.config, run.state, run.prompts.fit

    def ask(group: hints.Group, slot: int) -> rollout.Request:
        return run.prompts.request(group, c, slot, 0)

    def after_stage(group: hints.Group, completions: list, rewards: list) -> hints.Group:
        return hints.after_stage(group, completions, rewards, run.trigger_column, c, state, fit)

    problems = sorted(run.problems, key=lambda problem: problem.id)
    state.step = args.first // LADDER_PART
    for first in range(args.first, len(problems), LADDER_PART):
        started = time.perf_counter()
        part = problems[first : first + LADDER_PART]
        blank = [hints.advance(hints.Group(problem), c, state, fit) for problem in part]
        groups = rollout.collect(run.engine, blank, run.pool, ask, after_stage)
        outcomes = ghpo.write_groups(run, groups, f"rollouts/step_{state.step + 1:06d}.jsonl")
        metrics = hints.after_step(state, outcomes, c)
        state.step += 1
        ghpo.write_metrics(run, metrics | {"seconds/ladder": time.perf_counter() - started})
    run.engine.close()
    run.pool.close()


# ---- (b) the run


def train(args: argparse.Namespace) -> None:
    """Training in pieces that end where something is to be looked at."""
    run = start(args, [])
    last = min(args.until or run.plan.steps, run.plan.steps)
    stops = sorted({stop for stop in PROOFS + EVALUATIONS if stop < last} | {last})
    run = replace(run, config=replace(run.config, eval_strategy="no"))  # it is called from here
    for stop in stops:
        if run.state.step < stop:
            until = replace(run, plan=replace(run.plan, steps=stop))
            if ghpo.train(until, ghpo.Interrupt()):
                return
        if run.state.step > stop:
            continue
        if stop in (*PROOFS, last) and stop not in steps_proved(run.folder):
            prove(run)
        if stop in (*EVALUATIONS, last) and not heldout_path(run.folder, stop).is_file():
            evaluate(run)
    control(run)
    ghpo.export(run, run.folder / "model")
    run.engine.close()
    run.pool.close()


def heldout_path(folder: Path, step: int) -> Path:
    return folder / f"heldout_{step:06d}.jsonl"


def steps_proved(folder: Path) -> list[int]:
    path = folder / "proof.jsonl"
    return [line["step"] for line in read_jsonl(path)] if path.is_file() else []


def evaluate(run) -> None:
    """Greedy and without hints on the held-out problems; the texts are kept."""
    c, problems = run.eval_sets["heldout"]
    blank = [hints.Group(problem) for problem in problems]
    groups = ghpo.sample_groups(run, blank, c, "heldout")
    step, lines = run.state.step, []
    for group in groups:
        (completion,), (scores,) = group.completions, group.rewards
        lines.append({
            "step": step, "id": group.problem.id, "accuracy": scores[run.accuracy_column],
            "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason,
            "problem": group.problem.text, "gold": group.problem.gold,
            "text": completion.text,
        })  # fmt: skip
    write_jsonl(heldout_path(run.folder, step), lines)
    print(evaluation(heldout_path(run.folder, step)), flush=True)


def evaluation(path: Path) -> dict:
    """What a file of held-out texts says: accuracy with its standard error, length, truncation."""
    lines = read_jsonl(path)
    right = np.array([line["accuracy"] for line in lines])
    cut = [line["finish_reason"] == "length" for line in lines]
    return {
        "step": lines[0]["step"], "problems": len(lines), "accuracy": float(right.mean()),
        "stderr": float(right.std(ddof=1) / len(right) ** 0.5),
        "tokens": float(np.mean([line["tokens"] for line in lines])),
        "truncated": float(np.mean(cut)),
    }  # fmt: skip


# ---- the sampler sees the new weights


@torch.no_grad()
def trainer_logp(run, prompt_ids: list, token_ids: list) -> np.ndarray:
    """Log-probs (T,) of a completion by the weights that are trained."""
    ids = torch.tensor([prompt_ids + token_ids])
    predict = torch.arange(len(prompt_ids) - 1, ids.shape[1] - 1)
    positions = torch.arange(ids.shape[1])[None]
    return run.policy(ids, positions, predict, ids[0, predict + 1])[0].double().numpy()


def sampler_logp(run, prompt_ids: list, token_ids: list) -> np.ndarray:
    """Log-probs (T,) of a given completion by the weights that the engine has."""
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    prompt = {"prompt_token_ids": prompt_ids + token_ids}
    (output,) = run.engine.llm.generate([prompt], params, use_tqdm=False)
    pairs = list(zip(token_ids, output.prompt_logprobs[len(prompt_ids) :]))
    return np.array([entry[token].logprob for token, entry in pairs])


def trainer_greedy(run, requests: list) -> dict:
    """{problem id: Completion} as transformers decodes with the weights that are trained."""
    ends = run.engine.eos_ids
    engine = rollout.HfEngine(
        run.config, run.prompts.tokenizer, ends, run.engine.max_model_len, run.policy
    )
    for request in requests:
        engine.submit(request)
    engine.wake()
    found = {}
    while engine.is_busy():
        for request, (completion,) in engine.poll():
            found[request.problem.id] = completion
    engine.sleep()
    return found


def control(run) -> None:
    """That prove can fail: the engine is given weights with 2 % of noise, then the right ones."""
    texts = json.loads((run.folder / "proof_texts.json").read_text())[0]
    torch.manual_seed(0)

    def weights(noise: float):
        for name, tensor in fsdp_utils.full_tensors(run.policy.model, run.compute_dtype):
            if tensor.dim() > 1:
                tensor = tensor * (1 + noise * torch.randn(tensor.shape)).to(tensor.dtype)
            yield name, tensor

    scores = {}
    for name, noise in (("right", 0.0), ("wrong", CONTROL_NOISE), ("right_again", 0.0)):
        run.engine.update_weights(weights(noise))
        scores[name] = np.concatenate([sampler_logp(run, *text) for text in texts])
    trainer = np.concatenate([trainer_logp(run, *text) for text in texts])
    fsdp_utils.reshard(run.policy)
    found = {f"{name}_to_trainer": float(np.abs(x - trainer).mean()) for name, x in scores.items()}
    is_back = bool((scores["right_again"] == scores["right"]).all())
    found |= {"step": run.state.step, "right_again_equals_right": is_back}
    (run.folder / "control.json").write_text(json.dumps(found) + "\n")
    print(found, flush=True)


def outcome(line: dict, config) -> hints.Outcome:
    """What the program knew of a group, from its line of the rollouts."""
    samples = line["completions"]
    return hints.Outcome(
        problem_id=line["id"],
        stages=[hints.Stage(**stage) for stage in line["stages"]],
        n_earlier=line["n_earlier"],
        is_deferred=line["is_deferred"],
        rewards=[[sample[name] for name in config.reward_funcs] for sample in samples],
        lengths=[sample["tokens"] for sample in samples],
        is_truncated=[sample["finish_reason"] == "length" for sample in samples],
    )


def prove(run) -> None:
    """Compares the engine with the trainer: on greedy texts of the present weights and, so that the
    comparison can fail, on the greedy texts of the first weights, scored by old and new weights."""
    c, problems = run.eval_sets["heldout"]
    c = replace(c, max_completion_length=PROOF_TOKENS)
    blank = [hints.Group(problem) for problem in problems[:PROOF_PROBLEMS]]
    groups = ghpo.sample_groups(run, blank, c, "proof")
    asked = [replace(group, stages=[], next_stage=group.stages[0]) for group in groups]
    requests = [run.prompts.request(group, c, i, "proof") for i, group in enumerate(asked)]
    by_trainer = trainer_greedy(run, requests)
    equal = compared = 0
    gaps, differences = [], []
    for group in groups:
        (mine,) = group.completions
        theirs = by_trainer[group.problem.id]
        scored = trainer_logp(run, mine.prompt_ids, mine.token_ids)
        differences.extend(np.abs(scored - mine.behaviour_logp))
        pairs = list(zip(mine.token_ids, theirs.token_ids))
        same = [a == b for a, b in pairs]
        first = same.index(False) if False in same else len(same)
        equal, compared = equal + first, compared + len(pairs)
        if first < len(pairs):  # what the trainer's own choice was ahead by
            gaps.append(float(theirs.behaviour_logp[first] - scored[first]))
    step, path = run.state.step, run.folder / "proof_texts.json"
    if step == 0:
        texts = [[g.completions[0].prompt_ids, g.completions[0].token_ids] for g in groups]
        first_trainer = [trainer_logp(run, *text).tolist() for text in texts]
        first_sampler = [sampler_logp(run, *text).tolist() for text in texts]
        path.write_text(json.dumps([texts, first_trainer, first_sampler]))
    texts, old_trainer, old_sampler = json.loads(path.read_text())
    old_trainer, old_sampler = np.concatenate(old_trainer), np.concatenate(old_sampler)
    new_trainer = np.concatenate([trainer_logp(run, *text) for text in texts])
    new_sampler = np.concatenate([sampler_logp(run, *text) for text in texts])
    fsdp_utils.reshard(run.policy)  # a forward leaves the root's weights gathered
    moved_trainer, moved_sampler = new_trainer - old_trainer, new_sampler - old_sampler
    found = {
        "step": step, "greedy_tokens": compared, "equal_before_first_difference": equal,
        "trainer_was_ahead_by": gaps, "greedy_logp_difference": float(np.mean(differences)),
        "first_texts_tokens": len(new_trainer),
        "new_sampler_new_trainer": float(np.abs(new_sampler - new_trainer).mean()),
        "old_sampler_new_trainer": float(np.abs(old_sampler - new_trainer).mean()),
        "new_sampler_old_trainer": float(np.abs(new_sampler - old_trainer).mean()),
        "moved_trainer": float(np.abs(moved_trainer).mean()),
        "moved_sampler": float(np.abs(moved_sampler).mean()),
    }  # fmt: skip
    if step:
        found["moves_correlate"] = float(np.corrcoef(moved_trainer, moved_sampler)[0, 1])
    write_jsonl(run.folder / "proof.jsonl", [found], "a")
    print(found, flush=True)


# ---- the setting that is not to be used


def collapse(args: argparse.Namespace) -> None:
    """The same model, data and rate with the paper's prompt and its format reward: how training
    fails where accuracy is rare, and that the program tells it."""
    paper = load_config(ROOT / "configs/ghpo_7b_math3to5.yaml")
    run = start(args, [
        f"system_prompt={json.dumps(paper.system_prompt)}", "reward_funcs=[accuracy, format]",
        "reward_weights=[1.0, 0.5]", f"output_dir={args.out / 'collapse'}",
        f"max_steps={COLLAPSE_STEPS}", "eval_strategy=no", "eval_datasets={}",
        "save_steps=2",
    ])  # fmt: skip
    ghpo.train(run, ghpo.Interrupt())
    run.engine.close()
    run.pool.close()


def collapse_table(steps: list[dict]) -> list[str]:
    rows = [
        "| step | format | accuracy without hint | hard | tokens a sample |",
        "|---|---|---|---|---|",
    ]
    for m in steps:
        rows.append(
            f"| {m['step']} | {m['reward/format']:.2f} | {m['accuracy_without_hint']:.2f} "
            f"| {m['hard_fraction']:.2f} | {m['tokens/completion']:.0f} |")  # fmt: skip
    return rows


# ---- (c) the export, and what is shown


def changed(folder: Path) -> list[tuple[dict, dict]]:
    """(before, after) of the held-out problems whose verdict the run has changed, gained first."""
    paths = sorted(folder.glob("heldout_*.jsonl"))
    pairs = zip(read_jsonl(paths[0]), read_jsonl(paths[-1]))
    found = [pair for pair in pairs if pair[0]["accuracy"] != pair[1]["accuracy"]]
    return sorted(found, key=lambda pair: -pair[1]["accuracy"])


def after(args: argparse.Namespace) -> None:
    """The changed problems again by the export: in vLLM, and the first one in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM
    from vllm.sampling_params import SamplingParams

    from configs.vllm_cpu import cpu_options

    folder = args.out / "run"
    config = load_config(folder / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shown = [pair[1] for pair in changed(folder)]
    prompts = []
    for line in shown:
        messages = [
            {"role": "system", "content": config.system_prompt},
            {"role": "user", "content": line["problem"]},
        ]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    length = config.max_prompt_length + config.max_completion_length
    llm = LLM(str(folder / "model"), dtype="bfloat16", max_model_len=length, **cpu_options(length))
    params = SamplingParams(temperature=0.0, max_tokens=config.max_completion_length)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    for line, output in zip(shown, outputs):
        compare("vllm", line, output.outputs[0].text)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    output = model.generate(
        torch.tensor(prompts[:1]), max_new_tokens=config.max_completion_length, do_sample=False
    )
    text = tokenizer.decode(output[0, len(prompts[0]) :], skip_special_tokens=True)
    compare("transformers", shown[0], text)


def compare(engine: str, line: dict, text: str) -> None:
    """Prints how far a text is that of the run; a near-tie in bf16 may part them."""
    common = len(os.path.commonprefix([text, line["text"]]))
    print(
        f"{engine}: problem {line['id']}: the run's own text: {text == line['text']}, first "
        f"{common} of {len(text)} characters, ends {text[-40:]!r}",
        flush=True,
    )


STAGES = ("0.25", "0.5", "0.75")


def stage_counts(metrics: list[dict]) -> str:
    """Solved of tried at each hint ratio, over some lines of metrics."""
    cells = []
    for omega in STAGES:
        solved = sum(int(line.get(f"hint/solved@{omega}", 0)) for line in metrics)
        tried = sum(int(line.get(f"hint/tried@{omega}", 0)) for line in metrics)
        cells.append(f"{solved} of {tried}")
    return " / ".join(cells)


def ladder_table(folder: Path) -> list[str]:
    """One line for each source: what is solved without a hint and at each ratio."""
    paths = sorted((folder / "rollouts").glob("step_*.jsonl"))
    lines = [line for path in paths for line in read_jsonl(path)]
    config = load_config(folder / "config.yaml")
    rows = [
        "| 8 samples a problem | hard | solved at .25 / .50 / .75 of those tried | never solved "
        "| stages skipped | accuracy without hint | tokens, times un-hinted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in (
        ("GSM8K", [line for line in lines if line["id"] < LADDER_GSM8K]),
        ("MATH level 3-5", [line for line in lines if line["id"] >= LADDER_GSM8K]),
    ):
        if not part:  # the ladder was ended early
            continue
        m = hints.rollout_metrics([outcome(line, config) for line in part], config)
        plain, everything = m["tokens/generated@0"], m["tokens/generated"]
        rows.append(
            f"| {name} | {round(m['hard_fraction'] * len(part))} of {len(part)} "
            f"| {stage_counts([m])} | {m['hint/unsolved']} | {m['hint/skipped']} "
            f"| {m['accuracy_without_hint']:.2f} | {everything / plain:.1f} |")  # fmt: skip
    return rows


def steps_table(steps: list[dict]) -> list[str]:
    rows = [
        "| step | accuracy without hint | hard | solved at .25 / .50 / .75 of those tried | tokens "
        "a sample | truncated | k3 | gradient norm | generated | seconds: sample, train |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in steps:
        rows.append(
            f"| {m['step']} | {m['accuracy_without_hint']:.2f} | {m['hard_fraction']:.2f} "
            f"| {stage_counts([m])} | {m['tokens/completion']:.0f} | {m['truncated']:.2f} "
            f"| {m['mismatch_k3']:.1e} | {m['grad_norm']:.2f} | {m['tokens/generated']} "
            f"| {m['seconds/generate']:.0f}, {m['seconds/train']:.0f} |")  # fmt: skip
    return rows


def draw(steps: list[dict], evaluations: list[dict], collapsed: list[dict], path: Path) -> None:
    """Accuracy and hard fraction; lengths; what hints solved; the collapse."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt

    x = [m["step"] for m in steps]
    fig, (left, middle, right, last) = plt.subplots(1, 4, figsize=(15, 3.4))
    plain = [m["accuracy_without_hint"] for m in steps]
    smooth = [np.mean(plain[max(0, i - 3) : i + 1]) for i in range(len(plain))]
    left.plot(x, plain, ".", color="tab:blue", label="un-hinted, T 1 (4 problems x 8)")
    left.plot(x, smooth, color="tab:blue", label="mean of the last 4 steps")
    left.plot(x, [m["hard_fraction"] for m in steps], ":", color="tab:red", label="hard fraction")
    left.errorbar(
        [m["step"] for m in evaluations], [m["accuracy"] for m in evaluations],
        [m["stderr"] for m in evaluations], fmt="k*", label="40 held out, greedy")  # fmt: skip
    left.set(xlabel="step", ylim=(0, 1), title="accuracy")
    left.legend(fontsize=7)
    middle.plot(x, [m["tokens/completion"] for m in steps], color="tab:green")
    middle.set(xlabel="step", ylim=(0, None), title="tokens a completion; truncated")
    twin = middle.twinx()
    twin.plot(x, [m["truncated"] for m in steps], ":", color="tab:gray")
    twin.set_ylim(0, 1)
    for omega, colour in zip(STAGES, ("tab:purple", "tab:orange", "tab:green")):
        for kind, style in (("tried", ":"), ("solved", "-")):
            counts = np.cumsum([m.get(f"hint/{kind}@{omega}", 0) for m in steps])
            right.plot(x, counts, style, color=colour, label=f"{kind} at {omega}")
    right.set(xlabel="step", title="hinted problems, cumulative")
    right.legend(fontsize=7)
    for key, colour in (("reward/format", "tab:orange"), ("accuracy_without_hint", "tab:blue")):
        values = [m[key] for m in collapsed]
        last.plot([m["step"] for m in collapsed], values, color=colour, label=key)
    last.set(xlabel="step", ylim=(0, 1), title="not like this: format .5, paper's prompt")
    lengths = last.twinx()
    lengths.plot(
        [m["step"] for m in collapsed], [m["tokens/completion"] for m in collapsed], ":",
        color="tab:green")  # fmt: skip
    lengths.set_ylim(0, None)
    last.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def report(args: argparse.Namespace) -> None:
    """Prints the tables; copies what is small into tests/assets and draws the picture."""
    run = args.out / "run"
    is_new = run.is_dir()
    if not is_new:
        run = ASSETS  # the run that is on record
    metrics = read_jsonl(run / "metrics.jsonl")
    steps = [m for m in metrics if "loss" in m]
    evaluations = [evaluation(path) for path in sorted(run.glob("heldout_*.jsonl"))]
    tables = {"steps": steps_table(steps)}
    if [*(args.out / "ladder/rollouts").glob("step_*.jsonl")]:
        tables["ladder"] = ladder_table(args.out / "ladder")
    if (args.out / "collapse/metrics.jsonl").is_file():
        write_jsonl(ASSETS / "collapse.jsonl", read_jsonl(args.out / "collapse/metrics.jsonl"))
    collapsed = read_jsonl(ASSETS / "collapse.jsonl")
    tables["collapse"] = collapse_table(collapsed)
    for name, rows in tables.items():
        print(f"\n{name}\n" + "\n".join(rows))
    third = max(1, len(steps) // 3)
    print("\nwithout hint, first and last third of the steps:",
          *(f"{np.mean([m['accuracy_without_hint'] for m in part]):.3f}"
            for part in (steps[:third], steps[-third:])))  # fmt: skip
    print("hints solved, all steps:", stage_counts(steps))
    print(
        "generated tokens:",
        sum(m["tokens/generated"] for m in steps),
        "seconds:",
        round(sum(m["seconds/generate"] + m["seconds/train"] for m in steps)),
    )
    for m in evaluations:
        print(m)
    for line in read_jsonl(run / "proof.jsonl"):
        print(line)
    before, after = changed(run)[0]
    print(
        f"\n{before['problem']}\ngold {before['gold']}\n\nBEFORE\n{before['text']}\n\n"
        f"AFTER\n{after['text']}"
    )
    ASSETS.mkdir(parents=True, exist_ok=True)
    if is_new:
        rollouts = sorted((run / "rollouts").glob("step_*.jsonl"))[: len(steps)]
        heldout = sorted(run.glob("heldout_*.jsonl"))
        kept = [
            run / "metrics.jsonl",
            *run.glob("proof.jsonl"),
            *run.glob("control.json"),
            heldout[0],
            heldout[-1],
            rollouts[0],
            rollouts[-1],
        ]
        for path in kept:
            (ASSETS / path.name).write_bytes(path.read_bytes())
    keep_ladder(args.out / "ladder/rollouts")
    draw(steps, evaluations, collapsed, ASSETS.with_suffix(".png"))


def keep_ladder(rollouts: Path) -> None:
    """The lines of the ladder without texts, in the place of older lines of the same problems."""
    kept = ASSETS / "ladder.jsonl"
    lines = {line["id"]: line for line in read_jsonl(kept)} if kept.is_file() else {}
    for path in sorted(rollouts.glob("step_*.jsonl")):
        for line in read_jsonl(path):
            del line["completions"], line["prompt"]
            lines[line["id"]] = line
    write_jsonl(kept, [lines[number] for number in sorted(lines)])


COMMANDS = {
    "ladder": ladder, "train": train, "collapse": collapse, "after": after, "report": report,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*COMMANDS])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/real")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--until", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_intermixed_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as ghpo.py ends
