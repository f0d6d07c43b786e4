"""What the core tests share: the tiny base model, small configs, runs inside this process."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two threads on two busy cores are far slower
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is meant, on a machine with a GPU too

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import configs.settings  # noqa: E402
import fsdp_utils  # noqa: E402
import ghpo  # noqa: E402
import hints  # noqa: E402
from rollout import Completion, Group, HfEngine, Request  # noqa: E402

BASE = ROOT / "tests" / "tiny" / "base"
DATA = ROOT / "tests" / "tiny" / "data"
SHARED = ROOT.parent / "shared" / "data"
PAD, EOS = 256, 257  # of the tiny tokenizer


def settings(**changes):
    """A config as a dict: 4 problems x 4 samples a step on the tiny model, float32."""
    return {
        "model_name_or_path": str(BASE), "torch_dtype": "float32", "gradient_checkpointing": False,
        "dataset_name": str(DATA / "train.jsonl"), "num_generations": 4, "max_prompt_length": 128,
        "max_completion_length": 64, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "learning_rate": 3e-4, "lr_scheduler_type": "constant",
        "max_steps": 2, "engine": "hf", "save_strategy": "no", "seed": 0,
        **changes,
    }  # fmt: skip


def make_config(**changes):
    return configs.settings.make_config(settings(**changes))


def sampling(temperature=1.0, length=2048, top_p=1.0, top_k=0):
    """A config that samples so, greedily at temperature 0."""
    samples = 4 if temperature else 1
    return replace(
        make_config(),
        temperature=temperature,
        num_generations=samples,
        max_completion_length=length,
        top_p=top_p,
        top_k=top_k,
    )


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def group_of_one():
    """The process group of this process, joined once."""
    if not dist.is_initialized():
        hook = sys.excepthook
        fsdp_utils.setup_distributed()
        sys.excepthook = hook
    return SimpleNamespace(rank=0, local_rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def alone():
    """A process group of one."""
    return group_of_one()


@pytest.fixture(scope="session")
def prompts():
    """The chat template of the tiny model."""
    return ghpo.Prompts(make_config(), ghpo.State())


def compute_exactly(policy):
    """Makes float64 models float64 throughout: transformers' RMSNorm computes in float32."""

    def forward(norm, x):
        return (
            norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        )

    for module in policy.modules():
        if type(module).__name__.endswith("RMSNorm") and module.weight.dtype == torch.float64:
            module.forward = MethodType(forward, module)
    return policy


class Policies:
    """The tiny policy for `optimize`, built once for each kind and given its weights back."""

    def __init__(self, alone):
        self.alone = alone
        self.kept = {}

    def __call__(self, config, **changes):
        """A run for ghpo.optimize with plain gradient descent: weights move by lr * gradient."""
        policy, weights = self._policy(config.torch_dtype)
        policy.load_state_dict(weights)
        policy.zero_grad()
        run = SimpleNamespace(
            config=config,
            policy=policy,
            device=self.alone.device,
            rank=0,
            world=1,
            master_dtype=next(policy.parameters()).dtype,
            reference=None,
            state=ghpo.State(),
            optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        )
        run.__dict__.update(changes)
        return run

    def _policy(self, name):
        if name not in self.kept:
            torch.set_num_threads(1)
            policy = compute_exactly(ghpo.load_policy(make_config(torch_dtype=name)))
            weights = {key: value.clone() for key, value in policy.state_dict().items()}
            self.kept[name] = policy, weights
        return self.kept[name]


@pytest.fixture(scope="session")
def make_run(alone):
    return Policies(alone)


def new_engine(policy, kind=HfEngine, max_rows=256):
    """An hf engine with the tiny tokenizer."""
    config = make_config()
    tokenizer = ghpo.Prompts(config, ghpo.State()).tokenizer
    engine = kind(config, tokenizer, {EOS}, math.inf, policy)
    engine.max_rows = max_rows
    return engine


@pytest.fixture
def engine(make_run):
    """engine(max_rows=, dtype=): an HfEngine on the tiny model."""

    def build(dtype="float32", **options):
        return new_engine(make_run(make_config(torch_dtype=dtype)).policy, **options)

    return build


def problem(i=0, question="4a3b5c2?", gold="(7,2,4)", solution="a37\nb52\nc24\nend"):
    return hints.Problem(i, [{"role": "user", "content": question}], gold, solution)


def unhinted(size):
    """A Stage that shows nothing."""
    return hints.Stage([0.0] * size, [""] * size)


def request(prompt_ids, samples=2, seed=0, slot=0, config=None, of=None):
    """A request with given prompt ids and no hint."""
    return Request(
        of or problem(),
        unhinted(samples),
        [list(prompt_ids)] * samples,
        [""] * samples,
        seed,
        config or sampling(1.0, 12),
        slot,
    )


def row(length, advantage=1.0, n_context=1):
    """A Row that only has a length."""
    return ghpo.Row([0] * int(length), n_context, [], [], [], [], advantage, 1)


def run_engine(engine, requests):
    """{slot: completions} of requests that are submitted together."""
    engine.wake()
    for one in requests:
        engine.submit(one)
    done = {}
    while engine.is_busy():
        done |= {one.slot: completions for one, completions in engine.poll()}
    engine.sleep()
    return done


def recorded_groups(seed=0, sizes=(4, 4, 4), longest=12, with_logp=None):
    """Groups of random completions: mixed rewards, a group without advantage, truncated rows.

    Behaviour log-probs are near ln(1/266), where the untrained targets are: E7 cuts some of them.
    """
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=rng).tolist()  # noqa: E731
    groups = []
    for i, size in enumerate(sizes):
        completions, rewards = [], []
        prompt = draw(32, 127, 5 + 3 * i)
        for j in range(size):
            length = 1 + (3 * j + 5 * i) % longest
            logp = (-8 + 6 * torch.rand(length, generator=rng, dtype=torch.float64)).tolist()
            reason = "length" if (i + j) % 3 == 2 else "stop"
            completions.append(Completion(prompt, draw(32, 127, length), logp, reason, 0.0))
            rewards.append([1.0, 0.0] if i == 1 else [float(j % 2), float(j < 2)])
        groups.append(Group(problem(i), [], completions, rewards))
    return groups


class Main:
    """ghpo.main inside this process: exit status, standard error, results folder."""

    def __init__(self, alone, patch, capsys):
        self.alone, self.patch, self.capsys = alone, patch, capsys

    def __call__(self, folder, *flags, **changes):
        """Runs a config of `settings`, written to folder."""
        changes.setdefault("output_dir", str(Path(folder) / "out"))
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(settings(**changes)))  # JSON is YAML
        return self.command("--config", str(path), *flags, folder=changes["output_dir"])

    def command(self, *arguments, folder=None):
        """Runs a command line."""
        self.patch.setattr(fsdp_utils, "setup_distributed", lambda *a: self.alone)
        self.patch.setattr(sys, "argv", ["ghpo.py", *arguments])
        self.patch.setattr(ghpo.os, "_exit", sys.exit)
        # pytest keeps its own handler of Ctrl-C
        self.patch.setattr(ghpo, "Interrupt", lambda: SimpleNamespace(received=0))
        self.capsys.readouterr()
        status = 0
        try:
            ghpo.main()
        except SystemExit as end:
            status = end.code
        out, err = self.capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, folder=folder and Path(folder))


@pytest.fixture
def main(alone, monkeypatch, capsys):
    torch.set_num_threads(1)
    return Main(alone, monkeypatch, capsys)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The folder that two gloo ranks wrote: see two_ranks.py. Hangs end after three minutes."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "tests" / "two_ranks.py"),
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def setup(alone, monkeypatch, tmp_path):
    """setup(**changes): ghpo.setup in this process, with a new output folder."""
    monkeypatch.setattr(fsdp_utils, "setup_distributed", lambda *a: alone)
    runs = []

    def build(**changes):
        changes.setdefault("output_dir", str(tmp_path / f"run{len(runs)}"))
        runs.append(ghpo.setup(make_config(**changes)))
        return runs[-1]

    yield build
    for run in runs:
        run.pool.close()


class ScriptedPool:
    """A group passes (its first sample only) after passes(step, slot) failed stages.

    step counts the first stages of a slot. Verdicts are `delay` polls late unless waited for.
    """

    def __init__(self, passes, delay=0):
        self.passes, self.delay = passes, delay
        self.firsts, self.failed = Counter(), Counter()
        self.waiting, self.stats, self.error = [], {}, None

    def submit(self, key, texts, gold, row=None):
        request, completions = key
        number = request.problem.id
        self.failed[number] = self.failed[number] + 1 if any(request.stage.hints) else 0
        failed = self.failed[number]
        self.firsts[request.slot] += failed == 0
        is_right = failed >= self.passes(self.firsts[request.slot] - 1, request.slot)
        rewards = [[float(is_right and j == 0), float(j % 2)] for j in range(len(completions))]
        self.waiting.append((self.delay, key, rewards))

    def poll(self, wait):
        ready = [(key, rewards) for n, key, rewards in self.waiting if wait or n <= 0]
        self.waiting = [(n - 1, *rest) for n, *rest in self.waiting if not wait and n > 0]
        return ready

    def close(self):
        pass


@pytest.fixture
def scripted_training(setup, monkeypatch, tmp_path):
    """scripted_training(passes, rows, **changes): ghpo.train with a ScriptedPool on data rows.

    Returns (run, [(groups, rows of the loss) of each step], rollout lines of each step).
    """

    def go(passes, data, pool=ScriptedPool, **changes):
        run = setup(dataset_name=write_jsonl(tmp_path / "data.jsonl", data), **changes)
        run.pool.close()
        run = replace(run, pool=pool(passes))
        seen, make_rows = [], ghpo.make_rows

        def remember(groups, *rest):
            seen.append((groups, make_rows(groups, *rest)))
            return seen[-1][1]

        monkeypatch.setattr(ghpo, "make_rows", remember)
        ghpo.train(run, SimpleNamespace(received=0))
        files = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
        return run, seen, [read_jsonl(path) for path in files]

    return go


def pytest_collection_modifyitems(items):
    """Tests that fork their ranks come first: a process with a group of its own must not fork."""
    items.sort(key=lambda item: item.path.name not in ("test_fsdp.py", "test_resume.py"))
