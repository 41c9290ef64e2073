"""Which row of ours a printed row is to be held against: equal method, ratio, bits and settings."""

from collections.abc import Sequence

from moeprune.report.published.results import PublishedResult, published_results
from moeprune.report.runs.seeds import Row
from moeprune.report.runs.settings import configured, overrides_of, setting_text

# 61.7% is 0.617 in print; 16 experts can express 62.5%.
SAME_RATIO, ALIKE_RATIO = 0.001, 0.01
EXPERTS_PER_TOKEN = "model.experts_per_token"
# Numbers of channels, which on experts of another width are another setting.
WIDTHS = ("model.minimum_width", "model.alignment")
# Of several of our quantizers with the same bits, the one whose bytes the paper's storage shows (Tab. R12).
PUBLISHED_QUANTIZER, PUBLISHED_BITS = "nf4_double", 4


def printed_rows(table: str) -> list[PublishedResult]:
    """The rows of a printed table by its name, such as ``Tab. R9``."""
    return [row for row in published_results() if row.table == table]


def joined(published: PublishedResult, rows: Sequence[Row], model: str, tolerance: float = SAME_RATIO) -> Row | None:
    """Our row on ``model`` for a printed row; None where nothing of the kind was run."""
    found = [
        row
        for row in rows
        if row.model == model
        and _same_method(published, row)
        and _same_ratio(published, row, tolerance)
        and _bits(row, rows) == published.bits
        and _same_settings(published, row)
    ]
    return min(found, key=lambda row: _distance(published, row), default=None)


def _distance(published: PublishedResult, row: Row) -> tuple[object, ...]:
    """Of several rows that a printed one could be held against: with results, nearest in ratio, of the published
    quantizer, with the fewest settings given, and recovered, as the printed ones are."""
    ratios = abs((published.likely_ratio or 0) - (row.ratio or 0))
    runs = (*row.runs, *row.unfinished)
    recovered = any(setting_text(run, "recovery") not in (None, "none") for run in runs)
    given = min(len(overrides_of(run).keys() - {"recovery"}) for run in runs)
    return not row.runs, round(ratios, 6), row.quantizer != PUBLISHED_QUANTIZER, given, not recovered


def _same_method(published: PublishedResult, row: Row) -> bool:
    if published.is_dense or row.is_dense:
        return published.is_dense and row.is_dense
    methods = {setting_text(run, "method") or "none" for run in (*row.runs, *row.unfinished)}
    if published.method in methods:
        return True
    # A table that varies one setting of the paper's method: our sweep of that setting need not name the method.
    return bool(published.settings) and methods == {"none"}


def _same_ratio(published: PublishedResult, row: Row, tolerance: float) -> bool:
    ratio = published.likely_ratio
    return ratio is not None and row.ratio is not None and abs(ratio - row.ratio) <= tolerance


def _bits(row: Row, rows: Sequence[Row]) -> float | None:
    """Of a row without results, those of its quantizer in another row."""
    known = (one.bits for one in (row, *rows) if one.quantizer == row.quantizer and one.bits is not None)
    return next(known, PUBLISHED_BITS if row.quantizer == PUBLISHED_QUANTIZER else None)


def _same_settings(published: PublishedResult, row: Row) -> bool:
    asked = dict(published.settings)
    experts = asked.pop(EXPERTS_PER_TOKEN, None)
    if row.experts_per_token != (None if experts is None else int(experts)):
        return False
    if row.model != published.model and any(key in asked for key in WIDTHS):
        return False
    runs = (*row.runs, *row.unfinished)
    return all(configured(run, key) == value for key, value in asked.items() for run in runs)
