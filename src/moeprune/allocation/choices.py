"""Named settings of allocators."""

from collections.abc import Collection

from moeprune.errors import InputError


def require_choice(setting: str, value: str, possible: Collection[str]) -> None:
    """Raise InputError with the nearest possible values when ``value`` is none of them."""
    if value not in possible:
        raise InputError(f"{setting}={value} does not exist.", possible=possible, given=value)
