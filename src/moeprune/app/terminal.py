"""Keeps the terminal for our own lines: progress bars, stages, tables."""

import logging
import os
import warnings

from rich.console import Console

LOG_FILE_WIDTH = 120


def terminal(quiet: bool = False) -> Console:
    """A console as wide as the terminal, or as a table needs where the output goes to a file.

    It shows text as it is: a path may hold what Rich takes for markup or an emoji.
    """
    console = Console(quiet=quiet, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_FILE_WIDTH
    return console


def quiet_libraries() -> None:
    """Silence what libraries say about themselves; our own lines say what matters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when evaluation imports it
    for name in ("bitsandbytes", "httpx", "lm_eval", "lightning.pytorch", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
