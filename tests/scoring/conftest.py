"""Statistics of a tiny model beside what was seen while they were gathered."""

from collections.abc import Callable

import pytest
import torch

from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows


@pytest.fixture
def seen_statistics(tiny_model_64, random_windows, seen_layers) -> Callable:
    """``seen_statistics(windows=None)``: (Statistics, [SeenLayer]) of ``tiny_model_64``, all windows in one batch."""

    @torch.no_grad()
    def gather(windows: TokenWindows = random_windows):
        with seen_layers(tiny_model_64) as seen:
            statistics = collect_statistics(tiny_model_64, windows, batch_size=len(windows.input_ids_NT))
        return statistics, seen

    return gather


@pytest.fixture
def few_tokens(random_windows) -> TokenWindows:
    """One window of four tokens: experts get one token or none."""
    return TokenWindows(random_windows.input_ids_NT[:1, :4], random_windows.mask_NT[:1, :4])


@pytest.fixture(params=["many", "few"])
def seen_and_statistics(request, seen_statistics, few_tokens):
    """Also with so few tokens that experts get one or none."""
    statistics, seen = seen_statistics() if request.param == "many" else seen_statistics(few_tokens)
    return seen, statistics
