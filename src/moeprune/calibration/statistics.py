"""Sufficient statistics about routed tokens: one forward pass, no backward, for every scorer at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moeprune.calibration.recorder import LayerRecorder
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import MoeLayer, decoder_layers, moe_layers
from moeprune.models.layers.stored import StoredTensor, stored_tensors
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import Share, on_every_share, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration tokens; float64, padding excluded. Sums of an expert run over the tokens routed to it.

    Symbols: gate g (the weight with which f enters y), expert input x, channel activation h = act(gate) * up, expert
    output f, routed output m = sum g f, layer output y, q = 1 / (||y||^2 + eps), w_c the down-projection column of
    channel c.
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
        """What `save` wrote, in memory."""
        stored = stored_tensors(path)
        return cls(**{field.name: stored[field.name].read() for field in fields(cls)})


class StoredStatistics(Statistics):
    """What `Statistics.save` wrote, each field read when it is asked for and not kept.

    They take 22 MB a layer at Qwen3-30B-A3B's shape, and what is made of them needs a few fields.
    """

    def __init__(self, path: Path) -> None:
        object.__setattr__(self, "_stored", stored_tensors(path))

    def __getattr__(self, name: str) -> Tensor:
        stored: dict[str, StoredTensor] = self.__dict__["_stored"]
        if name not in stored:
            raise AttributeError(f"Statistics have no {name}.")
        return stored[name].read()


def collect_statistics(
    model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
) -> Statistics:
    """Run every calibration window once through the model without its head, and record all MoE layers.

    The model is left as it was. Cost: one forward pass plus about a third of the routed experts' multiplications. With
    a folder the sums of each finished layer lie in ``workspace.folder / "statistics-N.safetensors"`` until the end.
    """
    moe_layer_in = {layer.decoder_layer: layer for layer in moe_layers(skeleton(model))}
    batches = windows.batches(batch_size)
    kept = _KeptSums(workspace.folder)
    for visit in walk_layers(model, batches, "statistics", workspace):
        if visit.layer in moe_layer_in:
            layer = moe_layer_in[visit.layer]
            recorders = on_every_share(visit.shares, partial(_recorded, layer, batches))
            for other in recorders[1:]:
                recorders[0].absorb(other)
            kept.keep(visit.depth, recorders[0].sums())
    decoders = [layer for _, layer in decoder_layers(skeleton(model))]
    depths = [depth for depth, layer in enumerate(decoders) if layer in moe_layer_in]
    return _stacked(windows.token_count, [kept.layer(depth) for depth in depths])


@torch.no_grad()
def _recorded(layer: MoeLayer, batches: Sequence[tuple[Tensor, Tensor]], share: Share) -> LayerRecorder:
    """A recorder that saw the batches of one device pass ``layer``, or its replica there."""
    router, experts = (_counterpart(layer, part, share.layer) for part in (layer.router, layer.experts))
    recorder = LayerRecorder(MoeLayer(layer.name, share.layer, router, experts))
    device = next(experts.parameters()).device
    with recorder.recording():
        for batch in share.batches:
            recorder.expect(batches[batch][1].flatten().bool().to(device))
            next(share.outputs)
    return recorder


def _counterpart(layer: MoeLayer, part: nn.Module, replica: nn.Module) -> nn.Module:
    """The module of a replica of the decoder layer at the place of ``part``."""
    return replica.get_submodule(next(name for name, one in layer.decoder_layer.named_modules() if one is part))


class _KeptSums:
    """The sums of each layer, in files where there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._in_memory: dict[int, dict[str, Tensor]] = {}

    def keep(self, depth: int, sums: dict[str, Tensor]) -> None:
        if self._folder is None:
            self._in_memory[depth] = sums
            return
        partial_file = self._file(self._folder, depth).with_suffix(".partial")
        save_file({name: values.contiguous() for name, values in sums.items()}, partial_file)
        partial_file.rename(self._file(self._folder, depth))

    def layer(self, depth: int) -> dict[str, StoredTensor] | dict[str, Tensor]:
        """What was kept of the layer. Raises ModelError when its file is not there."""
        return self._in_memory[depth] if self._folder is None else stored_tensors(self._file(self._folder, depth))

    def _file(self, folder: Path, depth: int) -> Path:
        return folder / f"statistics-{depth}.safetensors"


def _stacked(tokens: int, layers: Sequence[Mapping[str, StoredTensor | Tensor]]) -> Statistics:
    stacked = {}
    for name in layers[0]:
        of_layers = [layer[name] for layer in layers]
        stacked[_with_layer_axis(name)] = torch.stack(
            [values if isinstance(values, Tensor) else values.read() for values in of_layers]
        )
    return Statistics(tokens=torch.tensor(tokens, dtype=torch.float64), **stacked)


def _with_layer_axis(name: str) -> str:
    stem, _, axes = name.rpartition("_")
    return f"{stem}_L{axes}" if axes in ("E", "EC", "EH", "EE") else f"{name}_L"
