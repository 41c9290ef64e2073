"""Published storage, to stand beside what is predicted; `resources/published/PROVENANCE.md` says where it is from."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

UNITS = {"GB": " GB", "GiB": " GiB", "x": "x"}
UNIT_BYTES = {"GB": 10**9, "GiB": 2**30}
IDEAL_4 = "ideal_4"
# Marks of what a number counts, where it is not what would be stored; `KINDS_TEXT` explains them.
KINDS = {"all_16": "", "nf4_double": " (d)", "int8_attention_16": " (a)", "ideal_4": " (i)"}
KINDS_TEXT = "(d): double quantisation; (a): attention in 16 bits; (i): 4.0 bits for everything, no scales"


@dataclass(frozen=True)
class PublishedStorage:
    """One number of a table: ``storage`` in ``unit``, which is not always the unit that the table says.

    The unit "x" is how many times smaller than the unpruned model in 16 bits.
    """

    model: str
    ratio: float
    bits: int
    storage: float
    unit: str
    table: str
    kind: str

    @property
    def text(self) -> str:
        return f"{self.storage:g}{UNITS[self.unit]}{KINDS[self.kind]}"


@cache
def published_storage() -> tuple[PublishedStorage, ...]:
    """All rows, in the order of the file."""
    text = (files("moeprune.resources") / "published" / "storage.csv").read_text(encoding="utf-8")
    return tuple(
        PublishedStorage(
            row["model"], float(row["ratio"]), int(row["bits"]), float(row["storage"]), row["unit"], row["table"],
            row["kind"],
        )
        for row in csv.DictReader(text.splitlines())
    )  # fmt: skip
