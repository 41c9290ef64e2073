"""AIMER: whole experts by the shape of their weights' distribution, without looking at data."""

from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class AimerScorer:
    """Experts by how concentrated their weights are (AIMER, arXiv 2603.18492).

        1 - mean |W| / rms W   over all weights of gate, up and down projection together          [L, E]

    The paper removes the experts with the largest ratio of absolute mean over root mean square. The ratio is at most 1,
    so one minus it ranks the same, is never negative, and can be compared and normalised like other scores. The three
    matrices are read as one vector, not as the mean of three ratios. An expert whose weights are all 0 scores 0.
    Channels get no score; the layers' loss is the only thing that needs data.
    """

    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        absolute_LEC = (
            statistics.gate_row_abs_sum_LEC + statistics.up_row_abs_sum_LEC + statistics.down_column_abs_sum_LEC
        )
        square_LEC = (
            statistics.gate_row_norm_LEC.square()
            + statistics.up_row_norm_LEC.square()
            + statistics.down_column_norm_LEC.square()
        )
        width, hidden = square_LEC.shape[-1], statistics.output_sum_LEH.shape[-1]
        mean_LE = absolute_LEC.sum(dim=-1) / (3 * width * hidden)
        root_mean_square_LE = (square_LEC.sum(dim=-1) / (3 * width * hidden)).sqrt()
        ratio_LE = (mean_LE / root_mean_square_LE).where(root_mean_square_LE > 0, 1.0)
        return Scores(None, 1 - ratio_LE, block_local_loss_L(statistics))
