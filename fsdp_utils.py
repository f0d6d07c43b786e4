"""Processes, sharding, full-tensor streaming and checkpoints: all that knows torch.distributed.

Works in one plain process or under torchrun. Every sharding is fully_shard on a (replicate, shard)
mesh, and gradients are SUMMED over ranks: the loss divides by global counts. Fork point: `shard`.
"""
import faulthandler
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard)
from torch.distributed.tensor import DTensor

_now = {"phase": "start", "timeout": timedelta(seconds=600)}
seconds = Counter()  # spent in each phase since this was last cleared

def setup_distributed(timeout_s=600):
    """Join torchrun's group, or a group of one: a record of rank, world and device. Collectives
    fail after timeout_s seconds; an uncaught error names rank and phase."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    _now["timeout"] = timedelta(seconds=timeout_s)
    store = None if "RANK" in os.environ else dist.HashStore()  # one process needs no port
    dist.init_process_group(
        backend, timeout=_now["timeout"], store=store, rank=rank, world_size=world)
    faulthandler.enable()  # NCCL's watchdog aborts the process: show where it stood

    def report(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        place = f"[rank {rank} of {world}] failed in phase '{_now['phase']}'"
        print(f"{place}: {error}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(1)  # no clean-up that waits for peers: torchrun then ends them

    sys.excepthook = report
    return SimpleNamespace(rank=rank, world=world, device=device)

@contextmanager
def phase(name: str):
    """Name what this rank does now, for the report of an uncaught error, and take the time."""
    before, _now["phase"] = _now["phase"], name
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started
    _now["phase"] = before  # not reached on an error, which is then reported under `name`

def all_reduce_scalars(values, op="sum"):
    """Sum or max over ranks of each value of a dict, in float64; same keys on every rank."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return dict(zip(values, total.tolist()))

def gather_objects(item: Any) -> list:
    """The item of every rank, in rank order, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items

def barrier(why: str) -> None:
    """All ranks get here before any goes on; `why` is for the reader and for a timeout's report."""
    before, _now["phase"] = _now["phase"], f"{_now['phase']}, barrier: {why}"
    dist.all_gather_object([None] * dist.get_world_size(), None)
    _now["phase"] = before

def phase_seconds() -> dict[str, float]:
    """Seconds of this rank in each phase since `seconds` was cleared."""
    return {f"seconds/{name}": spent for name, spent in seconds.items()}

def gpu_memory() -> dict[str, float]:
    """GiB of this rank's GPU in use, by the engine too, and this process's peak; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    free, whole = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return {"gib/used": (whole - free) / 2**30, "gib/peak": peak / 2**30}

def shard(module, blocks, sharding="zero3", dtype=None, replicate=1, cpu_offload=False):
    """Shard each block and the root in place; `dtype` is the compute type, masters stay fp32.
    sharding: zero3 frees a block after its forward, zero2 keeps it, ddp copies everything on
    every rank. replicate > 1 is HSDP: that many replicas of world / replicate neighbouring ranks.
    One process without mixed precision or offload stays unwrapped: hooks would only cost time.
    """
    world = dist.get_world_size()
    replicate = world if sharding == "ddp" else replicate
    if sharding not in ("zero3", "zero2", "ddp") or world % replicate:
        raise ValueError(f"sharding {sharding!r} with {world} ranks in {replicate} replicas: need "
                         "zero3, zero2 or ddp, and ranks divisible by replicas")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    master = torch.promote_types(next(module.parameters()).dtype, torch.float32)
    if world == 1 and dtype in (None, master) and not cpu_offload:
        return module.to(kind, master)
    # subgroups would get torch's 30 minutes, so they are made here, with our timeout
    mesh = DeviceMesh.from_group(dist.group.WORLD, kind)
    if replicate > 1:
        ranks = torch.arange(world).view(replicate, -1)  # (replica, shard)
        groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=_now["timeout"])[0]
                  for rows in (ranks.T, ranks)]
        mesh = DeviceMesh.from_group(
            groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the loss's fp32 inputs stay fp32
    if dtype not in (None, master):
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy()
    for part in [*blocks, module]:
        # the root keeps its weights up to the backward, which starts with them
        part.frees_after_forward = sharding == "zero3" and part is not module
        fully_shard(part.to(master), mesh=mesh, reshard_after_forward=part.frees_after_forward,
                    mp_policy=policy, offload_policy=offload)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else a premultiplied sum: not in gloo
    return module

def last_micro_batch(module, is_last: bool) -> None:
    """Leave the all-reduce over replicas (HSDP, ddp) to the step's last backward."""
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(is_last)

def unshard(module) -> None:
    """Gather all weights and keep them: forwards (without gradients) then need no collective."""
    for part in _fsdp_parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()

def reshard(module) -> None:
    """Back to the sharded state and the setting of `shard`."""
    for part in _fsdp_parts(module):
        part.set_reshard_after_forward(part.frees_after_forward, recurse=False)
        part.reshard()

def _fsdp_parts(module):
    return [m for m in module.modules() if isinstance(m, FSDPModule)]

def full_tensors(module, dtype=None):
    """Yield (name, whole tensor) one at a time, same order on all ranks, tied weights once. Every
    rank must take all of them: each is a collective. dtype casts before the gather."""
    is_sharded = bool(_fsdp_parts(module))
    for name, p in module.named_parameters():
        if is_sharded and not isinstance(p, DTensor):
            raise RuntimeError(f"{name} is unsharded: call reshard(root) before full_tensors")
        p = p.detach().to(dtype or p.dtype)
        yield name, p.to(p.device_mesh.device_type).full_tensor() if is_sharded else p

def clip_grad_norm(params, max_norm: float) -> torch.Tensor:
    """Clip in place by the norm over all ranks and return that norm; max_norm 0 only measures."""
    norm = torch.nn.utils.clip_grad_norm_(list(params), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

def save_checkpoint(folder, step, model, optimizer, state, keep=0, export=None):
    """Write checkpoint-<step> beside, then rename it; keep the newest `keep` (0: all). state: JSON,
    the same on all ranks. folder: shared by all nodes. export(path) runs on all ranks inside the
    same checkpoint. A kill at any moment leaves the last good one and *.tmp folders."""
    final = Path(folder) / f"checkpoint-{step:06d}"
    temporary = final.with_suffix(".tmp")
    is_writer = dist.get_rank() == 0
    with phase(f"checkpoint {step}"):
        if is_writer:
            for left_by_a_kill in Path(folder).glob("checkpoint-*.tmp"):
                shutil.rmtree(left_by_a_kill)
            temporary.mkdir(parents=True)
        barrier("checkpoint")
        reshard(model)
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
        if export:
            export(temporary)
        barrier("checkpoint")
        if is_writer:
            (temporary / "state.json").write_text(json.dumps(state, default=vars))
            for path in [*temporary.rglob("*"), temporary]:
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)  # names and contents are on the disk before the rename is
                os.close(file)
            temporary.rename(final)
            for old in checkpoints(folder)[:-keep] if keep else []:
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))
        barrier("checkpoint")

def checkpoints(folder):
    """Paths of the complete checkpoints, oldest first; what a kill left is named .tmp."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if path.suffix != ".tmp")

def load_checkpoint(path, model, optimizer) -> dict:
    """Fill weights and optimizer in place, on any number of ranks; return the saved state."""
    with phase(f"load {path}"):
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return json.loads((Path(path) / "state.json").read_text())
