"""The tables of one run: its variants side by side, and its stages."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple

from moeprune.report.formats import (
    MISSING,
    accuracy_text,
    byte_unit,
    byte_unit_note,
    bytes_text,
    counts_text,
    parameter_text,
    perplexity_text,
)
from moeprune.report.results import Metrics, StageRecord
from moeprune.report.tables import ROW_NAME, Cell, Column, Table

QUALITY, SIZE = "quality", "size"
RATIO_MEANING = "fraction of routed-expert channels removed"
BYTES_MEANING = (
    "ideal: parameters times ideal bits; with overhead: also scales and unquantised tensors; on disk: files as written."
)
LISTED_LAYERS = 8


def run_table(metrics: Metrics) -> Table:
    """One row per variant (dense, pruned, pruned and quantised): perplexity, accuracy, parameters, bytes."""
    variants = metrics.variants
    texts = names_in(variant.perplexity for variant in variants)
    tasks = names_in(variant.tasks for variant in variants)
    unit_bytes, unit = byte_unit(astuple(metrics.dense.bytes))
    columns = [column_of("variant", (variant.name for variant in variants), ROW_NAME)]
    columns.append(column_of("ppl\nmean", (perplexity_text(v.mean_perplexity) for v in variants), QUALITY))
    for text in texts:
        perplexities = (variant.perplexity.get(text) for variant in variants)
        shown = (MISSING if value is None else perplexity_text(value) for value in perplexities)
        columns.append(column_of(f"ppl\n{text}", shown, QUALITY))
    for task in tasks:
        columns.append(column_of(f"{task}\n%", (accuracy_text(v.tasks.get(task)) for v in variants), QUALITY))
    for part in ("total", "routed", "active"):
        counts = (parameter_text(getattr(variant.parameters, part)) for variant in variants)
        columns.append(column_of(f"parameters\n{part}", counts, SIZE))
    for kind in ("ideal", "with_overhead", "on_disk"):
        dense = getattr(metrics.dense.bytes, kind)
        sizes = (bytes_text(getattr(variant.bytes, kind), dense, unit_bytes) for variant in variants)
        columns.append(column_of(f"{unit}\n{kind.replace('_', ' ')}", sizes, SIZE))
    size_caption = (
        f"M = 1e6, B = 1e9 parameters; {byte_unit_note(unit)}; {BYTES_MEANING} (2x): dense is twice as large."
    )
    captions = {QUALITY: f"{perplexity_meaning([metrics])} {task_meaning([metrics])}", SIZE: size_caption}
    return Table(f"{metrics.model}, ratio {metrics.ratio:g}", columns, _run_caption(metrics), captions)


def stage_table(metrics: Metrics) -> Table:
    """One row per stage: seconds, peak memory, whether the cache had it, and its key."""
    stages = metrics.stages
    memory = (MISSING if s.peak_memory_gib is None else f"{s.peak_memory_gib:.2f}" for s in stages)
    columns = [
        column_of("stage", (stage.stage for stage in stages), ROW_NAME),
        column_of("seconds", (f"{stage.seconds:.2f}" for stage in stages), "stages"),
        column_of("peak memory\nGiB", memory, "stages"),
        column_of("result", ("cached" if stage.cached else "computed" for stage in stages), "stages", prose=True),
        column_of("key", (stage.key[:12] for stage in stages), "stages", prose=True),
    ]
    return Table("Stages", columns, _stage_caption(metrics, stages))


def perplexity_meaning(metrics: Sequence[Metrics]) -> str:
    """What the perplexities of these runs were measured on."""
    tokens = counts_text(variant.perplexity_tokens for each in metrics for variant in each.variants)
    return f"Perplexity (ppl): lower is better; tokens: {tokens}; mean: geometric mean over the texts."


def task_meaning(metrics: Sequence[Metrics]) -> str:
    """How the tasks of these runs were scored; says so where there were none."""
    variants = [variant for each in metrics for variant in each.variants]
    examples = counts_text({task: score.n for task, score in variant.tasks.items()} for variant in variants)
    return f"Tasks: accuracy in percent ± standard error; n: {examples}." if examples else "No tasks were run."


def _run_caption(metrics: Metrics) -> str:
    dense, final, plan = metrics.dense.parameters, metrics.final.parameters, metrics.plan
    chosen = f"scorer {metrics.scorer}, allocator {metrics.allocator}, surgery {metrics.surgery}"
    named = f"method {metrics.method} ({chosen})" if metrics.method else chosen
    sentences = [
        f"Model {metrics.model}; {named}; quantizer {metrics.quantizer}; recovery {metrics.recovery}; "
        f"calibration {metrics.calibration}; seed {metrics.seed}.",
        f"Ratio {metrics.ratio:g}: {RATIO_MEANING}; removed here: {plan.removed_channels} of {plan.total_channels} "
        f"channels ({plan.removed_ratio:.4f}), {_percent_removed(dense.total, final.total)} of all parameters, "
        f"{_percent_removed(dense.active, final.active)} of those active per token.",
        f"Live experts per layer: {_per_layer(plan.live_experts)}.",
        plan.note,
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _stage_caption(metrics: Metrics, stages: Sequence[StageRecord]) -> str:
    computed = [stage.seconds for stage in stages if not stage.cached]
    return (
        f"Model {metrics.model}; ratio {metrics.ratio:g} ({RATIO_MEANING}); calibration {metrics.calibration}; "
        f"seed {metrics.seed}. {len(computed)} of {len(stages)} stages computed, in {sum(computed):.2f} seconds. "
        "1 GiB = 2^30 bytes."
    )


def _per_layer(live_experts: Sequence[int]) -> str:
    if len(live_experts) <= LISTED_LAYERS:
        return ", ".join(map(str, live_experts))
    return f"{min(live_experts)} to {max(live_experts)} in {len(live_experts)} layers"


def _percent_removed(before: int, after: int) -> str:
    return f"{100 * (before - after) / before:.1f}%"


def names_in(mappings: Iterable[Iterable[str]]) -> list[str]:
    """The names that occur in any of the mappings, in the order of their first occurrence."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def column_of(head: str, texts: Iterable[str], group: str, prose: bool = False) -> Column:
    return Column(head, [Cell(text) for text in texts], group, prose)
