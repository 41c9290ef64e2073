"""From a checked config to plain objects."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from moeprune.app.check import asked_ratio
from moeprune.errors import InputError, MoepruneError
from moeprune.models.source import ModelSource
from moeprune.pipeline.experiment import Experiment
from moeprune.pipeline.target import ratio_for_quantized_bytes

# Plain types of settings -> types of values that may stand for them.
VALUES_OF: dict[Any, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (float, int), str: (str,), NoneType: (NoneType,),
}  # fmt: skip


def build_experiment(config: DictConfig) -> Experiment:
    """The experiment that the config describes. Raises InputError for a plug-in that cannot be built."""
    model, allocator, surgery = (_build(group, config[group]) for group in ("model", "allocator", "surgery"))
    quantizer = build_optional("quantizer", config.quantizer)
    return Experiment(
        model=model,
        calibration=_build("calibration", config.calibration),
        scorer=_build("scorer", config.scorer),
        allocator=allocator,
        ratio=_ratio(config, model, allocator, surgery, quantizer),
        evaluation=_build("evaluation", config.evaluation),
        surgery=surgery,
        recovery=build_optional("recovery", config.recovery),
        quantizer=quantizer,
        order=tuple(config.order),
        fewest_tokens=config.fewest_tokens,
    )


def _ratio(config: DictConfig, model: ModelSource, allocator: Any, surgery: Any, quantizer: Any) -> float:
    if config.target_bytes is None and config.target_active_parameters is None:
        return float(config.ratio)
    if getattr(allocator, "keeps_all_channels", False):
        raise InputError(
            "A target asks for a smaller model, but allocator=keep_all removes nothing.",
            change="Give a ratio, or choose another allocator.",
        )
    if config.target_bytes is not None and getattr(surgery, "adds_biases", False):
        raise InputError(
            "target_bytes does not count the biases that this surgery adds.",
            change="Give a ratio, or choose another surgery, such as surgery=refit.",
        )
    folder = model.folder()
    at_once = getattr(allocator, "channels_at_once", None)
    keeps_rows = getattr(surgery, "empty_experts", None) == "keep_row" and not getattr(allocator, "merges", False)
    if config.target_active_parameters is not None and at_once and not keeps_rows:
        raise InputError(
            "target_active_parameters cannot be met by removing or merging whole experts: a token still meets top-k of "
            "them.",
            change="Use a channel allocator such as allocator=coverage, surgery=keep_rows, or a target in bytes.",
        )
    channels_at_once = at_once(model.shape()) if at_once else model.alignment
    if config.target_bytes is not None and config.target_active_parameters is None and quantizer is not None:
        return ratio_for_quantized_bytes(config.target_bytes, model, quantizer, channels_at_once)
    return asked_ratio(config, folder, channels_at_once)


def build_optional(group: str, config: DictConfig) -> Any:
    """The plug-in of a group whose choice may be ``none``; None then."""
    return _build(group, config) if "_target_" in config else None


def _build(group: str, config: DictConfig) -> Any:
    try:
        plug_in = instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MoepruneError):
            raise cause from None
        if isinstance(cause, TypeError):  # perhaps from a plug-in that checks a setting of the wrong kind itself
            _require_plain_types(group, get_object(config["_target_"]), config)
        reason = " ".join(line for each in _causes(error) for line in str(each).splitlines()[:1])
        raise InputError(
            f"{group} cannot be built from _target_ {config.get('_target_')}: {reason}",
            change=f"Check the settings of {group}; an own plug-in must be importable (installed, or on PYTHONPATH).",
        ) from error
    _require_plain_types(group, plug_in, config)
    return plug_in


def _require_plain_types(group: str, plug_in: Any, config: DictConfig) -> None:
    """Raise InputError for a setting of the wrong kind; a word where true or false belongs would count as true."""
    for setting in fields(plug_in) if is_dataclass(plug_in) else ():
        if setting.name not in config:
            continue
        if isinstance(config[setting.name], DictConfig):
            _require_plain_types(f"{group}.{setting.name}", getattr(plug_in, setting.name, None), config[setting.name])
            continue
        kinds = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
        value = config[setting.name]
        if VALUES_OF.keys() >= set(kinds) and not any(type(value) in VALUES_OF[kind] for kind in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            change = "Use true or false." if bool in kinds else "Give a value of that type."
            raise InputError(f"{group}.{setting.name}={value} is no {expected}.", change=change)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What led to ``error``, without itself where something did."""
    cause = error.__cause__ or error.__context__
    if cause is None:
        yield error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
