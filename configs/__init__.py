"""The settings: default.yaml has each one with its default and meaning; this reads and checks them.

    load_config("configs/x.yaml", ["learning_rate=2e-6"])      a frozen record, one field a setting
"""
import difflib
import fcntl
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import yaml
from tqdm import tqdm

from reward import UserError, resolve_reward

DEFAULTS, ALLOWED, KEYS = yaml.safe_load_all(Path(__file__).with_name("default.yaml").read_text())
Config = make_dataclass("Config", DEFAULTS, frozen=True)
locks = {}  # path: the open file that holds a lock until the process ends

def need(condition, message):
    if not condition:
        raise UserError(message)

def say(message):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, file=sys.stderr)

def load_config(path, overrides=(), is_eval=False, is_dry=True):
    """YAML file and key=value strings to a checked Config; UserError names key and remedy."""
    try:
        values = dict(yaml.safe_load(Path(path).read_text()) or {})
        for text in overrides:
            key, equals, value = text.partition("=")
            need(equals, "an override is written key=value")
            values[key] = yaml.safe_load(value)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} {' '.join(overrides)}: {error}") from None
    c = make_config(values)
    need(c.eval_datasets or not is_eval, "config: --eval needs eval_datasets")
    need(is_dry or c.engine == "hf" or importlib.util.find_spec("vllm"), "config: engine: vllm is "
         "not installed: pip install -r requirements-vllm.txt (on a CPU: ./run.sh test-vllm)")
    is_used = is_eval or c.eval_strategy != "no"
    return c if is_used and c.eval_datasets else replace(c, eval_strategy="no", eval_datasets={})

def make_config(values):
    """A dict of settings to a checked Config; what it does not name has its default."""
    ignored = [key for key in values if key in KEYS["ignored"]]
    if ignored:
        say(f"config: without meaning here, ignored: {', '.join(ignored)}")
    if isinstance(values.get("hint_ratio"), (int, float)):
        say("config: one hint_ratio is a fixed ratio here; the released trainer ignores the key")
    for key in set(values) - set(DEFAULTS) - set(ignored):
        near = difflib.get_close_matches(str(key), DEFAULTS, n=1)
        raise UserError(f"config: unknown key {key!r}" + "".join(f", not {n}?" for n in near))
    types = {key: type(value).__name__ for key, value in DEFAULTS.items()} | KEYS["types"]
    c = Config(**{key: cast(key, (DEFAULTS | values)[key], types[key]) for key in DEFAULTS})
    engine = c.engine or ("vllm" if c.use_vllm else "hf")
    triggers = c.reward_funcs + ["always"] * bool(c.hint_ratio)
    need(c.model_name_or_path and c.dataset_name, "config: set model_name_or_path and dataset_name")
    need(c.hint_ratio == sorted(c.hint_ratio) and all(0 <= omega <= 1 for omega in c.hint_ratio),
         f"config: hint_ratio={c.hint_ratio} must ascend within [0, 1]")
    need(len(c.reward_weights) == len(c.reward_funcs), "config: reward_weights: one per reward")
    need(c.hint_trigger in triggers, f"config: hint_trigger={c.hint_trigger} is not in {triggers}")
    need(c.use_vllm in (None, engine != "hf"), "config: engine and use_vllm disagree, set one")
    need(c.bf16 in (None, c.torch_dtype == "bfloat16"), "config: bf16 and torch_dtype disagree")
    for name in c.reward_funcs:
        resolve_reward(name)
    if "wandb" in c.report_to and not importlib.util.find_spec("wandb"):
        say("config: report_to: wandb is not installed; metrics.jsonl has everything")
        c = replace(c, report_to=[])
    attention = c.attn_implementation
    if attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        say("config: attn_implementation: flash-attn is not installed, using sdpa")
        attention = "sdpa"
    packing = attention == "flash_attention_2" if c.packing is None else c.packing
    return replace(c, engine=engine, attn_implementation=attention, packing=packing)

def eval_config(config, spec):
    """The config of an eval set, a path or a dict of settings: G = k, no hints."""
    spec = {"dataset_name": spec} if isinstance(spec, str) else spec
    need(isinstance(spec, dict) and "dataset_name" in spec,
         f"config: eval_datasets: {spec!r} must be a path or name, or have a dataset_name")
    for key, instead in {"temperature": "eval_temperature", "num_generations": "eval_samples",
                         "engine": "that of the run", "reward_funcs": "those of the run"}.items():
        need(key not in spec, f"config: eval_datasets: {key} has no meaning there, use {instead}")
    c = make_config(asdict(config) | spec)
    if c.eval_max_completion_length and "max_completion_length" not in spec:
        c = replace(c, max_completion_length=c.eval_max_completion_length)
    return replace(
        c, rl_type="grpo", curriculum=False, num_generations=c.eval_samples,
        temperature=c.eval_temperature)

def changed_settings(config, path):
    """What differs from the config in a run folder and makes it another run."""
    mine, is_run = asdict(config), path.with_name("metrics.jsonl").is_file()
    theirs = yaml.safe_load(path.read_text()) if is_run and path.is_file() else mine
    return [key for key in mine if key not in KEYS["resumable"] and theirs.get(key) != mine[key]]

def save_config(config, path):
    """Writes the config with the command line and the commit; locks its folder for this process."""
    locks[path] = open(path.with_name("lock"), "w")
    try:
        fcntl.lockf(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"output_dir={path.parent}: another process writes there, end it first")
    except OSError as error:
        say(f"output_dir={path.parent} cannot be locked, see that no other run uses it: {error}")
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude '*'", shell=True,
                         capture_output=True, text=True).stdout
    new = path.with_suffix(".new")  # a kill leaves the old file or the whole new one
    new.write_text(f"# {sys.argv}\n# git {git.strip()}\n"
                   + yaml.safe_dump(asdict(config), sort_keys=False))
    new.rename(path)

def cast(key, value, kind):
    """A YAML value as the type and within the range of a setting; UserError otherwise."""
    if kind.startswith("list "):
        items = value if isinstance(value, list) else [value]
        return [cast(key, item, kind.removeprefix("list ")) for item in items]
    if value is None and KEYS["types"].get(key) == kind:
        return None
    # YAML 1.1: a bare no is false, and 1e-6 is text
    value = "no" if kind == "str" and value is False else value
    if kind in ("int", "float") and re.fullmatch(r"[-+]?\d+\.?\d*(e[-+]?\d+)?", str(value), re.I):
        number = float(value)
        value = int(number) if kind == "int" and number.is_integer() else number
    need(type(value).__name__ == kind and (kind != "float" or math.isfinite(value)),
         f"config: {key}={value!r} must be of type {kind}")
    limit = ALLOWED.get(key)
    fits = limit is None or (value in limit if kind == "str" else value >= limit)
    need(fits, f"config: {key}={value!r} must be {'one of' if kind == 'str' else '>='} {limit}")
    return value

def make_plan(config, world, n_problems):
    """Batch arithmetic, printed: prompts = ranks * per_device * accumulation / G (all ranks')."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    G, rows = config.num_generations, batch * accumulation
    need(rows % G == 0, f"config: per_device_train_batch_size {batch} * gradient_accumulation_steps"
         f" {accumulation} = {rows} is not divisible by num_generations {G}")
    per_epoch = n_problems // (prompts := world * rows // G)
    need(per_epoch, f"{config.dataset_name}: {n_problems} usable problems, a step takes {prompts}")
    steps = config.max_steps if config.max_steps > 0 else int(config.num_train_epochs * per_epoch)
    say(f"batch: {world} ranks * {batch} per device * {accumulation} accumulation / {G} generations"
        f" = {prompts} prompts a step; {per_epoch} steps an epoch; {steps} steps")
    every = {"steps": config.save_steps, "epoch": per_epoch, "no": steps}[config.save_strategy]
    return SimpleNamespace(prompts=prompts, per_epoch=per_epoch, steps=max(1, steps),
                           save_every=max(1, every))
