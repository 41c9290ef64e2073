"""The model card of a compressed model: how it was made, how to load it, and what it measures beside the dense one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from moeprune.report.runs.results import Metrics
from moeprune.report.runs.variants import Variant
from moeprune.report.tables.formats import MEGABYTE, MISSING, accuracy_text, byte_unit, parameter_text, perplexity_text
from moeprune.report.tables.run_tables import BYTE_KINDS, BYTES_MEANING, RATIO_MEANING, names_in, recovery_facts

GROUPS = ("calibration", "scorer", "allocator", "surgery", "recovery", "training_data", "quantizer")
ROWS_OF_THEIR_OWN = ("data",)  # of a recovery
LONGEST_VALUE = 60
LEAST_IN_MEGABYTES = 10_000
BITSANDBYTES_FORMATS = {"nf4", "int8"}
BINARY_UNITS = {"MB": (2**20, "MiB"), "GB": (2**30, "GiB")}

Row = Sequence[str]


@dataclass(frozen=True)
class Origin:
    """The dense model: its hub name and revision, where it came from the hub, and its licence where that is known."""

    hub_name: str | None = None
    revision: str | None = None
    licence: str | None = None


def model_card(metrics: Metrics, settings: Mapping[str, Any], origin: Origin, version: str) -> str:
    """The text of ``README.md``: YAML that the hub reads, then Markdown.

    ``settings`` is the run's resolved config, ``version`` that of this package.
    """
    removed = _percent(metrics.plan.removed_ratio)
    parts = [
        _front_matter(metrics, origin),
        f"# {_short_name(metrics)}, {removed} of its expert channels removed{_bits(metrics)}",
        _summary(metrics, origin, version),
        "## Use",
        _use(metrics),
        "## Measured beside the dense model",
        _table(("", "dense", "this model"), _measured(metrics.dense, metrics.final)),
        _captions(metrics),
        *_precision(metrics),
        *_recovery(metrics),
        "## How it was made",
        _table(("", "choice", "settings"), _made(metrics, settings, origin)),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(metrics, origin)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(metrics: Metrics, origin: Origin) -> str:
    """JSON strings are YAML strings, so that no name can break it."""
    entries: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if origin.hub_name is not None:
        entries["base_model"] = origin.hub_name
    if origin.licence is not None:
        entries["license"] = origin.licence
    quantized = [metrics.quantizer] if metrics.quantizer != "none" else []
    entries["tags"] = ["mixture-of-experts", "pruned", "custom_code", "moeprune", *quantized]
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in entries.items()), "---"])


def _short_name(metrics: Metrics) -> str:
    return PurePath(metrics.model).name


def _bits(metrics: Metrics) -> str:
    return "" if metrics.quantizer == "none" else f", {metrics.quantizer}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def _summary(metrics: Metrics, origin: Origin, version: str) -> str:
    plan, dense, pruned = metrics.plan, metrics.dense.parameters, metrics.pruned.parameters
    source = f"`{origin.hub_name}`" if origin.hub_name else _short_name(metrics)
    live = sorted(set(plan.live_experts))
    experts = f"{live[0]}" if len(live) == 1 else f"{live[0]} to {live[-1]}"
    return (
        f"{source}, compressed with moeprune {version}: {plan.removed_channels} of {plan.total_channels} "
        "intermediate channels of the routed experts were removed, which is "
        f"{_percent(1 - pruned.total / dense.total)} of all parameters and "
        f"{_percent(1 - pruned.active / dense.active)} of those that a token uses. Experts may differ in width; "
        f"{experts} per layer are left. {plan.note}"
    ).rstrip()


def _use(metrics: Metrics) -> str:
    adapters = _adapters(metrics)
    needs = "torch 'transformers>=5.23' safetensors"
    needs += " accelerate bitsandbytes" if _needs_bitsandbytes(metrics) else ""
    needs += " peft" if adapters else ""
    return f"""    pip install {needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name it was uploaded under
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
{_with_adapters(adapters)}inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`trust_remote_code=True` runs the Python files of this folder: a few hundred lines, which define experts of differing
widths{" and weights of few bits" if metrics.quantizer != "none" else ""}. moeprune itself is not needed."""


def _adapters(metrics: Metrics) -> Sequence[str]:
    """The names of the adapters that lie beside the weights; their groups of parameters go by these names."""
    details = metrics.recovery_details
    return list(details.learning_rates) if details is not None and details.merged is False else []


def _with_adapters(names: Sequence[str]) -> str:
    """Python that puts all of them on the model."""
    if not names:
        return ""
    first, *others = (f'folder, adapter_name="{name}", subfolder="adapters/{name}"' for name in names)
    lines = [
        "from peft import PeftModel  # what was trained lies beside the weights, as adapters",
        "",
        f"model = PeftModel.from_pretrained(model, {first})",
        *(f"model.load_adapter({other})" for other in others),
        f"model.base_model.set_adapter({json.dumps(list(names))})",
    ]
    return "".join(f"{line}\n" for line in lines)


def _needs_bitsandbytes(metrics: Metrics) -> bool:
    """By what the weights are stored in; by the quantizer, where the run did not write that down."""
    words = {word for row in metrics.final.precision for word in row.format.split()}
    return bool(words & BITSANDBYTES_FORMATS) if words else metrics.quantizer != "none"


def _measured(dense: Variant, final: Variant) -> Iterator[Row]:
    """One row per measure: its name, the dense model's value, this model's."""
    for text in names_in([dense.perplexity, final.perplexity]):
        values = (variant.perplexity.get(text) for variant in (dense, final))
        yield f"perplexity, {text}", *(MISSING if value is None else perplexity_text(value) for value in values)
    yield "perplexity, mean", perplexity_text(dense.mean_perplexity), perplexity_text(final.mean_perplexity)
    for task in names_in([dense.tasks, final.tasks]):
        yield f"{task}, % correct", accuracy_text(dense.tasks.get(task)), accuracy_text(final.tasks.get(task))
    for part in ("total", "routed", "active"):
        counts = (parameter_text(getattr(variant.parameters, part)) for variant in (dense, final))
        yield f"parameters, {part}", *counts
    for kind in BYTE_KINDS:
        sizes = (getattr(variant.bytes, kind) for variant in (dense, final))
        yield f"size, {kind.replace('_', ' ')}", *(_size(size) for size in sizes)


def _size(count: int | None) -> str:
    if count is None:
        return MISSING
    if count < LEAST_IN_MEGABYTES:
        return f"{count:,} bytes"
    decimal, unit = byte_unit([max(count, MEGABYTE)])
    binary, binary_unit = BINARY_UNITS[unit]
    return f"{count / decimal:.2f} {unit} ({count / binary:.2f} {binary_unit})"


def _captions(metrics: Metrics) -> str:
    final = metrics.final
    tokens = ", ".join(f"{text} {count}" for text, count in final.perplexity_tokens.items())
    examples = ", ".join(f"{task} {score.n}" for task, score in final.tasks.items())
    tasks = f"Tasks: percent correct ± standard error; examples: {examples}." if examples else "No tasks were run."
    return (
        f"Perplexity: lower is better; tokens: {tokens}; mean: geometric mean over the texts. {tasks} Parameters: M = "
        f"1e6, B = 1e9; active: those that one token uses. Size: {BYTES_MEANING} MB = 1e6, GB = 1e9, MiB = 2^20, GiB = "
        "2^30 bytes."
    )


def _precision(metrics: Metrics) -> Iterator[str]:
    """What is stored in how many bits; nothing where the run did not write it down."""
    rows = metrics.final.precision
    if rows:
        yield "## What is in how many bits"
        head = ("part", "format", "parameters", "bits per weight", "with scales", "size")
        yield _table(
            head,
            (
                (
                    row.part,
                    row.format,
                    parameter_text(row.parameters),
                    f"{row.bits:g}",
                    f"{row.bits_with_overhead:.3f}",
                    _size(row.bytes),
                )
                for row in rows
            ),
        )


def _recovery(metrics: Metrics) -> Iterator[str]:
    """What the recovery did; nothing where there was none."""
    if metrics.recovery_details is not None:
        yield "## Training after pruning"
        yield _table(("", metrics.recovery), iter(recovery_facts(metrics, metrics.recovery_details).items()))


def _made(metrics: Metrics, settings: Mapping[str, Any], origin: Origin) -> Iterator[Row]:
    revision = f"revision {origin.revision}" if origin.revision else ""
    yield "model", origin.hub_name or _short_name(metrics), revision
    if metrics.method:
        yield "method", metrics.method, ""
    yield "ratio", f"{metrics.ratio:g}", f"{RATIO_MEANING}; {metrics.plan.removed_ratio:.4f} after rounding"
    for group in GROUPS:
        if getattr(metrics, group) is not None:
            chosen = settings.get(group) or {}
            own = {name: value for name, value in chosen.items() if name not in ROWS_OF_THEIR_OWN}
            yield group.replace("_", " "), getattr(metrics, group), ", ".join(_plain_settings(own))
    if metrics.order_matters:
        yield "order", metrics.order, ""
    yield "seed", str(metrics.seed), ""


def _plain_settings(settings: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """``name=value`` of each setting; of a file its name alone, for its place says nothing elsewhere."""
    for name, value in settings.items():
        if name in ("_target_", "name") or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _plain_settings(value, f"{within}{name}.")
        else:
            yield f"{within}{name}={_plain(value)}"


def _plain(value: object) -> str:
    if isinstance(value, str):
        text = PurePath(value).name if value.startswith(("/", "~", ".")) else " ".join(value.split())
        return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(each) for each in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(metrics: Metrics, origin: Origin) -> Iterator[str]:
    yield (
        "Quality was measured on the texts and tasks above and nothing else. What the calibration text "
        f"(`{metrics.calibration}`) exercises little can have lost more than they show."
    )
    yield (
        "Stock model classes and engines such as vLLM or llama.cpp do not know experts of differing widths; "
        "`moeprune-export` says which formats can express a model."
    )
    if metrics.quantizer != "none":
        yield "Quantised weights take less memory; on a CPU they are not faster, for they are unpacked before each use."
    if metrics.recovery == "none":
        yield "It was not trained after pruning."
    else:
        data = (
            f", on `{metrics.training_data}`; the licence of these data may bind it too"
            if metrics.training_data
            else ""
        )
        yield f"It was trained after pruning{data}."
    licence = f"({origin.licence}) " if origin.licence else ""
    yield f"The licence {licence}and the limits of the dense model hold for this one too."


def _table(head: Row, rows: Iterator[Row]) -> str:
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
