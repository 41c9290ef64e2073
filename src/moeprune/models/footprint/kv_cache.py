"""What transformers keeps of the tokens already seen (the KV cache), from a model's config alone."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class CacheSize:
    """Bytes for one sequence: what each further token adds at first, and what is kept after ``context`` tokens.

    Layers with a window stop growing at the window less one token; linear attention keeps a state that never grows.
    """

    per_token: int
    at_context: int


def cache_size(config: PreTrainedConfig, context: int, bytes_per_number: int) -> CacheSize:
    """The KV cache of one sequence of ``context`` tokens.

    Grouped-query attention keeps keys and values of all key-value heads. Multi-head latent attention (DeepSeek versions
    2 and 3) is kept compressed: ``kv_lora_rank + qk_rope_head_dim`` numbers a token, as transformers does since it
    caches the latent (its earlier versions kept full heads). What linear attention keeps is in `_state_bytes`.
    """
    per_token = at_context = 0
    kinds, settings = get_layer_types_and_kwargs(config)
    for kind, setting in zip(kinds, settings, strict=True):
        if kind == "linear_attention":
            at_context += _state_bytes(config, bytes_per_number)
            continue
        token = _numbers_per_token(config) * bytes_per_number
        window = setting.get("sliding_window")
        per_token += token
        at_context += token * (context if window is None else min(context, window - 1))
    return CacheSize(per_token, at_context)


def _numbers_per_token(config: Any) -> int:
    if getattr(config, "kv_lora_rank", None):
        return config.kv_lora_rank + config.qk_rope_head_dim
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head


def _state_bytes(config: Any, bytes_per_number: int) -> int:
    """The state of one layer of linear attention.

    Gated DeltaNet (Qwen3-Next, Qwen3.5): the last inputs of its convolution, and a float32 matrix of key by value
    dimension per value head. Lightning attention (MiniMax): a square matrix per head.
    """
    if not hasattr(config, "linear_num_value_heads"):
        return config.num_attention_heads * config.head_dim**2 * bytes_per_number
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    convolution = (2 * keys + values) * config.linear_conv_kernel_dim * bytes_per_number
    return convolution + values * config.linear_key_head_dim * FLOAT32_BYTES
