"""How numbers are written in tables, plots and sentences."""

import math
from collections.abc import Iterable, Mapping

from moeprune.report.runs.variants import TaskScore

MISSING = "-"
MEGABYTE, GIGABYTE = 10**6, 10**9


def perplexity_text(perplexity: float) -> str:
    if not math.isfinite(perplexity):
        return str(perplexity)
    if perplexity < 100:
        return f"{perplexity:.2f}"
    return f"{perplexity:.1f}" if perplexity < 10_000 else f"{perplexity:.2e}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else perplexity_text(ratio)


def accuracy_text(score: TaskScore | None) -> str:
    """Percent with its standard error, where the harness gives one: ``91.0 ± 2.0``."""
    if score is None:
        return MISSING
    percent = f"{100 * score.accuracy:.1f}"
    return percent if score.stderr is None else f"{percent} ± {100 * score.stderr:.1f}"


def rate_text(rate: float) -> str:
    """A learning rate, as people write it: ``1e-4``, ``2.5e-6``."""
    digits, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if rate else "0"


def parameter_text(count: int) -> str:
    """Millions (M, 1e6) or billions (B, 1e9); small counts whole."""
    if count < 10**5:
        return f"{count:,}"
    return f"{count / 10**9:.2f}B" if count >= 10**9 else f"{count / 10**6:.2f}M"


def byte_unit(dense_counts: Iterable[int | None]) -> tuple[int, str]:
    """The unit for models of these dense sizes: (1e9, "GB") where all reach it, else (1e6, "MB")."""
    smallest = min((count for count in dense_counts if count), default=0)
    return (GIGABYTE, "GB") if smallest >= GIGABYTE else (MEGABYTE, "MB")


def byte_unit_note(unit: str) -> str:
    return f"1 {unit} = 1e{6 if unit == 'MB' else 9} bytes"


def bytes_text(count: int | None, dense: int | None, unit_bytes: int) -> str:
    """Size, and how many times smaller than dense it is: ``1.92 (4.49x)``."""
    if not count:
        return MISSING
    size = f"{count / unit_bytes:.2f}"
    return f"{size} ({dense / count:.2f}x)" if dense else size


def counts_text(counts: Iterable[Mapping[str, int]]) -> str:
    """``prose 8128, code 4096 to 8128``: the count of each name, with its range where it differs."""
    ranges: dict[str, list[int]] = {}
    for count_of in counts:
        for name, count in count_of.items():
            ranges.setdefault(name, []).append(count)
    texts = []
    for name, seen in ranges.items():
        low, high = min(seen), max(seen)
        texts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return ", ".join(texts)


def experts_text(per_token: int) -> str:
    """How many experts each token is sent to."""
    return f"{per_token} {'expert' if per_token == 1 else 'experts'} per token"
