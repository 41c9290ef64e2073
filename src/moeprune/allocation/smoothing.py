"""Smoothing of layer losses, which differ by orders of magnitude, before layers share a budget by them."""

import torch
from torch import Tensor

from moeprune.errors import InputError, require_choice

SMOOTHINGS = ("none", "sqrt", "log", "huber", "clip")


def require_smoothing(smoothing: str, rounds: int) -> None:
    """Raise InputError for settings that `smoothed_loss` does not know."""
    require_choice("smoothing", smoothing, SMOOTHINGS)
    if rounds < 0:
        raise InputError(f"smoothing_rounds={rounds} is not possible.", change="Use 0 or more.")


def smoothed_loss(loss_L: Tensor, smoothing: str, rounds: int) -> Tensor:
    """Losses x, clipped at 0, brought closer together and normalised to mean 1 [L]; ones when all are 0.

    With mean mu and standard deviation sigma of x:

        none    x
        sqrt    ``rounds`` times: square root, then clipping at mean +- standard deviation (of the roots)
        log     log(1 + x / mu)
        huber   x up to t = mu + sigma, sqrt(t (2 x - t)) above: the root of twice the Huber loss with knee t
        clip    x clipped at mu +- sigma

    arXiv 2606.18304 uses ``sqrt`` and only names the others (and gives no number of rounds): their formulas are our
    reading. All are monotone and do not depend on the unit of the loss.
    """
    loss_L = loss_L.clamp(min=0)
    if not bool((loss_L > 0).any()):
        return torch.ones_like(loss_L)
    if smoothing == "sqrt":
        for _ in range(rounds):
            loss_L = _clipped(loss_L.sqrt())
    elif smoothing == "log":
        loss_L = torch.log1p(loss_L / loss_L.mean())
    elif smoothing == "huber":
        knee = loss_L.mean() + loss_L.std(correction=0)
        loss_L = torch.where(loss_L <= knee, loss_L, (knee * (2 * loss_L - knee)).clamp(min=0).sqrt())
    elif smoothing == "clip":
        loss_L = _clipped(loss_L)
    return loss_L / loss_L.mean()


def _clipped(loss_L: Tensor) -> Tensor:
    mean, deviation = float(loss_L.mean()), float(loss_L.std(correction=0))
    return loss_L.clamp(min=mean - deviation, max=mean + deviation)
