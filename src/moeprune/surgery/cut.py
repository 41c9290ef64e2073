"""Cutting without compensation: what goes is gone."""

from collections.abc import Iterator
from dataclasses import dataclass

from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.surgery.prune import REMOVE_ROW, FinishedLayer, check_row_policy, cut_layers
from moeprune.types import Plan


@dataclass(frozen=True)
class Cut:
    """Cut to the plan and nothing else; ``empty_experts`` (``remove_row`` or ``keep_row``) as in `cut_layers`.

    The paper (arXiv 2606.18304) removes the router rows of experts that keep no channel.
    """

    empty_experts: str = REMOVE_ROW

    def __post_init__(self) -> None:
        check_row_policy(self.empty_experts)

    def __call__(
        self,
        model: Model,
        plan: Plan,
        statistics: Statistics,
        windows: TokenWindows,
        batch_size: int,
        workspace: Workspace = IN_MEMORY,
    ) -> Iterator[FinishedLayer]:
        """Cut in place, layer by layer. Raises InputError as `cut_layers` does."""
        return cut_layers(model, plan, self.empty_experts, workspace)
