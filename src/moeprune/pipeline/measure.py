"""Wall-clock time and peak memory of a piece of work."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Cost:
    """Seconds, and peak memory in GiB: of the device where CUDA is used, else of the process.

    Filled in when the measured context ends.
    """

    seconds: float = 0.0
    peak_memory_gib: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body. Where the kernel cannot reset the peak, it is that of the process since its start."""
    cost = Cost()
    _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_memory_gib = _peak_bytes() / 2**30


def _cuda() -> Any:
    """torch.cuda; None where there is no GPU, or torch is not loaded, which alone takes seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _reset_peak() -> None:
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed: then the peak since the process started is reported
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    if (cuda := _cuda()) is not None:
        peak_of_device: int = cuda.max_memory_allocated()
        return peak_of_device
    try:
        status = Path("/proc/self/status").read_text()
        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
