"""Tiny random models of the real architecture of every family, and their checkpoints as the hub stores them.

Layers are few, and have the family's peculiarities: dense layers, shared experts, linear attention, biases. No weight
is left at a value that would hide a mistake: norms, biases and correction biases are random too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MiniMaxConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

import moeprune.models.families  # noqa: F401  lets transformers build DeepSeek-MoE version 1
from moeprune.models.runtime.deepseek_v1 import DeepseekConfig

VOCAB_SIZE = 257
HIDDEN = 32
SHARD = "20KB"
FAR = -1e9

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEAD: dict[str, Any] = {"head_dim": 8}
# Multi-head latent attention of DeepSeek versions 2 and 3.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_FINE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}
_COARSE: dict[str, Any] = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
# A dense layer, then two with a shared and 8 routed experts; each router in one group.
_SHARED: dict[str, Any] = {
    **_FINE,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON | _FINE, num_experts=8, intermediate_size=40, shared_expert_intermediate_size=20, mlp_only_layers=[0]
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON | _HEAD | _FINE, num_experts=8, norm_topk_prob=True),
    "deepseek": lambda: DeepseekConfig(
        **_COMMON | _FINE | {"num_hidden_layers": 3, "num_key_value_heads": 4},
        intermediate_size=40, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **_COMMON | _LATENT | _SHARED, q_lora_rank=None, topk_method="greedy", norm_topk_prob=False
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**_COMMON | _LATENT | _SHARED, q_lora_rank=12, norm_topk_prob=True),
    "mixtral": lambda: MixtralConfig(**_COMMON | _COARSE),
    "olmoe": lambda: OlmoeConfig(**_COMMON, intermediate_size=24, num_experts=8, num_experts_per_tok=3),
    "phimoe": lambda: PhimoeConfig(**_COMMON | _COARSE, attention_bias=True, lm_head_bias=True),
    "glm4_moe": lambda: Glm4MoeConfig(**_COMMON | _HEAD | _SHARED, attention_bias=True, use_qk_norm=True),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **_COMMON, moe_intermediate_size=24, intermediate_size=40, moe_num_experts=8, moe_k=3, moe_num_shared_experts=1,
        moe_layer_start_index=1, use_bias=True,
    ),
    "gpt_oss": lambda: GptOssConfig(**_COMMON | _HEAD | _COARSE, sliding_window=8, swiglu_limit=1.5),
    "qwen3_next": lambda: Qwen3NextConfig(
        **_COMMON | _HEAD | _LINEAR | _FINE, num_experts=8, intermediate_size=40, shared_expert_intermediate_size=20
    ),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(
        **_COMMON | _HEAD | _LINEAR | _FINE, num_experts=8, shared_expert_intermediate_size=20
    ),
    "llama4": lambda: Llama4TextConfig(
        **_COMMON | _HEAD | _COARSE | {"num_hidden_layers": 3}, intermediate_size_mlp=40, moe_layers=[0, 2],
        attention_chunk_size=8, no_rope_layers=[1, 1, 0],
    ),
    "minimax": lambda: MiniMaxConfig(
        **_COMMON | _HEAD | _COARSE, block_size=4, layer_types=["full_attention", "linear_attention"],
        mlp_alpha_factor=1.2, mlp_beta_factor=0.8, full_attn_beta_factor=0.9,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **_COMMON | _COARSE, residual_multiplier=0.7, attention_multiplier=0.3, embedding_multiplier=2.0
    ),
    "dots1": lambda: Dots1Config(**_COMMON | _HEAD | _SHARED, norm_topk_prob=True),
}  # fmt: skip


def build_family(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """A tiny model of the family as transformers has it; the same weights every time.

    ``changes`` replace settings of its config.
    """
    config = FAMILIES[name]()
    for setting, value in changes.items():
        setattr(config, setting, value)
    # The grouped matrix product that transformers prefers does not know float64.
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        _leave_no_value_constant(model)
    return model.to(dtype).eval()


@torch.no_grad()
def _leave_no_value_constant(model: PreTrainedModel) -> None:
    """Add noise to weights that are all the same, as norms and biases are in a new model."""
    stored = model.state_dict()
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and values.is_floating_point() and values.numel() > 1 and values.min() == values.max():
            values += 0.3 * torch.randn(values.shape)


def save_as_the_hub_does(model: PreTrainedModel, folder: Path) -> None:
    """Write the checkpoint in shards with an index, under the family's own keys: most keep experts apart."""
    model.save_pretrained(folder, max_shard_size=SHARD)


@contextmanager
def out_of_reach(router: nn.Module, experts: Sequence[int]) -> Iterator[None]:
    """Within the context the router never chooses these experts: what removing their rows has to equal.

    Their logits are as good as -infinity, and so are the corrections that some families add to the probabilities.
    """
    linear, within = F.linear, []

    def distant(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(inputs, weight, bias)
        return logits.index_fill(-1, torch.tensor(experts), FAR) if within else logits

    corrections = [value for name, value in router.state_dict().items() if name.endswith("e_score_correction_bias")]
    stored = [values.clone() for values in corrections]
    hooks = [
        router.register_forward_pre_hook(lambda *_: within.append(True)),
        router.register_forward_hook(lambda *_: within.clear()),
    ]
    try:
        for values in corrections:
            values[..., list(experts)] = FAR
        with patch.object(F, "linear", distant):
            yield
    finally:
        for values, before in zip(corrections, stored, strict=True):
            values.copy_(before)
        for hook in hooks:
            hook.remove()
