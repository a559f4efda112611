"""A tiny Llama with random weights, written as a checkpoint and loaded like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.engine.core import EngineCore
from services.engine.loader import load_model
from services.engine.settings import EngineSettings

VOCAB_SIZE = 128
CONTEXT_TOKENS = 256
EOS = 2
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 64, 4, 2, 8, 2
BLOCK_BYTES = LAYERS * KV_HEADS * 16 * 2 * HEAD_DIM * 4  # of 16 tokens in fp32


def write_checkpoint(directory: Path) -> Path:
    """config.json and model.safetensors of the tiny model; the same weights each time."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        "model.embed_tokens.weight": randn(VOCAB_SIZE, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": randn(VOCAB_SIZE, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = randn(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny-llama"))


MakeCore = Callable[..., EngineCore]


@pytest.fixture
def make_core(checkpoint: Path) -> MakeCore:
    """Loads the model with the given settings over small defaults: 16-token blocks, 64 of them."""

    def make(**settings: Any) -> EngineCore:
        defaults: dict[str, Any] = {"block_size": 16, "kv_memory_bytes": 64 * BLOCK_BYTES, "max_num_seqs": 8}
        return load_model(checkpoint, EngineSettings(**{**defaults, **settings})).core

    return make
