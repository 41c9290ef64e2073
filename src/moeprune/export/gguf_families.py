"""What llama.cpp calls the families' tensors and settings, and which of their settings it computes with.

Facts are from llama.cpp's loader and graph of each architecture (src/models) and were checked by comparing logits;
docs/export.md says with which version.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from moeprune.errors import InputError

# The contract's names of fused experts, by the engine's; gate and up are apart there.
EXPERT_TENSORS = {"down_proj": ("ffn_down_exps", "weight"), "down_bias": ("ffn_down_exps", "bias")}
GATE_UP_TENSORS = {"gate_up_proj": "weight", "gate_up_bias": "bias"}

GPT_OSS_LIMIT = 7.0


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp calls a family, and how it differs from the others there.

    ``add_settings(writer, config, width)`` writes what the architecture has beyond the common settings.
    ``renormalises``: whether the engine always, or never, divides a token's gates by their sum; None if the file says.
    ``interleaved_rotary``: the engine rotates neighbouring rows of queries and keys where the family rotates halves.
    """

    architecture: MODEL_ARCH
    add_settings: Callable[[GGUFWriter, Any, int], None]
    renormalises: bool | None = None
    interleaved_rotary: bool = False


def _qwen2_moe(writer: GGUFWriter, config: Any, width: int) -> None:
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _qwen3_moe(writer: GGUFWriter, config: Any, width: int) -> None:
    writer.add_expert_feed_forward_length(width)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _olmoe(writer: GGUFWriter, config: Any, width: int) -> None:
    if config.clip_qkv is not None or config.num_key_value_heads != config.num_attention_heads:
        raise InputError(
            "llama.cpp computes OLMoE without clip_qkv, and with as many key-value heads as heads.",
            change="Use format=transformers.",
        )


def _gpt_oss(writer: GGUFWriter, config: Any, width: int) -> None:
    if config.swiglu_limit != GPT_OSS_LIMIT:
        raise InputError(
            f"llama.cpp always clamps GPT-OSS at {GPT_OSS_LIMIT}; this model has swiglu_limit={config.swiglu_limit}.",
            change="Use format=transformers.",
        )
    writer.add_expert_feed_forward_length(width)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)


def _deepseek(writer: GGUFWriter, config: Any, width: int) -> None:
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(1.0)


def _deepseek_v2(writer: GGUFWriter, config: Any, width: int) -> None:
    """Latent attention; the engine sees it as one key-value head of the latent's width and unfolds it per head."""
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    # 0 stands for queries without a latent; the engine wants the key for all but the published numbers of layers.
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    is_v3 = config.model_type == "deepseek_v3"
    # Version 2's router ignores norm_topk_prob in transformers.
    writer.add_expert_weights_norm(is_v3 and config.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if is_v3 else ExpertGatingFuncType.SOFTMAX)
    grouped = is_v3 or config.topk_method == "group_limited_greedy"
    if grouped and (config.n_group or 1) > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if config.rope_parameters["rope_type"] == "yarn":
        mscale = config.rope_parameters.get("mscale_all_dim")
        if not mscale or mscale != config.rope_parameters.get("mscale"):
            raise InputError(
                "llama.cpp scales latent attention by one factor: YaRN with mscale other than mscale_all_dim cannot be "
                "written as GGUF.",
                change="Use format=transformers.",
            )
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)  # the engine takes the factor 0.1 out again


GGUF_FAMILIES = {
    "qwen2_moe": GgufFamily(MODEL_ARCH.QWEN2MOE, _qwen2_moe, renormalises=False),
    "qwen3_moe": GgufFamily(MODEL_ARCH.QWEN3MOE, _qwen3_moe, renormalises=True),
    "olmoe": GgufFamily(MODEL_ARCH.OLMOE, _olmoe, renormalises=False),
    "gpt_oss": GgufFamily(MODEL_ARCH.GPT_OSS, _gpt_oss),
    "deepseek": GgufFamily(MODEL_ARCH.DEEPSEEK, _deepseek, renormalises=False, interleaved_rotary=True),
    "deepseek_v2": GgufFamily(MODEL_ARCH.DEEPSEEK2, _deepseek_v2),
    "deepseek_v3": GgufFamily(MODEL_ARCH.DEEPSEEK2, _deepseek_v2),
}


def gguf_family(config: PreTrainedConfig) -> GgufFamily:
    """Raises InputError for a family, or for gates, that llama.cpp would not compute as the model does."""
    name = config.model_type
    if name not in GGUF_FAMILIES:
        raise InputError(
            f"The family {name} is not written as GGUF.",
            possible=GGUF_FAMILIES,
            change="Export it with format=transformers, and convert that with llama.cpp's convert_hf_to_gguf.py.",
        )
    family = GGUF_FAMILIES[name]
    renormalises = getattr(config, "norm_topk_prob", False)
    if family.renormalises not in (None, renormalises):
        raise InputError(
            f"llama.cpp always computes {name} with norm_topk_prob={str(family.renormalises).lower()}; this model has "
            f"{str(renormalises).lower()}.",
            change="Use format=transformers.",
        )
    return family


def add_common_settings(writer: GGUFWriter, config: Any, experts: int) -> None:
    """What every architecture wants to know."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    # Latent attention becomes one shared head.
    writer.add_head_count_kv(1 if hasattr(config, "kv_lora_rank") else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    _add_rotary(writer, config.rope_parameters)


def _add_rotary(writer: GGUFWriter, rotary: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rotary["rope_theta"])
    kind = rotary.get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ("linear", "yarn"):
        raise InputError(f"Rotary embeddings of type {kind} are not written as GGUF.", possible=("linear", "yarn"))
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(rotary["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rotary.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rotary.get("beta_slow") or 1.0)


def gguf_tensors(part: dict[str, Tensor], family: GgufFamily, config: Any) -> Iterator[tuple[str, Tensor]]:
    """A part of the weights, experts in the contract's layout, under the engine's names and in its layouts."""
    names = get_tensor_name_map(family.architecture, config.num_hidden_layers)
    for name, tensor in part.items():
        module, _, parameter = name.rpartition(".")
        if parameter in EXPERT_TENSORS or parameter in GATE_UP_TENSORS:
            yield from _expert_tensors(f"blk.{_layer(module)}", parameter, tensor)
        elif module.endswith("kv_b_proj"):
            yield from _unfolded_latent(f"blk.{_layer(module)}", tensor, config)
        else:
            if family.interleaved_rotary and module.endswith(("q_proj", "k_proj")):
                tensor = _neighbouring_rows(tensor, config.hidden_size // config.num_attention_heads)
            # The engine's own names of two parameters that belong to no linear layer or norm.
            known = name.replace("e_score_correction_bias", "e_score_correction.bias")
            known = known + ".weight" if known.endswith("sinks") else known
            engine_name = names.get_name(known, try_suffixes=(".weight", ".bias"))
            if engine_name is None:
                raise InputError(
                    f"llama.cpp's {family.architecture.name} has no tensor {name}.", change="Use format=transformers."
                )
            yield engine_name, tensor.squeeze(0) if tensor.dim() == 2 and len(tensor) == 1 else tensor


def _layer(module: str) -> str:
    return module.split("layers.")[1].split(".")[0]


def _expert_tensors(block: str, parameter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if parameter in EXPERT_TENSORS:
        engine_name, kind = EXPERT_TENSORS[parameter]
        yield f"{block}.{engine_name}.{kind}", tensor
    else:
        gate, up = tensor.chunk(2, dim=1)
        yield f"{block}.ffn_gate_exps.{GATE_UP_TENSORS[parameter]}", gate
        yield f"{block}.ffn_up_exps.{GATE_UP_TENSORS[parameter]}", up


def _unfolded_latent(block: str, kv_b: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The matrix from the latent to keys and values as two: keys of each head transposed, so that they meet queries."""
    per_head = kv_b.unflatten(0, (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim))
    keys, values = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    yield f"{block}.attn_k_b.weight", keys.transpose(1, 2)
    yield f"{block}.attn_v_b.weight", values


def _neighbouring_rows(projection: Tensor, head_dim: int) -> Tensor:
    """Row i of the first half of each head beside row i of the second."""
    return projection.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
