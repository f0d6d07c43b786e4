"""What a config amounts to: steps, memory, and the vLLM server of `engine: server`.

python -m configs.plan serve CONFIG [key=value ...] [--dry_run]     what `./run.sh serve` runs
"""

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from configs import UserError, as_user_error, need, say
from configs.serve_key import LOCAL_HOSTS, key_header
from configs.settings import Config, eval_config, make_config, parse_overrides, read_settings

ROOT = Path(__file__).resolve().parent.parent
BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}  # of a number
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Plan:
    """Counts in steps, a step being one rollout batch."""

    prompts: int  # a step, of all ranks
    per_epoch: int
    steps: int  # of the run
    save_every: int


def make_plan(config: Config, world: int, n_problems: int, is_dry: bool = False) -> Plan:
    """Batch arithmetic, told: prompts = ranks * per_device * accumulation / G. is_dry: nothing will
    be sharded, so replicas may be meant for more ranks than there are."""
    need(
        is_dry or config.sharding == "ddp" or world % config.replicas == 0,
        f"config: replicas={config.replicas} does not "
        f"divide {world} ranks (--nproc_per_node times --nnodes)",
    )
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    G, rows = config.num_generations, batch * accumulation
    need(G > 1, "config: num_generations=1: advantages compare a group's samples, it takes 2")
    need(
        rows % G == 0,
        f"config: per_device_train_batch_size {batch} * gradient_accumulation_steps"
        f" {accumulation} = {rows} is not divisible by num_generations {G}",
    )
    prompts = world * rows // G
    per_epoch = n_problems // prompts
    need(per_epoch, f"{config.dataset_name}: {n_problems} usable problems, a step takes {prompts}")
    need_room_for_deferred(config, prompts)
    steps = max(1, int(config.num_train_epochs * per_epoch))
    if config.max_steps > 0:
        steps = config.max_steps
    save_every = steps
    if config.save_strategy == "steps":
        save_every = config.save_steps
    if config.save_strategy == "epoch":
        save_every = per_epoch
    say(
        f"batch: {world} ranks * {batch} per device * {accumulation} accumulation / {G} generations"
        f" = {prompts} prompts a step; {per_epoch} steps an epoch; {steps} steps"
    )
    return Plan(prompts, per_epoch, steps, save_every)


def need_room_for_deferred(config: Config, prompts: int) -> None:
    """UserError when deferred problems, with a share of a step's prompts, would never return."""
    is_deferred = config.rl_type == "ghpo" and config.hint_timing == "deferred"
    n_returning = int(config.deferred_share * prompts)
    need(
        not is_deferred or n_returning > 0,
        f"config: hint_timing=deferred and deferred_share={config.deferred_share:g} of {prompts} "
        "prompts a step: no problem could return, raise gradient_accumulation_steps",
    )


def mismatch_limit(config: Config) -> float | None:
    """The mean k3 of sampler against trainer above which a run stops; None: it only warns."""
    if config.mismatch_limit == "auto":
        return 1e-2 if config.torch_dtype == "bfloat16" else 1e-4
    return config.mismatch_limit


def bytes_per_gpu(config: Config, world: int, n_params: int, gathered: int) -> dict[str, int]:
    """What a model of this size takes, activations excluded; with cpu_offload some on the host.

    gathered: weights that zero3 holds at once (the root's plus two blocks').
    """
    shards = max(1, world // config.replicas)
    if config.sharding == "ddp":
        shards = 1
    copied = gathered if config.sharding == "zero3" else n_params
    if world == 1 and config.torch_dtype == "float32":  # it computes with the masters themselves
        copied = 0
    share = 4 * n_params // shards
    held = {"weights": share, "gradients": share, "optimizer": 2 * share}
    compute_copy = copied * BYTES[config.torch_dtype]
    total = compute_copy if config.cpu_offload else compute_copy + sum(held.values())
    return {"parameters": n_params, **held, "compute_copy": compute_copy, "total": total}


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with its completion, in training and in evaluation."""
    configs = [config, *(eval_config(config, spec) for spec in config.eval_datasets.values())]
    return max(c.max_prompt_length + c.max_completion_length for c in configs)


def server_arguments(config: Config, n_gpus: int) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of the vLLM server on a machine with so many GPUs. With none its weights
    come over gloo, and it starts by the module behind the command line, which vllm-cpu lacks."""
    host, model = config.vllm_server_host, config.model_name_or_path
    length, has_key = longest_sequence(config), bool(key_header())
    need(
        has_key or host in LOCAL_HOSTS,
        f"config: vllm_server_host={host}: whoever reaches the server could change its weights: "
        "set VLLM_API_KEY in the environment, here and of the training, to a word of your own",
    )
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # the calls that update weights
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)  # where it finds configs
    argv = [str(Path(sys.executable).parent / "vllm"), "serve", model]
    options = {
        "revision": config.model_revision,
        "host": host,
        "port": config.vllm_server_port,
        "dtype": config.torch_dtype,
        "max-model-len": length,
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": '{"backend":"nccl"}',
    }
    if has_key:
        options["middleware"] = "configs.serve_key.RequireKey"
    if n_gpus > 1:
        options["data-parallel-size"] = n_gpus  # a copy of the model on each
    if n_gpus == 0:
        environment |= CPU_ENVIRONMENT
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        # trap: seeded requests crash in a chunked prefill on CPU
        argv += ["--enforce-eager", "--no-enable-chunked-prefill"]
        options |= {
            "worker-extension-cls": "configs.vllm_cpu.Extension",
            "max-num-batched-tokens": max(4096, length),
            "kv-cache-memory-bytes": 2**30,
        }
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    return [*argv, "--enable-scale-out", "--skip-tokenizer-init"], environment


def server_commands(config: Config, n_gpus: int) -> str:
    """The server's command for a shell, on the GPUs here (or one elsewhere) and without any, each
    with what it needs in the environment; the key is not shown."""
    lines = []
    for machine, count in (("on GPUs", max(1, n_gpus)), ("with vllm-cpu", 0)):
        argv, environment = server_arguments(config, count)
        words = ["env"]
        for name, text in environment.items():
            if os.environ.get(name) != text:
                words.append(f"{name}={text}")
        lines.append(f"server, {machine}: {shlex.join([*words, *argv])}")
    return "\n".join(lines)


def main(path: str, *overrides: str) -> None:
    """Becomes the server of a config; Ctrl-C or SIGTERM stops it. --dry_run only prints."""
    words = [word for word in overrides if word != "--dry_run"]
    try:
        # with all eval sets, as --eval comes here too
        config = make_config(read_settings(path), parse_overrides(words))
        import torch  # slow

        n_gpus = torch.cuda.device_count()
        argv, environment = server_arguments(config, n_gpus)
        is_dry = "--dry_run" in overrides
        if not is_dry:
            need_port(config.vllm_server_host, config.vllm_server_port)
        print(server_commands(config, n_gpus), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not is_dry:
        os.execve(argv[0], argv, environment)


def need_port(host: str, port: int) -> None:
    """UserError unless a server of this process could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    remedy = "end what does, or choose another vllm_server_port, for server and training alike"
    with as_user_error(f"{host}:{port} cannot be listened to ({remedy})"):
        socket.create_server((host, port), family=family).close()


if __name__ == "__main__":
    main(*sys.argv[2:])
