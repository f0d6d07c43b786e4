"""What the keys of other trainers mean here: the tables of foreign.yaml, and what needs more."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs import say

TABLES = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text())


def our_name(key: object) -> str:
    """Our name of a setting, where we have one."""
    return TABLES["renamed"].get(key, str(key))


def translate(
    layers: Sequence[dict[str, Any]], our_keys: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """(Settings of ours and unknown ones, mistakes) for settings that may be another trainer's.

    layers: the settings of a file, then those of the command line, which win in whatever words.
    """
    layers, ignored = without_idle_mode(layers)
    ours, mistakes = {}, []
    for number, layer in enumerate(layers):
        later = {our_name(key) for other in layers[number + 1 :] for key in other}
        kept = {key: value for key, value in layer.items() if our_name(key) not in later}
        found, wrong, idle = translate_layer(kept, our_keys)
        ours |= found
        mistakes += wrong
        ignored += idle
    steps = ours.pop("steps_per_generation", None)
    accumulation = ours.get("gradient_accumulation_steps", 1)
    if steps is not None and str(steps) != str(accumulation):
        mistakes.append(
            f"steps_per_generation={steps!r} and gradient_accumulation_steps="
            f"{accumulation!r} must be the same: a step samples what it trains on"
        )
    if ignored:
        say(f"config: without meaning here, ignored: {', '.join(ignored)}")
    return ours, mistakes


def without_idle_mode(layers: list[dict]) -> tuple[list[dict], list[str]]:
    """(layers, what to tell) without vllm_mode where TRL ignores it: there is no vLLM."""
    merged = {}
    for layer in layers:
        merged |= layer
    mode, use_vllm = merged.get("vllm_mode"), merged.get("use_vllm")
    is_default = mode == "colocate" and not use_vllm and not merged.get("engine")
    if use_vllm is not False and not is_default:
        return layers, []
    told = ["vllm_mode without use_vllm"] if mode == "server" else []
    return [{key: layer[key] for key in layer if key != "vllm_mode"} for layer in layers], told


def translate_layer(values: dict, our_keys: set[str]) -> tuple[dict, list[str], list[str]]:
    """(settings, mistakes, names of what is ignored) of one file or command line, where the order
    of keys means nothing: two that say different things of one setting are a mistake."""
    ours, mistakes, ignored, said = {}, [], [], {}  # said: {our name: the key and value behind it}
    for key, value in values.items():
        name = our_name(key)
        meanings = TABLES["meanings"].get(name, {})
        meaning = {}
        if name in TABLES["ignored"]:
            ignored.append(name)
        elif isinstance(value, Hashable) and value in meanings:
            meaning = meanings[value]
        elif name in our_keys or name not in TABLES["meanings"]:
            meaning = {name: value}
        elif value not in (None, [], {}):
            only = ", ".join(map(str, ["null", *meanings]))
            mistakes.append(f"{key}={value!r} is not supported here, only {only}")
        for one, setting in meaning.items():
            if one in ours and ours[one] != setting:
                mistakes.append(f"{said[one]} and {key}={value!r} disagree, set one")
            ours[one], said[one] = setting, f"{key}={value!r}"
    if values.get("vllm_importance_sampling_correction") is False:  # whatever its cap
        ours["importance_cap"] = None
    warmup = ours.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:  # a share, in transformers 5
        ours["warmup_ratio"] = ours.pop("warmup_steps")
    if "report_to" in ours:
        loggers = ours["report_to"] or []
        if not isinstance(loggers, list | tuple):
            loggers = [loggers]
        ours["report_to"] = [name for name in loggers if name == "wandb"]
        ignored += [f"report_to: {name}" for name in loggers if name not in ("wandb", "none")]
    return ours, mistakes, ignored
