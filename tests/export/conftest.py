"""Pruned checkpoints to export: models with their first channels kept, written as the package writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moeprune.embedded.tokenizer import train_tokenizer
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.models.runtime.router import keep_router_rows

# Models whose tokenizer merges have more tokens than bytes, and some ids without a token.
MERGED_VOCABULARY = 280


@torch.no_grad()
def _cut(
    model: PreTrainedModel,
    widths_LE: Sequence[Sequence[int]],
    *,
    keep_rows: bool = False,
    slot_of_row: Sequence[int] | None = None,
    bias: bool = False,
) -> PreTrainedModel:
    """Keep the first channels of each expert, in place; one of width 0 goes, with its router row unless it is kept."""
    to_contract(model)
    for layer, widths in zip(moe_layers(model), widths_LE, strict=True):
        dense = layer.experts
        live = [index for index, width in enumerate(widths) if width]
        experts = [_first_channels(dense, index, widths[index]) for index in live]
        slots = slot_of_row
        if keep_rows:
            slots = [live.index(index) if width else -1 for index, width in enumerate(widths)]
        else:
            keep_router_rows(layer.router, torch.tensor(live))
        bias_EH = torch.ones(len(slots or live), layer.hidden_size) if bias else None
        ragged = RaggedExperts(
            experts, gated_activation(dense), slots, bias_EH, gates_inputs=getattr(dense, "gates_inputs", False)
        )
        model.set_submodule(layer.name, ragged)
    return model


def _first_channels(dense: nn.Module, index: int, kept: int) -> Expert:
    width, hidden = dense.down_proj.shape[2], dense.down_proj.shape[1]
    has_bias = getattr(dense, "gate_up_bias", None) is not None
    expert = Expert(kept, hidden, bias=has_bias, dtype=dense.down_proj.dtype)
    expert.gate_proj.weight.copy_(dense.gate_up_proj[index, :kept])
    expert.up_proj.weight.copy_(dense.gate_up_proj[index, width : width + kept])
    expert.down_proj.weight.copy_(dense.down_proj[index, :, :kept])
    if has_bias:
        expert.gate_proj.bias.copy_(dense.gate_up_bias[index, :kept])
        expert.up_proj.bias.copy_(dense.gate_up_bias[index, width : width + kept])
        expert.down_proj.bias.copy_(dense.down_bias[index])
    return expert


@pytest.fixture
def cut_model() -> Callable[..., PreTrainedModel]:
    """``cut_model(model, widths_LE, keep_rows=, slot_of_row=, bias=)`` cuts in place and returns the model."""
    return _cut


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; GGUF knows none without."""
    return train_tokenizer(["the thin cat, 12 cats"] * 3, MERGED_VOCABULARY - 10)


@pytest.fixture
def pruned_folder(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedModel], Path]:
    """``pruned_folder(model)``: where the cut model is written, with the byte tokenizer."""

    def write(model: PreTrainedModel) -> Path:
        folder = tmp_path / "pruned"
        folder.mkdir()
        save_compressed(model, byte_tokenizer, folder, model.dtype)
        return folder

    return write


@pytest.fixture
def logits_of() -> Callable[[PreTrainedModel], torch.Tensor]:
    """Logits on fixed random tokens."""
    tokens_BT = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(3))

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens_BT).logits

    return logits
