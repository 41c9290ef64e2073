"""Rounds a matrix column by column, each column making up for the errors of those before it: GPTQ (arXiv 2210.17323).

Axis letters: O outputs, I inputs, G groups of a row, N tokens.
"""

import torch
from torch import Tensor

from moeprune.quantization.grid import Rounded, min_max_grid, nearest_codes

# Columns whose corrections are carried to the rest at once, as whole groups; the paper's number (section 3.3, step 2).
COLUMNS_AT_ONCE = 128


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = (H + lambda I)^-1``, lambda = ``damping`` times the mean of H's diagonal.

    The paper's step 3 without forming an inverse: with J the matrix that reverses the order, ``J (H + lambda I) J =
    L L^T`` gives ``U = J L^-1 J``. float64, returned in H's dtype.

    Raises torch.linalg.LinAlgError where H is not positive definite for all the damping.
    """
    damped_II = hessian_II.double()
    damped_II = damped_II + damping * damped_II.diagonal().mean() * torch.eye(len(damped_II)).to(damped_II)
    lower_II = torch.linalg.cholesky(damped_II.flip(0, 1))
    identity_II = torch.eye(len(damped_II)).to(damped_II)
    return torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1).to(hessian_II.dtype)


def gptq(weight_OI: Tensor, inverse_factor_II: Tensor, *, bits: int, group_size: int) -> Rounded:
    """Codes that make ``||(W - W') X||^2`` small, for the `inverse_factor` U of ``H = X X^T`` over the inputs' tokens.

    Column i of what is left of W is rounded to the nearest point; the later columns j take over what its error does to
    the output: ``w_j -= U_ij (w_i - w'_i) / U_ii``. A group's `min_max_grid` is that of its columns as they are when
    the first of them comes. An input that was always 0 is rounded to nearest and corrects nothing.

    Raises NumericalError as `Rounded` does.
    """
    left_OI = weight_OI.detach().to(inverse_factor_II.dtype, copy=True)
    inputs = left_OI.shape[1]
    codes_OI, at_once = torch.empty_like(left_OI), max(1, COLUMNS_AT_ONCE // group_size) * group_size
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, inputs, at_once):
        end = min(start + at_once, inputs)
        errors_OI = torch.empty_like(left_OI[:, start:end])
        for column in range(start, end):
            if column % group_size == 0:
                grids.append(min_max_grid(left_OI[:, column : min(column + group_size, end)], bits))
            scales_O1, zeros_O1 = grids[-1]
            weight_O1 = left_OI[:, column : column + 1]
            codes_O1 = nearest_codes(weight_O1, scales_O1, zeros_O1, bits)
            error_O1 = (weight_O1 - (codes_O1 - zeros_O1) * scales_O1) / inverse_factor_II[column, column]
            left_OI[:, column + 1 : end] -= error_O1 * inverse_factor_II[column, column + 1 : end]
            codes_OI[:, column : column + 1], errors_OI[:, column - start : column - start + 1] = codes_O1, error_O1
        left_OI[:, end:] -= errors_OI @ inverse_factor_II[start:end, end:]
    scales_OG, zeros_OG = (torch.cat(each, dim=1).half() for each in zip(*grids, strict=True))
    return Rounded(codes_OI.to(torch.uint8), scales_OG, zeros_OG)
