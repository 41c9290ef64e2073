"""HQQ's solver: against a loop over the weights of a group, and never worse than nearest rounding in its own norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_weights import kept_by

from moeprune.quantization.grid import nearest
from moeprune.quantization.hqq import half_quadratic

P, FIRST_BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20


def heavy_tailed(outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    noise_OI = torch.randn(2, outputs, inputs, generator=generator, dtype=torch.float64)
    return noise_OI[0] / noise_OI[1].abs().clamp(min=0.2) * 0.02


def as_float16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).half())


def loop(weights: list[float], bits: int) -> tuple[list[float], float]:
    """What a group's weights become, and the sum of |w - w'|^p, by plain arithmetic."""
    lowest, highest = min(0.0, *weights), max(0.0, *weights)
    scale = as_float16((highest - lowest) / (2**bits - 1))
    zero, beta, best = as_float16(-lowest / scale), FIRST_BETA, None
    for _ in range(STEPS + 1):
        codes = [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in weights]
        kept = [(code - zero) * scale for code in codes]
        loss = sum(abs((w - k) / scale) ** P for w, k in zip(weights, kept, strict=True))
        if best is None or loss < best[0]:
            best = loss, kept
        candidates = []
        for w, k, code in zip(weights, kept, codes, strict=True):
            x = (w - k) / scale
            shrunk = max(0.0, abs(x) - abs(x) ** (P - 1) / beta) if x else 0.0
            candidates.append(code - w / scale + (shrunk if x > 0 else -shrunk))
        zero, beta = as_float16(sum(candidates) / len(candidates)), beta * GROWTH
    return best[1], best[0] * scale**P


@given(count=st.integers(2, 20), bits=st.integers(2, 4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_a_group_becomes_what_the_formulas_say(count, bits, seed):
    weight_1S = heavy_tailed(1, count, seed)
    found_1S = kept_by(half_quadratic(weight_1S, bits=bits, group_size=20), 20)
    expected, loss = loop(weight_1S[0].tolist(), bits)
    # Where two zeros are as good as equal, either may be taken.
    assert (found_1S - weight_1S).abs().pow(P).sum().item() == pytest.approx(loss, rel=1e-6)
    assert found_1S.shape[1] == len(expected)


@given(
    outputs=st.integers(1, 6), inputs=st.integers(1, 50), group_size=st.integers(1, 24), bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_no_group_is_worse_than_nearest_rounding_in_its_norm(outputs, inputs, group_size, bits, seed):
    weight_OI = heavy_tailed(outputs, inputs, seed)
    found, plain = (round_(weight_OI, bits=bits, group_size=group_size) for round_ in (half_quadratic, nearest))
    losses = [(kept_by(each, group_size) - weight_OI).abs().pow(P) for each in (found, plain)]
    for start in range(0, inputs, group_size):
        found_O, plain_O = (loss_OI[:, start : start + group_size].sum(dim=1) for loss_OI in losses)
        assert (found_O <= plain_O * (1 + 1e-9) + 1e-15).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tails_gain(bits):
    weight_OI = heavy_tailed(64, 128, seed=0)
    found, plain = (round_(weight_OI, bits=bits, group_size=64) for round_ in (half_quadratic, nearest))
    losses = [(kept_by(each, 64) - weight_OI).abs().pow(P).sum() for each in (found, plain)]
    assert losses[0] < 0.98 * losses[1]


def test_the_scale_of_the_weights_makes_no_difference():
    weight_OI = heavy_tailed(16, 70, seed=3)
    small, large = (half_quadratic(weight_OI * 2.0**power, bits=3, group_size=32) for power in (-2, 6))
    assert torch.equal(small.codes_OI, large.codes_OI) and torch.equal(small.zeros_OG, large.zeros_OG)
    assert torch.equal(small.scales_OG * 2.0**8, large.scales_OG)
