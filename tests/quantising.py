"""Quantised models for tests of other rooms than quantization."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from moeprune.calibration.windows import TokenWindows
from moeprune.models.layers.walk import run_through

WINDOWS = TokenWindows(
    torch.randint(1, 257, (3, 12), generator=torch.Generator().manual_seed(3)), torch.ones(3, 12, dtype=torch.int64)
)


def quantised(model: PreTrainedModel, quantizer: Callable) -> PreTrainedModel:
    """The model, quantised in place; a quantizer that asks for calibration gets random tokens."""
    run_through(quantizer(model, WINDOWS if quantizer.needs_calibration else None, 2))
    return model
