"""What a user chooses about evaluation, and the numbers that come of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moeprune.calibration.sample import TextSource
from moeprune.calibration.windows import TokenWindows, windows_of_text
from moeprune.errors import InputError, require_positive
from moeprune.evaluation.perplexity import perplexity
from moeprune.evaluation.tasks import require_known_tasks, task_accuracies
from moeprune.models.layers.streaming import Model


@dataclass(frozen=True)
class Evaluation:
    """Perplexity per text of ``source`` on its first ``windows`` windows, and accuracy on ``tasks``.

    A task is the name of one that ships with the package (word_order, cloze, copy) or of any lm-eval task; its first
    ``task_items`` items are used, all when None.
    """

    source: TextSource
    windows: int
    sequence_length: int
    batch_size: int
    tasks: Sequence[str] = ()
    task_items: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "windows", "sequence_length", "batch_size")
        if isinstance(self.tasks, str):
            raise InputError(f"tasks={self.tasks} is no list.", change=f"Write evaluation.tasks=[{self.tasks}].")
        if self.task_items is not None:
            require_positive(self, "task_items")

    def token_windows(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenWindows]:
        """The windows of each text that perplexity is measured on."""
        return {
            name: windows_of_text(tokenizer, text, name=name, count=self.windows, length=self.sequence_length)
            for name, text in self.source.read().items()
        }

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError for a text that is missing or too short, or a task that does not exist."""
        self.token_windows(tokenizer)
        require_known_tasks(self.tasks)

    def __call__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """``{"perplexity", "perplexity_tokens", "mean_perplexity", "tasks"}``; the mean is geometric over texts."""
        values, tokens = {}, {}
        for name, windows in self.token_windows(tokenizer).items():
            values[name] = perplexity(model, windows, self.batch_size, name)
            tokens[name] = windows.token_count - len(windows.input_ids_NT)
        mean = math.exp(sum(math.log(value) for value in values.values()) / len(values))
        tasks = task_accuracies(model, tokenizer, self.tasks, self.task_items, self.batch_size)
        return {"perplexity": values, "perplexity_tokens": tokens, "mean_perplexity": mean, "tasks": tasks}
