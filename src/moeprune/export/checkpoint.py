"""A pruned checkpoint on disk, read tensor by tensor; `models.checkpoint_files` says what lies where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import InputError, ModelError
from moeprune.models.compressed.adapters import ADAPTERS
from moeprune.models.compressed.files import CONFIG, PREFIX
from moeprune.models.layers.stored import StoredTensor, stored_tensors
from moeprune.models.shape import weight_files

# Keys of config.json that say how a checkpoint is stored, not what the family's model is.
STORAGE_KEYS = ("pruned", "auto_map", "architectures", "quantization_config")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """``family`` is the model type before pruning, ``family_config`` its config.

    ``pruned`` is the structure of the experts by name of their module; ``tensors`` are read when they are asked for.
    """

    folder: Path
    family: str
    family_config: Mapping[str, Any]
    pruned: Mapping[str, Any]
    quantized: bool
    tensors: Mapping[str, StoredTensor]

    def slots(self, experts: str) -> tuple[int, ...]:
        """Which stored expert each router row leads to, -1 for none."""
        return tuple(self.pruned["slot_of_row"].get(experts, range(len(self.pruned["widths"][experts]))))

    def row_widths(self, experts: str) -> tuple[int, ...]:
        """Channels behind each router row; 0 for rows without an expert."""
        widths = self.pruned["widths"][experts]
        return tuple(widths[slot] if slot >= 0 else 0 for slot in self.slots(experts))

    def read(self, name: str) -> Tensor:
        """A tensor in memory. Raises ModelError where the checkpoint lacks it."""
        return self._stored(name).read()

    def outline(self, name: str) -> Tensor:
        """Its dtype and shape on the meta device. Raises ModelError where the checkpoint lacks it."""
        stored = self._stored(name)
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ModelError(f"The checkpoint in {self.folder} lacks the tensor {name}.\nCopy or write it again.")
        return self.tensors[name]


def open_checkpoint(folder: Path) -> PrunedCheckpoint:
    """Raises InputError when the folder holds no pruned checkpoint, ModelError when what it holds is damaged."""
    file = folder / CONFIG
    if not file.exists():
        raise InputError(
            f"{folder} is no checkpoint: it has no {CONFIG}.", change="Give checkpoint the folder of a pruned model."
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    if "pruned" not in config:
        raise InputError(
            f"{folder} holds a checkpoint that moeprune did not prune; stock engines read it as it is.",
            change="Give checkpoint the folder of a pruned model.",
        )
    if ADAPTERS in config:
        raise InputError(
            f"{folder} has adapters beside its weights, which other engines do not read.",
            change="Export a model whose adapters are merged: recovery.merge=true before quantisation, or without any.",
        )
    tensors: dict[str, StoredTensor] = {}
    for weights in weight_files(folder):
        tensors |= stored_tensors(weights)
    return PrunedCheckpoint(
        folder=folder,
        family=config["model_type"].removeprefix(PREFIX),
        family_config={key: value for key, value in config.items() if key not in (*STORAGE_KEYS, "model_type")},
        pruned=config["pruned"],
        quantized="quantization_config" in config,
        tensors=tensors,
    )
