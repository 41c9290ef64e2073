"""Sufficient statistics about routed tokens: one forward pass, no backward, for every scorer at once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.calibration.recorder import LayerRecorder
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import moe_layers


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration tokens; float64, padding excluded. Sums of an expert run over the tokens routed to it.

    Symbols: gate g, expert input x, channel activation h = act(gate) * up, expert output f, routed output
    m = sum g f, layer output y, q = 1 / (||y||^2 + eps), w_c the down-projection column of channel c.
    """

    tokens: Tensor  # [] number of calibration tokens
    routed_tokens_LE: Tensor  # N_e
    gate_sum_LE: Tensor  # sum g
    probability_sum_LE: Tensor  # sum of the router's softmax over all tokens
    output_norm_sum_LE: Tensor  # sum ||f||
    output_sq_norm_sum_LE: Tensor  # sum ||f||^2
    gated_output_norm_sum_LE: Tensor  # sum g ||f||
    changed_output_norm_sum_LE: Tensor  # sum g ||f|| max(0, 1 - cos(y - m, y))
    removal_sum_LE: Tensor  # sum q g^2 ||f||^2
    output_sum_LEH: Tensor  # sum f
    output_sq_sum_LEH: Tensor  # sum f^2
    input_sq_sum_LEH: Tensor  # sum x^2
    channel_sum_LEC: Tensor  # sum h
    channel_sq_sum_LEC: Tensor  # sum h^2
    gated_channel_sq_sum_LEC: Tensor  # sum (g h)^2
    gated_channel_sq_max_LEC: Tensor  # max (g h)^2
    gate_sq_sum_LEC: Tensor  # sum of squared gate pre-activations
    up_sq_sum_LEC: Tensor  # sum of squared up pre-activations
    attribution_sum_LEC: Tensor  # sum q g h <w_c, m>
    saliency_sum_LEC: Tensor  # sum q g |h <w_c, m>|
    gradient_sq_sum_LEC: Tensor  # sum (q g <w_c, m>)^2
    removal_sum_LEC: Tensor  # sum q g^2 h^2
    gate_row_norm_LEC: Tensor  # norm of row c of the gate projection
    up_row_norm_LEC: Tensor  # norm of row c of the up projection
    down_column_norm_LEC: Tensor  # ||w_c||
    gate_row_abs_sum_LEC: Tensor  # sum of absolute values of row c of the gate projection
    up_row_abs_sum_LEC: Tensor  # ... of the up projection
    down_column_abs_sum_LEC: Tensor  # ... of w_c
    gate_row_input_norm_LEC: Tensor  # sum_j |W_gate[c, j]| sqrt(sum x_j^2)
    up_row_input_norm_LEC: Tensor  # sum_j |W_up[c, j]| sqrt(sum x_j^2)
    routed_output_loss_L: Tensor  # sum over all tokens of q ||m||^2
    router_entropy_sum_L: Tensor  # sum over all tokens of the entropy of the router's softmax, in nats
    logit_product_LEE: Tensor  # sum over all tokens of z z^T, with the router's logits z

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        with safe_open(path, framework="pt") as stored:
            return cls(**{field.name: stored.get_tensor(field.name) for field in fields(cls)})


@torch.no_grad()
def collect_statistics(model: PreTrainedModel, windows: TokenWindows, batch_size: int) -> Statistics:
    """Run every calibration window once through the model without its head, and record all MoE layers.

    The model is left as it was. Cost: one forward pass plus about a third of the routed experts' multiplications.
    """
    recorders = [LayerRecorder(layer) for layer in moe_layers(model)]
    device = next(model.parameters()).device
    with ExitStack() as recordings:
        for recorder in recorders:
            recordings.enter_context(recorder.recording())
        for input_ids_BT, mask_BT in tqdm(windows.batches(batch_size), desc="statistics", unit="batch"):
            input_ids_BT, mask_BT = input_ids_BT.to(device), mask_BT.to(device)
            for recorder in recorders:
                recorder.expect(mask_BT.flatten().bool())
            model.base_model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
    return _stacked(windows.token_count, recorders)


def _stacked(tokens: int, recorders: Sequence[LayerRecorder]) -> Statistics:
    layers = [recorder.sums() for recorder in recorders]
    names = {name: _with_layer_axis(name) for name in layers[0]}
    stacked = {field: torch.stack([sums[name] for sums in layers]) for name, field in names.items()}
    return Statistics(tokens=torch.tensor(tokens, dtype=torch.float64), **stacked)


def _with_layer_axis(name: str) -> str:
    stem, _, axes = name.rpartition("_")
    return f"{stem}_L{axes}" if axes in ("E", "EC", "EH", "EE") else f"{name}_L"
