"""What of a checkpoint is kept in how many bits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from moeprune.models.compressed.files import CONFIG
from moeprune.models.compressed.quantized import module_of, quantized_modules
from moeprune.models.footprint.measured import adapter_files, stored_bytes
from moeprune.models.footprint.tensors import BYTES_OF, CODES
from moeprune.models.headers import read_header, read_json
from moeprune.models.layers.dense_checkpoint import Renaming
from moeprune.models.parts import OTHER, PARTS, ROUTED, part_of_modules
from moeprune.models.runtime.structure import nearest
from moeprune.models.shape import weight_files

NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class PrecisionRow:
    """What of one part of a model (`moeprune.models.parts`) is kept in one format.

    ``bits`` of a weight, and with the scales, zeros and code books of the format; ``matrices``, how many (an expert has
    three); ``parameters``, those that the matrices and vectors stand for; ``bytes`` as they are stored.
    """

    part: str
    format: str
    bits: int
    bits_with_overhead: float
    matrices: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class _Tensor:
    """What one stored tensor adds to a row."""

    part: str
    format: str
    bits: int
    matrices: int
    parameters: int
    bytes: int


def precision_table(folder: Path, model: PreTrainedModel) -> list[PrecisionRow]:
    """What is in how many bits in the checkpoint in ``folder``, dense or compressed; parts in their usual order.

    ``model`` is its model, perhaps without weights. All bytes of all tensors are in it, adapters' too: they sum to
    `Bytes.with_overhead`. Norms, convolutions and what is not loaded with the language model count as "other".
    """
    sums: dict[tuple[str, str, int], list[int]] = {}
    for tensor in [*_tensors(folder, model), *_tensors_of_adapters(folder, model)]:
        row = sums.setdefault((tensor.part, tensor.format, tensor.bits), [0, 0, 0])
        for place, value in enumerate((tensor.matrices, tensor.parameters, tensor.bytes)):
            row[place] += value
    rows = [
        PrecisionRow(part, name, bits, 8 * size / count if count else float(bits), matrices, count, size)
        for (part, name, bits), (matrices, count, size) in sums.items()
    ]
    return sorted(rows, key=lambda row: (PARTS.index(row.part), -row.bytes, row.format))


def _tensors(folder: Path, model: PreTrainedModel) -> Iterator[_Tensor]:
    entries = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
    renamed = None if "pruned" in read_json(folder / CONFIG) else Renaming(model, model.state_dict())
    part_of = _part_finder(model)
    formats = _formats(entries, model)
    for name, entry in entries.items():
        module = module_of(name, formats)
        if module is None or name.endswith(".bias"):
            yield _plain(part_of(renamed(name)[0] if renamed else name), name, entry)
            continue
        matrix: Any = model.get_submodule(module)
        if hasattr(matrix, "num_embeddings"):
            count = matrix.num_embeddings * matrix.embedding_dim
        else:
            count = matrix.out_features * matrix.in_features
        held = name.removeprefix(f"{module}.") in CODES
        yield _Tensor(part_of(name), *formats[module], int(held), held * count, stored_bytes(entry))


def _tensors_of_adapters(folder: Path, model: PreTrainedModel) -> Iterator[_Tensor]:
    part_of = _part_finder(model)
    for file in adapter_files(folder):
        for name, entry in read_header(file).items():
            yield _plain(part_of(name.removeprefix("base_model.model.")), name, entry, of=" adapter")


def _plain(part: str, name: str, entry: Mapping[str, Any], of: str = "") -> _Tensor:
    """A tensor that is not quantised; a fused one holds a matrix for each expert."""
    kind, shape = entry["dtype"], entry["shape"]
    is_matrix = len(shape) > 1 and "bias" not in name.rpartition(".")[2]
    matrices = shape[0] if is_matrix and len(shape) == 3 and part == ROUTED else int(is_matrix)
    bits = 8 * BYTES_OF.get(kind, 1)
    return _Tensor(part, NAMES.get(kind, kind.lower()) + of, bits, matrices, prod(shape), stored_bytes(entry))


def _formats(names: Mapping[str, Any], model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """{module: (format, bits)} of the quantised ones."""
    formats = {}
    for module, scheme in quantized_modules(names).items():
        four_bit = "nf4 double" if f"{module}.weight.nested_absmax" in names else "nf4"
        formats[module] = (four_bit, 4) if scheme.kind is Linear4bit else ("int8", 8)
    for module in (name.removesuffix(".codes") for name in names if name.endswith(".codes")):
        matrix: Any = model.get_submodule(module)
        matrix = getattr(matrix, "base_layer", matrix)  # within what PEFT wraps around it
        formats[module] = (f"{matrix.rounding} {matrix.bits} bits", matrix.bits)
    return formats


def _part_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """What part a tensor belongs to, by its name in the model."""
    parts = part_of_modules(model)
    return lambda name: parts.get(nearest(name, parts) or "", OTHER)
