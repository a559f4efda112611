"""What config.json says of multi-head latent attention, checked and in our words. Source: DeepSeek-V2 (DeepSeek-AI 2024), section 2.1."""

from dataclasses import dataclass

from services.engine.config_fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Sizes are counts of numbers, of each head where nothing else is said.

    query_rank   of what queries are computed from; None: from the hidden state itself
    rank         of what keys and values are computed from: the latent, which all heads share
    plain_dim    of a query and a key, not rotated
    rope_dim     of a query and a key, rotated; the key's is one for all heads
    value_dim    of a value
    """

    query_rank: int | None
    rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int

    @property
    def cell_numbers(self) -> int:
        """Of what the KV cache keeps of a token: the latent and the rotated part of its key."""
        return self.rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rope_dim


def parse_latent_config(fields: Fields) -> LatentConfig:
    """Raises CheckpointError naming the key that is missing, malformed or not supported."""
    rope_dim = fields.positive("qk_rope_head_dim")
    if rope_dim % 2:
        raise fields.error("qk_rope_head_dim", f"{rope_dim} is odd, but rotary embedding needs pairs")
    num_heads = fields.positive("num_attention_heads")
    if fields.positive("num_key_value_heads", default=num_heads) != num_heads:
        raise fields.error("num_key_value_heads", f"every head has keys of its own, but there are {num_heads} attention heads")
    return LatentConfig(
        query_rank=None if fields.raw.get("q_lora_rank") is None else fields.positive("q_lora_rank"),
        rank=fields.positive("kv_lora_rank"),
        plain_dim=fields.positive("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=fields.positive("v_head_dim"),
    )
