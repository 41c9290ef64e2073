"""Perplexity on fixed windows of held-out text."""

import math

import torch
from torch.nn import functional as F

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import NumericalError
from moeprune.evaluation.fitting import with_fitting_batches
from moeprune.evaluation.logits import last_layer_outputs, logits_at
from moeprune.models.layers.streaming import Model, devices_of


def perplexity(model: Model, windows: TokenWindows, batch_size: int | str, name: str) -> float:
    """``exp(mean_t -log p(token_t | window before it))``, in natural units; a window's first token is not predicted.

    ``batch_size`` windows go through the model at once, or with "auto" as many as fit. Raises NumericalError when the
    loss is not finite, InputError when not even one window fits in memory.
    """
    what = f"perplexity {name}"
    loss_sum, predicted = with_fitting_batches(
        batch_size,
        devices_of(model)[0],
        len(windows.input_ids_NT),
        what,
        lambda size: _loss(model, windows, size, what),
    )
    if not math.isfinite(loss_sum):
        raise NumericalError(f"The loss on text {name!r} is {loss_sum}: the model computes NaN or infinity.")
    return math.exp(min(loss_sum / predicted, 700.0))


@torch.no_grad()
def _loss(model: Model, windows: TokenWindows, batch_size: int, what: str) -> tuple[float, int]:
    """The sum of ``-log p`` over all predicted tokens, and how many these are."""
    batches = windows.batches(batch_size)
    loss_sum, predicted = 0.0, 0
    for batch, y_BTH in zip(batches, last_layer_outputs(model, batches, what), strict=True):
        input_ids_BT, mask_BT = (part.to(y_BTH.device) for part in batch)
        targets_BT = input_ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
        predicted += int((targets_BT != -100).sum())
        for positions, logits_BPV in logits_at(model, batch, y_BTH, range(targets_BT.shape[1])):
            targets_BP = targets_BT[:, positions]
            loss = F.cross_entropy(logits_BPV.float().flatten(0, 1), targets_BP.flatten(), reduction="sum")
            loss_sum += float(loss)
    return loss_sum, predicted
