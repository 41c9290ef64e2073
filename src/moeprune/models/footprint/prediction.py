"""Predicts what a pruned, perhaps quantised model takes, from the shapes in its config alone: no weights are needed.

The family's own model is built without memory (on the meta device); what `compressed.writer` would write
of it is then counted tensor by tensor.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moeprune.models.adapter import MoeLayer, decoder_layers, moe_layers
from moeprune.models.compressed.files import Structure, layer_metadata, never_rounded, stored_precision
from moeprune.models.compressed.grouping import MATRICES, Settings, common_prefixes
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.families import to_contract
from moeprune.models.footprint.measured import Bytes, Parameters
from moeprune.models.footprint.tensors import BYTES_OF, CODE_OF_DTYPE, CODES, Parts, TensorSpec, file_bytes, held_bytes
from moeprune.models.shape import ExpertShape

REST = ""  # what belongs to no decoder layer


LINEAR, TABLE = "linear layer", "embedding table"


class Storage(Protocol):
    """Which matrices a quantizer takes, and how it stores them.

    One that keeps them in groups also says ``bits``, ``group_size`` and ``rounding``, as
    `moeprune.models.runtime.grouped.GroupedWeight` has them.
    """

    @property
    def parts(self) -> QuantizedParts:
        """Those that it takes."""

    def stored(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in] which was computed with in ``dtype``."""

    def stored_table(self, shape: tuple[int, int]) -> Parts:
        """The tensors that stand for an embedding table [rows, columns]."""


@dataclass(frozen=True)
class Weight:
    """A tensor before quantising, the types it is stored and held in memory in.

    ``kind``: LINEAR or TABLE where it is the weight of such a module. ``quantised``: whether the quantizer takes it.
    ``buffer``: no parameter.
    """

    name: str
    dtype: str
    held_dtype: str
    shape: tuple[int, ...]
    kind: str | None = None
    quantised: bool = False
    buffer: bool = False

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Prediction:
    """Sizes of one compressed model; ``largest_layer`` in bytes, of the decoder layer that takes most."""

    parameters: Parameters
    bytes: Bytes
    largest_layer: int


def empty_model(config: PreTrainedConfig, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The family's model without memory for its weights, its experts as the contract says.

    Raises ModelError when it has no routed experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype)
    to_contract(model)
    moe_layers(model)
    return model


def shape_of(model: PreTrainedModel) -> ExpertShape:
    """The shape of its experts, as `moeprune.models.shape.read_shape` reads it from a checkpoint."""
    layers = moe_layers(model)
    first = layers[0]
    return ExpertShape(len(layers), first.expert_count, first.widths[0], first.top_k, first.routes_by_group)


def even_widths(shape: ExpertShape, kept_channels: int, alignment: int, minimum_width: int) -> list[list[int]]:
    """Widths [L][E] that sum to ``kept_channels``, as even as whole blocks allow.

    As the allocator `uniform` gives them. Where that would leave experts below the minimum, some keep none.
    """
    blocks = kept_channels // alignment
    holders = min(shape.layers * shape.experts, kept_channels // minimum_width)
    base, extra = divmod(blocks, holders)
    widths = [[0] * shape.experts for _ in range(shape.layers)]
    for place in range(holders):
        widths[place % shape.layers][place // shape.layers] = (base + (place < extra)) * alignment
    return widths


def predict(
    model: PreTrainedModel, widths_LE: Sequence[Sequence[int]], dtype: torch.dtype, quantizer: Storage | None = None
) -> Prediction:
    """The size of ``model`` (without memory is enough) when its experts keep so many channels.

    An expert that keeps none is gone, and with it its router row, but where the router chooses among groups of experts:
    there rows cannot go. ``dtype`` is what is not quantised is stored in;
    the bytes are those of `count_bytes` on the checkpoint, files and headers included, with all of the model in memory.
    With double quantisation the files are off by a few bytes per matrix, for digits that depend on the weights; with a
    quantizer that rounds some experts otherwise than it says, by the words that name them.
    """
    layers = moe_layers(model)
    widths_of = {layer.name: tuple(widths) for layer, widths in zip(layers, widths_LE, strict=True)}
    shards = _weights(model, layers, widths_of, dtype, quantizer)
    compute_dtype = str(model.dtype).removeprefix("torch.")
    ideal = with_overhead = on_disk = largest = 0
    held = _bytes_of_unstored_buffers(model)
    for shard, weights in shards.items():
        stored = [pair for weight in weights for pair in _stored(weight, quantizer, compute_dtype)]
        specs = [spec for spec, _ in stored]
        size = sum(spec.nbytes for spec in specs)
        ideal += sum(spec.nbytes for spec in specs if not spec.overhead)
        with_overhead += size
        on_disk += file_bytes(specs, _metadata(shard, layers, widths_of, _grouped(shard, weights, quantizer)))
        held += sum(in_memory for _, in_memory in stored)
        largest = max(largest, size if shard != REST else 0)
    return Prediction(
        _parameters(shards, layers, widths_of), Bytes(ideal, with_overhead, on_disk, in_memory=held), largest
    )


def _weights(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    widths_of: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    quantizer: Storage | None,
) -> dict[str, list[Weight]]:
    """What is left of the model after pruning, by decoder layer."""
    modules = dict(model.named_modules())
    kinds = {
        f"{name}.weight": TABLE if isinstance(module, nn.Embedding) else LINEAR
        for name, module in modules.items()
        if isinstance(module, MATRICES)
    }
    quantised = set() if quantizer is None else {f"{name}.weight" for name in quantizer.parts.names(model)}
    takes_experts = quantizer is not None and quantizer.parts.routed_experts
    names = {id(module): name for name, module in modules.items()}
    fused = tuple(f"{name}." for name in widths_of)
    router_of = {id(tensor): layer for layer in layers for tensor in _tensors(layer.router)}
    shards: dict[str, list[Weight]] = {name: [] for name, _ in decoder_layers(model)}
    shards[REST] = []
    kept, kept_in_memory = never_rounded(model, dtype), never_rounded(model, model.dtype)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name.startswith(fused):
            continue  # tied to a tensor that is there already; fused experts, which follow below
        seen.add(id(tensor))
        shape = tuple(tensor.shape)
        if layer := router_of.get(id(tensor)):
            shape = _live_rows(shape, layer.expert_count, _row_count(layer, widths_of[layer.name]))
        buffer = not isinstance(tensor, nn.Parameter)
        shard = next((shard for shard in shards if shard and name.startswith(f"{shard}.")), REST)
        code = _code(tensor.dtype if buffer else stored_precision(name, dtype, kept))
        held = _code(tensor.dtype if buffer else stored_precision(name, model.dtype, kept_in_memory))
        shards[shard].append(Weight(name, code, held, shape, kinds.get(name), name in quantised, buffer))
    for layer in layers:
        codes = _code(dtype), _code(model.dtype)
        shards[names[id(layer.decoder_layer)]] += _expert_weights(layer, widths_of[layer.name], codes, takes_experts)
    return shards


def _expert_weights(
    layer: MoeLayer, widths: Sequence[int], dtypes: tuple[str, str] = ("", ""), quantised: bool = False
) -> Iterator[Weight]:
    """The tensors of `moeprune.models.runtime.ragged.Expert`, expert by expert, without those that keep nothing."""
    biased = hasattr(layer.experts, "gate_up_bias")
    hidden = layer.hidden_size
    for slot, width in enumerate(width for width in widths if width):
        for part, shape in (
            ("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width)),
        ):  # fmt: skip
            name = f"{layer.name}.{slot}.{part}"
            yield Weight(f"{name}.weight", *dtypes, shape, LINEAR, quantised)
            if biased:
                yield Weight(f"{name}.bias", *dtypes, shape[:1])


def _stored(weight: Weight, quantizer: Storage | None, compute_dtype: str) -> Iterator[tuple[TensorSpec, int]]:
    """The tensors that stand for it in the file, and what each takes in memory, in bytes."""
    if quantizer is None or not weight.quantised:
        yield TensorSpec(weight.name, weight.dtype, weight.shape), BYTES_OF[weight.held_dtype] * prod(weight.shape)
        return
    rows, columns = weight.shape
    is_table = weight.kind == TABLE
    parts = quantizer.stored_table((rows, columns)) if is_table else quantizer.stored((rows, columns), compute_dtype)
    for part, (code, shape) in parts.items():
        spec = TensorSpec(f"{weight.module}.{part}", code, shape, overhead=part not in CODES)
        yield spec, held_bytes(part, spec.nbytes)


def _grouped(shard: str, weights: Sequence[Weight], quantizer: Storage | None) -> dict[str, Settings]:
    """What the checkpoint says of the shard's grouped matrices."""
    settings: Settings | None = None
    if quantizer is not None and "codes" in quantizer.stored((1, 1), "float32"):
        settings = {name: getattr(quantizer, name) for name in ("bits", "group_size", "rounding")}
    matrices = [weight for weight in weights if weight.kind is not None]
    return common_prefixes({weight.module: settings if weight.quantised else None for weight in matrices}, shard)


def _parameters(
    shards: Mapping[str, Sequence[Weight]], layers: Sequence[MoeLayer], widths_of: Mapping[str, Sequence[int]]
) -> Parameters:
    """As `moeprune.models.footprint.measured.count_parameters` counts them."""
    total = routed = 0
    used = 0.0
    for weights in shards.values():
        total += sum(prod(weight.shape) for weight in weights if not weight.buffer)
    for layer in layers:
        own = sum(prod(weight.shape) for weight in _expert_weights(layer, widths_of[layer.name]))
        routed += own
        used += own * layer.top_k / _row_count(layer, widths_of[layer.name])
    return Parameters(total, routed, round(total - routed + used))


def _metadata(
    shard: str, layers: Sequence[MoeLayer], widths_of: Mapping[str, Sequence[int]], grouped: Mapping[str, Settings]
) -> dict[str, str]:
    """What the writer notes in the shard's header."""
    if shard == REST:
        return {"format": "pt"}
    inside = [layer for layer in layers if layer.name.startswith(f"{shard}.")]
    rows = {layer.name: _slot_of_row(widths_of[layer.name]) for layer in inside if layer.routes_by_group}
    structure = Structure(
        widths={layer.name: tuple(width for width in widths_of[layer.name] if width) for layer in inside},
        slot_of_row={name: slots for name, slots in rows.items() if -1 in slots},
        expert_biases=tuple(layer.name for layer in inside if hasattr(layer.experts, "gate_up_bias")),
        gates_inputs=tuple(layer.name for layer in inside if layer.gates_inputs),
        grouped=grouped,
    )
    return {"format": "pt", **layer_metadata(shard, structure)}


def _bytes_of_unstored_buffers(model: nn.Module) -> int:
    stored = model.state_dict().keys()
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)


def _row_count(layer: MoeLayer, widths: Sequence[int]) -> int:
    """Router rows that stay."""
    return layer.expert_count if layer.routes_by_group else sum(width > 0 for width in widths)


def _slot_of_row(widths: Sequence[int]) -> tuple[int, ...]:
    """Which stored expert each row leads to, where all rows stay; -1 for none."""
    live = itertools.count()
    return tuple(next(live) if width else -1 for width in widths)


def _live_rows(shape: tuple[int, ...], experts: int, live: int) -> tuple[int, ...]:
    """What `moeprune.models.adapter.keep_router_rows` makes of a router's tensor."""
    axis = 1 if shape == (1, experts) else 0
    return tuple(live if place == axis and size == experts else size for place, size in enumerate(shape))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _code(dtype: torch.dtype) -> str:
    return CODE_OF_DTYPE[str(dtype).removeprefix("torch.")]
