"""A mixture of experts: a router chooses a few MLPs for each token, beside those that every token has.

Source: DeepSeekMoE (Dai et al. 2024); groups: DeepSeek-V2 (DeepSeek-AI 2024), section 2.2.2.
"""

import torch
import torch.nn.functional as F

from kernels import Backend
from services.engine.models.layer_weights import LayerWeights
from services.engine.models.mlp import GatedMlp


class Experts:
    """One layer's. Computed expert by expert, each for those tokens that chose it: what a token gets is summed in the order of experts."""

    def __init__(self, weights: LayerWeights) -> None:
        config = weights.config
        assert config.experts is not None
        self._config = config.experts
        # Weights of less than fp32 would be rounded again in every score: near ties between experts would fall to the wrong one.
        self._router = weights.read("mlp.gate.weight", self._config.num_routed, config.hidden_size).float()
        size = self._config.expert_size
        self._routed = [GatedMlp(weights, f"mlp.experts.{index}", size, bias=False) for index in range(self._config.num_routed)]
        self._shared = GatedMlp(weights, "mlp.shared_experts", size * self._config.num_shared, bias=config.mlp_bias)

    def __call__(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        chosen, shares = self._route(x)
        output = self._shared(x, backend).float()
        order = chosen.flatten().argsort(stable=True)  # the (token, choice) pairs, expert after expert
        tokens, shares = order // chosen.shape[1], shares.flatten()[order, None]
        start = 0
        for expert, count in zip(self._routed, chosen.flatten().bincount(minlength=len(self._routed)).tolist(), strict=True):
            if count:
                end = start + count
                rows = tokens[start:end]
                output.index_add_(0, rows, expert(x.index_select(0, rows), backend).float() * shares[start:end])
                start = end
        return output.to(x.dtype)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, [T, num_chosen] int64, and what their results are multiplied by, fp32."""
        config = self._config
        scores = F.linear(x.float(), self._router).softmax(-1)
        if config.num_chosen_groups < config.num_groups:
            groups = scores.view(len(x), config.num_groups, -1)
            best = groups.amax(-1).topk(config.num_chosen_groups).indices
            eligible = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            scores = (groups * eligible[..., None]).flatten(1)
        top = scores.topk(config.num_chosen)
        return top.indices, top.values * config.routed_scale
