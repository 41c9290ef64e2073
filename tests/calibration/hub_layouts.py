"""Data sets of the hub in small: the fields and the files of each, with sentences of our own."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

SENTENCES = (
    "The ferry left before noon, and nobody on the quay waved.",
    "A map of the valley hung above the stove for thirty years.",
    "Rain found the one loose tile, as it does every October.",
    "She counted the lamps along the harbour and wrote the number down.",
)


@dataclass(frozen=True)
class HubLayout:
    """``records`` as the data set has them, and the path of the file that they lie in."""

    records: Sequence[dict[str, Any]]
    file: str
    card: str = ""

    def write(self, folder: Path) -> Path:
        """A folder laid out as the repository of the data set."""
        target = folder / self.file
        target.parent.mkdir(parents=True, exist_ok=True)
        _written_as(target.suffix)(self.records, target)
        if self.card:
            (folder / "README.md").write_text(self.card)
        return folder


def _written_as(suffix: str) -> Callable[[Sequence[dict[str, Any]], Path], object]:
    return _json_lines if suffix == ".gz" else _parquet


def _json_lines(records: Sequence[dict[str, Any]], target: Path) -> None:
    target.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


def _parquet(records: Sequence[dict[str, Any]], target: Path) -> None:
    Dataset.from_list(list(records)).to_parquet(target)


def _card(subset: str, files: str) -> str:
    """The part of a card that names a subset's files."""
    return f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: {files}\n---\n"


def _plain(**more: Any) -> list[dict[str, Any]]:
    return [{"text": " ".join([sentence] * 6), **more} for sentence in SENTENCES]


LAYOUTS = {
    "c4": HubLayout(
        _plain(timestamp="2019-04-25T12:57:54Z", url="https://example.org/"), "en/c4-train.00000-of-01024.json.gz"
    ),
    "wikitext2": HubLayout(
        [
            line
            for number, record in enumerate(_plain())
            for line in ({"text": ""}, {"text": f" = Heading {number} = \n"}, {"text": f" {record['text']} \n"})
        ],
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        _card("wikitext-2-raw-v1", "wikitext-2-raw-v1/train-*"),
    ),
    "pile": HubLayout(_plain(meta={"pile_set_name": "Pile-CC"}), "data/train-00000-of-00001-4746b8785c874cc7.parquet"),
    "redpajama": HubLayout(
        _plain(meta={"redpajama_set_name": "RedPajamaC4"}), "data/train-00000-of-00048-ab2b35705f029d94.parquet"
    ),
    "gsm8k": HubLayout(
        [
            {"question": f"{text} How many words are that?", "answer": f"It has <<4+6=10>>10.\n#### {n}"}
            for n, text in enumerate(SENTENCES * 2)
        ],
        "main/train-00000-of-00001.parquet",
        _card("main", "main/train-*"),
    ),
    "open_code_reasoning": HubLayout(
        [
            {
                "id": "0a", "input": f"Print this: {text}", "output": f"<think>\n{text}\n</think>\nprint({text!r})" * 3,
                "source": "codeforces", "license": "cc-by-4.0", "dataset": "taco", "split": "train",
                "difficulty": "EASY", "solution": f"print({text!r})",
            }
            for text in SENTENCES
        ],
        "split_0/train-00000-of-00030.parquet",
    ),
    "alpaca": HubLayout(
        [
            {"instruction": "Say it again.", "input": text if n % 2 else "", "output": text * 3, "text": "as a prompt"}
            for n, text in enumerate(SENTENCES)
        ],
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    ),
}  # fmt: skip
