"""Tiny random models of both router kinds, a byte-level tokenizer, and what a model computes, seen from outside.

The suite needs no network and one CPU thread.
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from moeprune.calibration.windows import TokenWindows
from moeprune.embedded.tokenizer import train_tokenizer
from moeprune.models.adapter import MoeLayer, moe_layers

VOCAB_SIZE = 257  # 256 bytes and the end-of-text token
TINY_MODELS = ("qwen3_renormalised", "qwen3_plain_gates", "deepseek_v2")

ModelBuilder = Callable[[str, torch.dtype], PreTrainedModel]

torch.set_num_threads(1)

# Tests kill copies of their process. tqdm's own lock is one for all copies, and whoever is killed with it leaves it
# locked for good; nor may its thread hold this one at the moment of copying.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def qwen3_config(*, renormalise: bool) -> PreTrainedConfig:
    """Two MoE layers of 8 experts of width 16, top-2; head tied to the embedding."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=renormalise,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def deepseek_config() -> PreTrainedConfig:
    """A dense layer, then two MoE layers of one shared and 6 routed experts of width 24, top-2, gates scaled by 1.5."""
    return DeepseekV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        topk_method="greedy",
        routed_scaling_factor=1.5,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits for a cluster begins first, so that it is not what all others wait for in the end."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The planted models that tests make are not left in the home folder; matplotlib keeps its list of fonts there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def build_model() -> ModelBuilder:
    """``build_model(name, dtype)``: a fresh tiny model, the same weights every time; names are in TINY_MODELS."""
    configs = {
        "qwen3_renormalised": lambda: qwen3_config(renormalise=True),
        "qwen3_plain_gates": lambda: qwen3_config(renormalise=False),
        "deepseek_v2": deepseek_config,
    }

    def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
        config = configs[name]()
        # The grouped matrix product that transformers prefers does not know float64.
        config._experts_implementation = "eager"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).to(dtype).eval()

    return build


@pytest.fixture(params=TINY_MODELS)
def model_name(request: pytest.FixtureRequest) -> str:
    """Every test that uses it, or a tiny model, runs once per tiny model."""
    return request.param


@pytest.fixture
def tiny_model(build_model: ModelBuilder, model_name: str) -> PreTrainedModel:
    """A tiny model in float32."""
    return build_model(model_name, torch.float32)


@pytest.fixture
def tiny_model_64(build_model: ModelBuilder, model_name: str) -> PreTrainedModel:
    """The same tiny model in float64; its routers compute the softmax in float32, as the families do."""
    return build_model(model_name, torch.float64)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; token 0 is begin, end and padding."""
    return train_tokenizer([], VOCAB_SIZE)


@pytest.fixture
def tiny_checkpoint(tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The folder of ``tiny_model`` and its tokenizer, saved as the families' own checkpoints are."""
    folder = tmp_path / "dense"
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def random_windows() -> TokenWindows:
    """Five windows of 11 random tokens, all of which count."""
    input_ids_NT = torch.randint(1, VOCAB_SIZE, (5, 11), generator=torch.Generator().manual_seed(1))
    return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))


@dataclass
class SeenLayer:
    """What one MoE layer took and gave, batch after batch: x, gates and chosen experts per token, logits, m and y."""

    layer: MoeLayer
    x_TH: Tensor
    logits_TE: Tensor
    gates_TK: Tensor
    experts_TK: Tensor
    m_TH: Tensor
    y_TH: Tensor


@pytest.fixture(scope="session")
def seen_layers() -> Callable:
    """``with seen_layers(model) as seen:`` runs; afterwards ``seen`` holds a SeenLayer for each MoE layer.

    Reads inputs and outputs of modules through hooks, and computes nothing itself.
    """

    @contextmanager
    def watching(model: nn.Module) -> Iterator[list[SeenLayer]]:
        layers = moe_layers(model)
        calls: list[dict[str, list[Tensor]]] = [
            {"x_TH": [], "logits_TE": [], "gates_TK": [], "experts_TK": [], "m_TH": [], "y_TH": []} for _ in layers
        ]
        hooks = []
        for layer, call in zip(layers, calls, strict=True):

            def keep_routing(_module, _inputs, output, call=call):
                for name, value in zip(("logits_TE", "gates_TK", "experts_TK"), output, strict=True):
                    call[name].append(value)

            def keep_experts(_module, inputs, output, call=call):
                call["x_TH"].append(inputs[0])
                call["m_TH"].append(output)

            def keep_output(_module, _inputs, output, call=call):
                output = output if isinstance(output, Tensor) else output[0]
                call["y_TH"].append(output.flatten(0, 1))

            hooks += [
                layer.router.register_forward_hook(keep_routing),
                layer.experts.register_forward_hook(keep_experts),
                layer.decoder_layer.register_forward_hook(keep_output),
            ]
        seen: list[SeenLayer] = []
        with torch.no_grad():
            yield seen
        for hook in hooks:
            hook.remove()
        for layer, call in zip(layers, calls, strict=True):
            seen.append(SeenLayer(layer, **{name: torch.cat(values) for name, values in call.items()}))

    return watching
