"""Every error a user can meet: what was asked, what is possible, what to change."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


class MoepruneError(Exception):
    """A mistake or a condition that the user can act on; shown as one message without a traceback."""


class InputError(MoepruneError):
    """A value that was asked for does not exist or cannot work.

    ``asked`` says what was asked and why it fails; ``possible`` lists valid values (the nearest to ``given`` first);
    ``change`` says what to do.
    """

    def __init__(
        self, asked: str, *, possible: Iterable[object] = (), given: str | None = None, change: str | None = None
    ) -> None:
        choices = [str(choice) for choice in possible]
        near = get_close_matches(given, choices, n=3, cutoff=0.4) if given else []
        parts = [asked]
        if near:
            parts.append(f"Did you mean: {', '.join(near)}?")
        if choices:
            parts.append(f"Possible: {', '.join(choices)}.")
        if change:
            parts.append(change)
        super().__init__("\n".join(parts))


class BudgetError(MoepruneError):
    """The pruning budget cannot be met with these settings on this model."""


class ModelError(MoepruneError):
    """A checkpoint is missing, damaged, or of an architecture whose experts were not found."""


class CacheError(MoepruneError):
    """A cached stage is damaged, or the cache folder cannot be written."""


class NumericalError(MoepruneError):
    """A computation gave NaN or infinity where a finite number is required."""


class LostProcessError(MoepruneError):
    """A process that took part in a training has ended before its time."""


def require_positive(settings: object, *names: str) -> None:
    """Raise InputError for the first of these whole-number settings that is below 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise InputError(f"{name}={value} is not possible.", change="Use a whole number of at least 1.")


def require_choice(setting: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError with the nearest choices when ``value`` is none of them."""
    if value not in choices:
        raise InputError(f"{setting}={value} does not exist.", possible=choices, given=value)
