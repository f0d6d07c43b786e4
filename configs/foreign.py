"""What the keys of other trainers mean here: the tables of foreign.yaml, and what needs more."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from configs import say

TABLES = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text())


def our_names(values: dict) -> dict[str, Any]:
    """The same settings under our names for them, where we have them."""
    return {TABLES["renamed"].get(key, str(key)): value for key, value in values.items()}


def translate(values: dict[str, Any], our_keys: set[str]) -> tuple[dict[str, Any], list[str]]:
    """(Settings of ours and unknown ones, mistakes) for settings that may be another trainer's."""
    ours, mistakes, ignored = {}, [], []
    for key, value in values.items():
        meanings = TABLES["meanings"].get(key, {})
        if key in TABLES["ignored"]:
            ignored.append(key)
        elif isinstance(value, Hashable) and value in meanings:
            ours |= meanings[value]
        elif key in our_keys or key not in TABLES["meanings"]:
            ours[key] = value
        elif value not in (None, [], {}):
            only = ", ".join(map(str, ["null", *meanings]))
            mistakes.append(f"{key}={value!r} is not supported here, only {only}")
    steps = ours.pop("steps_per_generation", None)
    accumulation = ours.get("gradient_accumulation_steps", 1)
    if steps is not None and str(steps) != str(accumulation):
        mistakes.append(f"steps_per_generation={steps!r} and gradient_accumulation_steps="
                        f"{accumulation!r} must be the same: a step samples what it trains on")
    warmup = ours.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:  # a share, in transformers 5
        ours["warmup_ratio"] = ours.pop("warmup_steps")
    loggers = ours.get("report_to") or []
    if not isinstance(loggers, list | tuple):
        loggers = [loggers]
    ours["report_to"] = [name for name in loggers if name == "wandb"]
    ignored += [f"report_to: {name}" for name in loggers if name not in ("wandb", "none")]
    if ignored:
        say(f"config: without meaning here, ignored: {', '.join(ignored)}")
    return ours, mistakes
