"""Format strings with a record's fields in braces, filled from records."""

import string
from collections.abc import Mapping, Sequence

from moeprune.calibration.records import Record
from moeprune.errors import InputError


def template_fields(template: str) -> set[str]:
    """The fields in braces. Raises InputError for what is no format string of plain names."""
    change = "Write a record's field in braces, {output}, and a brace itself as {{ or }}."
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError) as error:
        raise InputError(f"The template {template!r} is not possible: {error}.", change=change) from None
    if not all(name and name.isidentifier() and not spec and not conversion for _, name, spec, conversion in parts):
        raise InputError(f"The template {template!r} has fields that are more or less than a name.", change=change)
    return {str(name) for _, name, _, _ in parts}


def is_filled(value: object) -> bool:
    """Whether there is something to read; NaN is how tables without a value there come out as JSON."""
    return value is not None and value == value and bool(str(value).strip())


def first_filled(templates: Sequence[str], record: Record) -> str | None:
    """The first of the templates whose fields all have something in them, or None.

    Raises InputError when the record does not have a template's fields at all.
    """
    filled = {name for name, value in record.items() if is_filled(value)}
    chosen = next((each for each in templates if template_fields(each) <= filled), None)
    if chosen is None:
        require_fields(set().union(*map(template_fields, templates)), record)
    return chosen


def require_fields(fields: set[str], record: Record) -> None:
    """Raise InputError, with the fields that are there, when the record lacks one of ``fields``."""
    missing = sorted(fields - set(record))
    if missing:
        raise InputError(
            f"A record has no field {', '.join(missing)}.",
            possible=record,
            given=missing[0],
            change="Name the fields of your data in the template.",
        )


def require_text(fields: set[str], record: Record) -> None:
    """Raise InputError for lists and objects, which would be written in Python's notation."""
    for name in sorted(fields):
        value = record[name]
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            raise InputError(
                f"The field {name} of a record is a {type(value).__name__}, not text: {str(value)[:60]}.",
                change="Give text in a field of its own; for a list of messages use training_data=chat_file.",
            )
