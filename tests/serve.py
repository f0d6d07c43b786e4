"""Starts the vLLM server that `engine: server` talks to.

    python tests/serve.py CONFIG [key=value ...]        what `./run.sh serve CONFIG` runs

Model, host, port and lengths come from the config. On a machine without a GPU the server takes its
weights over gloo (tests/vllm_ext.py). Ctrl-C or SIGTERM stops it.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def command(model, host, port, max_model_len, dtype, device):
    """(argv, environment) of the server."""
    argv = f"""-m vllm.entrypoints.openai.api_server --host {host} --port {port} --dtype {dtype}
        --max-model-len {max_model_len} --enable-scale-out --skip-tokenizer-init
        --logprobs-mode processed_logprobs --weight-transfer-config {{"backend":"nccl"}}""".split()
    argv = [sys.executable, *argv, "--model", str(model)]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # the calls that update weights
    if device == "cuda":
        return argv, environment
    # trap: seeded requests crash in a chunked prefill on CPU, see VllmEngine
    batched = max(4096, max_model_len)
    argv += f"""--worker-extension-cls vllm_ext.Extension --enforce-eager
        --no-enable-chunked-prefill --max-num-batched-tokens {batched}
        --kv-cache-memory-bytes {2**30}""".split()
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return argv, environment


def main():
    sys.path.insert(0, str(TESTS.parent))
    import torch

    from configs import eval_config, load_config

    config = load_config(sys.argv[1], sys.argv[2:])
    configs = [config, *(eval_config(config, spec) for spec in config.eval_datasets.values())]
    longest = max(c.max_prompt_length + c.max_completion_length for c in configs)
    argv, environment = command(
        config.model_name_or_path, config.vllm_server_host, config.vllm_server_port,
        longest, config.torch_dtype,
        "cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    if torch.cuda.device_count() > 1:  # a copy of the model on each GPU of this machine
        argv += ["--data-parallel-size", str(torch.cuda.device_count())]
    os.execve(argv[0], argv, environment)


if __name__ == "__main__":
    main()
