"""The facts of a config.json that fix all shapes of a model: what a checkpoint is expected to have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from moeprune.errors import ModelError
from moeprune.models import families  # noqa: F401  (makes transformers know DeepSeekMoE version 1)


def config_of(facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The family's config from these facts alone. Raises ModelError for an unknown ``model_type``."""
    try:
        return AutoConfig.for_model(**facts)
    except (ValueError, TypeError) as error:
        raise ModelError(f"No model can be built of model_type {facts.get('model_type')!r}: {error}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of the checkpoint in ``folder``; of one that also sees or hears, its text model's.

    Raises ModelError when it is missing or damaged, or of an unknown family.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"The config of {folder} cannot be read: {error}") from error


def require_expected(folder: Path, expected: Mapping[str, Any] | None) -> None:
    """Raise ModelError naming the first field in which the config in ``folder`` is not what was expected of it.

    A field that config.json does not give has the value that transformers takes for it.
    """
    if expected is None:
        return
    config = read_config(folder)
    for name, value in expected.items():
        found = getattr(config, name, None)
        if found != value:
            raise ModelError(
                f"{folder} is not the checkpoint that was asked for: its config has {name} {found!r}, expected was "
                f"{value!r}.\nGive the path of that checkpoint, or use model=checkpoint for any other."
            )
