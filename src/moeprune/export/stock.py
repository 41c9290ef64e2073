"""The family's own model of a pruned checkpoint: its config, the shapes of its weights, and these part by part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import moeprune.models.families  # noqa: F401 - makes the families that transformers lacks known to it
from moeprune.errors import InputError, ModelError
from moeprune.export.checkpoint import PrunedCheckpoint
from moeprune.export.shape import StockShape
from moeprune.models.adapter import decoder_layers

# How the families' configs call the width and number of routed experts, and the shared ones, whose width in these
# families is a multiple of the routed width.
WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SHARED_KEYS = ("n_shared_experts", "moe_num_shared_experts")


Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class StockModel:
    """``model`` is the family's own, of the shape that was asked for, on the meta device."""

    checkpoint: PrunedCheckpoint
    shape: StockShape
    model: PreTrainedModel

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def weights(self, read: Reader) -> Iterator[dict[str, Tensor]]:
        """What is outside the decoder layers, then layer by layer: tensors by their names in the model's state dict.

        ``read`` is the checkpoint's `read` or `outline`. Experts have the contract's layout. Tied weights come once. No
        more than one layer is held. Raises ModelError where a stored tensor does not have the family's shape.
        """
        layers = [f"{name}." for name, _ in decoder_layers(self.model)]
        names = list(self.model.state_dict())
        yield self._part([name for name in names if not name.startswith(tuple(layers))], read)
        for layer in layers:
            yield self._part([name for name in names if name.startswith(layer)], read)

    def in_family_layout(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights with experts as the family's own module has them (GPT-OSS, Llama 4: transposed)."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in part.items():
            module, _, parameter = name.rpartition(".")
            if module in self.checkpoint.pruned["widths"]:
                parameter, tensor = _family_layout(self.model.get_submodule(module), parameter, tensor)
            tensors[f"{module}.{parameter}"] = tensor
        return tensors

    def _part(self, names: list[str], read: Reader) -> dict[str, Tensor]:
        part: dict[str, Tensor] = {}
        expected = self.model.state_dict()
        for name in names:
            module = name.rpartition(".")[0]
            if module in self.checkpoint.pruned["widths"]:
                if f"{module}.down_proj" not in part:
                    part |= _stacked(self.checkpoint, read, module, self.shape.width)
            elif name in self.checkpoint.tensors or name not in self.model.all_tied_weights_keys:
                part[name] = _fitted(read(name), name, expected[name].shape)
        return part


def stock_model(checkpoint: PrunedCheckpoint, shape: StockShape) -> StockModel:
    """Raises InputError for a family that transformers does not know, ModelError for weights that are not its."""
    if checkpoint.family not in CONFIG_MAPPING:
        raise InputError(f"The family {checkpoint.family} is unknown to this version of transformers.")
    config = CONFIG_MAPPING[checkpoint.family].from_dict(_stock_values(checkpoint, shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.config.architectures = [type(model).__name__]
    stock = StockModel(checkpoint, shape, model)
    _check_shapes(stock)
    return stock


def _check_shapes(stock: StockModel) -> None:
    expected = {name: tensor.shape for name, tensor in stock.model.state_dict().items()}
    for part in stock.weights(stock.checkpoint.outline):
        for name, tensor in stock.in_family_layout(part).items():
            if tensor.shape != expected.get(name):
                raise ModelError(
                    f"{name} would have the shape {tuple(tensor.shape)}; {type(stock.model).__name__} wants "
                    f"{tuple(expected.get(name, ()))}."
                )


def _stock_values(checkpoint: PrunedCheckpoint, shape: StockShape) -> dict[str, Any]:
    """The family's config with the number and width of the experts that are left."""
    values = dict(checkpoint.family_config)
    width_key = next(key for key in WIDTH_KEYS if values.get(key) is not None)
    for key in SHARED_KEYS:
        if values.get(key):
            # The shared experts keep their channels; where they are no multiple of the new width, zeros fill up.
            values[key] = -(-values[key] * values[width_key] // shape.width)
    values[width_key] = shape.width
    return values | {key: shape.experts for key in COUNT_KEYS if values.get(key) is not None}


def _fitted(tensor: Tensor, name: str, shape: torch.Size) -> Tensor:
    """The tensor, for shared experts filled up with zeros to ``shape``."""
    if tensor.shape == shape:
        return tensor
    if "shared_expert" not in name or any(have > want for have, want in zip(tensor.shape, shape, strict=True)):
        raise ModelError(f"{name} has the shape {tuple(tensor.shape)}; the family's model wants {tuple(shape)}.")
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _stacked(checkpoint: PrunedCheckpoint, read: Reader, module: str, width: int) -> dict[str, Tensor]:
    """All experts of a layer in the contract's layout, one per router row, narrower ones filled up with zeros.

    Zeros are exact: what such a channel computes is finite and meets a down column of zeros.
    """
    slots, widths = checkpoint.slots(module), checkpoint.row_widths(module)
    first = read(f"{module}.0.down_proj.weight")
    experts, hidden = len(slots), first.shape[0]
    stacked = {
        "gate_up_proj": first.new_zeros(experts, 2 * width, hidden),
        "down_proj": first.new_zeros(experts, hidden, width),
    }
    if module in checkpoint.pruned["expert_biases"]:
        stacked |= {"gate_up_bias": first.new_zeros(experts, 2 * width), "down_bias": first.new_zeros(experts, hidden)}
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        kept = widths[row]
        for name, tensor in stacked.items():
            kind = "bias" if name.endswith("bias") else "weight"
            if name.startswith("down"):
                values = read(f"{module}.{slot}.down_proj.{kind}")
                tensor[row, ..., : values.shape[-1]] = values
            else:
                tensor[row, :kept] = read(f"{module}.{slot}.gate_proj.{kind}")
                tensor[row, width : width + kept] = read(f"{module}.{slot}.up_proj.{kind}")
    return {f"{module}.{name}": tensor for name, tensor in stacked.items()}


def _family_layout(experts: nn.Module, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and layout of one of the contract's tensors in the family's own experts module."""
    if not (getattr(experts, "is_transposed", False) or isinstance(experts, Llama4TextExperts)):
        return name, tensor
    if name.startswith("gate_up") and not getattr(experts, "is_concatenated", True):
        gate, up = tensor.chunk(2, dim=1)
        tensor = torch.stack([gate, up], dim=2).flatten(1, 2)
    if tensor.dim() == 3:
        tensor = tensor.transpose(1, 2)
    return name.replace("_bias", "_proj_bias"), tensor.contiguous()
