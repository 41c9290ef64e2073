"""How many sequences go through a model at once: a number, or as many as the memory of the GPU holds."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from moeprune.errors import InputError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

AUTO = "auto"
# What "auto" begins with. A CPU gains nothing from more, and its memory gives no warning before it is full.
LARGEST_ON_GPU, ON_CPU = 256, 8
# What libraries below PyTorch say where the memory of the GPU is full.
FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def require_batch_size(batch_size: object) -> None:
    """Raise InputError for what is neither a whole number of at least 1 nor "auto"."""
    if batch_size != AUTO and (type(batch_size) is not int or batch_size < 1):
        raise InputError(
            f"batch_size={batch_size} is not possible.", change="Use a whole number of at least 1, or auto."
        )


def first_batch_size(asked: int | str, device: torch.device) -> int:
    """The batch size to begin with; "auto" is a power of two."""
    if isinstance(asked, int):
        return asked
    return LARGEST_ON_GPU if device.type == "cuda" else ON_CPU


def half_of(size: int, what: str) -> int:
    """The batch size to go on with where ``size`` did not fit. Raises InputError where that was one sequence."""
    if size == 1:
        raise InputError(
            f"{what}: not even one sequence at a time fits in the memory of the GPU.",
            change="Use a shorter evaluation.sequence_length, or leave the layers on disk: model.streaming=always.",
        )
    # What did not fit is gone only with the frames that held it.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.info("%s: %d sequences at once do not fit in memory, going on with %d", what, size, size // 2)
    return size // 2


def try_out(work: Callable[[], Result]) -> Result | None:
    """What ``work`` gives, None where the memory of the GPU was too small for it."""
    try:
        return work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in FULL):
            raise
        return None


def with_fitting_batches(
    asked: int | str, device: torch.device, count: int, what: str, work: Callable[[int], Result]
) -> Result:
    """``work(batch_size)`` with the asked batch size, or the first half, quarter, ... of it that fits in memory.

    There are ``count`` sequences: no batch is larger. ``what`` names the work in the log. The result must not depend on
    the batch size. Raises InputError where not even one sequence fits.
    """
    size = min(first_batch_size(asked, device), max(count, 1))
    while True:
        result = try_out(lambda size=size: work(size))  # type: ignore[misc]
        if result is not None:
            return result
        size = half_of(size, what)
