"""What config.json says of a mixture of experts, checked and in our words. Source: DeepSeek-V2 (DeepSeek-AI 2024), section 2.2."""

from dataclasses import dataclass

from services.engine.config_fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts, in all layers after the first `num_dense_layers`.

    num_routed         experts that a router chooses from
    num_chosen         of them, for each token
    num_shared         experts that every token has; computed as one that is so many times as large
    expert_size        intermediate size of each
    num_groups         of equally many routed experts, one after another
    num_chosen_groups  of these, for each token: those whose best experts are the best. As many as there are: groups mean nothing
    routed_scale       what the weights of chosen experts are multiplied by
    """

    num_dense_layers: int
    num_routed: int
    num_chosen: int
    num_shared: int
    expert_size: int
    num_groups: int
    num_chosen_groups: int
    routed_scale: float


def parse_experts_config(fields: Fields) -> ExpertsConfig:
    """Raises CheckpointError naming the key that is missing, malformed or not supported."""
    if fields.positive("moe_layer_freq", default=1) != 1:
        raise fields.error("moe_layer_freq", "only 1 is supported: experts in every layer after the dense ones")
    if (scoring := fields.raw.get("scoring_func", "softmax")) != "softmax":
        raise fields.error("scoring_func", f"{scoring!r} is not supported; supported: 'softmax'")
    # DeepSeek's own code divides the chosen experts' weights by their sum, transformers does not look at the key: no checkpoint is known
    # by which one could tell who is right.
    if fields.flag("norm_topk_prob", default=False):
        raise fields.error("norm_topk_prob", "only false is supported")
    num_routed, num_chosen = fields.positive("n_routed_experts"), fields.positive("num_experts_per_tok")
    num_groups = num_chosen_groups = 1
    method = fields.raw.get("topk_method") or "greedy"
    if method == "group_limited_greedy":
        num_groups, num_chosen_groups = fields.positive("n_group"), fields.positive("topk_group")
    elif method != "greedy":
        raise fields.error("topk_method", f"{method!r} is not supported; supported: 'greedy', 'group_limited_greedy'")
    if num_routed % num_groups:
        raise fields.error("n_group", f"{num_groups} does not divide n_routed_experts {num_routed}")
    if num_chosen_groups > num_groups:
        raise fields.error("topk_group", f"{num_chosen_groups} is more than n_group {num_groups}")
    if num_chosen > (eligible := num_routed // num_groups * num_chosen_groups):
        raise fields.error("num_experts_per_tok", f"{num_chosen} is more than the {eligible} experts that there are to choose from")
    num_dense_layers = fields.raw.get("first_k_dense_replace")
    return ExpertsConfig(
        num_dense_layers=0 if num_dense_layers in (None, 0) else fields.positive("first_k_dense_replace"),
        num_routed=num_routed,
        num_chosen=num_chosen,
        num_shared=fields.positive("n_shared_experts"),
        expert_size=fields.positive("moe_intermediate_size"),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        routed_scale=fields.number("routed_scaling_factor", default=1.0),
    )
