"""Processes, sharding, full-tensor streaming and checkpoints: all that knows torch.distributed.

Works in one plain process or under torchrun. Every sharding is fully_shard on a (replicate, shard)
mesh, and gradients are SUMMED over ranks: the loss divides by global counts. Fork point: `shard`.
"""

import faulthandler
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from configs import UserError, need, say

OUR_NAME = "checkpoint-([0-9]{6}|[1-9][0-9]{6,})"  # others are left alone
CHECKSUMS, METADATA = "checksums.json", ".metadata"
# What DCP's pickled index may name: no BytesStorageMetadata, of which DCP unpickles the contents.
METADATA_CLASSES = {
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names of the optimizer's state

# The phase that an error is told with, the limit of collectives, and the gloo group with the long
# limit wait_s.
_now = {"phase": "main", "limit": timedelta(seconds=600), "slow_group": None}
seconds = Counter()  # spent in each phase since this was last cleared


def setup_distributed(timeout_s: int = 600, wait_s: int = 3600) -> SimpleNamespace:
    """Join torchrun's group, or a group of one: a record of rank, world and device.

    Collectives fail after timeout_s seconds; where ranks wait for the slowest (a rollout whose
    problems are all hard, an upload) after wait_s. A rank that dies is noticed at once there, by
    gloo. An uncaught error names rank and phase.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        refuse_unseen_gpu()
    _now["limit"] = limit = timedelta(seconds=timeout_s)
    store = None if "RANK" in os.environ else dist.HashStore()  # one process needs no port
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    _now["slow_group"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s))
    faulthandler.enable()  # NCCL's watchdog aborts the process: show where it stood

    def report(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        place = f"[rank {rank} of {world}] failed in phase '{_now['phase']}'"
        print(f"{place}: {error}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(1)  # no clean-up that waits for peers: torchrun then ends them

    sys.excepthook = report
    return SimpleNamespace(rank=rank, world=world, device=device)


def refuse_unseen_gpu() -> None:
    """UserError where nvidia-smi sees a GPU that torch does not: the run would be on the CPU."""
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not tool or visible in ("", "-1", "NoDevFiles"):  # the last is Slurm's word
        return
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    seen = subprocess.run(query, capture_output=True, text=True)
    need(
        seen.returncode or "," not in seen.stdout,
        f"torch {torch.__version__} does not see the "
        f"GPU {seen.stdout.splitlines()[:1]} (name, driver). CUDA 13 needs driver 580 or newer. A "
        ".venv made without a GPU: ./run.sh mends it. To use the CPU: CUDA_VISIBLE_DEVICES=''",
    )


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what this rank does now, for the report of an uncaught error, and take the time."""
    before, _now["phase"] = _now["phase"], name
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started
    _now["phase"] = before  # not reached on an error, which is then reported under `name`


def current_phase() -> str:
    """What this rank does, or did when it failed."""
    return _now["phase"]


def all_reduce_scalars(values: dict, op: str = "sum") -> dict[str, float]:
    """Sum or max over ranks of each value of a dict, in float64; same keys on every rank."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    reduction = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    dist.all_reduce(total, reduction, group=_now["slow_group"])
    return dict(zip(values, total.tolist()))


def gather_objects(item: Any) -> list:
    """The item of every rank, in rank order, on every rank; over gloo, so no GPU is waited for."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=_now["slow_group"])
    return items


def barrier(why: str) -> None:
    """All ranks get here before any goes on; `why` is for the reader and for a timeout's report."""
    before, _now["phase"] = _now["phase"], f"{_now['phase']}, barrier: {why}"
    gather_objects(None)
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


def shard(
    module: Module,
    blocks: Iterable[Module],
    sharding: str = "zero3",
    dtype: torch.dtype | None = None,
    replicate: int = 1,
    cpu_offload: bool = False,
) -> Module:
    """Shard each block and the root in place; `dtype` is the compute type, masters become fp32,
    block by block: ranks that load a model as it is stored do not all hold it in fp32.
    sharding: zero3 frees a block after its forward, zero2 keeps it, ddp copies everything on
    every rank. replicate > 1 is HSDP: that many replicas of world / replicate neighbouring ranks.
    One process without mixed precision or offload stays unwrapped: hooks would only cost time.
    """
    world = dist.get_world_size()
    if sharding == "ddp":
        replicate = world
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    stored = next(module.parameters()).dtype
    master = torch.promote_types(torch.promote_types(stored, torch.float32), dtype or stored)
    if world == 1 and dtype in (None, master) and not cpu_offload:
        return module.to(kind, master)
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=master, cast_forward_inputs=False
    )
    mesh = mesh_of(kind, world, replicate)
    offload = fsdp.OffloadPolicy()
    if cpu_offload:
        offload = fsdp.CPUOffloadPolicy(pin_memory=kind == "cuda")
    for part in [*blocks, module]:
        # the root keeps its weights up to the backward, which starts with them
        part.frees_after_forward = sharding == "zero3" and part is not module
        fsdp.fully_shard(
            part.to(master),
            mesh=mesh,
            reshard_after_forward=part.frees_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
        part.set_gradient_divide_factor(1.0)
        # trap: FSDP2 would scale within the reduction, which gloo cannot
        part.set_force_sum_reduction_for_comms(True)
    return module


def mesh_of(kind: str, world: int, replicate: int) -> DeviceMesh:
    """(world,) ranks, or (replicate, world / replicate) of them."""
    if replicate == 1:
        return DeviceMesh.from_group(dist.group.WORLD, kind)
    ranks = torch.arange(world).view(replicate, -1)  # a row a replica, a column a shard
    # groups of our own: the mesh would give them 30 minutes
    column, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=_now["limit"])
    row, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=_now["limit"])
    names = ("replicate", "shard")
    return DeviceMesh.from_group([column, row], kind, mesh=ranks, mesh_dim_names=names)


def sync_replicas(module: Module, is_last: bool) -> None:
    """Leave the all-reduce over replicas (HSDP, ddp) to the step's last backward."""
    if isinstance(module, fsdp.FSDPModule):
        module.set_requires_all_reduce(is_last)


def unshard(module: Module) -> None:
    """Gather all weights and keep them: forwards (without gradients) then need no collective."""
    for part in _fsdp_parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def reshard(module: Module) -> None:
    """Back to the sharded state and the setting of `shard`."""
    for part in _fsdp_parts(module):
        part.set_reshard_after_forward(part.frees_after_forward, recurse=False)
        part.reshard()


def _fsdp_parts(module):
    return [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def full_tensors(
    module: Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) one at a time, same order on all ranks, tied weights once, saved
    buffers last. Every rank must take all of them: each is a collective. dtype casts the weights
    before the gather."""
    has_shards = bool(_fsdp_parts(module))
    for name, p in module.named_parameters():
        is_sharded = isinstance(p, DTensor)
        if has_shards and not is_sharded:
            raise RuntimeError(f"{name} is unsharded: call reshard(root) before full_tensors")
        tensor = p.detach().to(dtype or p.dtype)
        if is_sharded:
            tensor = tensor.to(p.device_mesh.device_type).full_tensor()
        yield name, tensor
    yield from saved_buffers(module).items()


def saved_buffers(model: Module) -> dict[str, torch.Tensor]:
    """The buffers that a model's file holds, as the bias of some MoE routers."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def clip_grad_norm(params: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip in place by the norm over all ranks and return that norm; max_norm 0 only measures."""
    norm = torch.nn.utils.clip_grad_norm_(list(params), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def save_checkpoint(
    folder: Path,
    step: int,
    model: Module,
    optimizer: Optimizer,
    state: dict,
    keep: int = 0,
    export: Callable[[Path], None] | None = None,
) -> None:
    """Write checkpoint-<step> beside, then rename it; keep the newest `keep` (0: all). state: JSON,
    the same on all ranks. folder: shared by all nodes. export(path) runs on all ranks inside the
    same checkpoint. A kill at any moment leaves the last good one and *.tmp folders."""
    final = Path(folder) / f"checkpoint-{step:06d}"
    temporary = final.with_suffix(".tmp")
    rank = dist.get_rank()
    with phase(f"checkpoint {step}"):
        if rank == 0:
            for left_by_a_kill in checkpoints(folder, ".tmp"):
                shutil.rmtree(left_by_a_kill)
            temporary.mkdir(parents=True)
        barrier("the folder is there")
        reshard(model)
        weights, moments = get_state_dict(model, optimizer, options=FLAT)
        with as_one_line(f"{temporary} cannot be written (is the disk full?)"):
            dcp.save(tensors_of(weights, moments), checkpoint_id=temporary)
        if export:
            export(temporary)
        if rank == 0:
            (temporary / "state.json").write_text(json.dumps(state, allow_nan=False))
        barrier("all is written")
        mine = [*temporary.glob(f"__{rank}_*.distcp")]
        if rank == 0:
            others = [path for path in temporary.rglob("*") if path.suffix != ".distcp"]
            mine += [path for path in others if path.is_file()]
        sums = gather_objects({str(path.relative_to(temporary)): checksum(path) for path in mine})
        if rank == 0:
            merged = {name: value for part in sums for name, value in part.items()}
            (temporary / CHECKSUMS).write_text(json.dumps(merged, indent=0))
            to_disk([temporary, *temporary.rglob("*")])  # where DCP's own are already
            temporary.rename(final)
            if keep:
                delete(checkpoints(folder)[:-keep])
        barrier("the checkpoint is complete")


def delete(old_ones: list[Path]) -> None:
    for old in old_ones:
        if not old.is_symlink():  # else the user keeps it elsewhere
            doomed = old.with_suffix(".tmp")  # half a deletion is no checkpoint
            old.rename(doomed)
            shutil.rmtree(doomed)


def to_disk(paths: list[Path]) -> None:
    """Names and contents are on the disk before the rename is."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def load_newest(folder: Path, model: Module, optimizer: Optimizer) -> tuple[Path, dict] | None:
    """Fill weights and optimizer in place from the newest good checkpoint, on any number of ranks:
    (its path, the saved state), or None where there is none. One that is damaged or incomplete is
    told and renamed *.damaged; UserError when no other is left."""
    found = checkpoints(folder)
    for path in reversed(found):
        with phase(f"load {path}"):
            faults = gather_objects(faults_of(path))
            faults = [fault for part in faults for fault in part]
            if not faults:
                return path, load_checkpoint(path, model, optimizer)
        say(f"{path} is damaged and set aside: {', '.join(faults[:3])}")
        if dist.get_rank() == 0:
            path.rename(next_free(path.with_name(f"{path.name}.damaged")))
        barrier("it is set aside")
    damaged = [*Path(folder).glob("checkpoint-*.damaged*")]  # now, or by an earlier start
    need(
        not damaged,
        f"output_dir={folder} has no good checkpoint left: put one back, or choose "
        "another output_dir to begin anew",
    )
    return None


@contextmanager
def as_one_line(what: str) -> Iterator[None]:
    """A failure inside DCP, which all ranks get, becomes one line that begins with `what`."""
    try:
        yield
    except dcp.CheckpointException as error:
        reasons = {repr(failure) for failure, _ in error.failures.values()}
        raise UserError(f"{what}: {' '.join(' '.join(reasons).split())[:400]}") from None


def load_checkpoint(path: Path, model: Module, optimizer: Optimizer) -> dict:
    """Fill weights and optimizer in place; return the saved state."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    with as_one_line(f"{path} cannot be loaded"):
        dcp.load(tensors_of(weights, moments), storage_reader=SafeReader(path))
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT
    )
    return json.loads((Path(path) / "state.json").read_text())


def tensors_of(weights: dict, moments: dict) -> dict[str, dict]:
    """What a checkpoint holds of a model's and its optimizer's state: tensors only, for numbers
    (rates, betas) would be pickled."""
    moments = {name: value for name, value in moments.items() if isinstance(value, torch.Tensor)}
    return {"model": weights, "optimizer": moments}


def checkpoints(folder: Path, suffix: str = "") -> list[Path]:
    """Paths of the complete checkpoints, or of those with the suffix, oldest first."""
    name = re.compile(OUR_NAME + re.escape(suffix))
    found = Path(folder).glob("checkpoint-*")
    ours = [path for path in found if path.is_dir() and name.fullmatch(path.name)]
    return sorted(ours, key=lambda path: int(path.stem.split("-")[1]))


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def faults_of(path: Path) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, and with its index."""
    if not (path / CHECKSUMS).is_file():
        return [f"{CHECKSUMS} is missing"]
    faults = []
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        share = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
        for name in sorted({*share, METADATA, "state.json"}):
            if not (path / name).is_file():
                faults.append(f"{name} is missing")
            elif checksum(path / name) != sums.get(name):
                faults.append(f"{name} has changed since it was written")
        if not faults:  # whole, but perhaps a stranger's: only known classes are loaded
            SafeReader(path).read_metadata()
            json.loads((path / "state.json").read_text())
    except OSError:  # of the disk, not of what is on it
        raise
    except Exception as error:
        faults.append(f"{CHECKSUMS}, index or state: {error}")
    return faults


def next_free(path: Path) -> Path:
    """The path, with a number behind it if it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


class SafeReader(dcp.FileSystemReader):
    """Reads checkpoints of which nothing can run code: an index of known classes, and tensors,
    which torch loads as weights only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / METADATA, "rb") as file:
            return MetadataUnpickler(file).load()


class MetadataUnpickler(pickle.Unpickler):
    """Knows METADATA_CLASSES and the dtypes of torch."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in METADATA_CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}")
        return super().find_class(module, name)
