"""The table of predicted sizes: in the terminal, as Markdown, CSV or JSON."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from moeprune.errors import InputError
from moeprune.report.documents.files import written_whole
from moeprune.report.published.storage import published_storage
from moeprune.report.tables.formats import MISSING, byte_unit, byte_unit_note, bytes_text, parameter_text
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table, markdown, print_table

GIBIBYTE, MEBIBYTE = 2**30, 2**20
# Memory in MiB that the driver reports, by the name on the box, whose GB are in truth about GiB.
GPUS = {
    "RTX 4090 (24 GB)": 24_564,
    "A100 (40 GB)": 40_960,
    "L40S (48 GB)": 46_068,
    "H100 (80 GB)": 81_559,
    "H200 (141 GB)": 143_771,
}
ENDINGS = (".md", ".csv", ".json")


@dataclass(frozen=True)
class FootprintRow:
    """One model at one ratio in one precision; counts of parameters, and bytes.

    ``bits`` of a quantised weight, nominally; ``dense_bytes``: every parameter of the unpruned model in its storage
    precision. ``held_bytes``: the weights in memory, those not quantised in the precision of computation. ``cache`` is
    the KV cache of the batch, ``cache_per_token`` of one token of one sequence. ``needed_bytes`` is what a GPU must
    hold: weights, KV cache and a margin.
    """

    model: str
    ratio: float
    removed_ratio: float
    precision: str
    bits: int
    total_parameters: int
    routed_parameters: int
    active_parameters: int
    dense_parameters: int
    dense_bytes: int
    ideal_bytes: int
    stored_bytes: int
    file_bytes: int
    held_bytes: int
    largest_layer_bytes: int
    cache_per_token: int
    cache_bytes: int
    needed_bytes: int

    @property
    def fitting_gpus(self) -> list[str]:
        return [name for name, mebibytes in GPUS.items() if self.needed_bytes <= mebibytes * MEBIBYTE]

    @property
    def published(self) -> str:
        """What the paper's tables say of this model, ratio and precision."""
        return ", ".join(
            row.text
            for row in published_storage()
            if (row.model, row.ratio, row.bits) == (self.model, self.ratio, self.bits)
        )


def footprint_table(rows: Sequence[FootprintRow], captions: Mapping[str, str]) -> Table:
    """One row per prediction, in the order given; ``captions`` of the groups parameters, size and memory."""
    unit_bytes, unit = byte_unit(row.dense_bytes for row in rows)

    def column(head: str, group: str, texts: Iterable[str]) -> Column:
        return Column(head, [Cell(text) for text in texts], group)

    def sizes(head: str, group: str, counts: Iterable[int]) -> Column:
        return column(f"{head}\n{unit}", group, [bytes_text(count, None, unit_bytes) for count in counts])

    def shrunk(head: str, counts: Iterable[int]) -> Column:
        pairs = zip(counts, rows, strict=True)
        return column(
            f"{head}\n{unit}", "size", [bytes_text(count, row.dense_bytes, unit_bytes) for count, row in pairs]
        )

    columns = [
        column("model", ROW_NAME, [row.model for row in rows]),
        column("ratio", ROW_NAME, [f"{row.ratio:g}" for row in rows]),
        column("precision", ROW_NAME, [row.precision for row in rows]),
        column("parameters", "parameters", [parameter_text(row.total_parameters) for row in rows]),
        column("removed", "parameters", [f"{1 - row.total_parameters / row.dense_parameters:.1%}" for row in rows]),
        column("active", "parameters", [parameter_text(row.active_parameters) for row in rows]),
        shrunk("ideal", [row.ideal_bytes for row in rows]),
        shrunk("stored", [row.stored_bytes for row in rows]),
        column("stored\nGiB", "size", [f"{row.stored_bytes / GIBIBYTE:.2f}" for row in rows]),
        sizes("files", "size", [row.file_bytes for row in rows]),
        column("published", "size", [row.published or MISSING for row in rows]),
        sizes("in memory", "memory", [row.held_bytes for row in rows]),
        sizes("largest\nlayer", "memory", [row.largest_layer_bytes for row in rows]),
        sizes("KV cache", "memory", [row.cache_bytes for row in rows]),
        column("needed\nGiB", "memory", [f"{row.needed_bytes / GIBIBYTE:.1f}" for row in rows]),
        column("smallest GPU", "memory", [(row.fitting_gpus or ["more than one"])[0] for row in rows]),
    ]
    return Table("Predicted footprint", columns, f"{byte_unit_note(unit)}; GiB = 2^30.", captions)


def write_footprint(
    rows: Sequence[FootprintRow], captions: Mapping[str, str], console: Console, file: Path | None
) -> None:
    """Print the table; also write it to ``file`` (.md), or every number unrounded (.csv, .json).

    Raises InputError as `require_possible_file` does.
    """
    require_possible_file(file)
    table = footprint_table(rows, captions)
    print_table(table, console)
    if file is None:
        return
    numbers = [{**asdict(row), "published": row.published, "fits": "; ".join(row.fitting_gpus)} for row in rows]
    with written_whole(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".md":
            stream.write(markdown(table))
        elif file.suffix == ".json":
            json.dump(numbers, stream, indent=1)
        else:
            writer = csv.DictWriter(stream, list(numbers[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(numbers)


def require_possible_file(file: Path | None) -> None:
    """Raise InputError for a file that no format belongs to, or whose folder is not there or cannot be written."""
    if file is None:
        return
    if file.suffix not in ENDINGS:
        raise InputError(f"file={file} has no known ending.", possible=ENDINGS, given=file.suffix)
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(
            f"file={file} cannot be written: {file.parent} is no folder of yours.", change="Make it first."
        )
