"""Means over the tokens routed to an expert."""

from torch import Tensor

from moeprune.calibration.statistics import Statistics


def per_routed_token(sum_LEx: Tensor, statistics: Statistics) -> Tensor:
    """``sum / N_e`` for sums with leading axes [L, E]; 0 for an expert that no token reached, whose sums are 0."""
    tokens_LE = statistics.routed_tokens_LE.clamp(min=1)
    return sum_LEx / tokens_LE.reshape(tokens_LE.shape + (1,) * (sum_LEx.dim() - 2))


def variance_over_routed_tokens(sum_LEx: Tensor, sq_sum_LEx: Tensor, statistics: Statistics) -> Tensor:
    """``sum x^2 / N_e - (sum x / N_e)^2``, the population variance, at least 0; 0 for an expert without tokens."""
    mean_sq_LEx = per_routed_token(sq_sum_LEx, statistics)
    return (mean_sq_LEx - per_routed_token(sum_LEx, statistics).square()).clamp(min=0)
