"""True ablation: experts by the loss of their layer without them."""

from dataclasses import dataclass, replace

from moeprune.calibration.expert_ablation import ExpertAblationPass, ExpertAblations
from moeprune.calibration.statistics import Statistics
from moeprune.scoring.activation import ActivationScorer
from moeprune.types import Scores


@dataclass(frozen=True)
class TrueAblationScorer:
    """Experts by the block-local loss that leaving each out really costs (arXiv 2606.18304, "true ablation").

    The loss [L, E] is that of `ExpertAblationPass`, routing decided anew, over ``tokens`` tokens drawn with ``seed``.
    Channels and layers are scored as `ActivationScorer` does, so that only the expert score differs from the paper's
    first order.
    """

    tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.passes  # refuses impossible settings before a model is loaded

    @property
    def passes(self) -> tuple[ExpertAblationPass, ...]:
        return (ExpertAblationPass(self.tokens, self.seed),)

    def __call__(self, statistics: Statistics, ablations: ExpertAblations) -> Scores:
        return replace(ActivationScorer()(statistics), expert_LE=ablations.loss_LE)
