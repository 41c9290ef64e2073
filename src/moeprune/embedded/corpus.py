"""The embedded models' text: five domains that differ, each split once into training, validation and task lines."""

import lzma
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from moeprune.embedded.arithmetic import arithmetic_lines
from moeprune.errors import InputError

DOMAINS = ("prose", "scripture", "speeches", "code", "arithmetic")

# A split by blocks of consecutive lines keeps passages whole; every 20th block is held out,
# alternately for perplexity and for the tasks.
BLOCK_LINES = 50
HELD_OUT_EVERY = 20
ARITHMETIC_LINES = 60_000


@cache
def domain_lines(domain: str) -> tuple[str, ...]:
    """All lines of one domain in their original order. Raises InputError for a domain that does not exist."""
    if domain not in DOMAINS:
        raise InputError(f"Text domain {domain!r} does not exist.", possible=DOMAINS)
    if domain == "arithmetic":
        return tuple(arithmetic_lines(ARITHMETIC_LINES))
    packed = files("moeprune.resources") / "corpus" / f"{domain}.txt.xz"
    return tuple(lzma.decompress(packed.read_bytes()).decode("utf-8").splitlines())


def training_text(domain: str) -> str:
    """What the embedded models are trained on and calibrated with."""
    return "\n".join(_blocks(domain, "training"))


def validation_text(domain: str) -> str:
    """Held-out text for perplexity: its blocks are never trained on, and no line of it occurs in the training text."""
    return "\n".join(_held_out(domain, "validation"))


def task_lines(domain: str) -> list[str]:
    """Held-out lines that the tasks are built from, disjoint from the training lines and the validation blocks."""
    return _held_out(domain, "tasks")


def _held_out(domain: str, part: str) -> list[str]:
    trained = set(_blocks(domain, "training"))
    return [line for line in _blocks(domain, part) if line not in trained]


def _blocks(domain: str, part: str) -> Sequence[str]:
    lines = domain_lines(domain)
    chosen: list[str] = []
    for start in range(0, len(lines), BLOCK_LINES):
        if _part_of_block(start // BLOCK_LINES) == part:
            chosen.extend(lines[start : start + BLOCK_LINES])
    return chosen


def _part_of_block(block: int) -> str:
    if block % HELD_OUT_EVERY != HELD_OUT_EVERY - 1:
        return "training"
    return "validation" if (block // HELD_OUT_EVERY) % 2 == 0 else "tasks"
