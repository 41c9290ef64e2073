"""What runs were asked to do, in what they differ, and the name each goes by in tables and plots."""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moeprune.errors import InputError
from moeprune.report.runs.results import CHOSEN_BY_METHOD, ORDER_SEPARATOR, SETTINGS, Run

BUNDLED = CHOSEN_BY_METHOD
NAMED_BY_LABEL = ("method", *BUNDLED)
NO_SURGERY = ("surgery", "none")
PRUNING = ("method", "scorer", "allocator")
SHOWN_APART = ("model", "ratio", "quantizer")


def setting_text(run: Run, key: str) -> str | None:
    """A setting or override as text, "none" where it is off; None where it says nothing of a run: as the training data
    of one that is not trained, or what an unfinished run did not choose."""
    if run.results is not None and key in SETTINGS:
        value = getattr(run.results, key)
        if value is None and key == "training_data":
            return None
        if key == "ratio":
            value = f"{value:.4g}"  # one that was found for a target in bytes has sixteen digits
        return "none" if value is None else _number_or_text(str(value))
    given = overrides_of(run)
    if key in given:
        if key == "order":
            return ORDER_SEPARATOR.join(stage.strip() for stage in given[key].strip("[]").split(","))
        return "none" if given[key] == "null" else _number_or_text(given[key])
    if key in run.asked:
        return _number_or_text(run.asked[key])
    return None if key in SETTINGS else "default"


def varying_keys(runs: Sequence[Run]) -> tuple[str, ...]:
    """The settings, then the other overrides, that do not have one value over all these runs."""
    given = dict.fromkeys(key for run in runs for key in overrides_of(run))
    keys = (*SETTINGS, *(key for key in given if key not in SETTINGS))
    return tuple(key for key in keys if len(setting_values(runs, key)) > 1)


def setting_values(runs: Sequence[Run], key: str) -> tuple[str, ...]:
    """The different values of a setting, in the order in which the runs have them."""
    values = (setting_text(run, key) for run in runs)
    return tuple(dict.fromkeys(value for value in values if value is not None))


def methods_bundle(runs: Sequence[Run]) -> bool:
    """Whether several methods were run, each with one scorer, allocator and surgery, so that its name says it all."""
    bundles = _bundles([run for run in runs if run.results])
    return len(bundles) > 1 and "none" not in bundles and all(len(found) == 1 for found in bundles.values())


def configured(run: Run, key: str) -> str | None:
    """A setting by its dotted name as text, given or not, from the config that the run wrote down; None where that is
    not known."""
    text = setting_text(run, key)
    if text not in (None, "default"):
        return text
    value: Any = _config(run.folder / "config.yaml")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else _number_or_text(str(value))


@cache
def _config(path: Path) -> dict[str, Any]:
    try:
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    except yaml.YAMLError as error:
        told = str(error).replace("\n", " ")
        raise InputError(f"{path} is damaged: {told}.", change="Run again, or remove the directory.") from error


def run_labels(runs: Sequence[Run], without: Collection[str] = ()) -> list[str]:
    """The name by which each run's method is known beside the others; model, ratio, quantizer are left out, and the
    keys of ``without``.

    That is the method, or "scorer + allocator" (and "+ surgery" where there is one) where no method is named or one
    method was run with several; other settings and overrides follow where they vary over the runs. Where one way of
    pruning was tried with several recoveries, these and the surgery are the name.
    """
    varying = varying_keys(runs)
    extra = [key for key in varying if key not in {*NAMED_BY_LABEL, *SHOWN_APART, *without}]
    compares_recoveries = "recovery" in varying and not set(varying) & set(PRUNING)
    names = [_surgery_name(run) for run in runs] if compares_recoveries else _method_names(runs)
    labels = []
    for run, name in zip(runs, names, strict=True):
        told = {key: setting_text(run, key) for key in extra}
        parts = [name, *(f"{key} {text}" for key, text in told.items() if text not in (None, "default"))]
        labels.append(", ".join(part for part in parts if part))
    return labels


def _surgery_name(run: Run) -> str:
    surgery = ("surgery", setting_text(run, "surgery"))
    return "" if surgery == NO_SURGERY else " ".join(map(str, surgery))


def _method_names(runs: Sequence[Run]) -> list[str]:
    bundles = _bundles(runs)
    names = []
    for run in runs:
        method, bundle = setting_text(run, "method"), _bundle(run)
        named = method is not None and method != "none"
        names.append((str(method) if len(bundles[method]) <= 1 else f"{method} ({bundle})") if named else bundle)
    return names


def overrides_of(run: Run) -> dict[str, str]:
    """What was given for the run beside the files of its config, by the names of the settings."""
    return dict(override.lstrip("+").split("=", 1) for override in run.overrides if "=" in override)


def _bundles(runs: Sequence[Run]) -> dict[str | None, set[str]]:
    """What each method was run with, as far as that is known."""
    bundles: dict[str | None, set[str]] = {}
    for run in runs:
        found = bundles.setdefault(setting_text(run, "method"), set())
        if None not in (setting_text(run, key) for key in BUNDLED):
            found.add(_bundle(run))
    return bundles


def _bundle(run: Run) -> str:
    values = [setting_text(run, key) for key in BUNDLED]
    return " + ".join(value for key, value in zip(BUNDLED, values, strict=True) if value and (key, value) != NO_SURGERY)


def _number_or_text(text: str) -> str:
    """One text for one number, however it was typed: 0.5 for 0.50, 1 for 1.0."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else str(number)
