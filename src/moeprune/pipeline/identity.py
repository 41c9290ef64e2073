"""What a stage's result depends on, as plain values, and the key made of them."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import InputError


def describe(value: object) -> Any:
    """``value`` as JSON: plain values as they are, a dataclass as its type and fields, anything with an ``identity()``
    method as what that returns.

    A class from outside this package also counts with the text of its module, so that editing a plug-in makes new
    results. Raises InputError for a value whose content cannot be known.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    kind = type(value)
    if hasattr(value, "identity"):
        return {"type": kind.__qualname__, **_outside_source(kind), **value.identity()}
    if is_dataclass(value):
        settings = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"type": f"{kind.__module__}.{kind.__qualname__}", **_outside_source(kind), **settings}
    raise InputError(
        f"{kind.__module__}.{kind.__qualname__} cannot be part of a cache key: its settings are not visible.",
        change="Make the plug-in a frozen dataclass, or give it an identity() method that returns plain values.",
    )


def stage_key(stage: str, version: int, settings: object, inputs: Sequence[str]) -> str:
    """SHA-256 (32 hex digits) of a stage's name, version, settings and its inputs' keys."""
    content = {"stage": stage, "version": version, "settings": describe(settings), "inputs": list(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _outside_source(kind: type) -> dict[str, str]:
    """The digest of the module's text for a class from outside this package."""
    if kind.__module__.startswith("moeprune."):
        return {}
    try:
        text = inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError) as error:
        raise InputError(
            f"{kind.__module__}.{kind.__qualname__} cannot be part of a cache key: its source is not to be found.",
            change="Define the plug-in in a file that can be imported.",
        ) from error
    return {"source": hashlib.sha256(text.encode()).hexdigest()}
