"""Logits of every family against transformers: whole prompts, token by token, in odd chunks, in mixed batches, across a window's edge."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.engine.model_config import load_model_config, parse_model_config
from services.engine.models import latent_attention
from services.engine.models.decoder import Decoder
from services.engine.rope import inverse_frequencies, rope_tables
from services.engine.weights import WeightReader
from tests.checkpoints import (
    CONTEXT_TOKENS,
    FAMILIES,
    PROMPT_LENGTHS,
    ROPES,
    SHARDED,
    SIZES,
    STEP_PROMPT_TOKENS,
    STEPS,
    FloatArray,
    read_reference,
    read_rope_reference,
)
from tests.parity.paged_sequences import PagedSequences

# Logits spread by 4 and come from fp32 sums in another order: 5e-5 was the worst seen. A wrong rotation or mask costs tenths.
TOLERANCE = 1e-4
WINDOWED = {"mistral": (50, 50, 50), "qwen2": (None, 70, 70), "gemma2": (50, None, 50)}

LoadDecoder = Callable[[str], Decoder]
each_family = pytest.mark.parametrize("name", FAMILIES)
each_block_size = pytest.mark.parametrize("block_size", [16, 64])


def check_close(logits: FloatArray, expected: FloatArray) -> None:
    assert logits.shape == expected.shape
    assert np.isfinite(logits).all()
    error = float(np.abs(logits - expected).max())
    assert error <= TOLERANCE, f"logits differ by {error:.1e}, first at row {int((np.abs(logits - expected) > TOLERANCE).any(1).argmax())}"


@each_family
@each_block_size
def test_logits_when_prompt_is_computed_whole_equal_transformers(
    checkpoints: Path, load_decoder: LoadDecoder, name: str, block_size: int
) -> None:
    reference = read_reference(checkpoints, name)
    for length in PROMPT_LENGTHS:
        sequences = PagedSequences(load_decoder(name), [reference.prompts[length].tolist()], block_size=block_size)
        check_close(sequences.compute({0: length})[0], reference.logits[length])


@each_family
@each_block_size
def test_logits_when_decoding_after_a_prompt_equal_transformers_with_cache(
    checkpoints: Path, load_decoder: LoadDecoder, name: str, block_size: int
) -> None:
    reference = read_reference(checkpoints, name)
    sequences = PagedSequences(load_decoder(name), [reference.step_ids.tolist()], block_size=block_size)
    rows = [sequences.compute({0: STEP_PROMPT_TOKENS}, only_last=True)[0]]
    rows.extend(sequences.compute({0: 1})[0] for _ in range(STEPS))
    check_close(np.concatenate(rows), reference.step_logits)


@each_family
def test_logits_when_computed_token_by_token_equal_transformers(checkpoints: Path, load_decoder: LoadDecoder, name: str) -> None:
    reference = read_reference(checkpoints, name)
    sequences = PagedSequences(load_decoder(name), [reference.prompts[64].tolist()], block_size=16)
    check_close(sequences.compute_in_chunks([1]), reference.logits[64])


@each_family
@each_block_size
@pytest.mark.parametrize("chunk_sizes", [[1, 15, 16, 17, 33, 5, 100, 2], [63, 1, 64, 1, 65], [31]], ids=str)
def test_logits_when_prompt_is_computed_in_odd_chunks_equal_transformers(
    checkpoints: Path, load_decoder: LoadDecoder, name: str, block_size: int, chunk_sizes: list[int]
) -> None:
    reference = read_reference(checkpoints, name)
    sequences = PagedSequences(load_decoder(name), [reference.prompts[333].tolist()], block_size=block_size)
    check_close(sequences.compute_in_chunks(chunk_sizes), reference.logits[333])


@each_family
@each_block_size
def test_logits_when_prompts_share_batches_equal_transformers(
    checkpoints: Path, load_decoder: LoadDecoder, name: str, block_size: int
) -> None:
    """Every step takes a random number of tokens of a random set of prompts, so that decodes, first and later chunks meet in one batch."""
    reference = read_reference(checkpoints, name)
    lengths = [length for length in PROMPT_LENGTHS if length < 1000]
    sequences = PagedSequences(load_decoder(name), [reference.prompts[length].tolist() for length in lengths], block_size=block_size)
    rows: list[list[FloatArray]] = [[] for _ in lengths]
    generator = np.random.default_rng(2)
    num_mixed = 0
    while any(computed < length for computed, length in zip(sequences.num_computed, lengths, strict=True)):
        chosen = {}
        for index, length in enumerate(lengths):
            remaining = length - sequences.num_computed[index]
            if remaining and generator.random() < 0.8:
                chosen[index] = min(remaining, int(generator.choice([1, 1, 1, 7, 16, 40])))
        if not chosen:
            continue
        num_mixed += len(chosen) > 1 and 1 in chosen.values() and max(chosen.values()) > 1
        for index, logits in sequences.compute(chosen).items():
            rows[index].append(logits)
    assert num_mixed >= 3
    for index, length in enumerate(lengths):
        check_close(np.concatenate(rows[index]), reference.logits[length])


@each_family
def test_logits_when_only_last_rows_are_wanted_equal_transformers(checkpoints: Path, load_decoder: LoadDecoder, name: str) -> None:
    """The last layer then computes fewer rows than the others."""
    reference = read_reference(checkpoints, name)
    lengths = [1, 17, 64]
    sequences = PagedSequences(load_decoder(name), [reference.prompts[length].tolist() for length in lengths], block_size=16)
    logits = sequences.compute(dict(enumerate(lengths)), only_last=True)
    for index, length in enumerate(lengths):
        check_close(logits[index], reference.logits[length][-1:])


@pytest.mark.parametrize("name", ["deepseek_lite", "deepseek"])
@pytest.mark.parametrize("expanded_bytes", [None, 1, 400_000], ids=["absorbed", "expanded by head", "expanded by several heads"])
def test_logits_when_latents_are_only_absorbed_or_only_expanded_equal_transformers(
    checkpoints: Path, load_decoder: LoadDecoder, monkeypatch: pytest.MonkeyPatch, name: str, expanded_bytes: int | None
) -> None:
    monkeypatch.setattr(latent_attention, "is_cheaper_expanded", lambda *_: expanded_bytes is not None)
    monkeypatch.setattr(latent_attention, "EXPANDED_BYTES", expanded_bytes)
    reference = read_reference(checkpoints, name)
    sequences = PagedSequences(load_decoder(name), [reference.prompts[333].tolist()], block_size=16)
    check_close(sequences.compute_in_chunks([100, 50, 1]), reference.logits[333])


@pytest.mark.parametrize("name", WINDOWED)
def test_logits_when_context_is_longer_than_window_depend_on_window(checkpoints: Path, load_decoder: LoadDecoder, name: str) -> None:
    """Shows that the parity above crossed the window: with another window only the tokens beyond it change."""
    decoder, reference = load_decoder(name), read_reference(checkpoints, name)
    assert decoder.config.windows == WINDOWED[name]
    window = max(width for width in WINDOWED[name] if width)
    assert window < STEP_PROMPT_TOKENS < 333
    for other in (None, window - 1, window + 1):
        windows = tuple(width and other for width in decoder.config.windows)
        changed = Decoder(
            replace(decoder.config, windows=windows),
            WeightReader(checkpoints / name),
            dtype=torch.float32,
            max_model_len=CONTEXT_TOKENS,
        )
        logits = PagedSequences(changed, [reference.prompts[333].tolist()], block_size=16).compute({0: 333})[0]
        same = window if other is None else min(window, other)
        check_close(logits[:same], reference.logits[333][:same])
        assert np.abs(logits[same] - reference.logits[333][same]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ROPES)
def test_rope_tables_of_every_kind_equal_transformers(checkpoints: Path, kind: str) -> None:
    raw = {**SIZES, "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "rope_parameters": ROPES[kind]}
    rope = parse_model_config(raw, path="config.json").rope
    reference = read_rope_reference(checkpoints, kind)
    np.testing.assert_allclose(inverse_frequencies(rope, 16).numpy(), reference.inverse_frequencies, rtol=1e-6)
    cos, sin = rope_tables(rope, 16, CONTEXT_TOKENS)
    # One rounding of a frequency is 1e-4 radians after 2,048 positions.
    np.testing.assert_allclose(cos.numpy(), reference.cos[:, :8], rtol=0, atol=5e-4)
    np.testing.assert_allclose(sin.numpy(), reference.sin[:, :8], rtol=0, atol=5e-4)


def test_checkpoints_have_the_features_they_are_here_for(checkpoints: Path, load_decoder: LoadDecoder) -> None:
    configs = {name: load_model_config(checkpoints / name) for name in FAMILIES}
    assert configs["llama3"].rope.kind == "llama3"
    assert configs["llama3"].num_kv_heads < configs["llama3"].num_heads == configs["llama2"].num_kv_heads
    assert configs["llama_yarn"].rope.kind == "yarn"
    assert configs["llama_yarn"].qkv_bias
    assert configs["llama_yarn"].output_bias
    assert configs["llama_yarn"].mlp_bias
    assert configs["llama_linear"].rope.kind == "linear"
    assert configs["llama_linear"].tie_embeddings
    assert configs["llama2"].rope.kind == "default"
    assert configs["mistral"].head_dim * configs["mistral"].num_heads != configs["mistral"].hidden_size
    assert configs["qwen2"].qkv_bias
    assert not configs["qwen2"].output_bias
    assert configs["qwen3"].qk_norm
    assert configs["qwen3"].tie_embeddings
    assert configs["qwen3"].head_dim * configs["qwen3"].num_heads != configs["qwen3"].hidden_size
    for name, has_query_latent, num_groups, num_eligible, rope in (
        ("deepseek_lite", False, 1, 1, "default"),
        ("deepseek", True, 4, 2, "yarn"),
    ):
        latent, experts = configs[name].latent, configs[name].experts
        assert latent is not None and experts is not None
        assert (latent.query_rank is not None) is has_query_latent
        assert (experts.num_groups, experts.num_chosen_groups) == (num_groups, num_eligible)
        assert 0 < experts.num_dense_layers < configs[name].num_layers
        assert configs[name].rope.kind == rope
    assert configs["deepseek"].score_scale > 1.2 * configs["deepseek"].head_dim ** -0.5
    assert configs["llama3_bf16"].dtype == "bfloat16"
    assert load_decoder("llama3_bf16").embedding.dtype == torch.bfloat16
    assert len(WeightReader(checkpoints / SHARDED).files) > 1
