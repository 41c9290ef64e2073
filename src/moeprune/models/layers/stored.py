"""Tensors in safetensors files, read piece by piece.

Files are read, not mapped into memory: mapped pages would count as memory of the process until they are dropped.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import ModelError
from moeprune.models.headers import read_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; ``start`` counts bytes from the begin of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The tensor in CPU memory. Raises ModelError where the file has become shorter than its header says."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self._fill(values)
        return values

    def read_into(self, place: Tensor) -> None:
        """Put the tensor into ``place``, of the same shape, perhaps of another precision or on another device."""
        if place.dtype == self.dtype and place.device.type == "cpu" and place.is_contiguous():
            self._fill(place)
        else:
            place.copy_(self.read())

    def _fill(self, place: Tensor) -> None:
        # One call may give less than is asked for: at most 2 GiB on Linux.
        left = memoryview(place.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            while len(left):
                count = stream.readinto(left)
                if not count:
                    raise ModelError(f"{self.file} ends before its last tensor.\nCopy or download it again.")
                left = left[count:]

    def __getitem__(self, index: Any) -> Tensor:
        """What transformers calls to read a tensor: ``tensor[...]``."""
        return self.read()[index]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; only the header is read.

    Raises ModelError when the file is truncated, no safetensors file, or holds numbers of an unknown type.
    """
    header = read_header(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise ModelError(f"{file} holds numbers of type {unknown[0]}; read are {', '.join(DTYPES)}.")
    return {
        name: StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
