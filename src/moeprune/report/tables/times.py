"""Where the time of a sweep went: what its runs shared, and what each of them added."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from moeprune.report.runs.results import Metrics, Run
from moeprune.report.runs.settings import SHOWN_APART, run_labels, setting_text, varying_keys
from moeprune.report.runs.variants import StageRecord
from moeprune.report.tables.formats import MISSING
from moeprune.report.tables.run_tables import column_of
from moeprune.report.tables.table import ROW_NAME, Table

# First parts of stage names in the order of the road; a stage of any other name comes last.
ROAD = (
    "calibration", "statistics", "calibration_report", "pass", "scores", "plan", "diagnostics", "pruned", "recovered",
    "quantized", "evaluation",
)  # fmt: skip
REPLAY = ("scores", "plan")
STEPS: Mapping[str, Sequence[str]] = {
    "calibration,\nstatistics": ("calibration", "statistics"),
    "extra\npasses": ("pass",),
    "scores\n+ plan": REPLAY,
    "reports": ("calibration_report", "diagnostics"),
    "pruned,\nrecovered, ...": ("pruned", "recovered", "quantized"),
    "evaluation": ("evaluation",),
}
SECONDS = "seconds"


def stage_times_table(runs: Sequence[Run]) -> Table:
    """One row per stage of the sweep: how many runs used it, how many different results that took, and the seconds.

    A result that several runs share counts once. Seconds are those of the run that computed it, in this sweep or
    before. Needs at least one run with results.
    """
    measured = [run.results for run in runs if run.results]
    records = [record for metrics in measured for record in metrics.stages]
    of_stage = {stage: [r for r in records if r.stage == stage] for stage in _in_order(r.stage for r in records)}
    seconds = {stage: _distinct_seconds(of_this) for stage, of_this in of_stage.items()}
    computed = {stage: len({r.key for r in of_this if not r.cached}) for stage, of_this in of_stage.items()}
    columns = [
        column_of("stage", of_stage, ROW_NAME),
        column_of("runs that\nused it", (str(len(of_this)) for of_this in of_stage.values()), SECONDS),
        column_of("different\nresults", (str(len(found)) for found in seconds.values()), SECONDS),
        column_of("computed\nin this sweep", (str(count) for count in computed.values()), SECONDS),
        column_of("seconds each\n(median)", (f"{median(found):.2f}" for found in seconds.values()), SECONDS),
        column_of("seconds each\n(most)", (f"{max(found):.2f}" for found in seconds.values()), SECONDS),
        column_of("seconds\nin all", (f"{sum(found):.2f}" for found in seconds.values()), SECONDS),
    ]
    return Table("Where the time went", columns, _sharing_caption(measured, seconds))


def run_times_table(runs: Sequence[Run]) -> Table:
    """One row per finished run: the seconds of each step, in brackets where the result was in the cache."""
    finished = [run for run in runs if run.results]
    measured = [run.results for run in finished if run.results]
    apart = [key for key in varying_keys(finished) if key in SHOWN_APART]
    columns = [column_of("run", (run.name for run in finished), ROW_NAME)]
    columns += [column_of(key, (setting_text(run, key) or MISSING for run in finished), ROW_NAME) for key in apart]
    columns.append(column_of("method", run_labels(finished, without=("experiment",)), ROW_NAME))
    for head, parts in STEPS.items():
        columns.append(column_of(head, (_step_text(metrics, parts) for metrics in measured), SECONDS))
    spent = (sum(record.seconds for record in metrics.stages if not record.cached) for metrics in measured)
    columns.append(column_of("computed\nin all", (f"{seconds:.2f}" for seconds in spent), SECONDS))
    caption = "In seconds. In brackets: taken from the cache, with the seconds that computing it once took."
    return Table("Time of each run", columns, caption)


def _sharing_caption(measured: Sequence[Metrics], seconds: Mapping[str, Sequence[float]]) -> str:
    replays = [sum(r.seconds for r in metrics.stages if _part(r.stage) in REPLAY) for metrics in measured]
    alone = sum(record.seconds for metrics in measured for record in metrics.stages)
    once = sum(sum(found) for found in seconds.values())
    passes = seconds.get("statistics", ())
    runs = f"{len(measured)} {'run' if len(measured) == 1 else 'runs'}"
    sentences = ["Results that are not computed in this sweep were in the cache, with their seconds."]
    if passes:
        counted = "1 statistics pass" if len(passes) == 1 else f"{len(passes)} statistics passes"
        sentences.append(
            f"{runs} used {counted} of {sum(passes):.2f} seconds in all; from there, the scores and the plan of a run "
            f"took {median(replays):.2f} seconds (median; {min(replays):.2f} to {max(replays):.2f})."
        )
    sentences.append(f"Every result once: {once:.1f} seconds; each run by itself: {alone:.1f} seconds.")
    return " ".join(sentences)


def _distinct_seconds(records: Sequence[StageRecord]) -> list[float]:
    return list({record.key: record.seconds for record in records}.values())


def _step_text(metrics: Metrics, parts: Sequence[str]) -> str:
    """``2.50`` computed, ``(2.50)`` cached, ``2.50 (1.20)`` where the step has stages of both kinds."""
    records = [record for record in metrics.stages if _part(record.stage) in parts]
    texts = []
    for form, cached in (("{:.2f}", False), ("({:.2f})", True)):
        seconds = [record.seconds for record in records if record.cached is cached]
        if seconds:
            texts.append(form.format(sum(seconds)))
    return " ".join(texts) or MISSING


def _in_order(stages: Iterable[str]) -> list[str]:
    known = list(dict.fromkeys(stages))
    return sorted(known, key=lambda stage: ROAD.index(_part(stage)) if _part(stage) in ROAD else len(ROAD))


def _part(stage: str) -> str:
    return stage.partition("/")[0]
