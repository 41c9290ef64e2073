"""Attribution as the code released with the paper accumulates it: clipped per token, averaged over batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_gradients import ExpertGradients, block_local_gradients
from moeprune.calibration.recorder import at_least_float32
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, Workspace


@dataclass(frozen=True)
class ReleasedAttribution:
    """``attribution_LEC``, float64: see `ReleasedAttributionPass`."""

    attribution_LEC: Tensor

    def save(self, path: Path) -> None:
        save_fields(self, path)


@dataclass(frozen=True)
class ReleasedAttributionPass:
    """Channel attribution with the options of the code released with arXiv 2606.18304.

    A token's contribution to channel c of an expert is ``-h dLoss/dh = 2 alpha (1 - alpha) q g h <w_c, m>``. Within a
    batch, its absolute value is clipped at the ``clip_quantile`` (0.99) over the tokens of that channel, linearly
    interpolated; the clipped contributions are summed. Over batches, the sums a are averaged exponentially, ``A = ema
    A + (1 - ema) a`` (0.9), so the result is of the size of one batch and depends on how the windows are batched.

    The source names the constants only. Our reading: the first batch starts the average, and an expert that got no
    token in a batch contributed 0 there. ``clip_quantile`` None clips nothing; ``ema`` None sums the batches; with both
    None the result is the closed form of `moeprune.scoring.attribution`.

    Raises InputError for values outside [0, 1) and (0, 1].
    """

    ema: float | None = 0.9
    clip_quantile: float | None = 0.99
    alpha: float = 0.9

    stage: ClassVar[str] = "released_attribution"
    version: ClassVar[int] = 2
    refuses_float16: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema={self.ema} is not possible.", change="Use a number from 0 to below 1, or null.")
        if self.clip_quantile is not None and not 0 < self.clip_quantile <= 1:
            raise InputError(
                f"clip_quantile={self.clip_quantile} is not possible.", change="Use a number above 0 up to 1, or null."
            )

    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> ReleasedAttribution:
        attribution_L: list[Tensor | None] = [None] * len(moe_layers(skeleton(model)))

        def receive(gradients: ExpertGradients) -> None:
            before_EC, batch_EC = attribution_L[gradients.layer], self._batch_EC(gradients)
            if before_EC is None:
                attribution_L[gradients.layer] = batch_EC
            elif self.ema is None:
                attribution_L[gradients.layer] = before_EC + batch_EC
            else:
                attribution_L[gradients.layer] = self.ema * before_EC + (1 - self.ema) * batch_EC

        block_local_gradients(model, windows, batch_size, self.alpha, receive, "released attribution", workspace)
        return ReleasedAttribution(torch.stack([layer_EC for layer_EC in attribution_L if layer_EC is not None]))

    def load(self, path: Path) -> ReleasedAttribution:
        return load_fields(ReleasedAttribution, path)

    @torch.no_grad()
    def _batch_EC(self, gradients: ExpertGradients) -> Tensor:
        """The clipped contributions of one batch, summed over tokens."""
        width = gradients.h_AC.shape[1]
        batch_EC = torch.zeros(len(gradients.routed.counts), width, dtype=torch.float64)
        for expert, rows in gradients.routed.active():
            valid_n = gradients.valid_A[rows]
            h_nC, d_nC = gradients.h_AC[rows][valid_n], gradients.dh_AC[rows][valid_n]
            contribution_nC = -at_least_float32(h_nC) * at_least_float32(d_nC)
            if self.clip_quantile is not None and len(contribution_nC):
                limit_C = _quantile_C(contribution_nC.abs(), self.clip_quantile)
                contribution_nC = contribution_nC.clamp(-limit_C, limit_C)
            batch_EC[expert] = contribution_nC.sum(dim=0, dtype=torch.float64).cpu()
        return batch_EC


def _quantile_C(values_nC: Tensor, quantile: float) -> Tensor:
    """The quantile over rows, linearly interpolated; torch.quantile refuses more than 16 million values."""
    sorted_nC = values_nC.sort(dim=0).values
    place = quantile * (len(sorted_nC) - 1)
    low = int(place)
    high = min(low + 1, len(sorted_nC) - 1)
    return sorted_nC[low].lerp(sorted_nC[high], place - low)
