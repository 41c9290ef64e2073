"""Checks a composed config before anything heavy is imported: known keys, types, and what cannot work on the model."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationToMissingValueError, MissingMandatoryValue, ValidationError

from moeprune.allocation.budget import Budget
from moeprune.allocation.targets import ratio_for_active_parameters, ratio_for_bytes
from moeprune.errors import InputError
from moeprune.models.shape import ExpertShape, local_folder, read_shape, read_sizes
from moeprune.pipeline.until import GROUP_OF, check_until

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """Mirrors `moeprune.models.source.ModelSource`, which is too heavy to import here."""

    _target_: str
    name: str
    path: str
    dtype: str
    compute_dtype: str
    alignment: int
    minimum_width: int
    device: str = "auto"
    revision: str | None = None
    streaming: str = "auto"
    activations_gib: float = 4.0
    expected: dict[str, Any] | None = None
    experts_per_token: int | None = None


@dataclass
class ExperimentConfig:
    """The top level; plug-ins bring their own settings, checked when they are built."""

    model: ModelConfig
    calibration: dict[str, Any]
    scorer: dict[str, Any]
    allocator: dict[str, Any]
    ratio: float
    target_bytes: int | None
    target_active_parameters: int | None
    seed: int
    cache_dir: str
    save_model: str | None
    evaluation: dict[str, Any]
    surgery: dict[str, Any]
    fewest_tokens: int
    order: list[str]
    until: str | None
    objective: str
    training_data: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    quantizer: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    method: Any = None
    experiment: Any = None


def checked(config: DictConfig) -> DictConfig:
    """The resolved config. Raises InputError, BudgetError or ModelError for what cannot work."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), config)
        OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        # Where another value refers to the missing one, only the message names it.
        key = error.full_key if isinstance(error, MissingMandatoryValue) else str(error).splitlines()[0].split()[-1]
        raise InputError(f"A value is missing: {key}.", change=f"Give it on the command line: {key}=VALUE.") from error
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = list(ExperimentConfig.__dataclass_fields__)
        near = get_close_matches(key.split(".")[-1], [*known, *ModelConfig.__dataclass_fields__], n=1)
        raise InputError(f"{key} is not a setting.", possible=near or known) from error
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{error.full_key}: {reason}", change=f"Give {error.full_key} a value of that type."
        ) from error
    assert isinstance(merged, DictConfig)
    if merged.until is not None:
        check_until(merged.until, [group for group in GROUP_OF.values() if "_target_" in merged[group]])
    _check_model(merged)
    return merged


def check_precisions(model: DictConfig) -> None:
    """Raise InputError for a ``dtype`` or ``compute_dtype`` that weights cannot have."""
    for key in ("dtype", "compute_dtype"):
        if model[key] not in DTYPES:
            raise InputError(f"model.{key}={model[key]} is not possible.", possible=DTYPES, given=model[key])


def _check_model(config: DictConfig) -> None:
    model = config.model
    check_precisions(model)
    if not 0 <= config.ratio < 1:
        raise InputError(
            f"ratio={config.ratio} is not possible: it is the fraction of routed-expert channels to remove.",
            change="Use a number from 0 up to, but not including, 1, for example ratio=0.5.",
        )
    folder = local_folder(model.path)
    # How many bytes a quantised model takes is known only where its quantizer is.
    by_quantizer = config.target_bytes is not None and "_target_" in config.quantizer
    if folder is not None and not by_quantizer:
        limits = {"alignment": model.alignment, "minimum_width": model.minimum_width}
        Budget.for_model(_shape(config, folder), ratio=asked_ratio(config, folder, model.alignment), **limits)


def asked_ratio(config: DictConfig, folder: Path, channels_at_once: int) -> float:
    """``ratio``, or what meets the target in bytes or active parameters on the checkpoint in ``folder``.

    Raises InputError for two targets at once, BudgetError for one that cannot be met.
    """
    target_bytes, target_active = config.target_bytes, config.target_active_parameters
    if target_bytes is not None and target_active is not None:
        raise InputError(
            "target_bytes and target_active_parameters were both given.", change="Give one of them, or a ratio."
        )
    limits = {"minimum_width": config.model.minimum_width, "channels_at_once": channels_at_once}
    if target_bytes is not None:
        per_parameter = {"float32": 4}.get(config.model.dtype, 2)
        return ratio_for_bytes(
            target_bytes, read_sizes(folder), _shape(config, folder), bytes_per_parameter=per_parameter, **limits
        )
    if target_active is not None:
        return ratio_for_active_parameters(target_active, read_sizes(folder), _shape(config, folder), **limits)
    return float(config.ratio)


def _shape(config: DictConfig, folder: Path) -> ExpertShape:
    return read_shape(folder, config.model.experts_per_token)
