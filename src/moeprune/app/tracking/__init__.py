"""Weights & Biases: the numbers of the run directory, and while a run is under way where it stands."""

from moeprune.app.tracking.names import summary_metrics
from moeprune.app.tracking.tracker import NoTracker, WandbTracker

__all__ = ["NoTracker", "WandbTracker", "summary_metrics"]
