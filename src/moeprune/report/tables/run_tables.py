"""The tables of one run: its variants side by side, and its stages."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple

from moeprune.report.runs.results import Metrics
from moeprune.report.runs.variants import PartPrecision, RecoveryDetails, StageRecord, Variant
from moeprune.report.tables.formats import (
    MISSING,
    accuracy_text,
    byte_unit,
    byte_unit_note,
    bytes_text,
    counts_text,
    parameter_text,
    perplexity_text,
    rate_text,
)
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

QUALITY, PARAMETERS, FOOTPRINT = "quality", "parameters", "footprint"
BYTE_KINDS = ("ideal", "with_overhead", "on_disk", "in_memory")
RATIO_MEANING = "fraction of routed-expert channels removed"
BYTES_MEANING = (
    "ideal: parameters times ideal bits; with overhead: also scales and unquantised tensors; on disk: files written; "
    "in memory: weights as loaded to run, those not quantised in the precision of computation."
)
PRECISION, RECOVERY = "precision", "recovery"
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
        columns.append(column_of(f"parameters\n{part}", counts, PARAMETERS))
    for kind in BYTE_KINDS:
        dense = getattr(metrics.dense.bytes, kind)
        sizes = (bytes_text(getattr(variant.bytes, kind), dense, unit_bytes) for variant in variants)
        columns.append(column_of(f"{unit}\n{kind.replace('_', ' ')}", sizes, FOOTPRINT))
    captions = {
        QUALITY: f"{perplexity_meaning([metrics])} {task_meaning([metrics])}",
        PARAMETERS: "M = 1e6, B = 1e9 parameters; active: those that one token uses.",
        FOOTPRINT: f"{byte_unit_note(unit)}; {BYTES_MEANING} (2x): dense is twice as large.",
    }
    return Table(f"{metrics.model}, ratio {metrics.ratio:g}", columns, _run_caption(metrics), captions)


def precision_table(metrics: Metrics) -> Table | None:
    """One row per part of the final variant and format it is stored in; None for a run that did not write them down."""
    final = metrics.final
    if not final.precision:
        return None
    unit_bytes, unit = byte_unit([metrics.dense.bytes.with_overhead])
    rows = [*final.precision, _sum(final)]
    columns = [
        column_of("part", (row.part for row in rows), ROW_NAME),
        column_of("format", (row.format for row in rows), ROW_NAME),
        column_of("matrices", (str(row.matrices) for row in rows), PRECISION),
        column_of("parameters", (parameter_text(row.parameters) for row in rows), PRECISION),
        column_of("bits", (f"{row.bits:.3g}" for row in rows), PRECISION),
        column_of("bits with\noverhead", (f"{row.bits_with_overhead:.3f}" for row in rows), PRECISION),
        column_of(f"{unit} with\noverhead", (f"{row.bytes / unit_bytes:.3f}" for row in rows), PRECISION),
    ]
    caption = (
        f"Model {metrics.model}; ratio {metrics.ratio:g} ({RATIO_MEANING}); quantizer {metrics.quantizer}; seed "
        f"{metrics.seed}. Bits per weight: nominal, and with scales, zero points and code books; of all parts: the "
        f"mean over parameters. M = 1e6, B = 1e9 parameters; {byte_unit_note(unit)}."
    )
    return Table(f"What is in how many bits: {metrics.model}, {final.name}", columns, caption)


def recovery_table(metrics: Metrics) -> Table | None:
    """What the recovery was given, what it trained and how it ended; None for a run without one."""
    if metrics.recovery_details is None:
        return None
    rows = recovery_facts(metrics, metrics.recovery_details)
    columns = [column_of("", rows, ROW_NAME), column_of(metrics.recovery, rows.values(), RECOVERY, prose=True)]
    caption = (
        f"Model {metrics.model}; ratio {metrics.ratio:g} ({RATIO_MEANING}); quantizer {metrics.quantizer}; recovery "
        f"{recovery_text(metrics)}; order {metrics.order}; seed {metrics.seed}. Seconds: with those before an "
        "interruption."
    )
    return Table(f"Recovery: {metrics.model}, {metrics.recovery}", columns, caption)


def recovery_facts(metrics: Metrics, found: RecoveryDetails) -> dict[str, str]:
    """Each fact of a recovery that is known, by what it is about."""
    trained = found.trained_parameters
    share = f"{100 * trained / metrics.pruned.parameters.total:.3g}% of the pruned model's number"
    speed = f"; {found.training_tokens / found.seconds:,.0f} tokens per second" if found.seconds > 0 else ""
    facts = {
        "training tokens": f"{found.training_tokens:,} that count in the loss",
        "optimizer steps": f"{found.steps:,}",
        "seconds": f"{found.seconds:.2f}{speed}",
        "trained parameters": f"{parameter_text(trained)} ({share})",
        **{f"learning rate, {part}": f"{rate_text(rate)} at its peak" for part, rate in found.learning_rates.items()},
    }
    if found.final_loss is not None:
        facts["final training loss"] = f"{found.final_loss:.4f} nats per label"
    if found.merged is not None:
        facts["adapters"] = "none: what trained is in the weights" if found.merged else "kept beside the weights"
    if found.stored_difference is not None:
        facts["change by storing"] = f"logits moved by {found.stored_difference:.2g} of their size (root mean square)"
    if found.stored_max_difference is not None:
        facts["greatest change"] = f"{found.stored_max_difference:.2g} of a logit"
    return facts


def recovery_text(metrics: Metrics) -> str:
    """The recovery and what it trained on: ``dora on alpaca``."""
    return f"{metrics.recovery} on {metrics.training_data}" if metrics.training_data else metrics.recovery


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


def _sum(variant: Variant) -> PartPrecision:
    """All parts of a variant in one row."""
    rows = variant.precision
    parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    bits = sum(row.bits * row.parameters for row in rows) / max(1, parameters)
    return PartPrecision(
        "all", "", bits, 8 * size / max(1, parameters), sum(row.matrices for row in rows), parameters, size
    )


def perplexity_meaning(metrics: Sequence[Metrics]) -> str:
    """What the perplexities of these runs were measured on."""
    tokens = counts_text(variant.perplexity_tokens for each in metrics for variant in each.variants)
    return f"Perplexity (ppl): lower is better; tokens: {tokens}; mean: geometric mean over the texts."


def task_meaning(metrics: Sequence[Metrics], deviation: str = "standard error") -> str:
    """How the tasks of these runs were scored, and what stands after the ±; says so where there were none."""
    variants = [variant for each in metrics for variant in each.variants]
    examples = counts_text({task: score.n for task, score in variant.tasks.items()} for variant in variants)
    if not examples:
        return "No tasks were run."
    shown = counts_text(
        {task: score.fewshot for task, score in variant.tasks.items() if score.fewshot} for variant in variants
    )
    scored = {task: score.metric for variant in variants for task, score in variant.tasks.items() if score.metric}
    sentences = [f"Tasks: accuracy in percent ± {deviation}; n: {examples}."]
    sentences += [f"Solved examples shown first: {shown}."] if shown else []
    if len(set(scored.values())) > 1:  # acc and acc_norm differ by many points
        sentences.append(f"Scored by {', '.join(f'{task} {metric}' for task, metric in scored.items())}.")
    return " ".join(sentences)


def _run_caption(metrics: Metrics) -> str:
    dense, pruned, plan = metrics.dense.parameters, metrics.pruned.parameters, metrics.plan
    chosen = f"scorer {metrics.scorer}, allocator {metrics.allocator}, surgery {metrics.surgery}"
    named = f"method {metrics.method} ({chosen})" if metrics.method else chosen
    order = f"order {metrics.order}; " if metrics.order_matters else ""
    sentences = [
        f"Model {metrics.model}; {named}; quantizer {metrics.quantizer}; recovery {recovery_text(metrics)}; {order}"
        f"calibration {metrics.calibration}; seed {metrics.seed}.",
        f"Ratio {metrics.ratio:g}: {RATIO_MEANING}; removed here: {plan.removed_channels} of {plan.total_channels} "
        f"channels ({plan.removed_ratio:.4f}), {_percent_removed(dense.total, pruned.total)} of all parameters, "
        f"{_percent_removed(dense.active, pruned.active)} of those active per token.",
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
