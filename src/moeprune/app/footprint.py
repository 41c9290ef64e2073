"""The command ``moeprune-footprint``: what models would take, from their configs, before anything is downloaded."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from moeprune.allocation.budget import Budget
from moeprune.app.check import ModelConfig, check_precisions
from moeprune.errors import InputError
from moeprune.models.shape import local_folder
from moeprune.report.published.storage import KINDS_TEXT
from moeprune.report.tables.footprint import GIBIBYTE, GPUS, FootprintRow, require_possible_file, write_footprint

if TYPE_CHECKING:
    from moeprune.models.source import ModelSource

USAGE = """\
moeprune-footprint - predicted sizes of pruned and quantised models, without their weights

One model:  moeprune-footprint model=qwen3_30b_a3b ratio=0.25 quantizer=nf4
A table:    moeprune-footprint model=qwen3_30b_a3b,mixtral_8x7b ratio=0,0.25,0.5 quantizer=none,int8,nf4
To a file:  ... file=footprint.md (or .csv, .json)
Settings:   context, batch (for the KV cache), margin_gib; those of conf/footprint.yaml"""

# The captions say them once for all rows.
ONE_PER_TABLE = ("context", "batch", "margin_gib", "file")

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass
class FootprintConfig:
    """Mirrors conf/footprint.yaml."""

    model: ModelConfig
    quantizer: dict[str, Any]
    ratio: float
    context: int
    batch: int
    margin_gib: float
    file: str | None


def run_footprint(words: Sequence[str], config_folder: Path) -> None:
    """Print the table for every combination of the values in ``words``. Raises what the user can mend."""
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        configs = [_checked(compose("footprint", overrides=point)) for point in _points(words)]
    first = configs[0]
    file = Path(first.file) if first.file else None
    require_possible_file(file)
    # Everything heavy is imported only now.
    from moeprune.app.terminal import quiet_libraries, terminal

    quiet_libraries()
    write_footprint(list(_rows(configs)), _captions(first), terminal(), file)


def _points(words: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of each combination; what stands last on the command line changes fastest."""
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise InputError(f"{flags[0]} is no option here.", change="Several values need no --multirun: ratio=0,0.5")
    choices = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(list(words)), strict=True):
        key = word.split("=", 1)[0]
        values = _values(word, override)
        if values and key in ONE_PER_TABLE:
            raise InputError(f"One table has one {key}, not {', '.join(values)}.", change="Give one value.")
        choices.append([f"{key}={value}" for value in values] or [word])
    yield from (list(point) for point in itertools.product(*choices))


def _values(word: str, override: Override) -> list[str]:
    """Of several; none where there is one. Raises InputError where they cannot be counted."""
    if not override.is_sweep_override():
        return []
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP or not override.is_discrete_sweep():
        raise InputError(f"{word} does not name its values.", change="Write them with commas between: ratio=0,0.5")
    return list(override.sweep_string_iterator())


def _checked(config: DictConfig) -> DictConfig:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(FootprintConfig), config)
    except ConfigKeyError as error:
        raise InputError(f"{error.full_key or error.key} is not a setting.", change=USAGE) from error
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{error.full_key}: {reason}", change="Give a value of that type.") from error
    assert isinstance(merged, DictConfig)
    for name in ("context", "batch"):
        if merged[name] < 1:
            raise InputError(f"{name}={merged[name]} is not possible.", change="Use a whole number of at least 1.")
    if not 0 <= merged.margin_gib < math.inf:
        raise InputError(f"margin_gib={merged.margin_gib} is not possible.", change="Use a number of at least 0.")
    check_precisions(merged.model)
    if merged.model.expected is None and local_folder(merged.model.path) is None:
        raise InputError(
            f"The shapes of {merged.model.path} are not known before it is downloaded.",
            change="Use a model of docs/model.md, or give model.path a folder that holds at least its config.json.",
        )
    return merged


def _rows(configs: Sequence[DictConfig]) -> Iterator[FootprintRow]:
    from moeprune.app.build import build_optional

    models: dict[str, Unpruned] = {}
    for config in configs:
        key = str(config.model)
        if key not in models:
            models[key] = Unpruned(build_optional("model", config.model))
        deployed = Deployed(config.context, config.batch, config.margin_gib)
        yield predicted_row(models[key], config.ratio, build_optional("quantizer", config.quantizer), deployed)


@dataclass(frozen=True)
class Deployed:
    """How a model is to be run: sequences of so many tokens, so many at once, and what a GPU needs besides."""

    context: int
    batch: int
    margin_gib: float


class Unpruned:
    """A model that may not be here, without memory for its weights, and what every row says of it.

    Its shapes are those that its source expects, or those in the folder of the checkpoint.
    """

    def __init__(self, source: "ModelSource") -> None:
        from moeprune.models.expected import config_of, read_config
        from moeprune.models.footprint.prediction import empty_model, even_widths, predict, shape_of
        from moeprune.models.routing import send_to_experts
        from moeprune.models.shape import sent_to_experts

        facts = config_of(source.expected) if source.expected else read_config(source.folder())
        self.source = source
        self.model = empty_model(facts, source.computation_dtype)
        self.shape = sent_to_experts(shape_of(self.model), source.experts_per_token, facts.model_type)
        send_to_experts(self.model, source.experts_per_token)
        whole = even_widths(self.shape, self.shape.layers * self.shape.experts * self.shape.width, 1, self.shape.width)
        predicted = predict(self.model, whole, source.computation_dtype)
        self.parameters = predicted.parameters.total
        self.held_bytes = predicted.bytes.in_memory
        self.largest_layer = predicted.largest_layer


def predicted_row(dense: Unpruned, ratio: float, quantizer: Any, deployed: Deployed) -> FootprintRow:
    """What the model takes with ``ratio`` of its routed channels removed, experts of even widths, then quantised."""
    from moeprune.models.footprint.kv_cache import cache_size
    from moeprune.models.footprint.prediction import even_widths, predict

    source = dense.source
    limits = {"alignment": source.alignment, "minimum_width": source.minimum_width}
    budget = Budget.for_model(dense.shape, ratio=ratio, **limits)
    widths_LE = even_widths(dense.shape, budget.kept_channels, **limits)
    predicted = predict(dense.model, widths_LE, source.storage_dtype, quantizer)
    cache = cache_size(dense.model.config, deployed.context, source.computation_dtype.itemsize)
    held = predicted.bytes.in_memory + deployed.batch * cache.at_context
    return FootprintRow(
        model=source.name,
        ratio=ratio,
        removed_ratio=1 - budget.kept_channels / budget.total_channels,
        precision=quantizer.label if quantizer else SHORT_NAMES[source.dtype],
        bits=quantizer.bits if quantizer else 8 * source.storage_dtype.itemsize,
        total_parameters=predicted.parameters.total,
        routed_parameters=predicted.parameters.routed,
        active_parameters=predicted.parameters.active,
        dense_parameters=dense.parameters,
        dense_bytes=dense.parameters * source.storage_dtype.itemsize,
        ideal_bytes=predicted.bytes.ideal,
        stored_bytes=predicted.bytes.with_overhead,
        file_bytes=predicted.bytes.on_disk,
        held_bytes=predicted.bytes.in_memory,
        largest_layer_bytes=dense.largest_layer,
        cache_per_token=cache.per_token,
        cache_bytes=deployed.batch * cache.at_context,
        needed_bytes=held + int(deployed.margin_gib * GIBIBYTE),
    )


def _captions(config: DictConfig) -> dict[str, str]:
    gpus = ", ".join(f"{name} {mebibytes / 1024:.1f} GiB" for name, mebibytes in GPUS.items())
    return {
        "parameters": "Removed: of all parameters. Active: for one token.",
        "size": "Ideal: every weight at its nominal bits. Stored: every tensor, scales and code books included. (x): "
        "times smaller than the unpruned model in its storage precision. Published: arXiv 2606.18304, in the unit that "
        f"its numbers are in; {KINDS_TEXT} (docs/footprint.md).",
        "memory": "In memory: the weights as loaded to run, those not quantised in the precision of computation. "
        "Largest layer: of the unpruned model, what streaming holds at once. KV cache: "
        f"{config.batch} x {config.context} tokens. Needed: in memory + KV cache + {config.margin_gib:g} GiB. "
        f"GPUs hold: {gpus}.",
    }
