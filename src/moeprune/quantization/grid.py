"""The points that weights of few bits can lie on: a scale and a zero for each group of neighbouring inputs of a row.

Axis letters: O outputs, I inputs, G groups of a row, S weights of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.errors import NumericalError

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0
# Weights that are rounded at once: several copies in float32 are made of them, and an embedding has many more.
WEIGHTS_AT_ONCE = 2**20

# Weights [O, G, S] -> their codes [O, G, S], scales and zeros [O, G, 1], all in the weights' dtype.
RoundGroups = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Rounded:
    """A matrix of few bits, ``w = (code - zero) * scale``: codes uint8 [O, I], scales and zeros float16 [O, G].

    Raises NumericalError for scales that float16 cannot hold.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor

    def __post_init__(self) -> None:
        if not (torch.isfinite(self.scales_OG).all() and torch.isfinite(self.zeros_OG).all()):
            raise NumericalError(
                "A matrix holds NaN, infinity, or weights so large that their scale is beyond float16.\n"
                "Look at the stage before: pruning, or the recovery's learning rate."
            )

    def split(self, rows: Sequence[int]) -> list["Rounded"]:
        """The matrices of so many rows each that this one was stacked of."""
        pieces = (tensor.split(list(rows)) for tensor in (self.codes_OI, self.scales_OG, self.zeros_OG))
        return [Rounded(*each) for each in zip(*pieces, strict=True)]


def min_max_grid(weight_OGS: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros [O, G, 1] of the evenly spaced points from the smallest to the largest weight of each group.

    ``scale = (max - min) / (2^bits - 1)``, ``zero = -min / scale``, both rounded to float16, with 0 always in range:
    so zeros stay between 0 and 2^bits - 1, which float16 holds well. Zeros are no whole numbers, unlike in GPTQ's own
    code: on the experts of the embedded models that makes the squared error 3% smaller at 4, 3 and 2 bits.
    """
    lowest_OG1 = weight_OGS.amin(-1, keepdim=True).clamp(max=0)
    highest_OG1 = weight_OGS.amax(-1, keepdim=True).clamp(min=0)
    scales_OG1 = as_float16((highest_OG1 - lowest_OG1) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    return scales_OG1, as_float16(-lowest_OG1 / scales_OG1)


def nearest_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The codes of the nearest points, whole numbers in the weights' dtype."""
    return (weight / scales + zeros).round_().clamp_(0, 2**bits - 1)


def as_float16(values: Tensor) -> Tensor:
    """The nearest values that float16 holds, in the same dtype as before."""
    return values.half().to(values.dtype)


def round_by_group(weight_OI: Tensor, group_size: int, round_groups: RoundGroups) -> Rounded:
    """Round groups of ``group_size`` neighbours of a row, the last of a row shorter where they do not fill it.

    In float32, or in the weights' dtype where that is finer. Groups know nothing of each other.

    Raises NumericalError as `Rounded` does.
    """
    exact_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
    full = exact_OI.shape[1] // group_size * group_size
    parts: list[list[Tensor]] = []
    for rows_oI in exact_OI.split(max(1, WEIGHTS_AT_ONCE // max(1, exact_OI.shape[1]))):
        whole_oGS = rows_oI[:, :full].reshape(len(rows_oI), full // group_size, group_size)
        shorter_o1S = rows_oI[:, None, full:]
        rounded = [round_groups(groups) for groups in (whole_oGS, shorter_o1S) if groups.shape[2] and groups.shape[1]]
        codes, scales, zeros = zip(*rounded, strict=True) if rounded else ([rows_oI], [rows_oI], [rows_oI])
        parts.append([torch.cat([part.flatten(1) for part in each], dim=1) for each in (codes, scales, zeros)])
    codes_OI, scales_OG, zeros_OG = (torch.cat(each) for each in zip(*parts, strict=True))
    return Rounded(codes_OI.to(torch.uint8), scales_OG.half(), zeros_OG.half())


def nearest(weight_OI: Tensor, *, bits: int, group_size: int) -> Rounded:
    """Each weight at the nearest point of its group's `min_max_grid`. Raises NumericalError as `Rounded` does."""

    def round_groups(weight_OGS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales_OG1, zeros_OG1 = min_max_grid(weight_OGS, bits)
        return nearest_codes(weight_OGS, scales_OG1, zeros_OG1, bits), scales_OG1, zeros_OG1

    return round_by_group(weight_OI, group_size, round_groups)
