"""Chance in lm-eval's tasks: the same in every run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# lm-eval's own: of Python's generator, and of numpy's, of PyTorch's, and of the examples that are shown.
PYTHON_SEED, SEED = 0, 1234


@contextmanager
def seeded() -> Iterator[None]:
    """Within the context all generators begin at lm-eval's seeds; then they go on from where they were.

    Some tasks, such as gpqa, shuffle the choices of their questions with Python's when their data are read.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
