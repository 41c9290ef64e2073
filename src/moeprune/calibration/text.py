"""Where calibration and evaluation text comes from: named texts, read only when a stage needs them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeprune.embedded import corpus
from moeprune.errors import InputError


@dataclass(frozen=True)
class EmbeddedText:
    """Domains of the text that ships with the package; ``part`` is "training" or the held-out "validation"."""

    domains: Sequence[str]
    part: Literal["training", "validation"]

    def read(self) -> dict[str, str]:
        """{domain: text}."""
        text_of = corpus.training_text if self.part == "training" else corpus.validation_text
        return {domain: text_of(domain) for domain in self.domains}

    def identity(self) -> dict[str, object]:
        """What the content depends on, for cache keys."""
        return {"embedded": list(self.domains), "part": self.part}


@dataclass(frozen=True)
class TextFiles:
    """Local UTF-8 text files under names of the user's choice."""

    files: Mapping[str, str]

    def read(self) -> dict[str, str]:
        """{name: text}. Raises InputError for a file that is missing, unreadable, not UTF-8, or empty."""
        return {name: self._read_file(name, Path(path)) for name, path in self.files.items()}

    def identity(self) -> dict[str, object]:
        """What the content depends on, for cache keys: the files' digests."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.read().items()}

    @staticmethod
    def _read_file(name: str, path: Path) -> str:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"Text {name!r}: {path} does not exist.", change="Give the path of a text file.") from None
        except OSError as error:
            raise InputError(
                f"Text {name!r}: {path} cannot be read: {error.strerror}.", change="Give the path of a text file."
            ) from None
        except UnicodeDecodeError:
            raise InputError(f"Text {name!r}: {path} is not UTF-8 text.", change="Convert it to UTF-8.") from None
        if not text.strip():
            raise InputError(f"Text {name!r}: {path} is empty.", change="Give a file with text in it.")
        return text
