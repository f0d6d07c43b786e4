"""A real model on real mathematics, on one CPU thread: what the README's section of it shows.

    python tests/real_run.py ladder MODEL    hints at every ratio, before training: 36 problems x 8
    python tests/real_run.py train MODEL     configs/gsm8k_cpu.yaml with evaluations and proofs that
                                             the sampler has the new weights; again: it resumes
    python tests/real_run.py after MODEL     the exported model in transformers and vLLM, one text
    python tests/real_run.py report          tables, picture and tests/assets/real_run

MODEL: a folder or hub name. --until N ends training after N steps; --data FOLDER has the rows,
gsm8k_train.jsonl and math500_dev.jsonl (columns problem, solution, solution_hint, level); key=value
settings go through to the program. About six minutes a step and 12 GB of memory.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads are many times slower
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fsdp_utils  # noqa: E402
import ghpo  # noqa: E402
import numpy as np  # noqa: E402
import rollout  # noqa: E402
import torch  # noqa: E402
from configs import load_config  # noqa: E402
from estimates import rollout_metrics  # noqa: E402

CONFIG = ROOT / "configs/gsm8k_cpu.yaml"
ASSETS = ROOT / "tests/assets/real_run"
HELD_OUT = 40  # problems at the end of the file that are never trained on
LADDER_GSM8K, LADDER_MATH = 24, 12
PROOFS, PROOF_PROBLEMS, PROOF_TOKENS = (1, 3), 5, 64
EVALUATIONS = (12, 24)


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
    return ghpo.setup(load_config(CONFIG, settings, is_dry=False))


# ---- (a) the ladder before training


def ladder(args: argparse.Namespace) -> None:
    """Every problem of the ladder file once, as one step of the program without its update."""
    problems = LADDER_GSM8K + LADDER_MATH
    run = start(args, [
        f"dataset_name={args.out / 'data/ladder.jsonl'}", f"output_dir={args.out / 'ladder'}",
        f"gradient_accumulation_steps={problems}", "max_completion_length=512", "max_steps=1",
        "learning_rate=0",
    ])  # fmt: skip
    blank = ghpo.next_groups(run)
    groups, planned = ghpo.roll_out(run, blank, run.config, 0)
    ghpo.write_metrics(run, ghpo.record(run, groups, blank, planned) | {"ladder": 1})


# ---- (b) the run


def train(args: argparse.Namespace) -> None:
    """Training in pieces that end where something is to be looked at."""
    run = start(args, [])
    last = min(args.until or run.plan.steps, run.plan.steps)
    stops = sorted({stop for stop in PROOFS + EVALUATIONS if stop < last} | {last})
    run.config = replace(run.config, eval_strategy="no")  # it is called from here
    if run.state["step"] == 0:
        evaluate(run)
        prove(run)
    for stop in stops:
        if run.state["step"] < stop:
            run.plan.steps = stop
            ghpo.train(run)
            if stop in PROOFS:
                prove(run)
            if stop in EVALUATIONS or stop == last:
                evaluate(run)
    ghpo.export(run, run.folder / "model")
    run.engine.close()
    run.pool.close()


def evaluate(run) -> None:
    """Greedy and without hints on the held-out problems; the texts are kept."""
    c, problems = run.eval_sets["heldout"]
    groups, _ = ghpo.roll_out(run, [rollout.Group(problem) for problem in problems], c, "heldout")
    step, lines = run.state["step"], []
    for group in groups:
        (completion,), (scores,) = group.completions, group.rewards
        lines.append({
            "step": step, "id": group.problem.id, "accuracy": scores[run.accuracy],
            "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason,
            "problem": group.problem.messages[-1]["content"], "gold": group.problem.answer,
            "text": completion.text,
        })  # fmt: skip
    write_jsonl(run.folder / f"heldout_{step:06d}.jsonl", lines)
    ghpo.write_metrics(run, {
        "eval/heldout": float(np.mean([line["accuracy"] for line in lines])),
        "eval/heldout_tokens": float(np.mean([line["tokens"] for line in lines])),
        "eval/heldout_truncated": float(np.mean(
            [line["finish_reason"] == "length" for line in lines])),
    })  # fmt: skip


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
        run.config, run.prompts.tokenizer, ends, run.engine.max_model_len, run.policy)
    for request in requests:
        engine.submit(request)
    engine.wake()
    found = {}
    while engine.busy:
        for request, (completion,) in engine.poll():
            found[request.problem.id] = completion
    engine.sleep()
    return found


def prove(run) -> None:
    """Compares the engine with the trainer: on greedy texts of the present weights and, so that the
    comparison can fail, on the greedy texts of the first weights, scored by old and new weights."""
    c, problems = run.eval_sets["heldout"]
    c = replace(c, max_completion_length=PROOF_TOKENS)
    blank = [rollout.Group(problem) for problem in problems[:PROOF_PROBLEMS]]
    groups, _ = ghpo.roll_out(run, blank, c, "proof")
    by_trainer = trainer_greedy(run, [group.request for group in groups])
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
    step, path = run.state["step"], run.folder / "proof_texts.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["ladder", "train"])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/real")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--until", type=int, default=0)
    args = parser.parse_intermixed_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as ghpo.py ends
