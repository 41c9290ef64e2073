"""What the files of a checkpoint say of themselves: JSON objects and safetensors headers; needs no torch."""

import json
import struct
from pathlib import Path

from moeprune.errors import ModelError


def read_header(file: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file.

    Raises ModelError when the file is truncated or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes were expected, {file.stat().st_size} are there")
    except (ValueError, struct.error, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}.\nCopy or download it again.") from error
    return header


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ModelError when it is missing or damaged."""
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise ModelError(f"{file.parent} is no checkpoint: it has no {file.name}.") from None
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return values
