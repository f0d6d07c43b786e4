"""What the keys of other trainers mean here; foreign.yaml has those that a table can say."""

from pathlib import Path
from typing import Any

import yaml

from configs import say

TABLES = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text())
LOGGERS = ("wandb",)


def our_names(values: dict) -> dict[str, Any]:
    """The same settings under our names for them, where we have them."""
    return {TABLES["renamed"].get(key, str(key)): value for key, value in values.items()}


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(What is left for Config, mistakes) of settings that may be another trainer's."""
    ours, mistakes, ignored = dict(values), [], []
    for key, value in values.items():
        if key in TABLES["ignored"]:
            ignored.append(key)
            del ours[key]
        elif key in TABLES["neutral"]:
            accepted = TABLES["neutral"][key]
            if value not in accepted:
                mistakes.append(f"{key}={value!r} is not supported, only {accepted}")
            del ours[key]
        elif key in TABLES["values"] and isinstance(value, str | int | None):
            ours[key] = TABLES["values"][key].get(value, value)
    steps = ours.pop("steps_per_generation", None)
    accumulation = ours.get("gradient_accumulation_steps", 1)
    if steps is not None and str(steps) != str(accumulation):
        mistakes.append(f"steps_per_generation={steps!r} must be gradient_accumulation_steps="
                        f"{accumulation!r}: a step samples what it trains on")  # fmt: skip
    mode = ours.pop("vllm_mode", None)
    if mode == "server" and ours.get("use_vllm"):
        ours.setdefault("engine", "server")
    elif mode not in (None, "colocate", "server"):
        mistakes.append(f"vllm_mode={mode!r} is not supported, only colocate and server")
    if ours.pop("vllm_importance_sampling_correction", True) is False:
        ours["importance_cap"] = None
    warmup = ours.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:  # transformers 5: a share
        ours["warmup_ratio"] = ours.pop("warmup_steps")
    if "report_to" in ours:
        names = ours["report_to"] or []
        names = names if isinstance(names, list | tuple) else [names]
        ours["report_to"] = [name for name in names if name in LOGGERS]
        ignored += [f"report_to: {name}" for name in names if name not in (*LOGGERS, "none")]
    if ignored:
        say(f"config: without meaning here, ignored: {', '.join(ignored)}")
    return ours, mistakes
