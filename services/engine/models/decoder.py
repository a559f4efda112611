"""The one decoder: Llama 2 and 3.x, Mistral, Qwen2 and 3, Gemma 2 and 3, DeepSeek-V2 are settings of it (model_config says which).

Pre-norm transformer over a paged KV pool for each KV group; attention and MLP of a layer are each of one of two kinds. Knows nothing of
scheduling or sampling: a StepBatch and pools go in, logits come out. Source: the modeling files of Hugging Face transformers, to which
tests hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels import Backend, KVFormat, KVLayout, Linear, as_capturable, backend_for
from services.engine.batch import StepBatch
from services.engine.model_config import ModelConfig
from services.engine.models.attention import Attention, AttentionStep, GroupedQueryAttention
from services.engine.models.experts import Experts
from services.engine.models.latent_attention import LatentAttention
from services.engine.models.layer_weights import LayerWeights, read_norm
from services.engine.models.mlp import GatedMlp, Mlp
from services.engine.rope import rope_tables

if TYPE_CHECKING:
    from services.engine.weights import WeightReader  # needs a library that computing does not


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """A StepBatch on the device: token_ids [T] and logit_rows [R] int64, and what attention needs in each KV group."""

    token_ids: torch.Tensor
    logit_rows: torch.Tensor
    steps: list[AttentionStep]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. Output norms are those of some families."""

    input_norm: torch.Tensor
    attention: Attention
    attention_output_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp: Mlp
    mlp_output_norm: torch.Tensor | None


class Decoder:
    """A model ready to compute. Activations have `dtype`, keys and values too, if their format is plain; logits are fp32."""

    def __init__(
        self,
        config: ModelConfig,
        reader: "WeightReader",
        *,
        dtype: torch.dtype,
        max_model_len: int,
        kv_format: KVFormat = KVFormat.PLAIN,
        backend: Backend | None = None,
    ) -> None:
        """Takes every tensor of the checkpoint, to the reader's device. Raises CheckpointError when one is missing, misshapen or left over.

        kv_format   in which keys and values are stored; plain: in dtype
        backend     computes all but the matrix products; None: the fastest for the device
        """
        self.config = config
        self.device = reader.device
        self.backend = backend_for(reader.device) if backend is None else backend
        self.dtype = dtype
        self.kv_format = kv_format
        # For each layer its KV group, and which of that group's layers it is.
        windows = config.group_windows
        self._places = [(windows.index(window), config.windows[:index].count(window)) for index, window in enumerate(config.windows)]
        rope_dim = config.latent.rope_dim if config.latent else config.head_dim
        window_rope = rope = rope_tables(config.rope, rope_dim, max_model_len, self.device)
        if config.window_rope != config.rope:
            window_rope = rope_tables(config.window_rope, rope_dim, max_model_len, self.device)
        self.embedding = reader.read("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.layers = []
        for index, window in enumerate(config.windows):
            weights = LayerWeights(config=config, reader=reader, index=index, dtype=dtype, is_invariant=bool(self.backend.INVARIANCE))
            self.layers.append(_read_layer(weights, rope if window is None else window_rope))
        self.norm = read_norm(config, reader, "model.norm", config.hidden_size, dtype)
        if config.tie_embeddings:
            reader.skip("lm_head.weight")  # some checkpoints store the tied copy as well
            head = self.embedding
        else:
            head = reader.read("lm_head.weight", (config.vocab_size, config.hidden_size))
        head_dtype = dtype if self.device.type == "cuda" else torch.float32
        self.lm_head = Linear(head, dtype=head_dtype, is_invariant=bool(self.backend.INVARIANCE))
        reader.finish()

    def kv_layouts(self, block_size: int) -> list[KVLayout]:
        """How this model's KV blocks look, in each KV group."""
        return kv_layouts(self.config, block_size=block_size, dtype=self.dtype, kv_format=self.kv_format)

    def forward(self, batch: StepBatch, pools: Sequence[torch.Tensor], layouts: Sequence[KVLayout]) -> torch.Tensor:
        """Computes the batch's tokens, stores their K and V in the groups' pools, returns fp32 logits [R, vocab_size] of its logit rows."""
        return self.compute(self.prepare(batch, pools, layouts))

    def prepare(self, batch: StepBatch, pools: Sequence[torch.Tensor], layouts: Sequence[KVLayout]) -> StepInputs:
        """Brings to the device what a step needs beyond the weights."""
        config, device = self.config, self.device
        positions = torch.from_numpy(batch.positions).to(device)
        steps = []
        for group, pool, layout, window in zip(batch.groups, pools, layouts, config.group_windows, strict=True):
            plan = self.layers[config.windows.index(window)].attention.plan(
                self.backend,
                block_tables=group.block_tables,
                query_lens=batch.query_lens,
                context_lens=group.context_lens,
                layout=layout,
                device=device,
            )
            slots = torch.from_numpy(group.slots).to(device)
            steps.append(AttentionStep(backend=self.backend, positions=positions, slots=slots, pool=pool, layout=layout, plan=plan))
        token_ids, logit_rows = torch.from_numpy(batch.token_ids).to(device), torch.from_numpy(batch.logit_rows).to(device)
        return StepInputs(token_ids=token_ids, logit_rows=logit_rows, steps=steps)

    @property
    def is_capturable(self) -> bool:
        """Whether a step that gives each sequence one token happens on the device alone, with plans that can be refilled.

        Not with experts, whose tokens are counted on the host, nor with latents, whose plans depend on how long each sequence is.
        """
        return self.config.experts is None and self.config.latent is None

    def refill(self, inputs: StepInputs, batch: StepBatch) -> None:
        """Copies another batch with as many sequences, of one token each, to where these inputs are; before share_work."""
        inputs.token_ids.copy_(torch.from_numpy(batch.token_ids))
        inputs.steps[0].positions.copy_(torch.from_numpy(batch.positions))  # one tensor for all groups
        for step, group in zip(inputs.steps, batch.groups, strict=True):
            step.slots.copy_(torch.from_numpy(group.slots))
            # Grouped-query attention's plans are the backend's own.
            as_capturable(self.backend).refill_plan(step.plan, block_tables=group.block_tables, context_lens=group.context_lens)

    def share_work(self, inputs: StepInputs) -> None:
        """Does again, on the device, what plans made of lengths that have changed."""
        for step in inputs.steps:
            as_capturable(self.backend).share_work(step.plan, num_heads=self.config.num_heads)

    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """See forward."""
        config, backend, steps, logit_rows = self.config, self.backend, inputs.steps, inputs.logit_rows
        hidden = self.embedding.index_select(0, inputs.token_ids).to(self.dtype)
        if config.embedding_scale != 1.0:
            hidden *= config.embedding_scale
        normed = backend.rms_norm(hidden, self.layers[0].input_norm, config.rms_norm_eps)
        norms_after = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for index, layer in enumerate(self.layers):
            attention, (group_index, layer_in_group) = layer.attention, self._places[index]
            step = steps[group_index]
            query = attention.store(normed, step, layer_in_group)
            if index == config.num_layers - 1 and not len(logit_rows):
                return torch.empty(0, config.vocab_size, device=self.device)
            attended = attention.attend(query, step, layer_in_group)
            if index == config.num_layers - 1:
                # Past the last layer's attention, only the rows that will be sampled matter.
                attended, hidden = attended.index_select(0, logit_rows), hidden.index_select(0, logit_rows)
            delta = attention.output(attended)
            if layer.attention_output_norm is not None:
                delta = backend.rms_norm(delta, layer.attention_output_norm, config.rms_norm_eps)
            normed = backend.add_rms_norm(hidden, delta, layer.mlp_norm, config.rms_norm_eps)
            delta = layer.mlp(normed, backend)
            if layer.mlp_output_norm is not None:
                delta = backend.rms_norm(delta, layer.mlp_output_norm, config.rms_norm_eps)
            normed = backend.add_rms_norm(hidden, delta, norms_after[index], config.rms_norm_eps)
        logits = self.lm_head.in_fp32(normed)
        if config.logit_softcap is not None:
            logits = logits.div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
        return logits


def kv_layouts(config: ModelConfig, *, block_size: int, dtype: torch.dtype, kv_format: KVFormat = KVFormat.PLAIN) -> list[KVLayout]:
    """How the KV blocks of such a model look, in each KV group; dtype is that of plain numbers."""
    latent = config.latent
    return [
        KVLayout(
            num_layers=config.windows.count(window),
            num_kv_heads=config.num_kv_heads,
            block_size=block_size,
            head_dim=latent.cell_numbers if latent else config.head_dim,
            value_head_dim=latent.rank if latent else None,
            is_latent=latent is not None,
            dtype=dtype,
            format=kv_format,
        )
        for window in config.group_windows
    ]


def _read_layer(weights: LayerWeights, rope: tuple[torch.Tensor, torch.Tensor]) -> Layer:
    config = weights.config
    hidden_size, has_output_norms = config.hidden_size, config.has_output_norms
    # The same name is that of the norm before the MLP where there are no output norms, and of attention's output norm where there are.
    after_attention = weights.norm("post_attention_layernorm", hidden_size)
    has_experts = config.experts is not None and weights.index >= config.experts.num_dense_layers
    return Layer(
        input_norm=weights.norm("input_layernorm", hidden_size),
        attention=LatentAttention(weights, rope) if config.latent else GroupedQueryAttention(weights, rope),
        attention_output_norm=after_attention if has_output_norms else None,
        mlp_norm=weights.norm("pre_feedforward_layernorm", hidden_size) if has_output_norms else after_attention,
        mlp=Experts(weights) if has_experts else GatedMlp(weights, "mlp", config.intermediate_size, bias=config.mlp_bias),
        mlp_output_norm=weights.norm("post_feedforward_layernorm", hidden_size) if has_output_norms else None,
    )
