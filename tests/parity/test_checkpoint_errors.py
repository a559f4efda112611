"""Checkpoints that cannot be served: each is refused with the file and the key or weight that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.errors import CheckpointError, InvalidRequest
from services.engine.core import EngineCore
from services.engine.loader import load_model
from services.engine.model_config import ModelConfig, load_generation_defaults, load_model_config, parse_model_config
from services.engine.models.decoder import Decoder
from services.engine.settings import EngineSettings
from services.engine.weights import INDEX_NAME, SINGLE_NAME, WeightReader
from tests.checkpoints import LLAMA3_ROPE, SHARDED, SIZES, YARN_ROPE

CopyCheckpoint = Callable[[str], Path]
ABSENT = "(absent)"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy_checkpoint(checkpoints: Path, tmp_path: Path) -> CopyCheckpoint:
    """A checkpoint of FAMILIES that the test may spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints / name, tmp_path / name))

    return copy


def load(directory: Path) -> EngineCore:
    return load_model(directory, EngineSettings(kv_memory_bytes=1 << 20)).core


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item != ABSENT}), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def check_refused(directory: Path, path: Path, *words: str) -> None:
    """Loading names `path` as the place and every one of `words`."""
    with pytest.raises(CheckpointError) as raised:
        load(directory)
    assert raised.value.path == str(path)
    for word in (str(path), *words):
        assert word in raised.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architectures", "GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": ABSENT}, ["architectures"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"hidden_size": ABSENT}, ["hidden_size", "missing"]),
        ({"intermediate_size": ABSENT}, ["intermediate_size", "missing"]),
        ({"num_hidden_layers": ABSENT}, ["num_hidden_layers", "missing"]),
        ({"num_attention_heads": ABSENT}, ["num_attention_heads", "missing"]),
        ({"max_position_embeddings": ABSENT}, ["max_position_embeddings", "missing"]),
        ({"vocab_size": ABSENT}, ["vocab_size", "missing"]),
        ({"vocab_size": 384.0}, ["vocab_size", "384.0"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "num_attention_heads"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "tiny"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "no"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"dtype": "int8"}, ["dtype", "int8", "bfloat16"]),
        ({"dtype": ABSENT, "torch_dtype": "float64"}, ["dtype", "float64"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}, ["rope_type", "dynamic"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10_000.0}}, ["rope_type", "longrope"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0}}, ["factor", "missing"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": None}}, ["low_freq_factor", "missing"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": None}}, ["original_max_position_embeddings", "missing"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}}, ["factor", "missing"]),
    ],
    ids=str,
)
def test_load_when_config_is_not_servable_names_file_and_key(
    copy_checkpoint: CopyCheckpoint, changes: dict[str, object], words: list[str]
) -> None:
    directory = copy_checkpoint("llama3")
    edit_json(directory / "config.json", **changes)
    check_refused(directory, directory / "config.json", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": ABSENT}, ["kv_lora_rank", "missing"]),
        ({"q_lora_rank": 0}, ["q_lora_rank", "0"]),
        ({"qk_nope_head_dim": ABSENT}, ["qk_nope_head_dim", "missing"]),
        ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim", "15"]),
        ({"v_head_dim": ABSENT}, ["v_head_dim", "missing"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "8"]),
        ({"n_routed_experts": None}, ["n_routed_experts", "missing"]),
        ({"n_shared_experts": None}, ["n_shared_experts", "missing"]),
        ({"num_experts_per_tok": ABSENT}, ["num_experts_per_tok", "missing"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "5", "4"]),
        ({"moe_intermediate_size": ABSENT}, ["moe_intermediate_size", "missing"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq"]),
        ({"first_k_dense_replace": -1}, ["first_k_dense_replace", "-1"]),
        ({"topk_method": "noaux_tc"}, ["topk_method", "noaux_tc"]),
        ({"n_group": 3}, ["n_group", "3", "8"]),
        ({"topk_group": 5}, ["topk_group", "5", "4"]),
        ({"topk_group": None}, ["topk_group", "missing"]),
        ({"norm_topk_prob": True}, ["norm_topk_prob"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
        ({"routed_scaling_factor": "big"}, ["routed_scaling_factor", "big"]),
        ({"rope_parameters": {**YARN_ROPE, "mscale_all_dim": "one"}}, ["mscale_all_dim", "one"]),
    ],
    ids=str,
)
def test_load_when_latents_or_experts_are_not_servable_names_file_and_key(
    copy_checkpoint: CopyCheckpoint, changes: dict[str, object], words: list[str]
) -> None:
    directory = copy_checkpoint("deepseek")
    edit_json(directory / "config.json", **changes)
    check_refused(directory, directory / "config.json", *words)


@pytest.mark.parametrize(
    "layer_types", [["full_attention"], ["full_attention", "chunked_attention", "full_attention"]], ids=["short", "unknown"]
)
def test_load_when_layer_types_do_not_fit_names_file_and_key(copy_checkpoint: CopyCheckpoint, layer_types: list[str]) -> None:
    directory = copy_checkpoint("qwen2")
    edit_json(directory / "config.json", layer_types=layer_types)
    check_refused(directory, directory / "config.json", "layer_types")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME])
@pytest.mark.parametrize("content", [b'{"vocab_size": 3', b"[]", b"\xff\xfe{}"], ids=["cut", "array", "not utf-8"])
def test_load_when_json_is_broken_names_file(copy_checkpoint: CopyCheckpoint, name: str, content: bytes) -> None:
    directory = copy_checkpoint(SHARDED)
    (directory / name).write_bytes(content)
    check_refused(directory, directory / name, "JSON")


def test_load_when_config_is_missing_names_file(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    (directory / "config.json").unlink()
    check_refused(directory, directory / "config.json", "no such file")


def test_load_when_directory_is_missing_names_it(tmp_path: Path) -> None:
    check_refused(tmp_path / "absent", tmp_path / "absent", "no such checkpoint directory")


def test_load_when_weight_files_are_missing_names_what_was_looked_for(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    (directory / SINGLE_NAME).unlink()
    check_refused(directory, directory, SINGLE_NAME, INDEX_NAME)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("llama3", Q_PROJ),
        ("llama3", "lm_head.weight"),
        ("llama3", "model.norm.weight"),
        ("llama_yarn", "model.layers.0.mlp.gate_proj.bias"),
        ("llama_yarn", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3", "model.layers.2.self_attn.k_norm.weight"),
        ("deepseek", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("deepseek", "model.layers.2.mlp.experts.7.up_proj.weight"),
        ("deepseek_lite", "model.layers.1.mlp.gate.weight"),
    ],
)
def test_load_when_weight_is_missing_names_it(copy_checkpoint: CopyCheckpoint, name: str, weight: str) -> None:
    directory = copy_checkpoint(name)
    edit_weights(directory / SINGLE_NAME, lambda weights: weights.pop(weight))
    check_refused(directory, directory, weight, "missing")


@pytest.mark.parametrize("weight", ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_load_when_weight_is_left_over_names_it(copy_checkpoint: CopyCheckpoint, weight: str) -> None:
    directory = copy_checkpoint("llama3")
    edit_weights(directory / SINGLE_NAME, lambda weights: weights.update({weight: torch.ones(64)}))
    check_refused(directory, directory, weight, "left over")


def test_load_when_config_says_fewer_experts_than_there_are_names_the_rest(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("deepseek_lite")
    edit_json(directory / "config.json", n_shared_experts=1)
    check_refused(directory, directory, "shared_experts.gate_proj.weight", "[48, 64]", "[24, 64]")
    edit_json(directory / "config.json", n_shared_experts=2, first_k_dense_replace=0)
    check_refused(directory, directory, "model.layers.0.mlp.gate.weight", "missing")


def test_load_when_many_weights_are_left_over_counts_them(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    edit_weights(directory / SINGLE_NAME, lambda weights: weights.update({f"extra.{index}": torch.ones(1) for index in range(5)}))
    check_refused(directory, directory, "extra.0, extra.1, extra.2 and 2 more")


def test_load_when_config_says_less_than_the_weights_have_is_refused(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama_yarn")
    edit_json(directory / "config.json", mlp_bias=False)
    check_refused(directory, directory, "left over", "mlp.down_proj.bias")


def test_load_when_weight_is_misshapen_names_it_and_both_shapes(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    edit_weights(directory / SINGLE_NAME, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:-1].clone()}))
    check_refused(directory, directory, Q_PROJ, "[63, 64]", "[64, 64]")


def test_load_when_weight_is_of_integers_names_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    edit_weights(directory / SINGLE_NAME, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].to(torch.int8)}))
    check_refused(directory, directory, Q_PROJ, "int8")


def test_load_when_weight_file_is_cut_short_names_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    content = (directory / SINGLE_NAME).read_bytes()
    (directory / SINGLE_NAME).write_bytes(content[:-100])
    check_refused(directory, directory / SINGLE_NAME, "safetensors")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def test_load_when_shard_is_missing_names_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint(SHARDED)
    shard = shards(directory)[1]
    shard.unlink()
    check_refused(directory, shard, "no such file")


def test_load_when_index_lists_a_weight_no_shard_has_names_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint(SHARDED)
    shard = shards(directory)[1]
    weight = next(iter(load_file(shard)))
    edit_weights(shard, lambda weights: weights.pop(weight))
    check_refused(directory, directory / INDEX_NAME, weight)


def test_load_when_two_shards_have_the_same_weight_names_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint(SHARDED)
    first, second = shards(directory)[:2]
    weight, tensor = next(iter(load_file(first).items()))
    edit_weights(second, lambda weights: weights.update({weight: tensor}))
    check_refused(directory, second, weight)


@pytest.mark.parametrize("weight_map", [ABSENT, {}, ["model.safetensors"]], ids=["absent", "empty", "list"])
def test_load_when_index_has_no_weight_map_names_it(copy_checkpoint: CopyCheckpoint, weight_map: object) -> None:
    directory = copy_checkpoint(SHARDED)
    edit_json(directory / INDEX_NAME, weight_map=weight_map)
    check_refused(directory, directory / INDEX_NAME, "weight_map")


def test_load_when_shards_are_whole_serves_them(copy_checkpoint: CopyCheckpoint) -> None:
    assert load(copy_checkpoint(SHARDED)).vocab_size == 500


def test_load_when_tied_head_or_rotary_table_is_stored_as_well_ignores_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama_linear")

    def add_copies(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(directory / SINGLE_NAME, add_copies)
    assert load(directory).vocab_size == 320


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (EngineSettings(max_model_len=4096), "max_model_len"),
        (EngineSettings(kv_memory_bytes=100), "kv_memory_bytes"),
        (EngineSettings(block_size=24), "block_size"),
        (EngineSettings(dtype="int8"), "dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_load_when_settings_do_not_fit_the_checkpoint_names_the_field(checkpoints: Path, settings: EngineSettings, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        load_model(checkpoints / "llama3", settings)
    assert raised.value.field == field


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8", "int4"])
def test_load_when_latents_were_to_be_quantized_names_the_field(checkpoints: Path, kv_dtype: str) -> None:
    with pytest.raises(InvalidRequest, match="latents") as raised:
        load_model(checkpoints / "deepseek", EngineSettings(kv_dtype=kv_dtype))
    assert raised.value.field == "kv_dtype"


def test_fingerprint_when_config_or_a_weight_changes_is_another(copy_checkpoint: CopyCheckpoint, checkpoints: Path) -> None:
    directory = copy_checkpoint("llama3")
    fingerprint = WeightReader(directory).fingerprint()
    assert fingerprint == WeightReader(checkpoints / "llama3").fingerprint()
    edit_json(directory / "config.json", rms_norm_eps=1e-5)
    other_config = WeightReader(directory).fingerprint()
    edit_weights(directory / SINGLE_NAME, lambda weights: weights["lm_head.weight"][0, 0].add_(1))
    assert len({fingerprint, other_config, WeightReader(directory).fingerprint()}) == 3


def test_config_in_the_names_of_transformers_4_means_the_same() -> None:
    common: dict[str, Any] = {**SIZES, "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "eos_token_id": [2, 7]}
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    new = parse_model_config({**common, "dtype": "bfloat16", "rope_parameters": LLAMA3_ROPE}, path="config.json")
    old = parse_model_config(
        {**common, "torch_dtype": "bfloat16", "rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling}, path="config.json"
    )
    assert new == old
    assert new.eos_token_ids == (2, 7)
    unscaled = parse_model_config({**common, "rope_theta": 5e5, "rope_scaling": None}, path="config.json")
    assert unscaled.rope.kind == "default"
    assert unscaled.rope.theta == 5e5


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("Mistral", {}, (4096,) * 3),
        ("Mistral", {"sliding_window": None}, (None,) * 3),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 3),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 8)),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True}, (None,) * 3),
        (
            "Qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            (8, None, None),
        ),
        ("Llama", {"sliding_window": 8}, (None,) * 3),
        ("Gemma2", {}, (4096, None, 4096)),
        ("Gemma3", {"num_hidden_layers": 7}, (4096,) * 5 + (None, 4096)),
        ("Gemma3", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8)),
        ("Gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, (None, 4096, 4096)),
    ],
)
def test_windows_of_layers_follow_the_family(family: str, settings: dict[str, object], windows: tuple[int | None, ...]) -> None:
    raw = {**SIZES, "architectures": [f"{family}ForCausalLM"], "vocab_size": 300, **settings}
    assert parse_model_config(raw, path="config.json").windows == windows


def gemma3(**settings: object) -> ModelConfig:
    return parse_model_config({**SIZES, "architectures": ["Gemma3ForCausalLM"], "vocab_size": 300, **settings}, path="config.json")


def test_gemma_3_rotates_windows_by_a_base_of_their_own_however_that_is_written() -> None:
    scaled = {"rope_type": "linear", "factor": 8.0}
    by_layer = {"full_attention": {**scaled, "rope_theta": 2e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}
    for config in (
        gemma3(rope_parameters=by_layer),
        gemma3(rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling=scaled),
    ):
        assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 2e6, 8.0)
        assert (config.window_rope.kind, config.window_rope.theta) == ("default", 3e4)
    assert (gemma3().rope.theta, gemma3().window_rope.theta) == (1e6, 1e4)
    assert gemma3().rope.kind == "default"


def test_gemma_defaults_are_those_of_transformers() -> None:
    config = gemma3()
    assert (config.head_dim, config.score_scale, config.tie_embeddings, config.activation) == (256, 1 / 16, True, "gelu_tanh")
    assert (config.score_softcap, config.logit_softcap, config.qk_norm) == (None, None, True)
    raw = {**SIZES, "architectures": ["Gemma2ForCausalLM"], "vocab_size": 300}
    config = parse_model_config(raw, path="config.json")
    assert (config.score_softcap, config.logit_softcap, config.qk_norm) == (50.0, 30.0, False)
    assert parse_model_config({**raw, "attn_logit_softcapping": None}, path="config.json").score_softcap is None
    with pytest.raises(CheckpointError, match=r"final_logit_softcapping: -1\.0 is not positive"):
        parse_model_config({**raw, "final_logit_softcapping": -1.0}, path="config.json")
    with pytest.raises(CheckpointError, match="hidden_activation: 'relu' is not supported"):
        parse_model_config({**raw, "hidden_activation": "relu"}, path="config.json")


def write_generation_config(directory: Path, **keys: object) -> ModelConfig:
    (directory / "generation_config.json").write_text(json.dumps(keys), encoding="utf-8")
    return load_model_config(directory)


def test_generation_defaults_when_eos_is_a_list_take_all_of_it(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    config = write_generation_config(directory, eos_token_id=[2, 31, 5], temperature=0.6, top_k=20, top_p=0.9, min_p=0.05)
    defaults = load_generation_defaults(directory, config)
    assert config.eos_token_ids == (2,)
    assert defaults.eos_token_ids == (2, 31, 5)
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.6, 20, 0.9, 0.05)
    assert defaults.repetition_penalty is None


def test_generation_defaults_when_do_sample_is_false_are_greedy(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    config = write_generation_config(directory, do_sample=False, temperature=0.6, top_k=20, top_p=0.9)
    defaults = load_generation_defaults(directory, config)
    assert defaults.temperature == 0.0
    assert (defaults.top_k, defaults.top_p, defaults.min_p) == (None, None, None)
    assert defaults.eos_token_ids == config.eos_token_ids == (2,)


def test_generation_defaults_when_file_is_missing_are_the_configs(copy_checkpoint: CopyCheckpoint) -> None:
    directory = copy_checkpoint("llama3")
    (directory / "generation_config.json").unlink()
    defaults = load_generation_defaults(directory, load_model_config(directory))
    assert defaults.eos_token_ids == (2,)
    assert defaults.temperature is None


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", [2, "x"]), ("temperature", "hot"), ("top_k", True)])
def test_generation_defaults_when_malformed_name_file_and_key(copy_checkpoint: CopyCheckpoint, key: str, value: object) -> None:
    directory = copy_checkpoint("llama3")
    write_generation_config(directory, **{key: value})
    check_refused(directory, directory / "generation_config.json", key)


def test_decoder_when_checkpoint_is_whole_reads_every_weight(checkpoints: Path) -> None:
    reader = WeightReader(checkpoints / "llama3")
    with pytest.raises(CheckpointError, match="left over"):
        reader.finish()
    Decoder(load_model_config(checkpoints / "llama3"), reader, dtype=torch.float32, max_model_len=16)
    reader.finish()
