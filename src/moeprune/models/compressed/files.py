"""What lies in the folder of a compressed checkpoint, and how single files of it are written.

config.json                    the family's own config, and under ``pruned`` how the experts differ from the family's
model.safetensors.index.json   which file holds which tensor
model-layer-00000.safetensors  one per decoder layer; its metadata describe the layer's experts
model-rest.safetensors         embeddings, final norm, head
modeling_pruned_FAMILY.py      the model's code, and the files that it imports
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.models.adapter import decoder_layers
from moeprune.models.compressed.grouping import Settings, grouped_in
from moeprune.models.runtime.ragged import RaggedExperts

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REST = "model-rest.safetensors"
PREFIX = "pruned_"
_LAYER, _STRUCTURE = "decoder_layer", "pruned"
# Where transformers says which weights of a family stay in float32 in models of half precision.
_KEPT = {
    torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    torch.float16: ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"),
}


@dataclass(frozen=True)
class Structure:
    """How the experts of a model, or of one of its decoder layers, differ from the family's, by module name.

    ``widths`` of the stored experts; ``slot_of_row`` of those where router row i does not lead to expert i; ``biased``,
    those whose router rows have a bias; ``expert_biases``, those whose experts' linear layers have biases;
    ``gates_inputs``, those whose gates scale what goes into an expert. ``grouped``: how linear layers and the embedding
    are kept in few bits, by name of a module at or above them; see `moeprune.models.compressed.grouping`.
    """

    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slot_of_row: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    expert_biases: tuple[str, ...] = ()
    gates_inputs: tuple[str, ...] = ()
    grouped: Mapping[str, Settings] = field(default_factory=dict)


def structure_of(module: nn.Module, prefix: str = "") -> Structure:
    """The structure of a model in memory, or of the part of one whose names begin with ``prefix``."""
    parts = {prefix + name: part for name, part in module.named_modules()}
    ragged = {name: part for name, part in parts.items() if isinstance(part, RaggedExperts)}
    layers = [name for name, _ in decoder_layers(module)] or [prefix.removesuffix(".")]
    return Structure(
        widths={name: experts.widths for name, experts in ragged.items()},
        slot_of_row={name: experts.slot_of_row for name, experts in ragged.items() if not experts.rows_are_slots},
        biased=tuple(name for name, experts in ragged.items() if experts.bias_EH is not None),
        expert_biases=tuple(name for name, experts in ragged.items() if experts.has_biases),
        gates_inputs=tuple(name for name, experts in ragged.items() if experts.gates_inputs),
        grouped=grouped_in(parts, layers),
    )


def layer_file(depth: int) -> str:
    """The name of a decoder layer's file."""
    return f"model-layer-{depth:05}.safetensors"


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under another name, then rename it: under its own it is always complete."""
    partial = file.with_name(f".{file.name}.partial")
    save_file(dict(tensors), partial, {"format": "pt", **metadata})
    partial.chmod(file.parent.stat().st_mode & 0o666)  # the library writes files that nobody else can read
    partial.replace(file)


def save_text(file: Path, text: str) -> None:
    """Write a text file as `save_tensors` does."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def layer_metadata(name: str, structure: Structure) -> dict[str, str]:
    """What a decoder layer's file says of it."""
    return {_LAYER: name, _STRUCTURE: json.dumps(asdict(structure))}


def read_layer_metadata(file: Path) -> tuple[str, dict[str, Any]]:
    """The decoder layer's name and structure, from its file."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    return metadata[_LAYER], json.loads(metadata[_STRUCTURE])


def merged(structures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The structure of a model from those of its decoder layers, as plain values."""
    whole: dict[str, Any] = {name: {} if isinstance(empty, dict) else [] for name, empty in asdict(Structure()).items()}
    for structure in structures:
        for name, value in structure.items():
            whole[name] = whole[name] | value if isinstance(value, dict) else whole[name] + list(value)
    return whole


def never_rounded(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names of the weights that the module's family keeps in float32 in models of ``dtype``.

    transformers knows them by model, more of them in float16, whose range is small; a decoder layer alone finds its
    model's class beside its own.
    """
    beside = vars(sys.modules[type(module).__module__]).values()
    models = [kind for kind in beside if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    return {name for model in models for kept in _KEPT.get(dtype, ()) for name in getattr(model, kept, None) or ()}


def stored_precision(name: str, dtype: torch.dtype, kept: Iterable[str]) -> torch.dtype:
    """The precision of a parameter in a model of ``dtype``; names with a part in ``kept`` are never rounded."""
    return torch.float32 if any(part in name for part in kept) else dtype
