"""What vLLM needs on a CPU: options around its traps, and gloo in the place of NCCL.

Both ends of a weight transfer import this module, the rest of vLLM's transfer is unchanged: the
trainer in rollout.py, the server's worker, before it builds the model, by

    PYTHONPATH=checkout ... --worker-extension-cls configs.vllm_cpu.Extension        (plan.py)
"""

from datetime import timedelta

import torch
import torch.distributed as dist
import vllm._custom_ops
from vllm.distributed.device_communicators import pynccl

vllm._custom_ops._supports_onednn = False  # packed weights cannot be loaded into again


def cpu_options(max_model_len: int) -> dict:
    """Arguments of vllm.LLM inside a training process."""
    torch._dynamo.config.disable = True  # else log-probs need a C++ compiler
    # trap: a request with a seed crashes in a chunked prefill on CPU
    return {"enable_chunked_prefill": False, "enforce_eager": True,
            "max_num_batched_tokens": max(4096, max_model_len), "kv_cache_memory_bytes": 2**30}


class Gloo:
    """vLLM's NCCL communicator, as far as weight transfer uses it."""

    def __init__(self, place, device):
        limit = timedelta(seconds=60)
        self.group = dist.ProcessGroupGloo(place.store, place.rank, place.world_size, limit)

    def broadcast(self, tensor, src, stream=None):
        self.group.broadcast([tensor], dist.BroadcastOptions()).wait()


pynccl.PyNcclCommunicator = Gloo
torch.accelerator.current_device_index = lambda: 0
torch.cuda.current_stream = lambda device=None: None


class Extension:
    """Mixed into the worker; naming it on the command line is what gets this module imported."""
