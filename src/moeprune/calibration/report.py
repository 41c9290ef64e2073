"""Was the calibration text enough for every expert, and is evaluation text among it?"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows

log = logging.getLogger(__name__)

QUARTILES = {"min": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "max": 1.0}
NGRAM = 13
# Set phrases make a few of any two texts of one kind the same; beyond this share passages are.
SHARED_TOO_MANY = 0.01
LISTED_LAYERS, LISTED_EXPERTS = 4, 8
WINDOWS_AT_ONCE = 64


def calibration_report(statistics: Statistics, fewest_tokens: int) -> dict[str, Any]:
    """How many calibration tokens reached the experts of each MoE layer, as plain values.

    ``tokens`` in all; ``layers``: min, quartiles (linear between experts) and max over the experts of N_e, the tokens
    routed to expert e, and ``scarce_experts``, those with N_e < ``fewest_tokens``. Layers and experts count from 0.
    """
    layers = []
    for tokens_E in statistics.routed_tokens_LE.double():
        quantiles = torch.quantile(tokens_E, torch.tensor(list(QUARTILES.values()), dtype=torch.float64)).tolist()
        scarce = (tokens_E < fewest_tokens).nonzero().flatten().tolist()
        layers.append({**dict(zip(QUARTILES, quantiles, strict=True)), "scarce_experts": scarce})
    return {"tokens": int(statistics.tokens), "fewest_tokens": fewest_tokens, "layers": layers}


def shared_ngrams(calibration: TokenWindows, evaluation: TokenWindows, n: int = NGRAM) -> float | None:
    """Share of the distinct n-grams of the evaluation token ids that occur in the calibration windows, from 0 to 1.

    None when no evaluation window is as long as n. An n-gram lies inside one window and covers no padding. The count
    is exact; memory is that of the evaluation's n-grams, whatever the amount of calibration text. n = 13 is the
    customary length for finding test text in training text (GPT-3, 2005.14165, appendix C).
    """
    asked = {ngram for ngrams in _ngrams(evaluation, n) for ngram in ngrams}
    if not asked:
        return None
    found: set[bytes] = set()
    for ngrams in _ngrams(calibration, n):
        found.update(asked.intersection(ngrams))
    return len(found) / len(asked)


def log_warnings(report: Mapping[str, Any]) -> None:
    """Warn of experts that saw too few tokens, and of each evaluation text that shares n-grams (``shared_ngrams``)."""
    scarce = {layer: each["scarce_experts"] for layer, each in enumerate(report["layers"]) if each["scarce_experts"]}
    if scarce:
        listed = [f"layer {layer}: {_listed(experts)}" for layer, experts in list(scarce.items())[:LISTED_LAYERS]]
        listed += [f"and {len(scarce) - LISTED_LAYERS} more layers"] if len(scarce) > LISTED_LAYERS else []
        log.warning(
            "%d experts in %d of %d MoE layers saw fewer than %d calibration tokens (%s); their scores are uncertain. "
            "Raise calibration.windows.",
            sum(map(len, scarce.values())), len(scarce), len(report["layers"]), report["fewest_tokens"],
            "; ".join(listed),
        )  # fmt: skip
    for name, share in report["shared_ngrams"].items():
        if share is not None and share >= SHARED_TOO_MANY:
            log.warning(
                "%.3g%% of the %d-grams of evaluation text %s are in the calibration text: its perplexity may flatter.",
                100 * share, NGRAM, name,
            )  # fmt: skip


def _ngrams(windows: TokenWindows, n: int) -> Iterator[list[bytes]]:
    """The n-grams of some windows at a time, each as the bytes of its token ids."""
    if windows.input_ids_NT.shape[1] < n:
        return
    for input_ids_BT, mask_BT in windows.batches(WINDOWS_AT_ONCE):
        runs = np.lib.stride_tricks.sliding_window_view(input_ids_BT.numpy().astype(np.int32), n, axis=1)
        counted = np.lib.stride_tricks.sliding_window_view(mask_BT.numpy() != 0, n, axis=1).all(axis=-1)
        yield np.ascontiguousarray(runs[counted]).view(np.dtype((np.void, 4 * n))).ravel().tolist()  # type: ignore[misc]


def _listed(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:LISTED_EXPERTS]))
    return f"{shown} and {len(experts) - LISTED_EXPERTS} more" if len(experts) > LISTED_EXPERTS else shown
