"""What vLLM needs on a CPU: options around its traps, and weight transfer over gloo to a server.

vLLM's own back-ends of weight transfer need CUDA; the HTTP sequence is that of NCCL. The server:

    PYTHONPATH=tests python -m vllm.entrypoints.openai.api_server ... \
        --worker-extension-cls vllm_ext.Extension --weight-transfer-config '{"backend": "gloo"}'

vLLM imports this module in its worker before it builds the model; rollout.py does so in ours.
"""
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import vllm._custom_ops
from vllm.distributed.weight_transfer.base import (WeightTransferEngine, WeightTransferInitInfo,
                                                   WeightTransferUpdateInfo)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

vllm._custom_ops._supports_onednn = False  # packed weights cannot be loaded into again


def cpu_options(max_model_len):
    """Arguments of vllm.LLM inside a training process."""
    torch._dynamo.config.disable = True  # else log-probs need a C++ compiler
    # trap: a request with a seed crashes in a chunked prefill on CPU
    return {"enable_chunked_prefill": False, "enforce_eager": True,
            "max_num_batched_tokens": max(4096, max_model_len), "kv_cache_memory_bytes": 2**30}


def trainer_init(place):
    """The trainer's end: rank 0, with the method of vLLM's NCCL communicator that it calls."""
    limit, size = timedelta(seconds=60), place["world_size"]
    store = dist.TCPStore(place["master_address"], place["master_port"], size, True, limit,
                          wait_for_workers=False)
    group = dist.ProcessGroupGloo(store, 0, size, limit)

    def broadcast(tensor, src):
        group.broadcast([tensor], dist.BroadcastOptions()).wait()

    return SimpleNamespace(broadcast=broadcast)


@dataclass
class InitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The worker's end: receives full tensors in order and loads each into the model in place."""
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, info):
        rank = info.rank_offset + self.parallel_config.rank
        limit = timedelta(seconds=60)
        store = dist.TCPStore(info.master_address, info.master_port, info.world_size, False, limit)
        self.group = dist.ProcessGroupGloo(store, rank, info.world_size, limit)

    def start_weight_update(self):
        """Plain weights are overwritten in place: nothing to prepare."""

    finish_weight_update = shutdown = start_weight_update

    def receive_weights(self, info):
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast([tensor], dist.BroadcastOptions()).wait()
            self.model.load_weights([(name, tensor)])


WeightTransferEngineFactory.register_engine("gloo", GlooEngine)


class Extension:
    """Mixed into the worker; naming it on the command line is what gets this module imported."""
