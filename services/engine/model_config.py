"""What a checkpoint's config.json says, checked and in our words: one description for every family the decoder can be.

Reads the names of transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype) alike. Whatever would change the
mathematics and is not understood is refused: a model that runs slightly wrong is worse than one that does not start.
Knows nothing of weights or devices. Source: the configuration classes of Hugging Face transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.config_fields import Fields, read_json
from services.engine.experts_config import ExpertsConfig, parse_experts_config
from services.engine.latent_config import LatentConfig, parse_latent_config

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}
GEMMAS = ("gemma2", "gemma3")
# In the words of config.json → in those of the kernels.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding; `kind` default, linear, llama3 or yarn, whose parameters are None where the kind has none."""

    kind: str
    theta: float
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama kind. Sizes are counts of elements; `windows` has one entry per layer (None: global attention).

    num_kv_heads        in the KV cache; head_dim: of a query and a key
    latent, experts     of families with latent attention, with a mixture of experts
    rope, window_rope   of layers with global attention, and of those with a window
    score_scale         what a query times a key is multiplied by; score_softcap, logit_softcap: see reference.paged_attention
    embedding_scale     what the embeddings are multiplied by
    norm_offset         what is added to the weights of norms, as they are stored
    has_output_norms    what attention and MLP give is normed before it is added to the residual
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: LatentConfig | None
    experts: ExpertsConfig | None
    context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    window_rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    score_scale: float
    score_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    norm_offset: float
    has_output_norms: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def group_windows(self) -> tuple[int | None, ...]:
        """Of the KV groups: layers with the same window keep the same tokens; those that keep all of them come first."""
        return tuple(sorted(set(self.windows), key=lambda window: (window is not None, window)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json sets; None where it is silent. Its end tokens win over config.json's."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def load_model_config(directory: Path) -> ModelConfig:
    """Reads `directory`/config.json. Raises CheckpointError naming the key that is missing, malformed or not supported."""
    path = directory / "config.json"
    return parse_model_config(read_json(path), path=str(path))


def parse_model_config(raw: Mapping[str, Any], *, path: str) -> ModelConfig:
    """See load_model_config; `path` is named in errors."""
    fields = Fields(raw, path)
    architectures = raw.get("architectures") or []
    family = next((ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES), None)
    if family is None:
        raise fields.error("architectures", f"{architectures} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized checkpoints are not supported yet")
    is_gemma = family in GEMMAS
    key = "hidden_activation" if is_gemma else "hidden_act"
    activation = raw.get(key) or ("gelu_pytorch_tanh" if is_gemma else "silu")
    if activation not in ACTIVATIONS:
        raise fields.error(key, f"{activation!r} is not supported; supported: {', '.join(map(repr, ACTIVATIONS))}")

    hidden_size = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    latent = parse_latent_config(fields) if family == "deepseek_v2" else None
    num_kv_heads, head_dim = (1, latent.query_dim) if latent else _heads(fields, family, hidden_size, num_heads)
    context_tokens = fields.positive("max_position_embeddings")
    num_layers = fields.positive("num_hidden_layers")
    # Qwen2 has biases on q, k and v only and Mistral has none at all, whatever the key says.
    attention_bias = fields.flag("attention_bias", default=False) and family in ("llama", "qwen3", "deepseek_v2")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise fields.error("dtype", f"{dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    rope, window_rope = _ropes(fields, family, context_tokens)
    score_scale = (fields.number("query_pre_attn_scalar", default=256.0) if is_gemma else float(head_dim)) ** -0.5
    if latent:
        score_scale *= _score_mscale(fields, rope) ** 2
    return ModelConfig(
        family=family,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        latent=latent,
        experts=parse_experts_config(fields) if family == "deepseek_v2" else None,
        context_tokens=context_tokens,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope=rope,
        window_rope=window_rope,
        windows=_windows(fields, family, num_layers),
        tie_embeddings=fields.flag("tie_word_embeddings", default=is_gemma),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False) and family in ("llama", "deepseek_v2"),
        qk_norm=family in ("qwen3", "gemma3"),
        activation=ACTIVATIONS[activation],
        score_scale=score_scale,
        score_softcap=_softcap(fields, "attn_logit_softcapping", 50.0) if family == "gemma2" else None,
        logit_softcap=_softcap(fields, "final_logit_softcapping", 30.0) if family == "gemma2" else None,
        embedding_scale=hidden_size**0.5 if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        has_output_norms=is_gemma,
        dtype=dtype,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def load_generation_defaults(directory: Path, config: ModelConfig) -> GenerationDefaults:
    """Reads `directory`/generation_config.json, which may be missing."""
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(eos_token_ids=config.eos_token_ids)
    raw = read_json(path)
    fields = Fields(raw, str(path))
    sampled = raw.get("do_sample") is not False  # the sampling keys of a greedy configuration mean nothing

    def optional(key: str) -> float | None:
        return fields.number(key) if sampled and raw.get(key) is not None else None

    top_k = optional("top_k")
    return GenerationDefaults(
        eos_token_ids=fields.token_ids("eos_token_id") or config.eos_token_ids,
        temperature=optional("temperature") if sampled else 0.0,
        top_k=None if top_k is None else int(top_k),
        top_p=optional("top_p"),
        min_p=optional("min_p"),
        repetition_penalty=optional("repetition_penalty"),
    )


def _heads(fields: Fields, family: str, hidden_size: int, num_heads: int) -> tuple[int, int]:
    """KV heads and head size of grouped-query attention."""
    num_kv_heads = fields.positive("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    head_dim = fields.positive("head_dim", default={"qwen3": 128, "gemma2": 256, "gemma3": 256}.get(family, hidden_size // num_heads))
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd, but rotary embedding needs pairs")
    return num_kv_heads, head_dim


def _softcap(fields: Fields, key: str, default: float) -> float | None:
    """null means none."""
    if key in fields.raw and fields.raw[key] is None:
        return None
    value = fields.number(key, default=default)
    if value <= 0.0:
        raise fields.error(key, f"{value} is not positive")
    return value


def _rope_parameters(fields: Fields) -> Mapping[str, Any]:
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, Mapping):
        raise fields.error("rope_parameters", "is not an object")
    return raw


def _ropes(fields: Fields, family: str, context_tokens: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers with global attention and of those with a window; Gemma 3 rotates these by another base and never scales them."""
    raw = _rope_parameters(fields)
    if family != "gemma3":
        rope = _rope(fields, raw, context_tokens, theta=10_000.0)
        return rope, rope
    by_layer = {"full_attention": raw, "sliding_attention": {"rope_theta": fields.number("rope_local_base_freq", default=10_000.0)}}
    if "full_attention" in raw or "sliding_attention" in raw:
        by_layer |= {kind: value for kind, value in raw.items() if isinstance(value, Mapping)}
    ropes = [
        _rope(fields, by_layer[kind], context_tokens, theta=theta)
        for kind, theta in (("full_attention", 1_000_000.0), ("sliding_attention", 10_000.0))
    ]
    return ropes[0], ropes[1]


def _rope(fields: Fields, raw: Mapping[str, Any], context_tokens: int, *, theta: float) -> RopeConfig:
    """`raw`: what is said of this rotation; `theta`: the base where nothing is."""
    inner = Fields({**raw}, fields.path)
    theta = inner.number("rope_theta", default=fields.number("rope_theta", default=theta))
    if inner.number("partial_rotary_factor", default=fields.number("partial_rotary_factor", default=1.0)) != 1.0:
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    match kind:
        case "default":
            return RopeConfig(kind=kind, theta=theta)
        case "linear":
            return RopeConfig(kind=kind, theta=theta, factor=inner.number("factor"))
        case "llama3":
            return RopeConfig(
                kind=kind,
                theta=theta,
                factor=inner.number("factor"),
                original_context=inner.positive("original_max_position_embeddings"),
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
            )
        case "yarn":
            factor = inner.number("factor")
            mscale, mscale_all = raw.get("mscale"), raw.get("mscale_all_dim")
            if raw.get("attention_factor") is not None:
                attention_factor = inner.number("attention_factor")
            elif mscale and mscale_all:
                attention_factor = _yarn_mscale(factor, float(mscale)) / _yarn_mscale(factor, float(mscale_all))
            else:
                attention_factor = _yarn_mscale(factor, 1.0)
            return RopeConfig(
                kind=kind,
                theta=theta,
                factor=factor,
                original_context=inner.positive("original_max_position_embeddings", default=context_tokens),
                beta_fast=inner.number("beta_fast", default=32.0),
                beta_slow=inner.number("beta_slow", default=1.0),
                attention_factor=attention_factor,
                truncate=inner.flag("truncate", default=True),
            )
        case _:
            # "dynamic" and "longrope" make a token's rotation depend on how long its sequence has become: cached blocks would be wrong.
            raise fields.error("rope_type", f"{kind!r} is not supported; supported: default, linear, llama3, yarn")


def _score_mscale(fields: Fields, rope: RopeConfig) -> float:
    """By what DeepSeek multiplies queries and keys, beside YaRN's attention factor, which only their rotated numbers have."""
    inner = Fields(_rope_parameters(fields), fields.path)
    return _yarn_mscale(rope.factor, inner.number("mscale_all_dim", default=0.0))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _windows(fields: Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    default = 4096 if family in ("mistral", *GEMMAS) else None  # what transformers takes when the key is absent; null means none
    if family in ("llama", "deepseek_v2") or fields.raw.get("sliding_window", default) is None:
        return (None,) * num_layers
    window = fields.positive("sliding_window", default=default)
    if family == "mistral":
        return (window,) * num_layers
    if family not in GEMMAS and not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    layer_types = fields.raw.get("layer_types")
    if layer_types is None and family in GEMMAS:
        period = fields.positive("sliding_window_pattern", default=6) if family == "gemma3" else 2
        return tuple(None if (layer + 1) % period == 0 else window for layer in range(num_layers))
    if layer_types is None:
        first = fields.positive("max_window_layers", default=28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers or not {"sliding_attention", "full_attention"}.issuperset(layer_types):
        raise fields.error("layer_types", f"must name {num_layers} layers of full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
