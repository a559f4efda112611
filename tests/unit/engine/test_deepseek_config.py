"""DeepSeek-V2's published configurations: how they are understood, how large their KV blocks are, how their attention is computed."""

import math
from typing import Any

import pytest
import torch

from kernels import KVLayout
from services.engine.model_config import parse_model_config
from services.engine.models.decoder import kv_layouts
from services.engine.models.latent_attention import is_cheaper_expanded

# As the checkpoints on the hub have them; what no computation needs is left out.
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2: dict[str, Any] = {
    **DEEPSEEK_V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def test_deepseek_configs_of_the_hub_are_understood() -> None:
    lite, large = (parse_model_config(raw, path="config.json") for raw in (DEEPSEEK_V2_LITE, DEEPSEEK_V2))
    for config in (lite, large):
        assert config.latent is not None and config.experts is not None
        assert (config.num_kv_heads, config.head_dim, config.latent.cell_numbers, config.experts.num_shared) == (1, 192, 576, 2)
        assert (config.rope.kind, config.rope.attention_factor, config.rope.original_context) == ("yarn", 1.0, 4096)
        assert config.score_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
        assert set(config.windows) == {None}
        assert (config.qkv_bias, config.output_bias, config.qk_norm, config.dtype) == (False, False, False, "bfloat16")
    assert lite.latent and large.latent and lite.experts and large.experts
    assert (lite.latent.query_rank, large.latent.query_rank) == (None, 1536)
    assert (lite.experts.num_groups, lite.experts.num_chosen_groups, lite.experts.routed_scale) == (1, 1, 1.0)
    assert (large.experts.num_groups, large.experts.num_chosen_groups, large.experts.routed_scale) == (8, 3, 16.0)


@pytest.mark.parametrize(("raw", "least"), [(DEEPSEEK_V2_LITE, 8), (DEEPSEEK_V2, 71)], ids=["lite", "large"])
def test_blocks_of_latents_are_a_fraction_of_all_heads_keys_and_values(raw: dict[str, Any], least: int) -> None:
    config = parse_model_config(raw, path="config.json")
    (layout,) = kv_layouts(config, block_size=64, dtype=torch.bfloat16)
    heads = KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_heads,
        block_size=64,
        head_dim=128 + 64,
        value_head_dim=128,
        dtype=torch.bfloat16,
    )
    assert layout.is_latent
    assert layout.block_bytes == config.num_layers * 64 * (512 + 64) * 2
    assert layout.block_bytes * least <= heads.block_bytes


@pytest.mark.parametrize("raw", [DEEPSEEK_V2_LITE, DEEPSEEK_V2], ids=["lite", "large"])
def test_expanding_is_cheaper_for_new_prompts_and_for_many_tokens_after_a_long_prefix(raw: dict[str, Any]) -> None:
    latent = parse_model_config(raw, path="config.json").latent
    assert latent is not None
    assert is_cheaper_expanded(latent, 2, 2)
    assert not is_cheaper_expanded(latent, 1, 1)  # a decode step's sequences attend together
    for context_len, least in ((200, 108), (1_000, 157), (100_000, 171)):
        assert not is_cheaper_expanded(latent, least - 1, context_len)
        assert is_cheaper_expanded(latent, least, context_len)
