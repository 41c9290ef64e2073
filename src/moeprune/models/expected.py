"""The facts of a config.json that fix all shapes of a model: what a checkpoint is expected to have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moeprune.errors import ModelError
from moeprune.models import families  # noqa: F401  (makes transformers know DeepSeekMoE version 1)
from moeprune.models.compressed.files import PREFIX
from moeprune.models.headers import read_json


def config_of(facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The family's config from these facts alone. Raises ModelError for an unknown ``model_type``."""
    try:
        return AutoConfig.for_model(**facts)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"No model can be built of model_type {facts.get('model_type')!r}: {error}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of the checkpoint in ``folder``; of one that also sees or hears, its text model's.

    Raises ModelError when it is missing, damaged, of an unknown family, or of a pruned model. Code that lies in the
    folder is never run.
    """
    family = str(read_json(folder / "config.json").get("model_type"))
    if family.startswith(PREFIX):
        raise ModelError(f"{folder} is pruned already ({family}).\nGive the folder of the dense model.")
    if family not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder} is of the family {family!r}, which transformers does not have.\n"
            "The code of a checkpoint is never run; use a family that docs/model.md lists."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"The config of {folder} cannot be read: {error}") from error


def require_expected(folder: Path, expected: Mapping[str, Any] | None) -> None:
    """Raise ModelError naming the first field in which the config in ``folder`` is not what was expected of it.

    A field that config.json does not give has the value that transformers takes for it. Where nothing is expected, the
    config must still be one that `read_config` reads.
    """
    config = read_config(folder)
    for name, value in (expected or {}).items():
        found = getattr(config, name, None)
        if found != value:
            raise ModelError(
                f"{folder} is not the checkpoint that was asked for: its config has {name} {found!r}, expected was "
                f"{value!r}.\nGive the path of that checkpoint, or use model=checkpoint for any other."
            )
