"""``diagnostics.json`` of a run, read into frozen dataclasses of arrays; numbers that do not exist are NaN."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import InputError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Concentration:
    """How unequal channel scores are: mean Lorenz curve of each layer's experts at ``positions_X``; per expert the Gini
    coefficient and the share of the score in its top 10% of channels; Gini over all channels of a layer."""

    positions_X: Numbers
    lorenz_LX: Numbers
    gini_LE: Numbers
    top_tenth_LE: Numbers
    layer_gini_L: Numbers


@dataclass(frozen=True)
class Coverage:
    """Share of the channel scores that the plan keeps, and its objective beside the best that any plan could reach."""

    expert_LE: Numbers
    layer_L: Numbers
    objective: float
    upper_bound: float
    gap: float


@dataclass(frozen=True)
class Diagnostics:
    """Kept channels out of ``width``, router entropy in nats, and what only scores of channels can tell."""

    width: int
    kept_LE: Numbers
    merged: bool
    entropy_nats_L: Numbers
    concentration: Concentration | None
    coverage: Coverage | None


def load_diagnostics(path: Path) -> Diagnostics:
    """Read the file. Raises InputError when it is damaged or lacks an entry."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        scores, coverage = raw["channel_scores"], raw["coverage"]
        return Diagnostics(
            width=raw["width"],
            kept_LE=_numbers(raw["kept_channels"]),
            merged=raw["merged_into"] is not None,
            entropy_nats_L=_numbers(raw["router_entropy"]["nats"]),
            concentration=None if scores is None else _concentration(scores),
            coverage=None if coverage is None else _coverage(coverage),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or lacks an entry: {error}.", change="Run again.") from error


def _concentration(raw: Mapping[str, Any]) -> Concentration:
    return Concentration(
        positions_X=_numbers(raw["lorenz_positions"]),
        lorenz_LX=_numbers(raw["lorenz"]),
        gini_LE=_numbers(raw["gini"]),
        top_tenth_LE=_numbers(raw["top_tenth"]),
        layer_gini_L=_numbers(raw["layer_gini"]),
    )


def _coverage(raw: Mapping[str, Any]) -> Coverage:
    numbers = (float(raw[name]) for name in ("objective", "upper_bound", "gap"))
    return Coverage(_numbers(raw["expert"]), _numbers(raw["layer"]), *numbers)


def _numbers(values: Any) -> Numbers:
    return np.array(values, dtype=np.float64)  # None becomes NaN
