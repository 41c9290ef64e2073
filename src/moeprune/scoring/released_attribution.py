"""Attribution with the options of the code released with the paper."""

from dataclasses import dataclass

from moeprune.calibration.released_attribution import ReleasedAttribution, ReleasedAttributionPass
from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import scores_by_sum
from moeprune.types import Scores


@dataclass(frozen=True)
class ReleasedAttributionScorer:
    """Channels [L, E, C] and experts [L, E] by attribution, as the code released with arXiv 2606.18304 takes it.

    Contributions of tokens are clipped at the ``clip_quantile`` of their channel within a batch and averaged over
    batches with weight ``ema``; see `ReleasedAttributionPass` for the formula and our reading. With ``usage``, all
    scores of an expert are multiplied by N_e / T, the share of tokens routed to it. An expert's attribution is the sum
    of its channels' clipped ones. ``ema`` and ``clip_quantile`` None, ``usage`` off: the plain attribution.
    """

    ema: float | None = 0.9
    clip_quantile: float | None = 0.99
    usage: bool = True

    def __post_init__(self) -> None:
        _ = self.passes  # refuses impossible settings before a model is loaded

    @property
    def passes(self) -> tuple[ReleasedAttributionPass, ...]:
        return (ReleasedAttributionPass(self.ema, self.clip_quantile),)

    def __call__(self, statistics: Statistics, attribution: ReleasedAttribution) -> Scores:
        channel_LEC = attribution.attribution_LEC
        if self.usage:
            channel_LEC = channel_LEC * (statistics.routed_tokens_LE / statistics.tokens).unsqueeze(-1)
        return scores_by_sum(channel_LEC, statistics)
