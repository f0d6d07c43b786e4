"""The families of models that people train: right log-probs, whole runs, and what is refused."""

import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import families
import pytest
import torch
import yaml
from conftest import make_config, problem, read_jsonl, write_jsonl
from families import FAMILIES, NEVER_PACKED, ON_RANKS, SHARDINGS, policy_run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    GPTJConfig,
    GPTJForCausalLM,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    T5Config,
)

import ghpo
from configs import UserError
from configs.model import blocks_of, check_wrapper, control_tokens, tell
from reward import VerifierPool, format_reward

REWARD = "def digest(text, gold):\n    return sum(text.encode()) % 97 / 97\n"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def folders(root):
    """folders(family): its model folder, made once."""

    def folder(family):
        if not (root / family).exists():
            families.save_family(family, root / family)
        return str(root / family)

    return folder


@pytest.fixture
def broken(folders, tmp_path):
    """broken(change): a copy of the qwen2 folder that `change` has been at."""

    def copy(change):
        folder = shutil.copytree(folders("qwen2"), tmp_path / "model")
        change(folder)
        return str(folder)

    return copy


# ---- log-probs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_the_models_own(family, folders, alone):
    """Chunked, checkpointed, padded and packed."""
    rows, dtype = families.sequences(), families.dtype_of(family)
    expected = families.plain_gradients(family, rows)
    run = policy_run(folders(family), torch_dtype=dtype, gradient_checkpointing=True)
    with torch.no_grad():
        logp = families.plain_logp(run.policy.model, rows, 0.7)
    run.policy.model.config.vocab_size = 2**26  # so that a chunk has 64 tokens
    for is_packed in (False, True):
        if is_packed and family in NEVER_PACKED:
            continue
        ours, entropy = run.policy(**families.policy_inputs(rows, is_packed), temperature=0.7)
        assert torch.allclose(ours, logp, rtol=0, atol=1e-5)
        assert 0 < entropy.min() and entropy.max() < 5.7  # ln 272
        (ours * families.weights(len(ours))).sum().backward()
        error = families.relative_error(families.whole_gradients(run.policy), expected)
        assert error < families.TOLERANCES[dtype]
        run.policy.zero_grad()


@pytest.fixture(scope="module")
def on_ranks(folders, root):
    """{(family, sharding): how far the gradients of two ranks are off}."""
    for family in ON_RANKS:
        folders(family)
    done = subprocess.run(
        [sys.executable, families.__file__, str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {(family, sharding): float(error) for family, sharding, error in lines}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("family", ON_RANKS)
def test_gradients_of_two_ranks_are_the_models_own(family, sharding, on_ranks):
    assert on_ranks[family, sharding] < families.TOLERANCES[families.dtype_of(family)]


def test_the_check_passes_on_two_ranks_in_bfloat16(on_ranks):
    assert all((family, "bfloat16") in on_ranks for family in ON_RANKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_accepts_the_family_and_refuses_leaking_packs(family, folders, alone):
    run = policy_run(folders(family))
    ghpo.check_policy(run)
    run.config = make_config(packing=True)
    if family in NEVER_PACKED:
        with pytest.raises(UserError, match=f"{family}: .*packed.*set packing=false$"):
            ghpo.check_policy(run)
    else:
        ghpo.check_policy(run)


class HeadAlone(ghpo.Policy):
    """What Policy was: the output embedding called on the hidden states."""

    def _score(self, hidden, target, temperature):
        logits = self.model.get_output_embeddings()(hidden) / temperature
        return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1), target


class Mixed(ghpo.Policy):
    """Sees the row before: as if a mask were wrong."""

    def _score(self, hidden, target, temperature):
        return super()._score(hidden + 0.01 * hidden.roll(1, 0), target, temperature)


@pytest.mark.parametrize("kind, family, dtype", [
    (HeadAlone, "gemma2", "float32"), (HeadAlone, "granite", "bfloat16"),
    (HeadAlone, "cohere2", "float32"), (HeadAlone, "minicpm3", "float32"),
    (HeadAlone, "falcon_h1", "float32"), (Mixed, "llama", "float32")])  # fmt: skip
def test_the_check_refuses_wrong_log_probs(kind, family, dtype, folders, alone):
    run = policy_run(folders(family))
    run.config = make_config(torch_dtype=dtype, model_name_or_path=folders(family))
    run.policy = kind(run.policy.model)
    numbers = r"off by [\d.e-]+ in the mean, [\d.e-]+ at most"
    with pytest.raises(UserError, match=f"{family}: log-probs .* {numbers} .* take another model"):
        ghpo.check_policy(run)


def test_the_check_refuses_what_is_random_in_training(folders, alone):
    run = policy_run(folders("qwen3"))
    run.policy.model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="qwen3: log-probs"):
        ghpo.check_policy(run)


@pytest.mark.parametrize("dtype, mean, largest, is_right", [
    ("float32", 9e-5, 9e-5, True), ("float32", 1e-6, 2e-4, False),
    ("bfloat16", 0.019, 0.19, True), ("bfloat16", 0.021, 0.1, False),
    ("bfloat16", 1e-3, 0.21, False), ("bfloat16", math.inf, math.inf, False)])  # fmt: skip
def test_the_checks_limits(dtype, mean, largest, is_right, folders, alone, monkeypatch):
    run = policy_run(folders("qwen3"))
    run.config = make_config(torch_dtype=dtype)
    monkeypatch.setattr(ghpo, "policy_error", lambda run, is_packed: (mean, largest))
    if is_right:
        ghpo.check_policy(run)
    else:
        numbers = f"off by {mean:.2g} in the mean, {largest:.2g} at most"
        with pytest.raises(UserError, match=numbers):
            ghpo.check_policy(run)


def test_the_check_refuses_what_is_not_finite(folders, alone):
    run = policy_run(folders("qwen3"))
    torch.nn.init.constant_(run.policy.model.lm_head.weight, torch.nan)
    with pytest.raises(UserError, match="off by inf"):
        ghpo.check_policy(run)


def test_a_head_shares_the_weights_of_its_model():
    model = families.build("falcon_h1")
    head = ghpo.head_of(model)
    assert head.lm_head is model.lm_head and type(head) is type(model)
    assert "model" in model._modules and model.model is not head.model
    assert head.model.lm_head_multiplier == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_the_blocks(family):
    model = families.build(family)
    blocks = blocks_of(model)
    assert len(blocks) == 2 and model.get_input_embeddings() not in blocks


# ---- the real loop -----------------------------------------------------------------------------


class SharedPool:
    """The pool of all runs of this file: workers that are started once."""

    def __init__(self, pool):
        self.pool = pool

    def close(self):
        """It goes on for the next run."""

    def __getattr__(self, name):
        return getattr(self.pool, name)


@pytest.fixture(scope="session")
def pool(root):
    (root / "reward.py").write_text(REWARD)
    pool = VerifierPool([f"{root}/reward.py:digest"], 1, 5.0)
    yield SharedPool(pool)
    pool.close()


@pytest.fixture
def shared_pool(pool, monkeypatch):
    monkeypatch.setattr(ghpo, "VerifierPool", lambda *arguments: pool)


@pytest.fixture
def two_steps(setup, shared_pool, root, tmp_path):
    """two_steps(model folder): a run of the real loop, two steps of two problems."""
    torch.set_num_threads(1)
    reward = f"{root}/reward.py:digest"

    def go(folder, **changes):
        rows = [{"problem": f"What is {i} + 2?", "solution": str(i + 2)} for i in range(4)]
        run = setup(
            model_name_or_path=folder, dataset_name=write_jsonl(tmp_path / "data.jsonl", rows),
            rl_type="grpo", reward_funcs=[reward], reward_weights=[1.0], hint_trigger=reward,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=16,
            temperature=0.7, **changes)  # fmt: skip
        ghpo.train(run, SimpleNamespace(received=0))
        return run

    return go


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_saves_and_reloads(family, two_steps, folders):
    """The sampler's log-probs come from the model's own generate."""
    run = two_steps(folders(family))
    lines = read_jsonl(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["compared"] > 20 and line["mismatch_max"] < 1e-4
        assert line["grad_norm"] > 1e-3
    (saved,) = run.folder.glob("checkpoint-*2/model")
    attention = "eager" if family == "gemma2" else "sdpa"
    again, report = AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation=attention, output_loading_info=True
    )
    assert not any(report.values())
    first = AutoModelForCausalLM.from_pretrained(folders(family), attn_implementation=attention)
    ids = families.sequences()[0][None]
    with torch.no_grad():
        trained = run.policy.model.eval()(ids).logits
        assert torch.allclose(again(ids).logits, trained, rtol=0, atol=1e-5)
        assert not torch.allclose(first(ids).logits, trained, rtol=0, atol=1e-3)
    assert AutoTokenizer.from_pretrained(saved).pad_token_id is not None


def test_buffers_that_belong_to_the_weights_are_exported(folders, alone, tmp_path):
    """As the bias of a MoE's router in some families."""
    run = policy_run(folders("qwen2"))
    run.policy.model.register_buffer("bias", torch.arange(3.0))
    run.policy.model.register_buffer("scratch", torch.arange(3.0), persistent=False)
    run.prompts = ghpo.Prompts(run.config)
    streamed = dict(ghpo.fsdp_utils.full_tensors(run.policy.model, torch.bfloat16))
    assert streamed["bias"].dtype == torch.float32 and "scratch" not in streamed  # vLLM's, too
    ghpo.export(run, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["bias"].tolist() == [0, 1, 2] and "scratch" not in saved


# ---- models as they are found ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_told():
    """A model's peculiarities are told once a process."""
    tell.cache_clear()


def test_dropout_is_turned_off_and_told(folders, alone, capsys):
    run = policy_run(folders("gpt2"))
    assert "trained without its resid_pdrop, embd_pdrop, attn_pdrop" in capsys.readouterr().err
    assert run.policy.training
    assert not any(m.p for m in run.policy.modules() if isinstance(m, torch.nn.Dropout))
    policy_run(folders("llama"))
    assert "without" not in capsys.readouterr().err


def test_what_is_told_of_a_model_is_told_once(folders, main, tmp_path):
    done = main(tmp_path, model_name_or_path=folders("gpt2"), beta=0.1, max_steps=1)
    assert done.status == 0, done.err
    assert done.err.count("trained without its") == 1  # the reference model is loaded, too


def test_a_cap_on_attention_is_not_left_out(folders, alone, capsys):
    run = policy_run(folders("gemma2"))
    assert "using eager" in capsys.readouterr().err
    assert run.policy.model.config._attn_implementation == "eager"
    policy_run(folders("gemma3"))
    assert "eager" not in capsys.readouterr().err


def test_attention_that_sdpa_does_not_have_is_eager(alone, capsys, tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 272}
    folder = families.save(GPTJForCausalLM(GPTJConfig(**sizes)), tmp_path / "model")
    ghpo.check_policy(policy_run(folder))
    assert "using eager" in capsys.readouterr().err


def test_the_text_model_of_a_wrapper_is_told_where_the_library_has_it(capsys):
    check_wrapper("model", Qwen3_5Config())
    assert "model: of qwen3_5 the text model alone is trained" in capsys.readouterr().err


@pytest.mark.parametrize("config, message", [
    (Gemma3Config, r"gemma3 wraps a text model \(gemma3_text\).*name a text model$"),
    (Qwen2_5_VLConfig, r"qwen2_5_vl wraps .*name a text model$"),
    (T5Config, "Unrecognized configuration class .*T5Config"),
])  # fmt: skip
def test_what_is_no_text_model_is_refused_in_one_line(config, message, main, shared_pool, tmp_path):
    folder = families.save(config(), tmp_path / "model")
    done = main(tmp_path, model_name_or_path=folder)
    assert_refused(done, message)


def assert_refused(done, message):
    """Status 2 and, after what is told, one line with the message."""
    assert done.status == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert len(line) < 700 and done.err.rstrip().endswith(line)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_a_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("change, message", [
    (cut, "model: Error while deserializing header: incomplete metadata, file not fully covered"),
    (lose_a_tensor, "lack 1 of the model's tensors, .*model.layers.1.mlp.up_proj.weight"),
    (change_a_shape, "model: .*mismatched"),
    (remove("model.safetensors"), "model: Error no file named model.safetensors"),
    (remove("config.json"), "model: .*config.json"),
    (remove("tokenizer.json"), "model: its tokenizer reads 12 as ''"),
    (write("config.json", "{"), "model: .*config.json' is not a valid JSON file"),
    (write("config.json", '{"model_type": "none_such"}'), "model: .*model type `none_such`"),
    (write("generation_config.json", '{"length_penalty": 2.0}'), "exported: .*length_penalty"),
])  # fmt: skip
def test_a_broken_folder_is_refused_in_one_line(
    change, message, broken, main, shared_pool, tmp_path
):
    assert_refused(main(tmp_path, model_name_or_path=broken(change)), message)


def test_a_text_beyond_the_models_positions_is_refused(main, shared_pool, folders, tmp_path):
    done = main(tmp_path, model_name_or_path=folders("gpt2"), max_completion_length=400)
    assert_refused(done, "max_prompt_length [+] max_completion_length = 528 tokens.* 512 positions")


def test_a_generation_config_that_cannot_be_saved_is_mended(broken, two_steps, capsys):
    folder = broken(write("generation_config.json", '{"temperature": 0.5, "eos_token_id": 257}'))
    run = two_steps(folder)
    assert "generation_config is exported with do_sample: true" in capsys.readouterr().err
    (saved,) = run.folder.glob("checkpoint-*2/model")
    assert GenerationConfig.from_pretrained(saved).temperature == 0.5


# ---- chat templates ----------------------------------------------------------------------------

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
GEMMA = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
         "{% endif %}" + TURNS)  # fmt: skip
DROPS = TURNS.replace("messages %}", "messages if m.role != 'system' %}")
THINKS = TURNS + "{{ '<think>\\n' }}"
SWITCH = TURNS + "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
DATE = "{{ strftime_now('%d %b %Y') }}" + TURNS
ALTERNATES = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TURNS
SYSTEM = [{"role": "system", "content": "Be brief."}]
USER = [{"role": "user", "content": "1 + 1?"}]


@pytest.fixture
def prompts_of(tmp_path):
    """prompts_of(chat template of the model's folder, **settings): ghpo.Prompts, that folder's."""

    def build(template=TURNS, tokenizer=None, **changes):
        folder = tmp_path / f"model{len(list(tmp_path.glob('model*')))}"
        families.save(
            families.build("llama").config, folder, chat_template=template, **(tokenizer or {})
        )
        return ghpo.Prompts(make_config(model_name_or_path=str(folder), **changes))

    return build


def text_of(prompts, messages, hint=""):
    ids, prefix = prompts.ids(SimpleNamespace(id=7, messages=messages), hint)
    return prompts.tokenizer.decode(ids), prefix


@pytest.mark.parametrize("template, expected", [
    (TURNS, "<|system|>Be brief.<|end|><|user|>1 + 1?<|end|><|assistant|>"),
    (GEMMA, "<|user|>Be brief.\n\n1 + 1?<|end|><|assistant|>"),
    (DROPS, "<|user|>Be brief.\n\n1 + 1?<|end|><|assistant|>"),
])  # fmt: skip
def test_a_template_without_a_system_role(template, expected, prompts_of, capsys):
    prompts = prompts_of(template)
    assert ("no system role" in capsys.readouterr().err) == (template != TURNS)
    assert text_of(prompts, SYSTEM + USER) == (expected, "")
    assert text_of(prompts, USER) == ("<|user|>1 + 1?<|end|><|assistant|>", "")
    few_shot = SYSTEM + [{"role": "assistant", "content": "Hi"}] + USER
    if template != TURNS:
        assert text_of(prompts, few_shot)[0].startswith("<|assistant|>Hi<|end|><|user|>Be brief.")


def test_a_template_error_is_one_line_that_names_the_row(prompts_of):
    prompts = prompts_of(ALTERNATES)
    with pytest.raises(UserError, match="^row 7: chat template: one turn only$"):
        prompts.ids(SimpleNamespace(id=7, messages=USER + USER))
    for template, message in [("{{ 1 +", "unexpected"), ("{{ none_such.role }}", "is undefined")]:
        with pytest.raises(UserError, match=f"^model_name_or_path=[^\n]*{message}[^\n]*$"):
            prompts_of(template)


def test_a_template_that_opens_think(prompts_of):
    """Rewards see what it opened; a hint in the assistant's turn does not open it again."""
    prompts = prompts_of(THINKS)
    text, prefix = text_of(prompts, USER)
    assert (text, prefix) == ("<|user|>1 + 1?<|end|><|assistant|><think>\n", "<think>\n")
    assert format_reward(prefix + "It is 2.\n</think>\n<answer>2</answer>") == 1.0
    prompts = prompts_of(THINKS, hint_where="assistant")
    text, prefix = text_of(prompts, USER, "First, add.")
    assert text.endswith("<|assistant|><think>\nFirst, add.") and prefix == "<think>\nFirst, add."
    # of a model that is told not to think
    closed = prompts_of(THINKS + "{{ '\\n</think>\\n\\n' }}")
    assert text_of(closed, USER)[1] == ""


def test_chat_template_kwargs_reach_the_template(prompts_of):
    assert text_of(prompts_of(SWITCH), USER)[0].endswith("<|assistant|>")
    prompts = prompts_of(SWITCH, chat_template_kwargs={"enable_thinking": False})
    assert text_of(prompts, USER)[0].endswith("<|assistant|>off")


def test_the_date_of_a_template_is_always_the_same(prompts_of):
    prompts = prompts_of(DATE)
    assert text_of(prompts, USER)[0].startswith("01 Jan 2025<|user|>")


def test_no_chat_template_is_refused_with_one_that_works(prompts_of):
    with pytest.raises(UserError, match="no chat template: set one") as error:
        prompts_of(None)
    setting = yaml.safe_load(str(error.value).partition("for example ")[2])
    prompts = prompts_of(None, **setting)
    assert text_of(prompts, SYSTEM + USER)[0] == "system: Be brief.\nuser: 1 + 1?\nassistant:"


def test_chat_template_is_a_text_or_a_file(prompts_of, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(THINKS)
    assert text_of(prompts_of(TURNS, chat_template=str(path)), USER)[1] == "<think>\n"
    assert text_of(prompts_of(TURNS, chat_template=THINKS), USER)[1] == "<think>\n"
    with pytest.raises(UserError, match="chat_template=none.jinja: .*No such file"):
        prompts_of(TURNS, chat_template="none.jinja")


def test_no_pad_token(prompts_of, capsys):
    prompts = prompts_of(tokenizer={"pad_token": None})
    assert prompts.tokenizer.pad_token == "<|end|>"
    assert "no pad token, <|end|> takes its place" in capsys.readouterr().err
    with pytest.raises(UserError, match="names no eos_token"):
        prompts_of(tokenizer={"pad_token": None, "eos_token": None})


def test_special_tokens_in_a_rows_text_are_plain_text(prompts_of):
    prompts = prompts_of(THINKS, hint_where="assistant")
    question = [{"role": "user", "content": "Say <|end|> or <think>."}]
    ids, prefix = prompts.ids(SimpleNamespace(id=0, messages=question), "a <|pad|> b")
    assert ids.count(257) == 1 and ids.count(256) == 0  # the template's own end
    assert ids.count(261) == 2  # <think> is a token, in a row too
    assert prompts.tokenizer.decode(ids) == (
        "<|user|>Say <|end|> or <think>.<|end|><|assistant|><think>\na <|pad|> b"
    )
    assert prefix == "<think>\na <|pad|> b"
    # nor may the text of a completion lose what is read from it, where these are special tokens
    tokenizer = prompts.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<|tool|>"]})
    assert "<|tool|>" in control_tokens(tokenizer).values()
    assert "<think>" not in control_tokens(tokenizer).values()
    plain = prompts.ids(problem())[0]
    assert plain == prompts.tokenizer("<|user|>4a3b5c2?<|end|><|assistant|><think>\n").input_ids
