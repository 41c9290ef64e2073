"""A launcher's settings, checked before anything is submitted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from moeprune.errors import InputError


@dataclass(frozen=True)
class Kind:
    """The Python types that a setting may have, and what it is to a user."""

    types: tuple[type, ...]
    words: str


KINDS = {
    "int": Kind((int,), "a whole number"),
    "int | None": Kind((int, type(None)), "a whole number or null"),
    "float | None": Kind((int, float, type(None)), "a number or null"),
    "str": Kind((str,), "a word"),
    "str | None": Kind((str, type(None)), "a word or null"),
    "bool": Kind((bool,), "true or false"),
    "list[str]": Kind((list,), "a list of words, such as ['module load cuda']"),
    "dict[str, Any]": Kind((dict,), "a mapping, such as {mail-type: END}"),
}

Settings = TypeVar("Settings")


def settings_of(made: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The dataclass ``made`` of these values. Raises InputError for one that is unknown or of a wrong type."""
    known = {field.name: KINDS[str(field.type)] for field in fields(made)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"hydra.launcher.{name} is not a setting of this launcher.", possible=known, given=name)
        kind = known[name]
        is_wrong = type(value) not in kind.types
        if isinstance(value, list):
            is_wrong = is_wrong or not all(isinstance(entry, str) for entry in value)
        if is_wrong:
            raise InputError(f"hydra.launcher.{name}={value} is not possible.", change=f"Give {kind.words}.")
    return made(**values)


def require_at_least(settings: object, least: int, *names: str) -> None:
    """Raise InputError for the first of these settings that is below ``least``; null is none."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise InputError(
                f"hydra.launcher.{name}={value} is not possible.", change=f"Use a whole number of at least {least}."
            )
