"""A mixture of experts: a router chooses a few MLPs for each token, beside those that every token has.

Source: DeepSeekMoE (Dai et al. 2024); groups: DeepSeek-V2 (DeepSeek-AI 2024), section 2.2.2.
"""

from itertools import pairwise

import torch

from kernels import Backend
from services.engine.models.layer_weights import LayerWeights
from services.engine.models.mlp import GatedMlp


class Experts:
    """One layer's. Each expert computes the tokens that chose it; what a token gets from them is summed in their order."""

    def __init__(self, weights: LayerWeights) -> None:
        config = weights.config
        assert config.experts is not None
        self._config, self._activation = config.experts, config.activation
        # Weights of less than fp32 would be rounded again in every score: near ties between experts would fall to the wrong one.
        router = weights.read("mlp.gate.weight", self._config.num_routed, config.hidden_size)
        self._router = weights.linear_of(router.float(), dtype=torch.float32)
        size, modules = self._config.expert_size, [f"mlp.experts.{index}" for index in range(self._config.num_routed)]
        self._gate_up = [weights.linear(module, {"gate_proj": size, "up_proj": size}, config.hidden_size, bias=False) for module in modules]
        self._down = [weights.linear(module, {"down_proj": config.hidden_size}, size, bias=False) for module in modules]
        self._shared = GatedMlp(weights, "mlp.shared_experts", size * self._config.num_shared, bias=config.mlp_bias)

    def __call__(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        chosen, shares = self._route(x)
        order = chosen.flatten().argsort(stable=True)  # the (token, choice) pairs, expert after expert
        tokens, shares = order // chosen.shape[1], shares.flatten()[order, None]
        ends = chosen.flatten().bincount(minlength=len(self._down)).cumsum(0).tolist()
        spans = [(expert, slice(start, end)) for expert, (start, end) in enumerate(pairwise([0, *ends])) if start < end]
        inputs = x.index_select(0, tokens)
        gate_up = torch.cat([self._gate_up[expert](inputs[span]) for expert, span in spans])
        activated = backend.activate_and_mul(gate_up, self._activation)
        output = self._shared(x, backend).float()
        for expert, span in spans:
            output.index_add_(0, tokens[span], self._down[expert](activated[span]).float() * shares[span])
        return output.to(x.dtype)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, [T, num_chosen] int64, and what their results are multiplied by, fp32."""
        config = self._config
        scores = self._router(x.float()).softmax(-1)
        if config.num_chosen_groups < config.num_groups:
            groups = scores.view(len(x), config.num_groups, -1)
            best = groups.amax(-1).topk(config.num_chosen_groups).indices
            eligible = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            scores = (groups * eligible[..., None]).flatten(1)
        top = scores.topk(config.num_chosen)
        return top.indices, top.values * config.routed_scale
