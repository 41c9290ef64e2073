"""The table of a sweep that is not run: its jobs, what each takes, and the stages that all of them compute."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from moeprune.report.published.storage import IDEAL_4, KINDS_TEXT, UNIT_BYTES, PublishedStorage, published_storage
from moeprune.report.tables.footprint import GIBIBYTE, GPUS, FootprintRow
from moeprune.report.tables.formats import MISSING, byte_unit, byte_unit_note, bytes_text, parameter_text
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table, print_table

# What a GPU needs beside what is counted: its driver, gaps between tensors.
MARGIN_GIB = 2
NOTHING_DONE = "Nothing was run, and nothing written."
# The order of the road; passes come after the statistics.
STAGES = ("calibration", "statistics", "pass", "pruned", "recovered", "quantized", "evaluation")


@dataclass(frozen=True)
class PlannedJob:
    """One job: its number and overrides, the size of what it makes, and bytes in memory at its peak.

    ``whole_bytes``: with all weights in memory; ``streamed_bytes``: with one decoder layer at a time; None where the
    job cannot run so. The ``gpu`` of each is the smallest that holds it, None where none does.
    """

    number: int
    overrides: tuple[str, ...]
    footprint: FootprintRow
    whole_bytes: int | None
    whole_gpu: str | None
    streamed_bytes: int | None
    streamed_gpu: str | None


def dry_run_table(jobs: Sequence[PlannedJob]) -> Table:
    """One row per job. Overrides that all jobs share are in the caption."""
    rows = [job.footprint for job in jobs]
    unit_bytes, unit = byte_unit(row.dense_bytes for row in rows)
    shared = [word for word in jobs[0].overrides if all(word in job.overrides for job in jobs)] if len(jobs) > 1 else []

    def column(head: str, group: str, texts: Iterator[str]) -> Column:
        return Column(head, [Cell(text) for text in texts], group)

    def own(job: PlannedJob) -> str:
        return " ".join(word for word in job.overrides if word not in shared) or MISSING

    columns = [
        column("job", ROW_NAME, (str(job.number) for job in jobs)),
        Column("overrides", [Cell(own(job)) for job in jobs], ROW_NAME, prose=True),
        column("parameters", "size", (parameter_text(row.total_parameters) for row in rows)),
        column(f"stored\n{unit}", "size", (bytes_text(row.stored_bytes, row.dense_bytes, unit_bytes) for row in rows)),
        column(
            "published\nand ours against it", "size", (", ".join(_against_published(row)) or MISSING for row in rows)
        ),
        column("whole\nGiB", "memory", (_gibibytes(job.whole_bytes) for job in jobs)),
        column("smallest GPU", "memory", (_gpu(job.whole_bytes, job.whole_gpu) for job in jobs)),
        column("streamed\nGiB", "memory", (_gibibytes(job.streamed_bytes) for job in jobs)),
        column("smallest GPU", "memory", (_gpu(job.streamed_bytes, job.streamed_gpu) for job in jobs)),
    ]
    caption = f"All jobs: {' '.join(shared)}. " if shared else ""
    return Table("Dry run", columns, f"{caption}{byte_unit_note(unit)}; GiB = 2^30.", _captions())


def print_dry_run(jobs: Sequence[PlannedJob], stages: Mapping[str, int], console: Console) -> None:
    """Print the table and how many stages of each kind all jobs compute together, where they share a cache."""
    if jobs:
        print_table(dry_run_table(jobs), console)
        shown = ", ".join(
            f"{count} {name}" for kind in STAGES for name, count in sorted(stages.items()) if name.split("/")[0] == kind
        )
        told = f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} could run."
        console.print(f"{told} What they compute, each once where they share a cache: {shown}.", soft_wrap=True)
    console.print(NOTHING_DONE)


def _against_published(row: FootprintRow) -> Iterator[str]:
    """Each published number of this model, ratio and precision, with the difference of ours, counted in its way."""
    for published in published_storage():
        if (published.model, published.ratio, published.bits) == (row.model, row.ratio, row.bits):
            yield f"{published.text} {_ours(row, published) / published.storage - 1:+.1%}"


def _ours(row: FootprintRow, published: PublishedStorage) -> float:
    count = row.total_parameters / 2 if published.kind == IDEAL_4 else row.stored_bytes
    return row.dense_bytes / count if published.unit == "x" else count / UNIT_BYTES[published.unit]


def _gibibytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / GIBIBYTE:.1f}"


def _gpu(count: int | None, name: str | None) -> str:
    return MISSING if count is None else name or "more than one"


def _captions() -> dict[str, str]:
    gpus = ", ".join(f"{name} {mebibytes / 1024:.1f} GiB" for name, mebibytes in GPUS.items())
    return {
        "size": "What the job makes last, pruned and quantised, experts of even widths; adapters that stay beside a "
        "quantised model are not counted. (x): times smaller than the unpruned model in its storage precision. "
        f"Published: arXiv 2606.18304 and by how much ours differs when counted in its way; {KINDS_TEXT} "
        "(docs/footprint.md).",
        "memory": "The peak of the job. Whole: all weights in memory as they compute. Streamed: one decoder layer at a "
        "time. Counted besides: for one batch of calibration or evaluation a layer's hidden states and its experts' "
        "channels, and logits; for a scorer with gradients through the whole model, and in a recovery, which has the "
        "pruned model whole in memory, those of all layers, and 16 bytes for each parameter that trains. Not counted: "
        "attention, shared experts, fragmentation. Streaming is chosen by itself where weights take more than 60% of "
        "the free memory, so that the first GPU is one where they do not; it goes with no task that generates text, "
        f"no timing, and no gradients through the whole model. {MARGIN_GIB} GiB are left free. GPUs hold: {gpus}.",
    }
