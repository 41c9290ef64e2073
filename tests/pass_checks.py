"""What every calibration pass must hold to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moeprune.calibration.windows import TokenWindows


def assert_close_to_scale(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to each value, and for values that cancel to nearly nothing, to the largest."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def padded(windows: TokenWindows, extra: int) -> TokenWindows:
    """The same windows with ``extra`` positions of a token that is not padding by its number, at the right end."""
    rows = len(windows.input_ids_NT)
    filler, zeros = torch.full((rows, extra), 7), torch.zeros(rows, extra, dtype=torch.int64)
    return TokenWindows(torch.cat([windows.input_ids_NT, filler], dim=1), torch.cat([windows.mask_NT, zeros], dim=1))


@contextmanager
def left_as_it_was(model: nn.Module, input_ids_NT: Tensor) -> Iterator[None]:
    """Whatever happens inside, weights, logits, gradient flags and hooks are the same afterwards, and no gradient is
    left."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    needs_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(input_ids_NT).logits
    yield
    assert needs_gradient == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    with torch.no_grad():
        assert torch.equal(model(input_ids_NT).logits, logits)
