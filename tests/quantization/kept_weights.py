"""What is left of weights: independent of the code that packs and unpacks them."""

from torch import Tensor

from moeprune.quantization.grid import Rounded


def kept_by(rounded: Rounded, group_size: int) -> Tensor:
    """``(code - zero) * scale`` in float64, group by group."""
    kept_OI = rounded.codes_OI.double()
    for index, start in enumerate(range(0, kept_OI.shape[1], group_size)):
        scale_O1, zero_O1 = rounded.scales_OG[:, index, None].double(), rounded.zeros_OG[:, index, None].double()
        kept_OI[:, start : start + group_size] = (kept_OI[:, start : start + group_size] - zero_O1) * scale_O1
    return kept_OI
