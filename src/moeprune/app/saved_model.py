"""Puts a run's final model into a folder of the user's own, with its card and the dense model's licence."""

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from moeprune.errors import InputError
from moeprune.models.shape import local_folder
from moeprune.pipeline.cache import RECORD
from moeprune.pipeline.run import RECOVERY_FILES
from moeprune.report.model_card import Origin, model_card
from moeprune.report.runs.results import Metrics

CARD = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


def check_destination(destination: Path) -> None:
    """Raise InputError where a model cannot be saved; worth asking before anything is computed."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"save_model={destination} is there already.", change="Give a new folder, or remove that one.")
    existing = next(parent for parent in destination.absolute().parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"save_model={destination} cannot be written.", change="Give a folder of your own.")


def save_model(checkpoint: Path, destination: Path, metrics: Metrics, settings: Mapping[str, Any], dense: Path) -> None:
    """Copy a stage's ``checkpoint`` to ``destination``, with a card, and licence files from the folder ``dense``.

    Weights are hard links where the file system allows it, so that they take no space twice. ``settings`` is the run's
    resolved config. The folder appears when it is complete. Raises InputError as `check_destination` does.
    """
    check_destination(destination)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for file in sorted(checkpoint.rglob("*")):  # adapters lie in folders of their own
            if file.is_file() and file.name not in (RECORD, *RECOVERY_FILES):
                target = partial / file.relative_to(checkpoint)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(file, target)
        for pattern in LICENCE_FILES:
            for file in dense.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        card = model_card(metrics, settings, origin(settings["model"], dense), version("moeprune"))
        (partial / CARD).write_text(card, encoding="utf-8")
        partial.replace(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def origin(model: Mapping[str, Any], dense: Path) -> Origin:
    """Where the dense model came from, by the settings of the model and the card in its folder, if there is one."""
    hub_name = model["path"] if local_folder(model["path"]) is None else None
    return Origin(hub_name, model.get("revision") if hub_name else None, _licence(dense / CARD))


def _licence(card: Path) -> str | None:
    """What the card's YAML says; a card without any, or damaged, says nothing."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return None
    try:
        said = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---"))
    except yaml.YAMLError:
        return None
    licence = said.get("license") if isinstance(said, dict) else None
    return licence if isinstance(licence, str) else None


def _link_or_copy(file: Path, target: Path) -> None:
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    shutil.copyfile(file, target)
