"""Every setting, in one class: its type, range and choices, its default, its meaning.

    config = load_config("configs/x.yaml", ["learning_rate=2e-6", "--max_steps", "50"])

A config file names only what it changes; a value on the command line wins over it. "Steps" are
rollout batches everywhere. To add a setting, add its line: runs made before it still resume.
Files of TRL, Open-R1 and the reference load too: foreign.yaml says what their other keys mean.
"""

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from annotated_types import Ge, Gt, Interval, Lt, MinLen
from pydantic import AllowInfNan, BeforeValidator, TypeAdapter, ValidationError

from configs import UserError, need, say
from configs.foreign import our_name, translate
from hints import uses_hints
from reward import REWARDS

INTEGER = re.compile(r"[-+]?\d+")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
SUBJECT = re.compile(r"^\w+ should")  # of pydantic's messages
RESUMABLE = "may differ when a run is resumed"
ALL_GREEDY = "are several greedy samples, all the same"
NEAREST = 0.8  # similarity from which an unknown key is taken for a misspelt one
SHOWN = 90  # characters of a value in a message
FLASH = {  # what each of them needs installed
    "varlen": "torch",
    "flash_attention_2": "flash-attn",
    "kernels-community/flash-attn2": "kernels",
    "kernels-community/flash-attn3": "kernels",
}
IN_EVALUATION = {  # the settings of an eval set; in all others it is like the run
    "dataset_name",
    "dataset_config",
    "dataset_split",
    "dataset_prompt_column",
    "dataset_answer_column",
    "dataset_hint_column",
    "dataset_level_column",
    "system_prompt",
    "dataset_choice_columns",
    "eval_samples",
    "eval_temperature",
    "eval_max_completion_length",
    "eval_limit",
    "max_prompt_length",
    "max_completion_length",
    "top_p",
    "top_k",
    "strict_answers",
    "seed",
}
INSTEAD = {"temperature": "eval_temperature", "num_generations": "eval_samples"}
COSINE_KEYS = {"num_cycles"}
MIN_LR_KEYS = {"num_cycles", "min_lr", "min_lr_rate"}
SCHEDULE_KEYS = {  # what lr_scheduler_kwargs may hold, the rest take nothing
    "cosine": COSINE_KEYS,
    "cosine_with_restarts": COSINE_KEYS,
    "polynomial": {"lr_end", "power"},
    "inverse_sqrt": {"timescale"},
    "cosine_with_min_lr": MIN_LR_KEYS,
    "cosine_warmup_with_min_lr": MIN_LR_KEYS | {"warmup_lr_rate"},
    "warmup_stable_decay": {
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    },
}


def as_number(value: object) -> object:
    """YAML 1.1 takes 1e-6 for text and 1e6 for no integer."""
    if isinstance(value, str) and INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_tuple(value: object) -> tuple:
    """One value stands for a list of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


T = TypeVar("T")
MayChange = Annotated[T, RESUMABLE]  # all the other settings define the run
Int = Annotated[int, BeforeValidator(as_number)]
Number = Annotated[Any, BeforeValidator(as_number)]  # or another word
Real = Annotated[float, BeforeValidator(as_number), AllowInfNan(False)]
Tuple = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]
Natural = Annotated[Int, Ge(0)]
Count = Annotated[Int, Ge(1)]
Length = Annotated[Int, Interval(ge=1, le=2**20)]  # tokens
Positive = Annotated[Real, Gt(0)]
NonNegative = Annotated[Real, Ge(0)]
Share = Annotated[Real, Interval(ge=0, le=1)]
Part = Annotated[Real, Interval(gt=0, le=1)]
Temperature = Annotated[Real, Interval(ge=0, le=10)]
Port = Annotated[Int, Interval(ge=1, lt=65535)]
Attention = Literal[
    "sdpa",
    "eager",
    "varlen",
    "flash_attention_2",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
]
Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class Config:
    """The settings of a run or of an evaluation; whoever makes one gets it checked."""

    # model
    model_name_or_path: str = ""  # hub name or folder of a causal LM
    model_revision: str = "main"
    torch_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of computing
    bf16: MayChange[bool | None] = None  # the reference's flag: must agree with torch_dtype
    attn_implementation: MayChange[Attention] = "sdpa"  # varlen: the flash attention of torch
    chat_template: str | None = None  # Jinja text or its file; null: the tokenizer's
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # enable_thinking ...

    # data; a column may be dotted: reward_model.ground_truth
    dataset_name: str = ""  # hub name, folder or file
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_prompt_column: str = "problem"  # text, or a list of chat messages
    dataset_answer_column: str = "solution"  # the gold answer, as the reference's data names it
    dataset_hint_column: str = "solution_hint"  # the solution that hints are cut from
    dataset_level_column: str = "level"  # difficulty for the curriculum; may be missing
    dataset_choice_columns: Tuple[str] = ()  # wrong options: a multiple choice, asked for a letter
    system_prompt: str | None = None
    curriculum: bool = False  # easy to hard by level instead of shuffled (GRPO-CL)

    # hints: the method
    rl_type: Literal["ghpo", "grpo"] = "ghpo"  # grpo: the same code without hints
    hint_ratio: Tuple[Share] = (0.25, 0.5, 0.75)  # omega of the stages; one number: a fixed ratio
    start_hint_step: Natural = 0  # cold start: no hints before (paper: 20)
    hint_trigger: str = "accuracy"  # the reward that decides what is hard; always: hint everything
    hint_threshold: Share = 0.0  # hard: mean trigger reward of the group is at most this
    hint_where: Literal["user", "assistant"] = "user"  # (paper), or the assistant's turn begins so
    hint_timing: Literal["inline", "deferred"] = "inline"  # within the step (paper), or in the next
    deferred_share: Share = 0.5  # at most this part of a step's prompts are returning problems
    hint_context: Literal["hinted", "original"] = "hinted"  # the loss conditions on (paper: hinted)
    hint_exhausted: Literal["keep", "drop"] = "keep"  # a group that fails the last stage
    # groups whose rewards are all alike; drop: not counted in E6; replace: by fresh problems (DAPO)
    flat_groups: Literal["keep", "drop", "replace"] = "keep"
    replace_rounds: Count = 3  # at most, in a step

    # rollouts
    engine: Literal["hf", "vllm", "server"] | None = None  # null: vllm if use_vllm, else hf
    use_vllm: MayChange[bool | None] = None  # the reference's flag: must agree with engine
    num_generations: Count = 8  # G, samples per problem
    max_prompt_length: Length = 512  # longer problems are dropped at load, longer hints shortened
    max_completion_length: Length = 2048
    temperature: Temperature = 1.0  # 0: greedy, in evaluation only
    top_p: Part = 1.0  # below 1 the sampler's log-probs are of another distribution than the loss's
    top_k: Natural = 0  # 0: off; otherwise as top_p
    # mean k3 of sampler against trainer that stops the run; auto: see plan.py; null: only warns
    mismatch_limit: MayChange[Literal["auto"] | Positive | None] = "auto"
    vllm_gpu_memory_utilization: MayChange[Part] = 0.3  # of the whole GPU, colocated engine
    vllm_server_host: MayChange[str] = "127.0.0.1"
    vllm_server_port: MayChange[Port] = 8000  # weights travel through port + 1

    # rewards
    reward_funcs: Annotated[Tuple[str], MinLen(1)] = ("accuracy", "format")  # or file.py:function
    reward_weights: Tuple[Real] = (1.0, 0.5)
    strict_answers: bool = True  # in training an answer must be worked out, not copied
    # seconds for one answer, which then scores 0
    verifier_timeout: MayChange[Annotated[Real, Interval(ge=0.01, le=3600)]] = 5.0

    # loss
    loss_type: Literal["bnpo", "dapo", "grpo", "dr_grpo"] = "bnpo"  # E6; bnpo is the reference's
    epsilon: NonNegative = 0.2
    epsilon_high: NonNegative | None = None  # null: epsilon
    beta: NonNegative = 0.0  # of the KL term; above 0 a frozen copy of the model is kept
    scale_rewards: bool = True  # divide advantages by the standard deviation of the group
    num_iterations: Count = 1  # optimizer steps on each rollout batch
    mask_truncated_completions: bool = False
    importance_cap: Positive | None = 2.0  # E7; null: no correction

    # optimisation
    learning_rate: Share = 1e-6
    lr_scheduler_type: Schedule = "cosine"  # as in transformers
    lr_scheduler_kwargs: dict[str, Number] = field(default_factory=dict)  # min_lr_rate ...
    warmup_ratio: Share = 0.0
    warmup_steps: Natural = 0  # above 0 it wins over warmup_ratio
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[NonNegative, Lt(1)] = 0.9
    adam_beta2: Annotated[NonNegative, Lt(1)] = 0.999
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    num_train_epochs: MayChange[Positive] = 1.0
    max_steps: MayChange[Annotated[Int, Ge(-1)]] = -1  # above 0 it wins over num_train_epochs
    per_device_train_batch_size: MayChange[Count] = 8  # see plan.py for the prompts of a step
    gradient_accumulation_steps: MayChange[Count] = 1
    micro_batch_tokens: MayChange[Count] = 16384  # per forward: a matter of memory only
    packing: MayChange[bool | None] = None  # rows in one sequence; null: with flash attention only
    gradient_checkpointing: MayChange[bool] = True
    sharding: MayChange[Literal["zero3", "zero2", "ddp"]] = "zero3"
    replicas: MayChange[Count] = 1  # HSDP: copies of the sharded model, e.g. one a node
    cpu_offload: MayChange[bool] = False
    startup_pass: MayChange[bool | None] = None  # first a pass at full length; null: on GPU

    # evaluation, always without hints
    eval_strategy: MayChange[Literal["no", "steps"]] = "no"
    eval_steps: MayChange[Count] = 100
    # name: path, or name: {dataset_name: ..., eval_samples: ..., more of data and evaluation}
    eval_datasets: MayChange[dict[str, str | dict[str, Any]]] = field(default_factory=dict)
    eval_samples: MayChange[Count] = 1  # k of avg@k
    eval_temperature: MayChange[Temperature] = 0.0
    eval_max_completion_length: MayChange[Length | None] = None  # null: max_completion_length
    eval_limit: MayChange[Count | None] = None  # problems of each set, the first ones

    # output
    output_dir: MayChange[Annotated[str, MinLen(1)]] = "runs/ghpo"  # the same config resumes there
    overwrite_output_dir: MayChange[bool] = False  # another run there is moved aside, not deleted
    save_strategy: MayChange[Literal["no", "steps", "epoch"]] = "steps"  # no: only the last
    save_steps: MayChange[Count] = 100
    save_total_limit: MayChange[Count | None] = None
    push_to_hub: MayChange[bool] = False
    hub_model_id: MayChange[str | None] = None
    report_to: MayChange[Tuple[Literal["wandb"]]] = ()
    reliance_steps: MayChange[Natural] = 0  # log hint/reliance every so many steps; 0: never
    logging_steps: MayChange[Count] = 1  # for the terminal; metrics.jsonl has every step
    seed: Annotated[Int, Interval(ge=0, lt=2**63)] = 42

    def __post_init__(self):
        wrong = {}
        for name, kind in KINDS.items():
            value = getattr(self, name)
            try:
                value = kind.validate_python(value, strict=True)
            except ValidationError as error:
                found = [SUBJECT.sub("must", one["msg"]) for one in error.errors()]
                wrong[name] = f"{shown(name, value)} {' or '.join(dict.fromkeys(found))}"
                value = DEFAULTS[name]  # for what follows; the config is refused below
            object.__setattr__(self, name, value)
        if self.engine is None:
            object.__setattr__(self, "engine", "vllm" if self.use_vllm else "hf")
        lines = list(wrong.values())
        for names, message in contradictions(self):
            if wrong.keys().isdisjoint(names.split()):
                settings = [shown(name, getattr(self, name)) for name in names.split()]
                lines.append(f"{' and '.join(settings)} {message}")
        if lines:
            raise SettingsError(lines)


class SettingsError(UserError):
    """All that is wrong with some settings, a line each."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        title = "config: " if len(lines) == 1 else f"config: {len(lines)} mistakes\n  "
        super().__init__(title + "\n  ".join(lines))


def shown(name: str, value: object) -> str:
    """key=value, not longer than a message can hold."""
    text = repr(value)
    return f"{name}={text if len(text) <= SHOWN else text[:SHOWN] + '...'}"


KINDS = {
    name: TypeAdapter(hint) for name, hint in get_type_hints(Config, include_extras=True).items()
}


def contradictions(c: Config) -> Iterator[tuple[str, str]]:
    """(names of settings, why they cannot stand so) for values that are right one by one."""
    if not c.model_name_or_path:
        yield "model_name_or_path", "must be set, to a hub name or a folder"
    if not c.dataset_name:
        yield "dataset_name", "must be set, to a hub name, a folder or a file"
    if c.use_vllm is not None and c.use_vllm != (c.engine != "hf"):
        yield "engine use_vllm", "disagree, set one"
    if c.bf16 is not None and c.bf16 != (c.torch_dtype == "bfloat16"):
        yield "bf16 torch_dtype", "disagree, set one"
    if c.chat_template and "{" not in c.chat_template and not isfile(c.chat_template):
        yield "chat_template", "is neither Jinja text nor a file"
    unknown = [
        name
        for name in c.reward_funcs
        if name not in REWARDS and not isfile(name.rpartition(":")[0])
    ]
    if unknown:
        yield "reward_funcs", f"{unknown[0]!r}: none of {', '.join(REWARDS)}, no file.py:function"
    if len(set(c.reward_funcs)) < len(c.reward_funcs):
        yield "reward_funcs", "names a reward twice"
    if len(c.reward_weights) != len(c.reward_funcs):
        yield "reward_funcs reward_weights", "need one weight for each reward"
    if list(c.hint_ratio) != sorted(set(c.hint_ratio)):
        yield "hint_ratio", "must ascend"
    if uses_hints(c):
        if not unknown and c.hint_trigger not in (*c.reward_funcs, "always"):
            yield "hint_trigger reward_funcs", "disagree: name one of the rewards, or always"
        if not c.hint_ratio and (c.hint_trigger == "always" or c.hint_exhausted == "keep"):
            yield "hint_ratio", "shows no hint: set rl_type: grpo, or hint_exhausted: drop"
        if c.hint_timing == "deferred" and not c.deferred_share:
            yield "hint_timing deferred_share", "never ask again"
    if c.temperature == 0 and c.num_generations > 1:
        yield "temperature num_generations", ALL_GREEDY
    if not all(re.fullmatch(r"[\w.@+-]+", name) for name in c.eval_datasets):
        yield "eval_datasets", "must have names of letters, digits and .@+-_: they name files"
    schedule, given = "lr_scheduler_type lr_scheduler_kwargs", c.lr_scheduler_kwargs.keys()
    allowed = SCHEDULE_KEYS.get(c.lr_scheduler_type, set())
    if given - allowed:
        yield schedule, f"disagree: the schedule takes {', '.join(sorted(allowed)) or 'nothing'}"
    if "min_lr" in allowed and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield schedule, "must name one of min_lr and min_lr_rate"
    if "num_decay_steps" in allowed - given:
        yield schedule, "must name num_decay_steps"


DEFAULTS = asdict(Config(model_name_or_path="-", dataset_name="-"))


class OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two values the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            need(name not in seen, f"line {line}: {name} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, name: str) -> Any:
    """What YAML text says; UserError names where it comes from."""
    try:
        return yaml.load(text, OnceLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"config: {name}: {reason}")


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Settings from a command line: key=value, --key=value, --key value, --key value value."""
    texts, last = {}, None  # last: the key of a --key, whose values follow
    for word in arguments:
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        is_setting = equals and key.isidentifier()
        if word.startswith("--"):
            texts[key] = [text] if equals else []
            last = None if equals else key
        elif last and not texts[last]:  # the first value may have any look
            texts[last].append(word)
        elif is_setting:
            texts[key], last = [text], None
        else:
            need(last, f"config: {word}: an override is written key=value")
            texts[last].append(word)
    values = {}
    for key, words in texts.items():
        need(words, f"config: --{key} has no value")
        found = [read_yaml(word, f"{key}={word}") for word in words]
        values[key] = found[0] if len(found) == 1 else found
    return values


def read_settings(path: str | Path) -> dict[str, Any]:
    """The unchecked settings of a YAML file; UserError names it when it holds no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        told = f"{error.strerror}; configs/ has examples"
        raise UserError(f"config: {path}: {told}") from None
    except ValueError as error:
        raise UserError(f"config: {path}: {error}") from None
    values = read_yaml(text, path)
    need(isinstance(values, dict | None), f"config: {path}: no settings, but {shown('', values)}")
    return values or {}


def read_config(path: str | Path, arguments: Iterable[str] = ()) -> Config:
    """The checked Config of a YAML file and a command line's overrides (see parse_overrides)."""
    return make_config(read_settings(path), parse_overrides(arguments))


def load_config(
    path: str | Path, arguments: Iterable[str] = (), is_eval: bool = False, will_run: bool = False
) -> Config:
    """The Config of read_config for one run, without eval sets when it evaluates nothing; will_run:
    what the run needs must be installed."""
    config = read_config(path, arguments)
    need(config.eval_datasets or not is_eval, "config: --eval needs eval_datasets")
    if will_run and config.engine != "hf" and not importlib.util.find_spec("vllm"):
        raise UserError(
            "config: engine: vllm is not installed: pip install -r "
            "requirements-vllm.txt (on a CPU: ./run.sh test-vllm)"
        )
    if config.eval_strategy == "steps" and not config.eval_datasets:
        say("config: eval_strategy: nothing is evaluated without eval_datasets")
    if config.eval_datasets and (is_eval or config.eval_strategy == "steps"):
        return config
    return replace(config, eval_strategy="no", eval_datasets={})


def make_config(*layers: dict[str, Any]) -> Config:
    """The checked Config of settings, ours or another trainer's; those of a later dict win."""
    ours, lines = translate(layers, KINDS.keys())
    for key in [key for key in ours if key not in KINDS]:
        near = difflib.get_close_matches(key, KINDS, 1, NEAREST)
        lines.append(f"unknown key {key!r}" + "".join(f", not {name}?" for name in near))
        del ours[key]
    if isinstance(ours.get("hint_ratio"), int | float):
        say("config: one hint_ratio is a fixed ratio here; the released trainer ignores the key")
    try:
        config = Config(**ours)
    except SettingsError as error:
        raise SettingsError(lines + error.lines) from None
    for name, spec in config.eval_datasets.items():
        try:
            eval_config(config, spec)
        except SettingsError as error:
            lines += [f"eval_datasets: {name}: {line}" for line in error.lines]
    if lines:
        raise SettingsError(lines)
    return with_what_is_installed(config)


def eval_config(config: Config, spec: str | dict) -> Config:
    """The config of an eval set, a path or a dict of settings: G = k, no hints."""
    if isinstance(spec, str):
        spec = {"dataset_name": spec}
    spec = {our_name(key): value for key, value in spec.items()}
    lines = [] if "dataset_name" in spec else ["has no dataset_name"]
    for key in [key for key in spec if key not in IN_EVALUATION]:
        instead = INSTEAD.get(key, "that of the run")
        known = f"{key} has no meaning there, use {instead}"
        lines.append(known if key in KINDS else f"unknown key {key!r}")
    if lines:
        raise SettingsError(lines)
    values = asdict(config) | {"strict_answers": False} | spec  # as others report accuracies
    if values["eval_max_completion_length"] and "max_completion_length" not in spec:
        values["max_completion_length"] = values["eval_max_completion_length"]
    c = Config(**values | {"rl_type": "grpo", "curriculum": False})
    if c.eval_temperature == 0 and c.eval_samples > 1:
        raise SettingsError(
            [
                f"{shown('eval_temperature', c.eval_temperature)} and "
                f"{shown('eval_samples', c.eval_samples)} {ALL_GREEDY}"
            ]
        )
    return replace(c, num_generations=c.eval_samples, temperature=c.eval_temperature)


def with_what_is_installed(config: Config) -> Config:
    """The config without wandb and flash attention where they are missing, which is told."""
    report_to, attention = config.report_to, config.attn_implementation
    if "wandb" in report_to and not is_installed("wandb"):
        say("config: report_to: wandb is not installed; metrics.jsonl has everything")
        report_to = ()
    if attention in FLASH and not is_installed(FLASH[attention]):
        instead = "varlen" if config.torch_dtype == "bfloat16" and sees_gpu() else "sdpa"
        say(f"config: attn_implementation: {FLASH[attention]} is not installed, using {instead}")
        attention = instead
    if attention == "varlen" and not sees_gpu():
        say("config: attn_implementation: varlen needs a GPU, using sdpa")
        attention = "sdpa"
    need(
        attention not in FLASH or config.torch_dtype == "bfloat16",
        "config: attn_implementation="
        f"{attention} and torch_dtype={config.torch_dtype} disagree: flash attention computes in "
        "bfloat16, take sdpa",
    )
    packing = config.packing
    if packing is None:
        packing = attention in FLASH
    return replace(config, report_to=report_to, attn_implementation=attention, packing=packing)


def sees_gpu() -> bool:
    import torch  # slow

    return torch.cuda.is_available()


def is_installed(package: str) -> bool:
    """Is the package of this name in the index there (modules of other packages may share it)?"""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
