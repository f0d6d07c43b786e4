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

from configs import UserError, as_user_error, need, say
from configs.foreign import our_name, translate
from hints import uses_hints
from reward import REWARDS

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
RESUMABLE = "may differ when a run is resumed"
IN_EVAL_SET = "may differ in an eval set"
OF_EVAL_SETS = "dataset_*, eval_*, system_prompt, max_*_length, top_*, strict_answers, seed"
FLASH = {  # what each of them needs installed
    "varlen": "torch",  # its own flash attention
    "flash_attention_2": "flash-attn",
    "kernels-community/flash-attn2": "kernels",
    "kernels-community/flash-attn3": "kernels",
}


def as_integer(value: object) -> object:
    """1e6 means one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_tuple(value: object) -> tuple:
    """One value stands for a list of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


T = TypeVar("T")
MayChange = Annotated[T, RESUMABLE]  # all the other settings define the run
PerSet = Annotated[T, IN_EVAL_SET]  # in all others an evaluation is like the run
Int = Annotated[int, BeforeValidator(as_integer)]
Real = Annotated[float, AllowInfNan(False)]
Tuple = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]
Natural = Annotated[Int, Ge(0)]
Count = Annotated[Int, Ge(1)]
Length = Annotated[Int, Interval(ge=1, le=2**20)]  # tokens
Positive = Annotated[Real, Gt(0)]
NonNegative = Annotated[Real, Ge(0)]
Share = Annotated[Real, Interval(ge=0, le=1)]
Part = Annotated[Real, Interval(gt=0, le=1)]
Temperature = Annotated[Real, Interval(ge=0, le=10)]


@dataclass(frozen=True)
class Config:
    """The settings of a run or of an evaluation; whoever makes one gets it checked."""

    # model
    model_name_or_path: str = ""  # hub name or folder of a causal LM
    model_revision: str = "main"
    torch_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of computing
    attn_implementation: MayChange[Literal["sdpa", "eager", *FLASH]] = "sdpa"
    chat_template: str | None = None  # Jinja text or its file; null: the tokenizer's
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # enable_thinking ...

    # data; a column may be dotted: reward_model.ground_truth
    dataset_name: PerSet[str] = ""  # hub name, folder or file
    dataset_config: PerSet[str | None] = None
    dataset_split: PerSet[str] = "train"
    dataset_prompt_column: PerSet[str] = "problem"  # text, or a list of chat messages
    dataset_answer_column: PerSet[str] = "solution"  # the gold; named so by the reference's data
    dataset_hint_column: PerSet[str] = "solution_hint"  # the solution that hints are cut from
    dataset_level_column: PerSet[str] = "level"  # difficulty for the curriculum; may be missing
    dataset_choice_columns: PerSet[Tuple[str]] = ()  # the wrong options of a multiple choice
    system_prompt: PerSet[str | None] = None
    curriculum: bool = False  # easy to hard by level instead of shuffled (GRPO-CL)

    # hints: the method
    rl_type: Literal["ghpo", "grpo"] = "ghpo"  # grpo: the same code without hints
    hint_ratio: Tuple[Share] = (0.25, 0.5, 0.75)  # omega of the stages; one number: a fixed ratio
    start_hint_step: Natural = 0  # cold start: no hints before (paper: 20)
    hint_trigger: str = "accuracy"  # the reward that decides what is hard; always: hint everything
    hint_threshold: Share = 0.0  # hard: mean trigger reward of the group is at most this
    hint_where: Literal["user", "assistant"] = "user"  # (paper), or the assistant's turn begins so
    hint_timing: Literal["inline", "deferred"] = "inline"  # within the step (paper), or in the next
    deferred_share: Part = 0.5  # at most this part of a step's prompts are returning problems
    hint_context: Literal["hinted", "original"] = "hinted"  # the loss conditions on (paper: hinted)
    hint_exhausted: Literal["keep", "drop"] = "keep"  # a group that fails the last stage
    # groups whose rewards are all alike; drop: not counted in E6; replace: by fresh problems (DAPO)
    flat_groups: Literal["keep", "drop", "replace"] = "keep"
    replace_rounds: Count = 3  # at most, in a step

    # rollouts
    engine: Literal["hf", "vllm", "server"] | None = None  # null: vllm if use_vllm, else hf
    use_vllm: MayChange[bool | None] = None  # the reference's flag: must agree with engine
    num_generations: Count = 8  # G, samples per problem
    max_prompt_length: PerSet[Length] = 512  # longer problems are dropped, longer hints shortened
    max_completion_length: PerSet[Length] = 2048
    temperature: Temperature = 1.0  # 0: greedy, in evaluation only
    top_p: PerSet[Part] = 1.0  # below 1 the sampler's distribution is not that of the loss
    top_k: PerSet[Natural] = 0  # 0: off; otherwise as top_p
    # mean k3 of sampler against trainer that stops the run; auto: see plan.py; null: only warns
    mismatch_limit: MayChange[Literal["auto"] | Positive | None] = "auto"
    vllm_gpu_memory_utilization: MayChange[Part] = 0.3  # of the whole GPU, colocated engine
    vllm_server_host: MayChange[str] = "127.0.0.1"
    vllm_server_port: MayChange[Annotated[Int, Interval(ge=1, lt=65535)]] = (
        8000  # weights travel through port + 1
    )

    # rewards
    reward_funcs: Annotated[Tuple[str], MinLen(1)] = ("accuracy", "format")  # or file.py:function
    reward_weights: Tuple[Real] = (1.0, 0.5)
    strict_answers: PerSet[bool] = True  # in training an answer must be worked out, not copied
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
    lr_scheduler_type: str = "cosine"  # as in transformers
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)  # min_lr_rate ...
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
    eval_samples: MayChange[PerSet[Count]] = 1  # k of avg@k
    eval_temperature: MayChange[PerSet[Temperature]] = 0.0
    eval_max_completion_length: MayChange[PerSet[Length | None]] = (
        None  # null: max_completion_length
    )
    eval_limit: MayChange[PerSet[Count | None]] = None  # problems of each set, the first ones

    # output
    output_dir: MayChange[Annotated[str, MinLen(1)]] = "runs/ghpo"  # the same config resumes there
    overwrite_output_dir: MayChange[bool] = False  # another run there is moved aside, not deleted
    save_strategy: MayChange[Literal["no", "steps", "epoch"]] = "steps"  # no: only the last
    save_steps: MayChange[Count] = 100
    save_total_limit: MayChange[Count | None] = None
    push_to_hub: MayChange[bool] = False
    hub_model_id: MayChange[str | None] = None
    report_to: MayChange[Tuple[str]] = ()  # wandb
    reliance_steps: MayChange[Natural] = 0  # log hint/reliance every so many steps; 0: never
    logging_steps: MayChange[Count] = 1  # for the terminal; metrics.jsonl has every step
    seed: PerSet[Annotated[Int, Interval(ge=0, lt=2**63)]] = 42

    def __post_init__(self):
        wrong = {}
        for name, kind in KINDS.items():
            value = getattr(self, name)
            try:
                value = kind.validate_python(value, strict=True)
            except ValidationError as error:
                found = [re.sub(r"^\w+ should", "must", one["msg"]) for one in error.errors()]
                wrong[name] = f"{shown(name, value)} {' or '.join(dict.fromkeys(found))}"
                value = DEFAULTS[name]  # for what follows; the config is refused below
            object.__setattr__(self, name, value)
        if self.engine is None:
            object.__setattr__(self, "engine", "vllm" if self.use_vllm else "hf")
        lines, told = list(wrong.values()), set(wrong)
        for names, message in contradictions(self):
            if told.isdisjoint(names.split()):
                told.update(names.split())
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
    return f"{name}={value!r:.90}"


HINTS = get_type_hints(Config, include_extras=True)
KINDS = {name: TypeAdapter(hint) for name, hint in HINTS.items()}


def is_marked(name: str, mark: str) -> bool:
    """Has a setting's type this mark, RESUMABLE or IN_EVAL_SET?"""
    return mark in getattr(HINTS.get(name), "__metadata__", ())


def contradictions(c: Config) -> Iterator[tuple[str, str]]:
    """(names of settings, why they cannot stand so) for values that are right one by one."""
    for name in ("model_name_or_path", "dataset_name"):
        if not getattr(c, name):
            yield name, "must be set, to a hub name or a path"
    if c.use_vllm is not None and c.use_vllm != (c.engine != "hf"):
        yield "engine use_vllm", "disagree, set one"
    for name in c.reward_funcs:
        if name not in REWARDS and not isfile(name.rpartition(":")[0]):
            yield "reward_funcs", f"{name!r}: none of {', '.join(REWARDS)}, no file.py:function"
    if len(c.reward_weights) != len(c.reward_funcs):
        yield "reward_funcs reward_weights", "need one weight for each reward"
    if list(c.hint_ratio) != sorted(set(c.hint_ratio)):
        yield "hint_ratio", "must ascend"
    if uses_hints(c):
        if c.hint_trigger not in (*c.reward_funcs, "always"):
            yield "hint_trigger reward_funcs", "disagree: name one of the rewards, or always"
        if not c.hint_ratio and (c.hint_trigger == "always" or c.hint_exhausted == "keep"):
            yield "hint_ratio", "shows no hint: set rl_type: grpo, or hint_exhausted: drop"
    if c.temperature == 0 and c.num_generations > 1:
        note = "in an eval set they are eval_temperature and eval_samples"
        yield "temperature num_generations", f"are greedy samples, all the same ({note})"
    if not all(re.fullmatch(r"[\w.@+-]+", name) for name in c.eval_datasets):
        yield "eval_datasets", "must have names of letters, digits and .@+-_: they name files"
    if c.lr_scheduler_type != "cosine" or c.lr_scheduler_kwargs:
        fault = schedule_fault(c.lr_scheduler_type, c.lr_scheduler_kwargs)
        if fault:
            yield "lr_scheduler_type lr_scheduler_kwargs", f"make no schedule: {fault}"


def schedule_fault(name: str, more: dict[str, Any]) -> str | None:
    """Why transformers makes no learning rate that depends on the step alone from these."""
    import torch  # slow
    from transformers import get_scheduler

    if name.startswith("constant") and more:  # it would be ignored
        return "it takes no lr_scheduler_kwargs"
    try:
        scheduler = get_scheduler(name, torch.optim.SGD([torch.zeros(1)]), 1, 2, more)
    except (TypeError, ValueError) as error:
        return str(error)
    return None if hasattr(scheduler, "lr_lambdas") else "it is no function of the step"


DEFAULTS = asdict(Config(model_name_or_path="-", dataset_name="-"))


class Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, which YAML 1.1 takes for text, and no key stands twice: of
    two values the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ValueError(f"line {line}: {name} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("+-.0123456789"))


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Settings from a command line: key=value, --key=value, --key value."""
    values, words = {}, iter(arguments)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if word.startswith("--") and not equals:
            text = next(words, "--")
            need(not text.startswith("--"), f"config: {word} has no value")
        elif not (equals and key.isidentifier()):
            raise UserError(f"config: {word}: an override is written key=value")
        with as_user_error(f"config: {key}={text}"):
            values[key] = yaml.load(text, Loader)
    return values


def read_settings(path: str | Path) -> dict[str, Any]:
    """The unchecked settings of a YAML file; UserError names it when it holds no mapping."""
    with as_user_error(f"config: {path}"):
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    need(isinstance(values, dict | None), f"config: {path}: no settings, but {shown('', values)}")
    return values or {}


def load_config(
    path: str | Path, arguments: Iterable[str] = (), is_eval: bool = False, will_run: bool = False
) -> Config:
    """The checked Config of a YAML file and a command line's overrides (see parse_overrides) for
    one run: without eval sets when it evaluates nothing. will_run: what it needs must be there."""
    config = make_config(read_settings(path), parse_overrides(arguments))
    need(
        not will_run or config.engine == "hf" or importlib.util.find_spec("vllm"),
        "config: engine: vllm is not installed: pip install -r requirements-vllm.txt "
        "(on a CPU: ./run.sh test-vllm)",
    )
    if config.eval_datasets and (is_eval or config.eval_strategy == "steps"):
        return config
    need(not is_eval, "config: --eval needs eval_datasets")
    if config.eval_strategy == "steps":
        say("config: eval_strategy: nothing is evaluated without eval_datasets")
    return replace(config, eval_strategy="no", eval_datasets={})


def make_config(settings: dict[str, Any], overrides: dict[str, Any] | None = None) -> Config:
    """The checked Config of settings, ours or another trainer's; overrides win over them."""
    ours, lines = translate(settings, overrides or {})
    for key in [key for key in ours if key not in KINDS]:
        near = difflib.get_close_matches(key, KINDS, n=1, cutoff=0.8)  # a misspelt one
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
    for key in spec:
        if not is_marked(key, IN_EVAL_SET):
            lines.append(f"{key} has no meaning there, only {OF_EVAL_SETS}")
    if lines:
        raise SettingsError(lines)
    values = asdict(config) | {"strict_answers": False} | spec  # as others report accuracies
    if values["eval_max_completion_length"] and "max_completion_length" not in spec:
        values["max_completion_length"] = values["eval_max_completion_length"]
    c = Config(**values | {"rl_type": "grpo", "curriculum": False})
    return replace(c, num_generations=c.eval_samples, temperature=c.eval_temperature)


def with_what_is_installed(config: Config) -> Config:
    """The config without wandb and flash attention where they are missing, which is told."""
    report_to = [name for name in config.report_to if name == "wandb" and is_installed(name)]
    for name in config.report_to:
        if name not in report_to:
            say(f"config: report_to: {name} is not here; metrics.jsonl has everything")
    attention = asked = config.attn_implementation
    if asked in FLASH:
        import torch  # slow

        can_flash = config.torch_dtype == "bfloat16" and torch.cuda.is_available()
        if not can_flash or not is_installed(FLASH[asked]):
            attention = "varlen" if can_flash else "sdpa"
            needed = f"{asked} needs {FLASH[asked]}, a GPU and bfloat16"
            say(f"config: attn_implementation: {needed}, using {attention}")
    packing = config.packing
    if packing is None:
        packing = attention in FLASH
    return replace(config, report_to=report_to, attn_implementation=attention, packing=packing)


def is_installed(package: str) -> bool:
    """Is the package of this name in the index there (modules of other packages may share it)?"""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
