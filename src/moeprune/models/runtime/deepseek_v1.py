"""DeepSeekMoE, version 1 (DeepSeek-MoE-16B, arXiv 2401.06066), which transformers does not have: Llama's attention and
norms, and in most layers shared and routed experts instead of one MLP.

Names and shapes of the weights are those of the published checkpoint and its modelling code, with routed experts fused
as in all families of transformers.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts


class DeepseekConfig(LlamaConfig):
    """Layers from ``first_k_dense_replace`` on whose index ``moe_layer_freq`` divides hold experts."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"


class DeepseekRouter(nn.Module):
    """The ``top_k`` largest softmax probabilities, renormalised to 1 where the config says so."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        if config.scoring_func != "softmax":
            raise ValueError(f"scoring_func={config.scoring_func!r} is unknown to DeepSeekMoE version 1; use softmax.")
        self.weight = _random(config.n_routed_experts, config.hidden_size, std=config.initializer_range)
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], gates [T, K], experts [T, K]; all in the model's precision, as published."""
        logits_TE = nn.functional.linear(hidden_TH, self.weight)
        gates_TK, experts_TK = torch.topk(logits_TE.softmax(dim=-1), self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, gates_TK, experts_TK


def _random(*shape: int, std: float) -> nn.Parameter:
    """Normally distributed; transformers itself initialises only the experts and routers that it knows."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


class DeepseekMoE(nn.Module):
    """Routed experts, and the shared ones, which are one MLP of their widths together."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = Qwen2MoeExperts(config)
        for name, weights in list(self.experts.named_parameters()):
            setattr(self.experts, name, _random(*weights.shape, std=config.initializer_range))
        self.shared_experts = None
        if config.n_shared_experts is not None:
            shared_width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=shared_width)  # type: ignore[arg-type]

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1)
        _, gates_TK, experts_TK = self.gate(hidden_TH)
        mixed_TH = self.experts(hidden_TH, experts_TK, gates_TK)
        if self.shared_experts is not None:
            mixed_TH = mixed_TH + self.shared_experts(hidden_TH)
        return mixed_TH.view_as(hidden_BSH)


class DeepseekForCausalLM(LlamaForCausalLM):
    """Llama with experts in the layers that the config names."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for depth, layer in enumerate(self.model.layers):
            if depth >= config.first_k_dense_replace and depth % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoE(config)
        self.post_init()
