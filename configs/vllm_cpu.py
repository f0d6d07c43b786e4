"""What vLLM needs on a CPU: options around its traps, and gloo in the place of NCCL.

Both ends of a weight transfer import this module, the rest of vLLM's transfer is unchanged: the
trainer in rollout.py, the server's worker, before it builds the model, by

    PYTHONPATH=checkout ... --worker-extension-cls configs.vllm_cpu.Extension        (plan.py)
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import vllm._custom_ops as ops
from vllm.distributed.device_communicators import pynccl

ops._supports_onednn = False  # vLLM would keep packed weights only, and not load into them again


def cpu_options(max_model_len: int) -> dict:
    """Arguments of vllm.LLM inside a training process."""
    torch._dynamo.config.disable = True  # else log-probs need a C++ compiler
    # trap: a request with a seed crashes in a chunked prefill on CPU
    return {
        "enable_chunked_prefill": False,
        "enforce_eager": True,
        "max_num_batched_tokens": max(4096, max_model_len),
        "kv_cache_memory_bytes": 2**30,
    }


def pack(model: torch.nn.Module) -> None:
    """After each load: a packed copy of every bf16 matrix, which oneDNN multiplies faster."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and can_pack(module.weight):
            module.cpu_linear = packed_linear(module.weight)


def can_pack(weight: torch.Tensor) -> bool:
    has_instructions = torch.cpu._is_avx512_bf16_supported()
    return has_instructions and weight.dtype == torch.bfloat16 and weight.dim() == 2


def packed_linear(weight: torch.Tensor) -> Callable:
    handler = ops.create_onednn_mm(weight.t(), 32)  # 32: shapes whose plans are kept

    def linear(x, weight, bias):
        return ops.onednn_mm(handler, x, bias)

    return linear


class Gloo:
    """vLLM's NCCL communicator, as far as weight transfer uses it."""

    def __init__(self, place: Any, device: Any):
        limit = timedelta(seconds=60)
        self.group = dist.ProcessGroupGloo(place.store, place.rank, place.world_size, limit)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.group.broadcast([tensor], dist.BroadcastOptions()).wait()

    def destroy(self) -> None:
        self.group = None


pynccl.PyNcclCommunicator = Gloo
torch.accelerator.current_device_index = lambda: 0
torch.cuda.current_stream = lambda device=None: None


class Extension:
    """Mixed into the worker; naming it on the command line is what gets this module imported."""
