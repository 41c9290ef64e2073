"""What runs were asked to do, in what they differ, and the name each goes by in tables and plots."""

from collections.abc import Sequence

from moeprune.report.results import SETTINGS, Run

NAMED_BY_LABEL = ("method", "scorer", "allocator")
SHOWN_APART = ("model", "ratio", "quantizer")


def setting_text(run: Run, key: str) -> str | None:
    """A setting or override as text, "none" where it is off; None where an unfinished run does not say."""
    if run.results is not None and key in SETTINGS:
        value = getattr(run.results, key)
        return "none" if value is None else _number_or_text(str(value))
    given = _overrides(run)
    if key in given:
        return "none" if given[key] == "null" else _number_or_text(given[key])
    return None if key in SETTINGS else "default"


def varying_keys(runs: Sequence[Run]) -> tuple[str, ...]:
    """The settings, then the other overrides, that do not have one value over all these runs."""
    given = dict.fromkeys(key for run in runs for key in _overrides(run))
    keys = (*SETTINGS, *(key for key in given if key not in SETTINGS))
    return tuple(key for key in keys if len(setting_values(runs, key)) > 1)


def setting_values(runs: Sequence[Run], key: str) -> tuple[str, ...]:
    """The different values of a setting, in the order in which the runs have them."""
    values = (setting_text(run, key) for run in runs)
    return tuple(dict.fromkeys(value for value in values if value is not None))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The name by which each run's method is known beside the others; model, ratio, quantizer are left out.

    That is the method, or "scorer + allocator" where no method is named or one method was run with several; other
    settings and overrides follow where they vary over the runs.
    """
    extra = [key for key in varying_keys(runs) if key not in NAMED_BY_LABEL + SHOWN_APART]
    pairs: dict[str | None, set[str]] = {}
    for run in runs:
        pairs.setdefault(setting_text(run, "method"), set()).add(_scorer_and_allocator(run))
    labels = []
    for run in runs:
        method = setting_text(run, "method")
        pair = _scorer_and_allocator(run)
        label = pair if method in (None, "none") else method if len(pairs[method]) == 1 else f"{method} ({pair})"
        labels.append(", ".join([str(label), *(f"{key} {setting_text(run, key)}" for key in extra)]))
    return labels


def _overrides(run: Run) -> dict[str, str]:
    return dict(override.lstrip("+").split("=", 1) for override in run.overrides if "=" in override)


def _scorer_and_allocator(run: Run) -> str:
    return f"{setting_text(run, 'scorer')} + {setting_text(run, 'allocator')}"


def _number_or_text(text: str) -> str:
    """One text for one number, however it was typed: 0.5 for 0.50, 1 for 1.0."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else str(number)
