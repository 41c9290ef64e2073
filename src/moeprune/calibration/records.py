"""Where records come from: a local JSON file, a data set on the Hugging Face hub, or a local copy of one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import InputError, require_positive
from moeprune.models.digest import file_digest

Record = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class RecordSource:
    """Records of a local UTF-8 file, of a data set on the hub by its name, or of a folder laid out as one.

    A file is ``.json`` with one list of objects, or ``.jsonl`` with an object per line; it can stand in for a data set
    where there is no connection. Of a data set: ``subset`` is its configuration, where it has several; ``files`` a
    pattern, where only some of its files are wanted (they are the split "train"); ``revision`` a commit, without which
    the newest is taken, and a cached result is not known to be of an older one. With ``first`` only so many records are
    read, in the order of the files; with ``stream`` no more than these are downloaded, and nothing is kept of them,
    else the files are, whole and once, so that a machine without a connection finds them.

    Raises InputError for ``first`` below 1.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    files: str | None = None
    revision: str | None = None
    first: int | None = None
    stream: bool = True

    def __post_init__(self) -> None:
        if self.first is not None:
            require_positive(self, "first")

    def read(self) -> Sequence[Record]:
        """The records, in their order. Raises InputError for what is missing or holds no records, with the line."""
        records = self._of_file() if self._is_file() else self._of_data_set()
        if len(records) == 0:
            raise InputError(f"{self.path} holds no record.", change="Give a file or a split with at least one.")
        return records

    def identity(self) -> dict[str, object]:
        """What the content depends on, for cache keys: of files their digest, of the hub's data the name and commit."""
        if self._is_file():
            content = hashlib.sha256(self._text().encode()).hexdigest()
            return {"suffix": Path(self.path).suffix, "content": content, "first": self.first}
        settings = {name: value for name, value in asdict(self).items() if name != "stream"}  # the records are the same
        if Path(self.path).is_dir():
            settings["path"] = self._folder_digest()
        return settings

    def _is_file(self) -> bool:
        return Path(self.path).suffix in SUFFIXES

    def _of_data_set(self) -> Sequence[Record]:
        if Path(self.path).is_file():
            raise InputError(f"{self.path} is no .json or .jsonl file.", change="Give the path of one, or a hub name.")
        import datasets  # takes seconds, and most runs do not need it

        streams = self.stream and self.first is not None
        try:
            records: Any = datasets.load_dataset(
                self.path,
                self.subset,
                split=self.split,
                data_files=self.files,
                revision=self.revision,
                streaming=streams,
            )
            return records if self.first is None else list(records.take(self.first))
        except Exception as error:  # the library raises a dozen kinds
            kept = "records.stream=false and HF_HOME" if streams else "HF_HOME"
            raise InputError(
                f"The data set {self.path} cannot be had: {error}",
                change=f"Check the name and the connection. Without one, set {kept} to a cache that holds it, or "
                "records.path to a .json or .jsonl file of its records or to a folder with a copy of it.",
            ) from error

    def _folder_digest(self) -> str:
        digest, folder = hashlib.sha256(), Path(self.path)
        for file in sorted(file for file in folder.glob(self.files or "**/*") if file.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file_digest(file))
        return digest.hexdigest()

    def _of_file(self) -> Sequence[Record]:
        text = self._text()
        if Path(self.path).suffix == ".json":
            return self._of_list(text)[: self.first]
        # Not splitlines: it also splits at characters that JSON allows within a string.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [self._of_line(number, line) for number, line in lines[: self.first]]

    def _of_line(self, number: int, line: str) -> Record:
        try:
            return self._checked(json.loads(line), f"line {number}")
        except json.JSONDecodeError as error:
            raise self._damaged(number, error) from None

    def _of_list(self, text: str) -> Sequence[Record]:
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._damaged(error.lineno, error) from None
        if not isinstance(records, list):
            raise InputError(f"{self.path} holds a {type(records).__name__}.", change="Give a list of objects.")
        return [self._checked(record, f"record {number}") for number, record in enumerate(records, start=1)]

    def _damaged(self, line: int, error: json.JSONDecodeError) -> InputError:
        return InputError(
            f"{self.path}, line {line}, column {error.colno}: {error.msg}.",
            change="A .json file holds one list of objects, a .jsonl file an object per line.",
        )

    def _checked(self, record: object, where: str) -> Record:
        if not isinstance(record, dict):
            raise InputError(f"{self.path}, {where}: {str(record)[:60]} is no object.", change="Use {field: value}.")
        return record

    def _text(self) -> str:
        change = "Give the path of a .json or .jsonl file."
        try:
            return Path(self.path).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"{self.path} does not exist.", change=change) from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.", change=change) from None
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is not UTF-8 text.", change="Convert it to UTF-8.") from None
