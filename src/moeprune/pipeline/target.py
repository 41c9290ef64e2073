"""The ratio at which a quantised model takes so many bytes."""

import bisect
from typing import Any

from moeprune.errors import BudgetError, InputError
from moeprune.models.expected import read_config
from moeprune.models.footprint.prediction import empty_model, even_widths, predict
from moeprune.models.source import ModelSource


def ratio_for_quantized_bytes(target: int, source: ModelSource, quantizer: Any, channels_at_once: int) -> float:
    """The smallest ratio at which the pruned and quantised weights take at most ``target`` bytes, scales included.

    Predicted for experts of equal widths. A plan of unequal ones may differ by what its last, shorter groups of weights
    pay more or less for their scales: nothing where the widths are multiples of the quantizer's block. Plans remove
    multiples of ``channels_at_once``.

    Raises InputError for a target of 0 or less, BudgetError with the smallest one possible.
    """
    if target <= 0:
        raise InputError(f"target_bytes={target} is not possible.", change="Use a number above 0.")
    model = empty_model(read_config(source.folder()), source.computation_dtype)
    shape = source.shape()
    minimum, channels = source.minimum_width, shape.layers * shape.experts * shape.width
    block = shape.width if channels_at_once % shape.width == 0 else source.alignment

    def stored(steps: int) -> int:
        widths_LE = even_widths(shape, steps * channels_at_once, block, max(minimum, block))
        return predict(model, widths_LE, source.storage_dtype, quantizer).bytes.with_overhead

    least = -(-shape.layers * shape.top_k * minimum // channels_at_once)
    if stored(least) > target:
        raise BudgetError(
            f"target_bytes={target} cannot be met: with the fewest channels that routing needs, quantised by "
            f"{type(quantizer).__name__}, the model takes {stored(least)}.\nUse target_bytes={stored(least)} or more, "
            "a quantizer of fewer bits, or a smaller model.minimum_width."
        )
    steps = range(least, channels // channels_at_once + 1)
    most = steps[bisect.bisect_right(steps, target, key=stored) - 1]
    return 1 - most * channels_at_once / channels
