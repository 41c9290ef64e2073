"""Published accuracies, one object per printed row; `resources/published/PROVENANCE.md` says where they are from."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import yaml

AVERAGE = "average"
# A printed average that is further than this from the mean of its row is no rounding.
ROUNDING = 0.015
FEWEST_TASKS = 6
MODELS = {
    "Qwen1.5-MoE-A2.7B": "qwen1_5_moe_a2_7b",
    "DeepSeek-MoE-16B": "deepseek_moe_16b",
    "DeepSeek-V2-Lite": "deepseek_v2_lite",
    "Qwen3-30B-A3B": "qwen3_30b_a3b",
}
METHODS = {
    "Ours": "moe_slimming", "Baseline": "dense", "MoNE": "mone", "He et al.": "he_layerwise", "C-Prune": "c_prune",
    "Wanda": "wanda_unstructured", "REAP": "reap", "EAN": "ean", "Frequency": "frequency", "HC-SMoE": "hc_smoe",
    "M-SMoE": "m_smoe", "HEAPr": "heapr",
}  # fmt: skip
# Settings behind the words of the tables, by how the word begins.
SETTINGS_OF = {
    "layer loss smoothing=NA": {"allocator.smoothing": "none"},
    "layer loss smoothing=Log": {"allocator.smoothing": "log"},
    "layer loss smoothing=Huber": {"allocator.smoothing": "huber"},
    "layer loss smoothing=Clip": {"allocator.smoothing": "clip"},
    "layer loss smoothing=Sqrt": {"allocator.smoothing": "sqrt"},
    "Metric=First-order": {"scorer.experts": "first_order"},
    "Metric=Second-order": {"scorer.experts": "second_order"},
    "Metric=largest removed channels": {"allocator.reallocation": "most_lost"},
    "Metric=largest removed scores": {"allocator.reallocation": "most_score"},
}
SETTING_NAMES = {"m": "model.minimum_width", "a": "model.alignment", "Top-k": "model.experts_per_token"}
KNOWN_TASKS = (
    "arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande", "mmlu", "gsm8k", "humaneval"
)  # fmt: skip
# Ratios that tables do not print, from rows that are printed elsewhere too: R4's sqrt row is R8's first one, and its
# average stands in R6 (top-k) among those at 50%; R6 (reallocation) has rows of R5, which says 25%.
LIKELY_RATIOS = {"Tab. R4": 0.5, "Tab. R8": 0.5, "Tab. R6 (reallocation)": 0.25}
FRACTIONS = ("code_average", "multiple_choice_average")


@dataclass(frozen=True)
class PublishedResult:
    """One printed row: ``values`` by metric (accuracies in percent), the settings that it names, and its doubts.

    ``ratio`` and ``storage_gb`` are None where the table does not say them; ``model`` and ``method`` are our names,
    where we have one.
    """

    table: str
    source: str
    model: str
    method: str
    printed_method: str
    ratio: float | None
    bits: int
    variant: str
    settings: Mapping[str, str]
    storage_gb: float | None
    values: Mapping[str, float]
    doubts: tuple[str, ...] = ()

    @property
    def likely_ratio(self) -> float | None:
        """As printed; else what other tables tell of it, if they do."""
        return LIKELY_RATIOS.get(self.table) if self.ratio is None else self.ratio

    @property
    def is_dense(self) -> bool:
        return self.method == METHODS["Baseline"]

    @property
    def tasks(self) -> dict[str, float]:
        """The accuracies that an average could be over; empty where only averages or other numbers are printed."""
        return {name: value for name, value in self.values.items() if name in KNOWN_TASKS}

    @property
    def average(self) -> float | None:
        """As printed, even where it is not the mean of the row."""
        return self.values.get(AVERAGE)

    @property
    def mean_of_row(self) -> float | None:
        return sum(self.tasks.values()) / len(self.tasks) if self.tasks else None


@dataclass(frozen=True)
class PublishedExperiment:
    """What an experiment asks, and the printed tables that belong beside it."""

    title: str
    question: str
    tables: tuple[str, ...]


@cache
def published_experiments() -> dict[str, PublishedExperiment]:
    """By the name of the experiment under conf/experiment/paper, without ``_embedded``."""
    content = yaml.safe_load(_resource("experiments.yaml"))
    return {
        name: PublishedExperiment(entry["title"], entry["question"], tuple(entry["tables"]))
        for name, entry in content.items()
    }


@cache
def published_results() -> tuple[PublishedResult, ...]:
    """All printed rows, in the order of the file, with what is doubtful in them."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    keys = ("source", "table", "model", "method", "granularity", "prune_ratio", "weight_bits", "variant", "storage_gb")
    for line in csv.DictReader(_resource("results.csv").splitlines()):
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    rows = [_result(lines) for lines in groups.values()]
    return tuple(replace(row, doubts=tuple(_found_doubts(row, rows)) or row.doubts) for row in rows)


def _resource(name: str) -> str:
    return (files("moeprune.resources") / "published" / name).read_text(encoding="utf-8")


def _result(lines: Sequence[dict[str, str]]) -> PublishedResult:
    first = lines[0]
    notes = dict.fromkeys(line["note"] for line in lines if line["note"].startswith("suspect"))
    return PublishedResult(
        table=_table(first),
        source=first["source"],
        model=MODELS.get(first["model"], first["model"]),
        method=METHODS.get(first["method"], first["method"]),
        printed_method=first["method"],
        ratio=float(first["prune_ratio"]) if first["prune_ratio"] else None,
        bits=int(first["weight_bits"]),
        variant=first["variant"],
        settings=dict(_settings(first["variant"])),
        storage_gb=float(first["storage_gb"]) if first["storage_gb"] else None,
        values={line["metric"]: float(line["value"]) * _percent(line["metric"]) for line in lines},
        doubts=tuple(note.removeprefix("suspect: ") for note in notes),
    )


def _percent(metric: str) -> float:
    return 100.0 if metric in FRACTIONS else 1.0


def _table(line: Mapping[str, str]) -> str:
    """The printed number, made unambiguous."""
    if line["table"] == "README":
        return "HEAPr README" if "HEAPr" in line["source"] else "REAP README"
    if line["table"] == "Tab. R6":
        return f"Tab. R6 ({'top-k' if line['variant'].startswith('Top-k') else 'reallocation'})"
    return line["table"]


def _settings(variant: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, variant.split(";")):
        named = next((settings for words, settings in SETTINGS_OF.items() if part.startswith(words)), None)
        if named is not None:
            yield from named.items()
        else:
            name, _, value = part.partition("=")
            yield SETTING_NAMES.get(name, name), value


def _found_doubts(row: PublishedResult, rows: Sequence[PublishedResult]) -> Iterator[str]:
    """What computing shows: an average that is not the mean, and figures that stand in another place too."""
    mean = row.mean_of_row
    if mean is not None and row.average is not None and abs(mean - row.average) > ROUNDING:
        yield f"the printed average {row.average:.2f} is not the mean of the row, {mean:.2f}"
    for other in rows:
        if other is not row and _has_figures_of(row, other) and not _is_same(row, other):
            yield f"same figures as {_told(other)}"


def _has_figures_of(row: PublishedResult, other: PublishedResult) -> bool:
    """Whether at least six tasks have the same figures."""
    return sum(value == other.tasks.get(task) for task, value in row.tasks.items()) >= FEWEST_TASKS


def _is_same(row: PublishedResult, other: PublishedResult) -> bool:
    """Whether two rows may well be of the same model: where one does not say a setting, nothing speaks against it."""
    pairs = (row.model, other.model), (row.method, other.method), (row.ratio, other.ratio), (row.bits, other.bits)
    return all(one == two or None in (one, two) for one, two in pairs)


def _told(row: PublishedResult) -> str:
    ratio = "" if row.ratio is None or row.is_dense else f" at {100 * row.ratio:g}%"
    return f"{row.table}, {row.model} {row.printed_method}{ratio}, {row.bits} bits"
