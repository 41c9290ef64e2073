"""A target in bytes is met by the quantised model, scales and all."""

import pytest

from moeprune.allocation.uniform import UniformAllocator
from moeprune.errors import BudgetError, InputError
from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.run import run
from moeprune.pipeline.target import ratio_for_quantized_bytes
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer

QUANTIZERS = [NF4Quantizer(block_size=64), NearestQuantizer(name="rtn3", bits=3, group_size=16)]


@pytest.fixture(params=QUANTIZERS, ids=lambda quantizer: quantizer.name)
def quantizer(request):
    return request.param


@pytest.mark.parametrize("family", ["qwen3_renormalised", "deepseek_v2"])
def test_the_written_model_takes_at_most_the_target_and_one_block_more_would_not_fit(
    family, quantizer, experiment, tmp_path
):
    def stored(ratio: float) -> int:
        parts = {"ratio": ratio, "allocator": UniformAllocator(), "quantizer": quantizer}
        *_, quantized = run(experiment(family, **parts), StageCache(tmp_path)).variants.values()
        return quantized["bytes"]["with_overhead"]

    source = experiment(family).model
    channels = {"qwen3_renormalised": 2 * 8 * 16, "deepseek_v2": 2 * 6 * 24}[family]
    target = (stored(0.5) + stored(0.25)) // 2
    ratio = ratio_for_quantized_bytes(target, source, quantizer, channels_at_once=4)
    assert 0.25 < ratio < 0.5
    assert stored(ratio) <= target < stored(ratio - 4 / channels)


def test_a_target_that_cannot_be_met_names_the_smallest_one(quantizer, experiment):
    source = experiment().model
    with pytest.raises(BudgetError, match=r"Use target_bytes=\d+ or more") as refused:
        ratio_for_quantized_bytes(1000, source, quantizer, channels_at_once=4)
    smallest = int(str(refused.value).split("Use target_bytes=")[1].split()[0])
    least = ratio_for_quantized_bytes(smallest, source, quantizer, channels_at_once=4)
    assert least == 1 - 2 * 2 * 4 / (2 * 8 * 16)  # layers x top-k x the least width
    with pytest.raises(InputError, match="above 0"):
        ratio_for_quantized_bytes(0, source, quantizer, channels_at_once=4)
    assert ratio_for_quantized_bytes(10**9, source, quantizer, channels_at_once=4) == 0
