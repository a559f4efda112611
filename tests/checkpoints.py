"""Tiny random checkpoints of every family, and what Hugging Face transformers computes with them.

transformers runs in a process of its own: it would take this repository's `kernels` folder for its optional dependency of that name.
Everything is made once per pytest session, in one such process. Knows nothing of Baton's own code.
"""

import fcntl
import importlib
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CONTEXT_TOKENS = 2048
PROMPT_LENGTHS = (1, 2, 17, 64, 333, 1000)
STEP_PROMPT_TOKENS, STEPS = 100, 24
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
DEEPSEEK = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
# Name → (class prefix in transformers, configuration beyond SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"vocab_size": 384, "rope_parameters": LLAMA3_ROPE}),
    "llama_yarn": ("Llama", {"vocab_size": 301, "rope_parameters": YARN_ROPE, "attention_bias": True, "mlp_bias": True}),
    "llama_linear": (
        "Llama",
        {
            "vocab_size": 320,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama2": ("Llama", {"vocab_size": 320, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"vocab_size": 352, "sliding_window": 50, "head_dim": 32}),
    "qwen2": ("Qwen2", {"vocab_size": 500, "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"vocab_size": 400, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "vocab_size": 300,
            "head_dim": 32,
            "sliding_window": 50,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 12.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "vocab_size": 360,
            "head_dim": 32,
            "sliding_window": 40,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "llama3_bf16": ("Llama", {"vocab_size": 384, "rope_parameters": LLAMA3_ROPE, "dtype": "bfloat16"}),
    # Block bytes are at most an eighth of those of all heads' keys and values. Norms' epsilon: that of the latents does not follow it.
    "deepseek_lite": (
        "DeepseekV2",
        {
            **DEEPSEEK,
            "vocab_size": 340,
            "rms_norm_eps": 1e-2,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek": (
        "DeepseekV2",
        {
            **DEEPSEEK,
            "vocab_size": 310,
            "q_lora_rank": 40,
            "qk_nope_head_dim": 24,
            "v_head_dim": 16,
            "attention_bias": True,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
}
SHARDED = "qwen2"
# Rotary settings that no checkpoint above has; head_dim 16.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "llama3": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "factor": 8.0, "original_max_position_embeddings": 512},
    "yarn": {**YARN_ROPE, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn_not_truncated": {**YARN_ROPE, "truncate": False},
    "yarn_attention_factor": {**YARN_ROPE, "attention_factor": 0.7},
    "yarn_mscale": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3},
}

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What transformers computed with one checkpoint.

    prompts      length → token ids [length]; logits: length → [length, vocab_size]
    step_ids     [STEP_PROMPT_TOKENS + STEPS] token ids, of which the last STEPS went in one at a time
    step_logits  [1 + STEPS, vocab_size]: after the prompt, and after each step
    """

    prompts: dict[int, IntArray]
    logits: dict[int, FloatArray]
    step_ids: IntArray
    step_logits: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeReference:
    """inverse_frequencies [head_dim / 2], cos and sin [CONTEXT_TOKENS, head_dim], all of head_dim 16."""

    inverse_frequencies: FloatArray
    cos: FloatArray
    sin: FloatArray


def make_checkpoints(session_dir: Path) -> Path:
    """The folder with one checkpoint per name of FAMILIES, made by the first caller of a session; `session_dir` is pytest's base temp."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        session_dir = session_dir.parent  # shared by all workers
    folder, made = session_dir / "checkpoints", session_dir / "checkpoints.made"
    with (session_dir / "checkpoints.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir(exist_ok=True)
            # -I: neither this repository nor the script's own folder (which has a `kernels` as well) gets onto sys.path.
            process = subprocess.run([sys.executable, "-I", __file__, str(folder)], cwd=folder, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stderr
            made.touch()
    return folder


def read_reference(folder: Path, name: str) -> Reference:
    with np.load(folder / f"{name}.npz") as arrays:
        return Reference(
            prompts={length: arrays[f"ids_{length}"] for length in PROMPT_LENGTHS},
            logits={length: arrays[f"logits_{length}"] for length in PROMPT_LENGTHS},
            step_ids=arrays["step_ids"],
            step_logits=arrays["step_logits"],
        )


def read_rope_reference(folder: Path, name: str) -> RopeReference:
    with np.load(folder / f"rope_{name}.npz") as arrays:
        return RopeReference(inverse_frequencies=arrays["inverse_frequencies"], cos=arrays["cos"], sin=arrays["sin"])


def _generate(folder: Path) -> None:
    """Runs in the process of its own."""
    sys.modules["kernels"] = None  # type: ignore[assignment]  # where the repository is installed, -I does not hide it
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    transformers = importlib.import_module("transformers")  # typed as Any: its annotations take mypy half a minute
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name in FAMILIES:
            _make_checkpoint(transformers, folder, name)
        for name, parameters in ROPES.items():
            config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(parameters))
            rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
            cos, sin = rotary(torch.zeros(1), torch.arange(CONTEXT_TOKENS)[None])
            np.savez(folder / f"rope_{name}.npz", inverse_frequencies=rotary.inv_freq.numpy(), cos=cos[0].numpy(), sin=sin[0].numpy())


def _make_checkpoint(transformers: Any, folder: Path, name: str) -> None:
    import torch

    torch.manual_seed(list(FAMILIES).index(name))  # of the prompts
    prefix, settings = FAMILIES[name]
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(prefix, f"{prefix}Config")  # the plain name is that of the model with images
    config = getattr(transformers, config_class)(**{**SIZES, **settings}, attn_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    stored_less = 1.0 if prefix.startswith("Gemma") else 0.0  # by so much Gemma stores a norm's weight smaller than it is
    for parameter_name, parameter in model.named_parameters():
        # A seed of its own for each weight: they stay what they are when a release of transformers orders them differently.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{parameter_name}".encode()))
        if "norm" in parameter_name:
            parameter.normal_(1.0 - stored_less, 0.3, generator=generator)
        else:
            parameter.normal_(0.0, 0.1 if "bias" in parameter_name else 0.12, generator=generator)
    # Logits that spread: flat ones would hide errors, and their best two would often nearly tie.
    if config.tie_word_embeddings:
        model.model.norm.weight.add_(stored_less).mul_(4.0).sub_(stored_less)
    else:
        model.lm_head.weight.mul_(4.0)
    if settings.get("dtype") == "bfloat16":
        # The reference for bf16 weights is their fp32 product, with rotary tables in fp32.
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())

    arrays: dict[str, npt.NDArray[Any]] = {}
    for length in PROMPT_LENGTHS:
        ids = torch.randint(0, config.vocab_size, (1, length))
        logits = model(ids).logits[0]
        arrays[f"ids_{length}"], arrays[f"logits_{length}"] = ids[0].numpy(), logits.numpy()
        assert length < 64 or logits.std() >= 2, f"{name}: the logits' standard deviation is only {logits.std()}"
    ids = torch.randint(0, config.vocab_size, (1, STEP_PROMPT_TOKENS + STEPS))
    step = model(ids[:, :STEP_PROMPT_TOKENS], use_cache=True)
    rows = [step.logits[0, -1]]
    for position in range(STEP_PROMPT_TOKENS, STEP_PROMPT_TOKENS + STEPS):
        step = model(ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
        rows.append(step.logits[0, -1])
    arrays |= {"step_ids": ids[0].numpy(), "step_logits": torch.stack(rows).numpy()}
    np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]

    model.to(getattr(torch, settings.get("dtype", "float32")))
    model.save_pretrained(folder / name, **({"max_shard_size": "100KB"} if name == SHARDED else {}))


if __name__ == "__main__":
    _generate(Path(sys.argv[1]))
