"""Cutting without compensation: what goes is gone."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.surgery.prune import REMOVE_ROW, check_row_policy, prune
from moeprune.types import Plan


@dataclass(frozen=True)
class Cut:
    """Cut to the plan and nothing else; ``empty_experts`` (``remove_row`` or ``keep_row``) as in `prune`.

    The paper (arXiv 2606.18304) removes the router rows of experts that keep no channel.
    """

    empty_experts: str = REMOVE_ROW

    def __post_init__(self) -> None:
        check_row_policy(self.empty_experts)

    def __call__(
        self, model: PreTrainedModel, plan: Plan, statistics: Statistics, windows: TokenWindows, batch_size: int
    ) -> PreTrainedModel:
        """Cut in place. Raises InputError as `prune` does."""
        return prune(model, plan, self.empty_experts)
