"""The one decoder: Llama 2 and 3.x, Mistral, Qwen2 and 3, Gemma 2 and 3 are settings of it (model_config says which).

Pre-norm transformer with grouped-query attention, rotary positions and a gated MLP, over a paged KV pool for each KV group. Knows nothing
of scheduling or sampling: a StepBatch and pools go in, logits come out. Source: the modeling files of Hugging Face transformers, to which
tests hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import Backend, BackendName, KVFormat, KVLayout, Linear, backend_of
from services.engine.batch import StepBatch
from services.engine.model_config import ModelConfig
from services.engine.rope import rope_tables
from services.engine.weights import WeightReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one layer; q, k and v are one product, gate and up another. Output norms are those of some families."""

    input_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    attention_output_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    mlp_output_norm: torch.Tensor | None


class Decoder:
    """A model ready to compute. Activations have `dtype`, keys and values too, if their format is plain; logits are fp32."""

    def __init__(
        self,
        config: ModelConfig,
        reader: WeightReader,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        kv_format: KVFormat = KVFormat.PLAIN,
        backend: Backend | None = None,
    ) -> None:
        """Takes every tensor of the checkpoint. Raises CheckpointError when one is missing, misshapen or left over.

        kv_format   in which keys and values are stored; plain: in dtype
        backend     computes all but the matrix products; None: the CPU's
        """
        self.config = config
        self.backend = backend_of(BackendName.CPU) if backend is None else backend
        self.dtype = dtype
        self.kv_format = kv_format
        # For each layer its KV group, and which of that group's layers it is.
        windows = config.group_windows
        self._places = [(windows.index(window), config.windows[:index].count(window)) for index, window in enumerate(config.windows)]
        self.rope = rope_tables(config.rope, config.head_dim, max_model_len)
        self.window_rope = self.rope
        if config.window_rope != config.rope:
            self.window_rope = rope_tables(config.window_rope, config.head_dim, max_model_len)
        self.embedding = reader.read("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.layers = [_read_layer(config, reader, index, dtype) for index in range(config.num_layers)]
        self.norm = _read_norm(config, reader, "model.norm", config.hidden_size, dtype)
        if config.tie_embeddings:
            reader.skip("lm_head.weight")  # some checkpoints store the tied copy as well
            self.lm_head = Linear(self.embedding, dtype=dtype)
        else:
            self.lm_head = Linear(reader.read("lm_head.weight", (config.vocab_size, config.hidden_size)), dtype=dtype)
        reader.finish()

    def kv_layouts(self, block_size: int) -> list[KVLayout]:
        """How this model's KV blocks look, in each KV group."""
        return [
            KVLayout(
                num_layers=self.config.windows.count(window),
                num_kv_heads=self.config.num_kv_heads,
                block_size=block_size,
                head_dim=self.config.head_dim,
                dtype=self.dtype,
                format=self.kv_format,
            )
            for window in self.config.group_windows
        ]

    def forward(self, batch: StepBatch, pools: Sequence[torch.Tensor], layouts: Sequence[KVLayout]) -> torch.Tensor:
        """Computes the batch's tokens, stores their K and V in the groups' pools, returns fp32 logits [R, vocab_size] of its logit rows."""
        config, backend = self.config, self.backend
        plans = [
            backend.plan_attention(
                block_tables=group.block_tables,
                query_lens=batch.query_lens,
                context_lens=group.context_lens,
                layout=layout,
                num_heads=config.num_heads,
                device=pool.device,
                window=window,
                plain_scores=config.score_softcap is None,
            )
            for group, pool, layout, window in zip(batch.groups, pools, layouts, config.group_windows, strict=True)
        ]
        positions, slots = torch.from_numpy(batch.positions), [torch.from_numpy(group.slots) for group in batch.groups]
        logit_rows = torch.from_numpy(batch.logit_rows)
        hidden = self.embedding.index_select(0, torch.from_numpy(batch.token_ids)).to(self.dtype)
        if config.embedding_scale != 1.0:
            hidden *= config.embedding_scale
        normed = backend.rms_norm(hidden, self.layers[0].input_norm, config.rms_norm_eps)
        norms_after = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for index, layer in enumerate(self.layers):
            group, layer_in_group = self._places[index]
            cos, sin = self.rope if config.windows[index] is None else self.window_rope
            query = backend.rope_and_write_kv(
                layer.qkv(normed).view(len(hidden), -1, config.head_dim),
                pools[group],
                layouts[group],
                layer_in_group,
                positions=positions,
                slots=slots[group],
                cos=cos,
                sin=sin,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                eps=config.rms_norm_eps,
            )
            if index == config.num_layers - 1 and not len(logit_rows):
                return torch.empty(0, config.vocab_size)
            attended = backend.paged_attention(
                query, pools[group], layer_in_group, plans[group], scale=config.score_scale, softcap=config.score_softcap
            ).flatten(1)
            if index == config.num_layers - 1:
                # Past the last layer's attention, only the rows that will be sampled matter.
                attended, hidden = attended.index_select(0, logit_rows), hidden.index_select(0, logit_rows)
            delta = layer.output(attended)
            if layer.attention_output_norm is not None:
                delta = backend.rms_norm(delta, layer.attention_output_norm, config.rms_norm_eps)
            normed = backend.add_rms_norm(hidden, delta, layer.mlp_norm, config.rms_norm_eps)
            delta = layer.down(backend.activate_and_mul(layer.gate_up(normed), config.activation))
            if layer.mlp_output_norm is not None:
                delta = backend.rms_norm(delta, layer.mlp_output_norm, config.rms_norm_eps)
            normed = backend.add_rms_norm(hidden, delta, norms_after[index], config.rms_norm_eps)
        logits: torch.Tensor = self.lm_head(normed).float()
        if config.logit_softcap is not None:
            logits = logits.div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
        return logits


def _read_norm(config: ModelConfig, reader: WeightReader, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    weight = reader.read(f"{name}.weight", (size,))
    return (weight.float() + config.norm_offset).to(dtype) if config.norm_offset else weight.to(dtype)


def _read_layer(config: ModelConfig, reader: WeightReader, index: int, dtype: torch.dtype) -> Layer:
    prefix = f"model.layers.{index}"
    hidden_size, head_dim = config.hidden_size, config.head_dim
    query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def linear(module: str, parts: dict[str, int], in_features: int, *, bias: bool) -> Linear:
        """Several projections of the same input as one product."""
        weights = [reader.read(f"{prefix}.{module}.{name}.weight", (size, in_features)) for name, size in parts.items()]
        biases = [reader.read(f"{prefix}.{module}.{name}.bias", (size,)) for name, size in parts.items()] if bias else []
        return Linear(torch.cat(weights), torch.cat(biases) if bias else None, dtype=dtype)

    def norm(name: str, size: int) -> torch.Tensor:
        return _read_norm(config, reader, f"{prefix}.{name}", size, dtype)

    # The same name is that of the norm before the MLP where there are no output norms, and of attention's output norm where there are.
    after_attention = norm("post_attention_layernorm", hidden_size)

    return Layer(
        input_norm=norm("input_layernorm", hidden_size),
        qkv=linear("self_attn", {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}, hidden_size, bias=config.qkv_bias),
        query_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
        key_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
        output=linear("self_attn", {"o_proj": hidden_size}, query_size, bias=config.output_bias),
        attention_output_norm=after_attention if config.has_output_norms else None,
        mlp_norm=norm("pre_feedforward_layernorm", hidden_size) if config.has_output_norms else after_attention,
        gate_up=linear(
            "mlp", {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}, hidden_size, bias=config.mlp_bias
        ),
        down=linear("mlp", {"down_proj": hidden_size}, config.intermediate_size, bias=config.mlp_bias),
        mlp_output_norm=norm("post_feedforward_layernorm", hidden_size) if config.has_output_norms else None,
    )
