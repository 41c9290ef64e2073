"""lm-eval tasks on a model; those that ship with the package need no network."""

import os
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from moeprune.errors import InputError
from moeprune.models.layers.streaming import Model, StreamedModel

# Only metrics that are no plain mean are bootstrapped.
BOOTSTRAP_SAMPLES = 1000
ACCURACY_METRICS = ("acc,none", "exact_match,none", "exact_match,strict-match")


def shipped_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(entry.stem for entry in _tasks_folder().glob("*.yaml"))


def require_known_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError for a task that lm-eval does not know.

    Takes seconds where a task does not ship with the package.
    """
    if not set(shipped_tasks()).issuperset(tasks):
        _task_manager(tasks)


def task_accuracies(
    model: Model, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], items: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """``{task: {"accuracy", "stderr", "n"}}`` with lm-eval's own standard error of the mean.

    Raises InputError for a task that lm-eval does not know, or that generates text when the model is streamed.
    """
    if not tasks:
        return {}
    # lm-eval takes seconds to import, and only evaluation needs it.
    from lm_eval import evaluate

    shipped = set(shipped_tasks())
    manager = _task_manager(tasks)
    language_model = _language_model(model, tokenizer, batch_size)
    if os.environ.get("TQDM_DISABLE"):  # lm-eval's own bars do not heed it
        language_model.loglikelihood = partial(language_model.loglikelihood, disable_tqdm=True)
    accuracies = {}
    # One call per task: in a common call, lm-eval's cache of logits mistakes requests of two tasks for each other when
    # they are the same tokens split at different places.
    for task in tasks:
        spec = _shipped_config(task) if task in shipped else task
        answers = evaluate(
            language_model, _loaded(manager, spec), limit=items, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False
        )
        samples = sum(part["effective"] for part in answers["n-samples"].values())  # a group has several parts
        accuracies[task] = _accuracy(task, answers["results"][task], samples)
    return accuracies


def _language_model(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    from moeprune.evaluation.streamed_tasks import StreamedLM

    limit = model.config.max_position_embeddings
    if isinstance(model, StreamedModel):
        return StreamedLM(model, tokenizer, batch_size, limit)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=limit)


def _task_manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    shipped = shipped_tasks()
    manager = TaskManager(include_defaults=not set(shipped).issuperset(tasks))
    unknown = [task for task in tasks if task not in shipped and task not in manager.all_tasks]
    if unknown:
        raise InputError(f"Task {unknown[0]!r} does not exist.", possible=shipped, given=unknown[0])
    return manager


def _loaded(manager: Any, spec: str | dict[str, Any]) -> Any:
    loaded = manager.load([spec])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _accuracy(task: str, result: dict[str, Any], items: int) -> dict[str, float]:
    metric = next((name for name in ACCURACY_METRICS if name in result), None)
    if metric is None:
        raise InputError(
            f"Task {task!r} gives {', '.join(name for name in result if ',' in name)}, no accuracy.",
            change=f"Use a task with one of {', '.join(ACCURACY_METRICS)}.",
        )
    stderr = result[metric.replace(",", "_stderr,", 1)]
    return {"accuracy": float(result[metric]), "stderr": float(stderr), "n": items}


def _shipped_config(task: str) -> dict[str, Any]:
    config = yaml.safe_load((_tasks_folder() / f"{task}.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"test": str(_tasks_folder() / f"{task}.jsonl")}}
    return config


def _tasks_folder() -> Path:
    return Path(str(files("moeprune.resources"))) / "tasks"
