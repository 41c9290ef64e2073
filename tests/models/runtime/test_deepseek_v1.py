"""DeepSeekMoE version 1 against the published architecture written out with plain tensor products."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moeprune.models.adapter import moe_layers
from moeprune.models.families import to_contract
from moeprune.models.runtime.deepseek_v1 import DeepseekConfig, DeepseekForCausalLM

HIDDEN, HEADS, LAYERS, EXPERTS, WIDTH, VOCAB = 32, 4, 4, 12, 12, 257
# As config.json of the published checkpoint says it, with smaller numbers.
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": HIDDEN, "initializer_range": 0.006, "intermediate_size": 40, "max_position_embeddings": 128,
    "model_type": "deepseek", "moe_intermediate_size": WIDTH, "moe_layer_freq": 1, "n_routed_experts": EXPERTS,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": HEADS, "num_experts_per_tok": 3,
    "num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip


def is_sparse(depth: int, config: dict) -> bool:
    return depth >= config["first_k_dense_replace"] and depth % config["moe_layer_freq"] == 0


def published_tensors(config: dict) -> dict[str, Tensor]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    def mlp(name: str, width: int) -> dict[str, Tensor]:
        return {
            f"{name}.gate_proj.weight": random(width, HIDDEN),
            f"{name}.up_proj.weight": random(width, HIDDEN),
            f"{name}.down_proj.weight": random(HIDDEN, width),
        }

    tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = 1 + random(HIDDEN)
    for depth in range(LAYERS):
        name = f"model.layers.{depth}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + random(HIDDEN)
        for projection in "qkvo":
            tensors[f"{name}.self_attn.{projection}_proj.weight"] = 2 * random(HIDDEN, HIDDEN)
        if not is_sparse(depth, config):
            tensors |= mlp(f"{name}.mlp", 40)
            continue
        tensors[f"{name}.mlp.gate.weight"] = 3 * random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            tensors |= mlp(f"{name}.mlp.experts.{expert}", WIDTH)
        tensors |= mlp(f"{name}.mlp.shared_experts", 2 * WIDTH)
    return tensors


def write_published(folder, **changes) -> dict[str, Tensor]:
    """A checkpoint in three shards; returns its tensors."""
    config = PUBLISHED | changes
    tensors = published_tensors(config)
    files = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: values for name, values in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


class WrittenOut:
    """The forward pass for one window, one head, token and expert at a time."""

    def __init__(self, tensors: dict[str, Tensor], config: dict) -> None:
        self.tensors, self.config = tensors, config

    def logits(self, ids: list[int]) -> Tensor:
        h_TH = self.tensors["model.embed_tokens.weight"][ids]
        for depth in range(LAYERS):
            name = f"model.layers.{depth}"
            h_TH = h_TH + self.attention(self.norm(h_TH, f"{name}.input_layernorm"), f"{name}.self_attn")
            x_TH = self.norm(h_TH, f"{name}.post_attention_layernorm")
            if is_sparse(depth, self.config):
                h_TH = h_TH + torch.stack([self.experts(x, f"{name}.mlp") for x in x_TH])
            else:
                h_TH = h_TH + self.mlp(x_TH, f"{name}.mlp")
        return self.norm(h_TH, "model.norm") @ self.tensors["lm_head.weight"].T

    def norm(self, x_TH: Tensor, name: str) -> Tensor:
        size = (x_TH.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return x_TH / size * self.tensors[f"{name}.weight"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up, down = (self.tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def experts(self, x: Tensor, name: str) -> Tensor:
        probabilities = (self.tensors[f"{name}.gate.weight"] @ x).softmax(dim=0).tolist()
        best = sorted(range(EXPERTS), key=lambda expert: -probabilities[expert])[:3]
        total = sum(probabilities[expert] for expert in best) if self.config["norm_topk_prob"] else 1
        mixed = self.mlp(x, f"{name}.shared_experts")
        for expert in best:
            mixed = mixed + probabilities[expert] / total * self.mlp(x, f"{name}.experts.{expert}")
        return mixed

    def attention(self, x_TH: Tensor, name: str) -> Tensor:
        size = HIDDEN // HEADS
        heads = []
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            q, k, v = (x_TH @ self.tensors[f"{name}.{part}_proj.weight"][rows].T for part in "qkv")
            scores_TT = rotated(q) @ rotated(k).T / math.sqrt(size)
            later = torch.ones_like(scores_TT, dtype=torch.bool).triu(1)
            heads.append(scores_TT.masked_fill(later, -math.inf).softmax(dim=-1) @ v)
        return torch.cat(heads, dim=-1) @ self.tensors[f"{name}.o_proj.weight"].T


def rotated(x_TD: Tensor) -> Tensor:
    """Value i of a head is turned together with value i + D/2, by position * 10000^(-2i/D)."""
    half = x_TD.shape[1] // 2
    position_T = torch.arange(len(x_TD), dtype=torch.float64)
    angle_TD = position_T[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x_TD[:, :half], x_TD[:, half:]
    return torch.cat(
        [first * angle_TD.cos() - second * angle_TD.sin(), second * angle_TD.cos() + first * angle_TD.sin()], dim=1
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_topk_prob": True}, {"first_k_dense_replace": 2}, {"moe_layer_freq": 2}],
    ids=lambda changes: next(iter(changes), "as published"),
)
def test_a_published_checkpoint_computes_the_published_architecture(tmp_path, random_windows, changes):
    tensors = write_published(tmp_path, **changes)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(model) is DeepseekForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written_out = WrittenOut(tensors, PUBLISHED | changes)
    with torch.no_grad():
        for ids_T in random_windows.input_ids_NT:
            # transformers keeps angles of positions and squares of norms in float32.
            expected_TV = written_out.logits(ids_T.tolist())
            torch.testing.assert_close(model(ids_T[None]).logits[0], expected_TV, atol=1e-4, rtol=1e-4)


def test_the_layers_that_hold_experts_are_those_that_the_config_names(tmp_path):
    write_published(tmp_path, moe_layer_freq=2, first_k_dense_replace=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    to_contract(model)
    assert [layer.name for layer in moe_layers(model)] == ["model.layers.2.mlp.experts"]


def test_another_scoring_function_is_refused():
    config = DeepseekConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        moe_intermediate_size=4, n_routed_experts=4, num_experts_per_tok=1, first_k_dense_replace=0,
        scoring_func="sigmoid",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"scoring_func='sigmoid' is unknown .* use softmax"):
        AutoModelForCausalLM.from_config(config)
