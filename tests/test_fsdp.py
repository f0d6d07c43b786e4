"""Sharding, streaming, clipping and checkpoints on gloo: 1, 2 and 4 CPU processes.

All checks on ranks, without pytest:  python tests/test_fsdp.py /tmp/somewhere all
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdp_utils as fu  # noqa: E402

MODES = {"zero3": {}, "zero2": {}, "ddp": {}, "hsdp": {"sharding": "zero3", "replicate": 2}}


class Root(nn.Module):
    """Stands for the trainer's Policy: the FSDP root around a causal LM."""

    def __init__(self, causal_lm):
        super().__init__()
        self.model = causal_lm

    def forward(self, ids_NT):
        return self.model(input_ids=ids_NT, use_cache=False).logits


def tiny(dtype=torch.float64, seed=0):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Root(Qwen2ForCausalLM(config).to(dtype))


def sharded(mode, root, **options):
    settings = {"sharding": mode} | MODES[mode] | options
    return fu.shard(root, list(root.model.model.layers), **settings)


def rows(n=8, seed=1):
    return torch.randint(0, 97, (n, 11), generator=torch.Generator().manual_seed(seed))


def loss_of(root, ids_NT, n_tokens):
    """Summed cross-entropy over a count that is the same on all ranks."""
    logits = root(ids_NT)[:, :-1].double()
    return (
        nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten(), reduction="sum")
        / n_tokens
    )


def backward_in_micro_batches(root, ids_NT, n_micro=2):
    mine = ids_NT[dist.get_rank() :: dist.get_world_size()]
    parts = mine.chunk(n_micro)
    for i, part in enumerate(parts):
        fu.sync_replicas(root, i == len(parts) - 1)
        loss_of(root, part, ids_NT.numel()).backward()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grads(root):
    return {name: whole(p.grad) for name, p in root.named_parameters()}


def reference_grads(ids_NT):
    root = tiny()
    loss_of(root, ids_NT, ids_NT.numel()).backward()
    return grads(root)


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        worst = (got[name] - want[name]).abs().max().item()
        assert worst <= tolerance, (name, worst)


# ---- checks that run on every rank of a torchrun ----


def check_gradients(folder):
    """Summed over ranks and micro-batches they equal one process's, in every sharding."""
    want = reference_grads(rows())
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    for mode in MODES if dist.get_world_size() < 4 else ["hsdp"]:
        root = sharded(mode, tiny())
        backward_in_micro_batches(root, rows())
        assert_close(grads(root), want, 1e-9)
        assert abs(fu.clip_grad_norm(root.parameters(), 0.0) - norm) < 1e-9
        assert abs(fu.clip_grad_norm(root.parameters(), 0.25 * norm.item()) - norm) < 1e-9
        scaled = {name: g * 0.25 for name, g in want.items()}
        assert_close(grads(root), scaled, 1e-6)  # torch adds 1e-6 to the norm it divides by


def check_stream(folder):
    """The stream is the original state, tied weights once, before and after use."""
    original = dict(tiny().named_parameters())
    for mode in MODES:
        root = sharded(mode, tiny())
        backward_in_micro_batches(root, rows())
        assert_close(dict(fu.full_tensors(root)), original, 0.0)
        half = dict(fu.full_tensors(root.model, torch.bfloat16))  # names as in the HF folder
        assert all(t.dtype == torch.bfloat16 for t in half.values())
        assert {"model." + name for name in half} == original.keys()
        assert "lm_head.weight" not in half
    if dist.get_world_size() > 1:
        fu.unshard(root)
        with pytest.raises(RuntimeError, match="reshard"):
            list(fu.full_tensors(root.model))


def check_uneven_forwards(folder):
    """Unsharded ranks may run different numbers of forwards, also before the first backward."""
    for mode in MODES:
        root = sharded(mode, tiny())
        want = loss_of(tiny(), rows(), 1.0).item()
        for _ in range(2):
            fu.unshard(root)
            with torch.no_grad():
                for _ in range(3 if dist.get_rank() == 0 else 7):
                    assert abs(loss_of(root, rows(), 1.0).item() - want) < 1e-9
            fu.reshard(root)
            root.zero_grad()
            backward_in_micro_batches(root, rows())
        assert_close(grads(root), reference_grads(rows()), 1e-9)


def check_weights_move_after_sampling(folder):
    """A forward after unshard sees the step that came before it, not the gathered copy."""
    root = sharded("zero2", tiny())
    optimizer = torch.optim.SGD(root.parameters(), lr=1.0)
    for _ in range(2):
        fu.unshard(root)
        with torch.no_grad():
            root(rows())
        fu.reshard(root)
        backward_in_micro_batches(root, rows())
        optimizer.step()
        optimizer.zero_grad()
    plain = tiny()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    for _ in range(2):
        loss_of(plain, rows(), rows().numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(dict(fu.full_tensors(root)), dict(plain.named_parameters()), 1e-9)


def check_mixed_precision(folder):
    """bf16 compute, fp32 masters and reduction; half-precision weights are raised to fp32."""
    root = sharded("zero3", tiny(torch.bfloat16), dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in root.parameters())
    seen = []
    layer = root.model.model.layers[0].mlp
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-6)
    before = {name: t.clone() for name, t in fu.full_tensors(root)}  # on 1 rank they alias
    backward_in_micro_batches(root, rows())
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert all(p.grad.dtype == torch.float32 for p in root.parameters())
    cosine = nn.functional.cosine_similarity
    for name, want in reference_grads(rows()).items():
        # masters are bf16-rounded here and there not, hence a direction and not a difference
        assert cosine(grads(root)[name].double().flatten(), want.flatten(), 0) > 0.99, name
    optimizer.step()
    after = dict(fu.full_tensors(root))
    moved = sum((after[name] != before[name]).sum().item() for name in before)
    assert moved > 0.9 * sum(t.numel() for t in before.values())  # lr 1e-6 does move fp32


def check_cpu_offload(folder):
    root = sharded("zero3", tiny(), cpu_offload=True)
    backward_in_micro_batches(root, rows())
    assert_close(grads(root), reference_grads(rows()), 1e-9)
    torch.optim.SGD(root.parameters(), lr=1.0).step()
    want = {name: p - reference_grads(rows())[name] for name, p in tiny().named_parameters()}
    assert_close(dict(fu.full_tensors(root)), want, 1e-9)


def train(root, optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        backward_in_micro_batches(root, rows(seed=step))
        fu.clip_grad_norm(root.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def everything(root, optimizer):
    """Weights and optimizer state as whole tensors."""
    state = {
        f"{name}.{key}": whole(value)
        for name, p in root.named_parameters()
        for key, value in optimizer.state[p].items()
    }
    return dict(fu.full_tensors(root)) | state


def adam(root, fused=False):
    return torch.optim.AdamW(root.parameters(), lr=0.01, weight_decay=0.1, fused=fused)


def check_exact_resume(folder):
    """4 steps equal 2, save, load in a fresh model, 2 more: bit for bit."""
    world = dist.get_world_size()
    cases = [("zero3", False), ("zero2", True), ("hsdp", False)]
    for mode, fused in cases[2:] if world == 4 else cases:
        here = Path(folder) / f"resume-{world}-{mode}-{fused}"
        root = sharded(mode, tiny(torch.float32))
        optimizer = adam(root, fused)
        train(root, optimizer, range(2))
        state = {"step": 2, "lr": 0.1 + 0.2, "queue": [[7, 0.25]]}
        fu.save_checkpoint(here, 2, root, optimizer, state)
        train(root, optimizer, range(2, 4))
        fresh = sharded(mode, tiny(torch.float32, seed=5))
        again = adam(fresh, fused)
        assert fu.load_checkpoint(fu.checkpoints(here)[-1], fresh, again) == state
        train(fresh, again, range(2, 4))
        assert_close(everything(fresh, again), everything(root, optimizer), 0.0)


def check_save_for_other_world(folder):
    root = sharded("zero3", tiny(torch.float32))
    optimizer = adam(root)
    train(root, optimizer, range(2))
    fu.save_checkpoint(Path(folder) / f"from-{dist.get_world_size()}", 2, root, optimizer, {})
    if dist.get_rank() == 0:
        torch.save(everything(root, optimizer), Path(folder) / f"from-{dist.get_world_size()}.pt")
    else:
        everything(root, optimizer)


def check_load_from_other_world(folder):
    """A checkpoint of 2 ranks loads on 1, one of 1 on 4."""
    source = {1: 2, 4: 1}[dist.get_world_size()]
    root = sharded("zero3", tiny(torch.float32, seed=5))
    optimizer = adam(root)
    fu.load_checkpoint(fu.checkpoints(Path(folder) / f"from-{source}")[-1], root, optimizer)
    assert_close(everything(root, optimizer), torch.load(Path(folder) / f"from-{source}.pt"), 0.0)


def check_keep(folder):
    """Old checkpoints go only after the new one; stale temporaries do not confuse."""
    here = Path(folder) / f"keep-{dist.get_world_size()}"
    root = sharded("zero3", tiny(torch.float32))
    optimizer = adam(root)
    train(root, optimizer, range(1))
    if dist.get_rank() == 0:
        (here / "checkpoint-000003.tmp").mkdir(parents=True)
        (here / "checkpoint-000003.tmp" / "junk").write_text("from a killed write")
    seen_while_writing = []

    def export(path):
        assert path.name.endswith(".tmp")
        seen_while_writing.append(sorted(p.name for p in here.glob("checkpoint-??????")))
        if dist.get_rank() == 0:
            (path / "exported").write_text("x")

    for step in (1, 2, 3):
        fu.save_checkpoint(here, step, root, optimizer, {"step": step}, keep=2, export=export)
    names = ["checkpoint-000001", "checkpoint-000002", "checkpoint-000003"]
    assert seen_while_writing == [[], names[:1], names[:2]]
    assert sorted(p.name for p in here.iterdir()) == names[1:]
    assert fu.checkpoints(here)[-1].name == names[2]
    assert sorted(p.name for p in (here / names[2]).iterdir() if p.suffix != ".distcp") == [
        ".metadata",
        "checksums.json",
        "exported",
        "state.json",
    ]
    assert fu.checkpoints(here / "nothing") == []


def damage(path, kind):
    """One fault in a complete checkpoint."""
    shard, state = sorted(path.glob("*.distcp"))[-1], path / "state.json"
    if kind == "zeros":
        whole = bytearray(shard.read_bytes())
        middle = len(whole) // 2
        whole[middle : middle + 64] = bytes(64)
        shard.write_bytes(whole)
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "missing":
        shard.unlink()
    elif kind == "missing state":  # which is in one rank's share
        state.unlink()
    elif kind == "empty state":
        state.write_text("")
    elif kind == "no checksums":
        (path / "checksums.json").unlink()
    elif kind == "empty checksums":
        (path / "checksums.json").write_text("")
    elif kind == "bits of metadata":  # torch's unpickling of these could end in any error
        whole = bytearray((path / ".metadata").read_bytes())
        whole[len(whole) // 3] ^= 4
        (path / ".metadata").write_bytes(whole)
    elif kind == "code in metadata":
        (path / ".metadata").write_bytes(pickle.dumps(Payload(str(path.parent / "executed"))))
    elif kind == "byte item":
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.state_dict_metadata["model.extra"] = BytesStorageMetadata()
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    if kind in ("code in metadata", "byte item"):  # by somebody who knows of the checksums
        sums = json.loads((path / "checksums.json").read_text())
        sums[".metadata"] = fu.checksum(path / ".metadata")
        (path / "checksums.json").write_text(json.dumps(sums))


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


DAMAGE = {
    "zeros": "has changed",
    "truncated": "has changed",
    "missing": "is missing",
    "missing state": "state.json is missing",
    "empty state": "state.json has changed",
    "no checksums": "checksums.json is missing",
    "empty checksums": "Expecting value",
    "bits of metadata": ".metadata has changed",
    "code in metadata": "names builtins.exec",
    "byte item": "metadata.BytesStorageMetadata",
}


def check_damage(folder):
    """A damaged checkpoint is named and set aside, the good one before it is used; other names are
    left alone; without a good one the run does not begin anew by itself."""
    here = Path(folder) / f"damage-{dist.get_world_size()}"
    root = sharded("zero3", tiny(torch.float32))
    optimizer = adam(root)
    told = []
    fu.say = told.append
    train(root, optimizer, range(1))
    fu.save_checkpoint(here, 1, root, optimizer, {"step": 1})
    good = everything(root, optimizer)
    if dist.get_rank() == 0:
        for name in ("checkpoint-best", "checkpoint-000009-kept", "checkpoint-notes"):
            (here / name).mkdir()
        (here / "checkpoint-000009.txt").write_text("mine")
        (here / "checkpoint-000008").write_text("a file")
    for kind, message in DAMAGE.items():
        train(root, optimizer, range(1))
        fu.save_checkpoint(here, 2, root, optimizer, {"step": 2}, keep=2)
        if dist.get_rank() == 0:
            damage(here / "checkpoint-000002", kind)
        fu.barrier("damaged")
        told.clear()
        path, state = fu.load_newest(here, root, optimizer)
        assert (path.name, state) == ("checkpoint-000001", {"step": 1}), kind
        assert_close(everything(root, optimizer), good, 0.0)
        assert message in told[0] and "checkpoint-000002 is damaged" in told[0], (kind, told)
    fu.barrier("looked at")
    assert not (here / "executed").exists()
    names = {path.name for path in here.iterdir()}
    assert len([name for name in names if ".damaged" in name]) == len(DAMAGE)
    assert names >= {
        "checkpoint-best",
        "checkpoint-000009-kept",
        "checkpoint-notes",
        "checkpoint-000009.txt",
        "checkpoint-000008",
        "checkpoint-000001",
    }
    fu.barrier("counted")
    if dist.get_rank() == 0:
        damage(here / "checkpoint-000001", "zeros")
    fu.barrier("damaged")
    for _ in range(2):  # the next start does not begin anew either
        with pytest.raises(ValueError, match="no good checkpoint left"):
            fu.load_newest(here, root, optimizer)
        fu.barrier("refused")
    assert fu.load_newest(here / "nothing", root, optimizer) is None


def check_helpers(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    assert fu.all_reduce_scalars({"a": rank + 0.1, "b": -rank}) == pytest.approx(
        {"a": sum(r + 0.1 for r in range(world)), "b": -sum(range(world))}
    )
    assert fu.all_reduce_scalars({"a": rank}, "max") == {"a": world - 1}
    assert fu.gather_objects(("rank", rank)) == [("rank", r) for r in range(world)]


def check_all_masters_kept_by_wrapping(folder):
    """One fp32 process stays unwrapped, a mixed-precision one does not."""
    assert not isinstance(sharded("zero3", tiny(torch.float32)), fu.fsdp.FSDPModule)
    wrapped = sharded("zero3", tiny(torch.float32), dtype=torch.bfloat16)
    assert isinstance(wrapped, fu.fsdp.FSDPModule)


COMMON = [
    "gradients",
    "stream",
    "uneven_forwards",
    "weights_move_after_sampling",
    "mixed_precision",
    "cpu_offload",
    "exact_resume",
    "keep",
    "damage",
    "helpers",
]
CHECKS = {
    2: COMMON + ["save_for_other_world"],
    1: COMMON + ["save_for_other_world", "load_from_other_world", "all_masters_kept_by_wrapping"],
    4: ["gradients", "exact_resume", "load_from_other_world"],
}


def run_check(name, folder):
    if dist.get_world_size() == 1:  # HSDP needs two ranks
        MODES.update(hsdp={"sharding": "zero3"})
    globals()[f"check_{name}"](folder)
    fu.barrier("test")


# ---- pytest side ----


def run_this_file(*args, torchrun=False):
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, __file__, *map(str, args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_this_file(tmp_path_factory.mktemp("fsdp"), "all")


def fork_ranks(world):
    """Become `world` ranks, which saves the imports that torchrun would do once per rank.

    The parent waits and ends with the first failure; the function returns in the children only.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(world),
                    MASTER_ADDR="localhost",
                    MASTER_PORT=str(port),
                )
            return True
        children[pid] = rank
    while children:
        pid, status = os.wait()
        del children[pid]
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
    return False


@pytest.mark.parametrize("world,name", [(w, name) for w in CHECKS for name in CHECKS[w]])
def test_on_ranks(outcome, world, name):
    assert f"ok {world} {name}\n" in outcome.stdout, outcome.stdout + outcome.stderr[-4000:]


def test_failed_rank_is_named_and_ends_the_others_at_once(tmp_path):
    start = time.monotonic()
    done = run_this_file(tmp_path, "fail_on_rank_1", torchrun=True)
    assert done.returncode != 0
    assert "[rank 1 of 2] failed in phase 'train step 7': no more tea" in done.stderr
    assert time.monotonic() - start < 200  # and not the ten minutes of a timeout


def test_collective_timeout_names_rank_and_phase(tmp_path):
    done = run_this_file(tmp_path, "hang_on_rank_1", torchrun=True)
    assert "[rank 0 of 2] failed in phase 'sync weights, barrier: test'" in done.stderr


def fail_on_rank_1():
    fu.setup_distributed()
    with fu.phase("train step 7"):
        if dist.get_rank() == 1:
            raise RuntimeError("no more tea")
        fu.barrier("test")


def hang_on_rank_1():
    fu.setup_distributed(timeout_s=3, wait_s=3)
    if dist.get_rank() == 1:
        time.sleep(20)
    with fu.phase("sync weights"):
        fu.barrier("test")


def save_and_save(folder):
    """Writes checkpoints without end until it is killed."""
    fu.setup_distributed()
    root = sharded("zero3", tiny(torch.float32))
    optimizer = adam(root)
    first = max([0, *(int(path.name[-6:]) for path in fu.checkpoints(folder))]) + 1
    for step in range(first, 10_000):
        train(root, optimizer, [step])
        fu.save_checkpoint(folder, step, root, optimizer, {"step": step}, keep=2)
        print(step, flush=True)


def test_kill_while_saving_keeps_a_good_checkpoint(tmp_path):
    """SIGKILL at two moments of a run that does little else than save."""
    for delay in (0.0, 0.02):
        child = subprocess.Popen(
            [sys.executable, __file__, tmp_path, "save_and_save"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3):
            last = int(child.stdout.readline())
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        path = fu.checkpoints(tmp_path)[-1]
        assert int(path.name[-6:]) >= last
        root = tiny(torch.float32)
        assert fu.load_checkpoint(path, root, adam(root)) == {"step": int(path.name[-6:])}


def run_checks(target):
    place = fu.setup_distributed()
    for check in CHECKS[place.world]:
        with fu.phase(check):
            began = time.monotonic()
            run_check(check, target)
            if place.rank == 0:
                print(f"ok {place.world} {check}", flush=True)
                print(f"{check}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    target, name = sys.argv[1:]
    if name in ("fail_on_rank_1", "hang_on_rank_1"):
        globals()[name]()
    elif name == "save_and_save":
        save_and_save(Path(target))
    else:
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401  before the forks

        for world in CHECKS:  # 2 before 1 before 4: they pass each other checkpoints
            if fork_ranks(world):
                run_checks(target)
                break
