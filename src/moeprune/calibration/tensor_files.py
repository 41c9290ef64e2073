"""Frozen dataclasses of tensors as safetensors files, one tensor per field."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file

Tensors = TypeVar("Tensors")


def save_fields(values: Any, path: Path) -> None:
    """Write every field of a dataclass of tensors under its own name."""
    save_file({field.name: getattr(values, field.name).contiguous() for field in fields(values)}, path)


def load_fields(kind: type[Tensors], path: Path) -> Tensors:
    """What `save_fields` wrote of a ``kind``. Raises safetensors' error when a field is not there."""
    with safe_open(path, framework="pt") as stored:
        return kind(**{field.name: stored.get_tensor(field.name) for field in fields(kind)})  # type: ignore[arg-type]
