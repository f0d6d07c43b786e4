"""What the keys of other trainers mean here: the tables of foreign.yaml, and what needs more."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from configs import say

TABLES = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text())


def our_name(key: object) -> str:
    """Our name of a setting, where we have one."""
    return TABLES["renamed"].get(key, str(key))


def translate(settings: dict, overrides: dict) -> tuple[dict[str, Any], list[str]]:
    """(Settings of ours and unknown ones, mistakes) of a file and a command line, which may be
    written for another trainer. The command line wins, in whatever words; within each the order
    means nothing: keys that disagree about a setting are a mistake."""
    overridden = {our_name(key) for key in overrides}
    settings = {key: settings[key] for key in settings if our_name(key) not in overridden}
    ours, mistakes, ignored = {}, [], idle_keys(settings | overrides)
    for layer in (settings, overrides):
        said = {}  # {our name: the key and value behind it}
        for key in layer:
            if key in ignored:
                continue
            words = f"{key}={layer[key]!r}"
            meaning = meaning_of(our_name(key), layer[key])
            if meaning is None:
                known = ", ".join(map(str, ["null", *TABLES["keys"][key]]))
                mistakes.append(f"{words} is not supported here, only {known}")
                continue
            for name, setting in meaning.items():
                if name in said and ours[name] != setting:
                    mistakes.append(f"{said[name]} and {words} disagree, set one")
                ours[name], said[name] = setting, words
    steps = ours.pop("steps_per_generation", None)
    accumulation = ours.get("gradient_accumulation_steps", 1)
    if steps not in (None, accumulation):
        known = f"only gradient_accumulation_steps={accumulation!r}"
        mistakes.append(f"steps_per_generation={steps!r} is not supported here, {known}")
    if ignored:
        say(f"config: without meaning here, ignored: {', '.join(ignored)}")
    return ours, mistakes


def idle_keys(values: dict[str, Any]) -> list[str]:
    """Those that say nothing here, or nothing beside the others."""
    idle = [key for key in values if key in TABLES["ignored"]]
    uses_vllm = values.get("use_vllm", values.get("engine"))
    if "vllm_mode" in values and not uses_vllm:
        idle.append("vllm_mode")
    has_cap = "vllm_importance_sampling_cap" in values
    if has_cap and values.get("vllm_importance_sampling_correction") is False:
        idle.append("vllm_importance_sampling_cap")
    return idle


def meaning_of(name: str, value: Any) -> dict[str, Any] | None:
    """The settings that a key stands for with this value; None: it is not supported."""
    if name == "warmup_steps" and isinstance(value, float) and 0 < value < 1:
        return {"warmup_ratio": value}  # a share, in transformers 5
    meanings = TABLES["words"].get(name, {}) | TABLES["keys"].get(name, {})
    if isinstance(value, Hashable) and value in meanings:
        return meanings[value]
    if name not in TABLES["keys"]:
        return {name: value}
    return {} if value in (None, [], {}) else None
