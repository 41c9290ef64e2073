"""What a user chooses about evaluation, and the numbers that come of it."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moeprune.calibration.sample import TextSource
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError, require_positive
from moeprune.evaluation.fitting import AUTO, require_batch_size
from moeprune.evaluation.perplexity import perplexity
from moeprune.evaluation.speed import Speed
from moeprune.evaluation.task_choice import TaskChoice, task_choices
from moeprune.evaluation.tasks import check_tasks, task_result, task_score, task_settings
from moeprune.evaluation.text_windows import evaluation_windows
from moeprune.models.layers.streaming import Model

Loader = Callable[[], Model]


@dataclass(frozen=True)
class Part:
    """A piece of an evaluation whose result can be kept: a text, or a task. ``settings`` are all that it depends on but
    for the model; ``compute(load)`` gives plain values, and loads the model once its own data are there."""

    name: str
    settings: Mapping[str, object]
    compute: Callable[[Loader], dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """Perplexity per text of ``source``, and accuracy on ``tasks``.

    Perplexity is that of the first ``windows`` windows of ``sequence_length`` tokens; of the whole text, as the field
    measures it, when None (`moeprune.evaluation.text_windows.whole_text`).

    A task is the name of one that ships with the package (word_order, cloze, copy) or of any lm-eval task, or such a
    name with settings, {name: gsm8k, fewshot: 8, metric: "exact_match,flexible-extract"}. Its first ``task_items``
    items are used, all when None. Tasks that run code which the model wrote need ``run_generated_code``.

    ``batch_size`` windows or requests go through the model at once, as many as fit when "auto"; results do not depend
    on it beyond rounding. ``speed`` asks for throughput, too.
    """

    source: TextSource
    windows: int | None
    sequence_length: int
    batch_size: int | str = AUTO
    tasks: Sequence[Any] = ()
    task_items: int | None = None
    run_generated_code: bool = False
    speed: Speed | None = None

    def __post_init__(self) -> None:
        require_positive(self, "sequence_length")
        for name in ("windows", "task_items"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require_batch_size(self.batch_size)
        _ = self.task_choices

    @property
    def task_choices(self) -> tuple[TaskChoice, ...]:
        return task_choices(self.tasks)

    def token_windows(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenWindows]:
        """The windows of each text that perplexity is measured on."""
        return {
            name: evaluation_windows(tokenizer, text, name=name, count=self.windows, length=self.sequence_length)
            for name, text in self.source.read().items()
        }

    def check(self, tokenizer: PreTrainedTokenizerBase, streams: bool) -> list[Part]:
        """The `parts`. Raises InputError for a text that is missing or too short, or a task that cannot be run, on a
        model that ``streams`` or not."""
        parts = self.parts(tokenizer)
        check_tasks(self.task_choices, self.run_generated_code, streams)
        return parts

    def parts(self, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
        """The texts, then the tasks."""
        texts = [self._text_part(name, windows) for name, windows in self.token_windows(tokenizer).items()]
        if not texts:
            raise InputError("evaluation.source has no text.", change="Name one; perplexity is measured on it.")
        return texts + [self._task_part(choice, tokenizer) for choice in self.task_choices]

    def metrics(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """From the result of each part: ``{"perplexity", "perplexity_tokens", "mean_perplexity", "tasks"}``.

        The mean is geometric over texts. Raises InputError where a task has not the chosen metric.
        """
        texts = {name: result for name, result in results.items() if "perplexity" in result}
        mean = math.exp(sum(math.log(text["perplexity"]) for text in texts.values()) / len(texts))
        return {
            "perplexity": {text["name"]: text["perplexity"] for text in texts.values()},
            "perplexity_tokens": {text["name"]: text["tokens"] for text in texts.values()},
            "mean_perplexity": mean,
            "tasks": {choice.name: task_score(choice, results[task_part_name(choice)]) for choice in self.task_choices},
        }

    def __call__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """`metrics` of a model that is loaded."""
        return self.metrics({part.name: part.compute(lambda: model) for part in self.parts(tokenizer)})

    def _text_part(self, name: str, windows: TokenWindows) -> Part:
        def compute(load: Loader) -> dict[str, Any]:
            tokens = windows.token_count - len(windows.input_ids_NT)
            return {"name": name, "perplexity": perplexity(load(), windows, self.batch_size, name), "tokens": tokens}

        return Part(f"text/{name}", {"name": name, "windows": _digest(windows)}, compute)

    def _task_part(self, choice: TaskChoice, tokenizer: PreTrainedTokenizerBase) -> Part:
        def compute(load: Loader) -> dict[str, Any]:
            rest = (choice, self.task_items, self.batch_size, self.run_generated_code)
            return task_result(load, tokenizer, *rest)

        return Part(task_part_name(choice), task_settings(choice, self.task_items), compute)


def task_part_name(choice: TaskChoice) -> str:
    """What the part of a task is called."""
    return f"task/{choice.name}"


def _digest(windows: TokenWindows) -> str:
    content = hashlib.sha256(str(tuple(windows.input_ids_NT.shape)).encode())
    for tensor in (windows.input_ids_NT, windows.mask_NT):
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()
