"""What a config's model_name_or_path stands for: model and tokenizer, as they can be trained.

Called by ghpo.py. What the libraries refuse is one line that names the model, and what an export
writes beside the weights is written once at the start, lest the first checkpoint fails on it.
"""

import functools
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import configs.varlen  # noqa: F401, makes transformers know it
from configs import as_user_error, need, say
from configs.plan import longest_sequence
from configs.settings import Config

tell = functools.cache(say)  # once a process: the reference model is loaded as the policy was


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template and a pad token; UserError when it cannot be used."""
    name = f"model_name_or_path={config.model_name_or_path}"
    with as_user_error(f"{name}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=False
        )
        spelt = tokenizer.decode(tokenizer("12").input_ids)
    need(
        "12" in spelt.replace(" ", ""),
        f"{name}: its tokenizer reads 12 as {spelt!r}: are files missing?",
    )
    template = config.chat_template
    if template and "{" not in template:  # all Jinja has a brace
        with as_user_error(f"chat_template={template:.90}"):
            template = Path(template).read_text(encoding="utf-8")
    if template:
        tokenizer.chat_template = template
    example = r'"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"'
    need(
        tokenizer.chat_template,
        f"{name}: its tokenizer has no chat template: set one, Jinja or a file, for example "
        f"chat_template: {example}",
    )
    need(tokenizer.eos_token is not None, f"{name}: its tokenizer names no eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"tokenizer: no pad token, {tokenizer.eos_token} takes its place")
    prove_export(name, tokenizer)
    return tokenizer


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: text} of the special tokens, of roles and ends; <think> and <answer> are text."""
    found = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special and not re.fullmatch("</?(think|answer)>", str(token)):
            found[number] = str(token)
    return found


def prove_export(name: str, *parts: Any) -> None:
    """Saves configs or a tokenizer once, lest the first checkpoint of a run fails on them."""
    with as_user_error(f"{name}: cannot be exported"), TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)


def load_model(config: Config, dtype: torch.dtype | str) -> PreTrainedModel:
    """The causal LM (dtype auto: as it is stored) without dropout; UserError when a folder is
    incomplete, or holds no text model alone. What an export writes has been written once."""
    name = f"model_name_or_path={config.model_name_or_path}"
    where = {"revision": config.model_revision, "trust_remote_code": False}
    with as_user_error(name):
        model_config = AutoConfig.from_pretrained(config.model_name_or_path, **where)
        text_config = model_config.get_text_config()
    if text_config is not model_config:
        check_wrapper(name, model_config)
    turn_off_dropout(name, text_config)
    longest = longest_sequence(config)
    limit = getattr(text_config, "max_position_embeddings", longest)
    need(
        longest <= limit,
        f"{name}: max_prompt_length + max_completion_length = {longest} tokens (of training or of "
        f"an eval set), but it has {limit} positions: lower one of them",
    )
    with as_user_error(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            config=model_config,
            dtype=dtype,
            attn_implementation=attention_of(config.attn_implementation, name, model_config),
            output_loading_info=True,
            **where,
        )
    missing = sorted(report["missing_keys"])
    need(
        not missing,
        f"{name}: its files lack {len(missing)} of the model's tensors, which would "
        f"be random: get the whole model ({', '.join(missing[:2])} ...)",
    )
    allow_sampling(name, model.generation_config)
    prove_export(name, model.config, model.generation_config)
    return model


def attention_of(attention: str, name: str, model_config: PretrainedConfig) -> str:
    """This one, or eager where the model's is more than sdpa computes."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    # sdpa would leave out a cap on the logits (Gemma 2) silently
    cap = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    if getattr(kind, "_supports_sdpa", True) and cap is None:
        return attention
    need(
        attention != "varlen",
        f"{name}: attn_implementation=varlen cannot compute its attention: set eager, or "
        "install flash-attn",
    )
    if attention == "sdpa":
        tell(f"{name}: attn_implementation: sdpa cannot compute its attention, using eager")
        return "eager"
    return attention


def check_wrapper(name: str, model_config: PretrainedConfig) -> None:
    """A model of several modalities is refused, or told where the library has its text model."""
    text_config = model_config.get_text_config()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    need(
        kind and kind.config_class is type(text_config),
        f"{name}: {model_config.model_type} wraps a text model ({text_config.model_type}) and is "
        "not trained here: name a text model",
    )
    tell(f"{name}: of {model_config.model_type} the text model alone is trained and exported")


def turn_off_dropout(name: str, model_config: PretrainedConfig) -> None:
    """Sets what is random in training to 0."""
    off = []
    for key, value in list(vars(model_config).items()):
        if re.search("drop|jitter", key) and isinstance(value, float) and value > 0:
            setattr(model_config, key, 0.0)
            off.append(key)
    if off:
        tell(f"{name}: trained without its {', '.join(off)}")


def allow_sampling(name: str, generation: Any) -> None:
    """A generation config that names a temperature, say, but does not sample cannot be saved."""
    try:
        generation.validate(strict=True)
    except ValueError:
        if not generation.do_sample:
            generation.do_sample = True
            tell(f"{name}: its generation_config is exported with do_sample: true")


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers, which FSDP shards one by one; what holds the embedding belongs to the root."""
    names, embedding = model._no_split_modules or [], model.get_input_embeddings()
    return [
        part
        for part in model.modules()
        if type(part).__name__ in names and embedding not in part.modules()
    ]


def sizes(config: Config) -> tuple[int, int]:
    """(weights of the model, those that zero3 holds at once: the root's and two blocks'), of which
    only the configuration is read."""
    name = config.model_name_or_path
    with as_user_error(f"model_name_or_path={name}"):
        shape = AutoConfig.from_pretrained(name, revision=config.model_revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
    n_params = sum(p.numel() for p in model.parameters())
    sharded = [p for block in blocks_of(model)[2:] for p in block.parameters()]
    return n_params, n_params - sum(p.numel() for p in sharded)
