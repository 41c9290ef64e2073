"""Perplexity on fixed windows of held-out text."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import NumericalError


@torch.no_grad()
def perplexity(model: nn.Module, windows: TokenWindows, batch_size: int, name: str) -> float:
    """``exp(mean_t -log p(token_t | window before it))``, in natural units; a window's first token is not predicted.

    Raises NumericalError when the loss is not finite.
    """
    device = next(model.parameters()).device
    loss_sum, predicted = 0.0, 0
    for input_ids_BT, mask_BT in tqdm(windows.batches(batch_size), desc=f"perplexity {name}", leave=False):
        input_ids_BT, mask_BT = input_ids_BT.to(device), mask_BT.to(device)
        logits_BTV = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
        targets_BT = input_ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
        loss_sum += float(F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"))
        predicted += int((targets_BT != -100).sum())
    if not math.isfinite(loss_sum):
        raise NumericalError(f"The loss on text {name!r} is {loss_sum}: the model computes NaN or infinity.")
    return math.exp(min(loss_sum / predicted, 700.0))
