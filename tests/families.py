"""Tiny random models of the families that people train, with the tokenizer of tests/tiny/base.

    python tests/families.py DIR    two gloo ranks train some of them, for test_families.py

Their weights are scaled up, so that a scale or cap of the logits that is left out shows.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

BASE = Path(__file__).parent / "tiny" / "base"
PAD, EOS = 256, 257  # of the tiny tokenizer
SCALE = 8.0  # of the matrices, times what the library initialises

SIZES = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip

# family: (class of the causal LM, what its config has besides SIZES)
FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True}),
    "llama": ("LlamaForCausalLM", {"pad_token_id": None}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "gemma2": ("Gemma2ForCausalLM", {
        "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8,
        "sliding_window": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi": ("PhiForCausalLM", {"num_key_value_heads": 4, "resid_pdrop": 0.1}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
    "cohere2": ("Cohere2ForCausalLM", {"logit_scale": 0.25, "sliding_window": 16}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "minicpm3": ("MiniCPM3ForCausalLM", {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8, "scale_emb": 1}),
    "falcon_h1": ("FalconH1ForCausalLM", {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 16, "lm_head_multiplier": 0.5}),
    "gpt2": ("GPT2LMHeadModel", {"n_positions": 512}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "seed_oss": ("SeedOssForCausalLM", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
}  # fmt: skip
NEVER_PACKED = ("falcon_h1", "opt")  # the library's forward lets packed rows see each other
ON_RANKS = ("qwen2", "gemma2", "qwen3_moe", "falcon_h1", "gpt2", "opt")
SHARDINGS = ("zero3", "zero2", "ddp")
DTYPES = {"qwen3_moe": "float32"}  # its experts cannot compute in float64, as the others do
TOLERANCES = {"float64": 1e-5, "float32": 1e-4}  # of gradients; norms compute in float32


def build(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The causal LM of a family, float32."""
    name, options = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**(SIZES | options)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(SCALE)
    return model


def save(part: object, folder: Path, **tokenizer: object) -> str:
    """A model folder as a hub repository has it, of a model or a config alone. tokenizer: changes
    to tokenizer_config.json, and chat_template, a text or None for none at all."""
    part.save_pretrained(folder)
    for path in BASE.glob("tokenizer*"):
        shutil.copy(path, folder)
    template = tokenizer.pop("chat_template", (BASE / "chat_template.jinja").read_text())
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | tokenizer
    settings = {key: value for key, value in settings.items() if value is not None}
    path.write_text(json.dumps(settings))
    return str(folder)


def save_family(family: str, folder: Path) -> str:
    options = {"pad_token": None} if family == "llama" else {}
    return save(build(family), folder, **options)


def policy_run(folder: str, rank: int = 0, world: int = 1, **changes: object) -> SimpleNamespace:
    """What ghpo.check_policy needs of a run: its policy is that of the model in the folder."""
    import conftest

    import ghpo

    config = conftest.make_config(model_name_or_path=folder, **changes)
    compute_dtype, master_dtype = ghpo.dtypes(config)
    return SimpleNamespace(
        config=config,
        policy=ghpo.load_policy(config),
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        compute_dtype=compute_dtype,
        master_dtype=master_dtype,
    )


def sequences(seed: int = 0) -> list[torch.Tensor]:
    """Random token ids of several lengths, more than two chunks of 64 targets."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=rng) for length in (61, 45, 38)]


def policy_inputs(rows: list[torch.Tensor], is_packed: bool) -> dict[str, torch.Tensor]:
    """The arguments of Policy.forward that score every token of the rows but the first."""
    width = max(len(row) for row in rows)
    if is_packed:
        starts = [sum(len(row) for row in rows[:i]) for i in range(len(rows))]
        ids = torch.cat(rows)[None]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    else:
        starts = [i * width for i in range(len(rows))]
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        positions = torch.arange(width).expand(len(rows), -1)
    predict = torch.cat([start + torch.arange(len(row) - 1) for row, start in zip(rows, starts)])
    target = torch.cat([row[1:] for row in rows])
    return {"ids": ids, "positions": positions, "predict": predict, "target": target}


def plain_logp(model: transformers.PreTrainedModel, rows: list[torch.Tensor], temperature: float):
    """The log-probs of the same tokens from the whole model's logits, row by row."""
    parts = []
    for row in rows:
        logits_TV = model(input_ids=row[None], use_cache=False).logits[0, :-1] / temperature
        parts.append(logits_TV.log_softmax(-1).gather(-1, row[1:, None]).squeeze(-1))
    return torch.cat(parts)


def dtype_of(family: str) -> str:
    return DTYPES.get(family, "float64")


def weights(size: int) -> torch.Tensor:
    """What the log-probs weigh in a loss."""
    return torch.randn(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def relative_error(gradients: dict, expected: dict) -> float:
    """The largest difference, of the largest gradient."""
    assert gradients.keys() == expected.keys()
    most = max(g.abs().max() for g in expected.values())
    return float(max((gradients[name] - expected[name]).abs().max() for name in expected) / most)


def whole_gradients(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the names of the causal LM's parameters, gathered from all ranks."""
    found = {}
    for name, p in policy.model.named_parameters():
        grad = p.grad
        if grad is not None:
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def plain_gradients(family: str, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the weighted log-probs at temperature 0.7, from the plain model."""
    model = build(family).to(getattr(torch, dtype_of(family)))
    if family == "gemma2":
        model.set_attn_implementation("eager")  # sdpa would leave out its attention cap
    logp = plain_logp(model.eval(), rows, 0.7)
    (logp * weights(len(logp))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_on_ranks(folder: Path, rank: int) -> None:
    """Rank 0 has two of the sequences, rank 1 the last; prints how far the gradients are off."""
    import fsdp_utils
    import ghpo

    rows = sequences()
    n_first = sum(len(row) - 1 for row in rows[:2])  # targets of rank 0
    weight = weights(n_first + len(rows[2]) - 1)
    mine, weight = (rows[:2], weight[:n_first]) if rank == 0 else (rows[2:], weight[n_first:])
    for family in ON_RANKS:
        expected = plain_gradients(family, rows)
        for sharding in SHARDINGS:
            run = policy_run(
                str(folder / family),
                rank,
                2,
                sharding=sharding,
                torch_dtype=dtype_of(family),
                gradient_checkpointing=True,
            )
            ghpo.check_policy(run)
            names = [name for name, _ in fsdp_utils.full_tensors(run.policy.model)]  # is resharded
            assert names
            run.policy.model.config.vocab_size = 2**26  # so that a chunk has 64 tokens
            logp, _ = run.policy(**policy_inputs(mine, False), temperature=0.7)
            (logp * weight).sum().backward()
            error = relative_error(whole_gradients(run.policy), expected)
            if rank == 0:
                print(f"{family} {sharding} {error:.3g}", flush=True)
        run = policy_run(str(folder / family), rank, 2, torch_dtype="bfloat16")
        ghpo.check_policy(run)
        if rank == 0:
            print(f"{family} bfloat16 0", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    from test_fsdp import fork_ranks

    if fork_ranks(2):
        import fsdp_utils

        torch.set_num_threads(1)
        fsdp_utils.setup_distributed()
        gradients_on_ranks(Path(sys.argv[1]), int(os.environ["RANK"]))
        fsdp_utils.gather_objects("done")
        os._exit(0)
