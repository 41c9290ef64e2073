"""Pruned models to recover, in every storage that adapters may stand beside."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.layers.walk import run_through
from moeprune.models.runtime.ragged import Expert
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.recovery.adapters import Adapters
from moeprune.surgery.prune import prune
from moeprune.types import Plan

QUANTIZERS = {
    "nf4": NF4Quantizer(),
    "int8": Int8Quantizer(),
    "grouped": NearestQuantizer("rtn3", bits=3, group_size=16, parts=QuantizedParts()),
}


def cut(model: PreTrainedModel) -> PreTrainedModel:
    """Expert 0 of the first layer goes, the others have 16 channels or 8."""
    layers = moe_layers(model)
    kept = tuple(
        tuple(
            torch.arange(0 if (index, expert) == (0, 0) else 16 if expert == 1 else 8)
            for expert in range(layer.expert_count)
        )
        for index, layer in enumerate(layers)
    )
    return prune(model, Plan(kept, layers[0].widths[0])).requires_grad_(False)


@pytest.fixture
def pruned(build_model, model_name) -> Callable[[torch.dtype], PreTrainedModel]:
    """``pruned(dtype)``: the same pruned tiny model every time; one expert is stored without channels."""

    def build(dtype: torch.dtype) -> PreTrainedModel:
        model = cut(build_model(model_name, dtype))
        last = moe_layers(model)[-1]
        last.experts[2] = Expert(0, last.hidden_size, dtype=dtype).requires_grad_(False)
        return model

    return build


@pytest.fixture(params=QUANTIZERS)
def quantized(request, build_model, model_name) -> Callable[[], PreTrainedModel]:
    """``quantized()``: the pruned model with quantised weights, in float32."""

    def build() -> PreTrainedModel:
        model = cut(build_model(model_name, torch.float32))
        run_through(QUANTIZERS[request.param](model, None, 1))
        return model

    return build


@pytest.fixture
def adapters() -> Callable[..., Adapters]:
    """``adapters(use_dora=False, ...)``: of small rank, with dropout."""

    def build(**settings) -> Adapters:
        small = {
            "rank": 4, "alpha": 8.0, "dropout": 0.1, "use_dora": True, "learning_rate": 1e-2,
            "router_rank": 2, "router_alpha": 4.0, "router_learning_rate": 1e-3,
        }  # fmt: skip
        return Adapters(**small | settings)

    return build


@pytest.fixture(scope="session")
def shaken() -> Callable[[nn.Module], None]:
    """``shaken(model)`` moves everything that trains by random amounts."""

    @torch.no_grad()
    def shake(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    return shake


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(1, 257, (3, 13), generator=torch.Generator().manual_seed(3))
