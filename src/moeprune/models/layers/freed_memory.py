"""Makes the C library give memory back."""

import ctypes

_MAP_FROM = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_MAP_FROM_BYTES = 2**20


def give_freed_memory_back() -> None:
    """Let blocks of 1 MiB and more be mapped one by one, so that each goes back to the system when it is freed.

    glibc otherwise raises that limit to 32 MiB as such blocks are freed, and cuts later ones from a common heap. There
    small blocks that stay keep the large ones between them from being used again or given back: compressing 12 layers
    of Qwen3-30B-A3B's shape took 8.5 GiB at its peak instead of 2.2. Costs page faults. For the whole process; does
    nothing where the C library is another.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MAP_FROM, _MAP_FROM_BYTES)
