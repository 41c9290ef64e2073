"""The two embedded architectures, one of each family of the paper; each trains on one CPU core in under two hours."""

from transformers import DeepseekV2Config, PreTrainedConfig, Qwen3MoeConfig

VOCAB_SIZE = 2048


def tiny_qwen3_moe() -> PreTrainedConfig:
    """Qwen3-MoE: 4 layers, all MoE, 16 experts of width 96, top-4 with renormalised gates; 4.3M parameters."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def tiny_deepseek_v2() -> PreTrainedConfig:
    """DeepSeek-V2: multi-head latent attention, dense first layer, 3 MoE layers of one shared and 16 routed experts
    of width 128, top-4 without renormalisation; 4.9M parameters."""
    return DeepseekV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=False,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
