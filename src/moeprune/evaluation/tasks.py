"""lm-eval tasks on a model; those that ship with the package need no network."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from moeprune.evaluation.generated_code import code_may_run, require_permission
from moeprune.evaluation.seeding import SEED, seeded
from moeprune.evaluation.task_checks import check_harness_task, load_harness_task, runs_code
from moeprune.evaluation.task_choice import TaskChoice
from moeprune.evaluation.task_files import find_task
from moeprune.models.digest import file_digest
from moeprune.models.layers.streaming import Model, StreamedModel

# Only metrics that are no plain mean are bootstrapped.
BOOTSTRAP_SAMPLES = 1000


def shipped_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(entry.stem for entry in _tasks_folder().glob("*.yaml"))


def check_tasks(choices: Iterable[TaskChoice], run_generated_code: bool, streams: bool) -> None:
    """Raise InputError for a task that cannot be run, on a model that ``streams`` or not; see `check_harness_task`.

    Takes seconds where a task does not ship with the package, and longer where its data must be fetched.
    """
    shipped = shipped_tasks()
    for choice in choices:
        if choice.name in shipped:
            choice.metric_of([f"{each['metric']},none" for each in _shipped_config(choice.name)["metric_list"]])
        else:
            check_harness_task(find_task(choice.name, shipped), choice, run_generated_code, streams)


def task_settings(choice: TaskChoice, items: int | None) -> dict[str, object]:
    """What a task's result depends on, but for the model; every metric is computed, whichever is chosen."""
    settings: dict[str, object] = {"task": choice.name, "fewshot": choice.fewshot, "items": items}
    if choice.name in shipped_tasks():
        settings["files"] = [file_digest(file).hex() for file in _shipped_files(choice.name)]
    return {**settings, "lm_eval": version("lm_eval")}


def task_result(
    load: Callable[[], Model],
    tokenizer: PreTrainedTokenizerBase,
    choice: TaskChoice,
    items: int | None,
    batch_size: int | str,
    run_generated_code: bool = False,
) -> dict[str, Any]:
    """``{"metrics": {metric: {"value", "stderr"}}, "n", "fewshot"}`` of one task on the model that ``load`` gives.

    The data are loaded before the model. The first ``items`` of each task are used, all when None; values and standard
    errors are lm-eval's. Raises InputError for a task that does not exist or runs code without permission, for data
    that cannot be had, and for a task that generates text when the model is streamed.
    """
    # lm-eval takes seconds to import, and only evaluation needs it.
    from lm_eval import evaluate

    loaded, unsafe = _loaded(choice, run_generated_code)
    language_model = _language_model(load(), tokenizer, batch_size)
    # One call per task: in a common call, lm-eval's cache of logits mistakes requests of two tasks for each other when
    # they are the same tokens split at different places.
    with code_may_run(unsafe), seeded():
        answers = evaluate(
            language_model,
            loaded,
            limit=items,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
            confirm_run_unsafe_code=unsafe,
        )
    fewshot = {task.get_config("num_fewshot") for task in loaded["tasks"].values()}
    return {
        "metrics": dict(_metrics(answers["results"][choice.name])),
        "n": sum(part["effective"] for part in answers["n-samples"].values()),  # a group has several parts
        "fewshot": fewshot.pop() if len(fewshot) == 1 else None,
    }


def task_score(choice: TaskChoice, result: Mapping[str, Any]) -> dict[str, Any]:
    """``{"accuracy", "stderr", "n", "metric", "fewshot"}``; raises InputError where the result has not the metric."""
    metric = choice.metric_of(result["metrics"])
    found = result["metrics"][metric]
    scored = {"accuracy": found["value"], "stderr": found["stderr"], "n": result["n"], "metric": metric}
    return {**scored, "fewshot": result["fewshot"]}


def task_accuracies(
    model: Model, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], items: int | None, batch_size: int | str
) -> dict[str, dict[str, Any]]:
    """`task_score` of each task by its name. Raises as `task_result` does."""
    choices = [TaskChoice(task) for task in tasks]
    return {
        choice.name: task_score(choice, task_result(lambda: model, tokenizer, choice, items, batch_size))
        for choice in choices
    }


def _loaded(choice: TaskChoice, run_generated_code: bool) -> tuple[Any, bool]:
    """The task with its data, as lm-eval's ``evaluate`` takes it, and whether it runs code."""
    shipped = shipped_tasks()
    if choice.name in shipped:
        from lm_eval.tasks import TaskManager

        loaded, unsafe = TaskManager(include_defaults=False).load([_shipped_config(choice.name)]), False
    else:
        task = find_task(choice.name, shipped)
        unsafe = runs_code(task)
        if unsafe:
            require_permission(choice.name, run_generated_code)
        with code_may_run(unsafe):
            loaded = load_harness_task(task)
    for each in loaded["tasks"].values():
        if choice.fewshot is not None:
            each.set_config(key="num_fewshot", value=choice.fewshot)
        elif each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=SEED)
    return loaded, unsafe


def _language_model(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Any:
    from moeprune.evaluation.language_model import FittingLM
    from moeprune.evaluation.streamed_tasks import StreamedLM

    limit = model.config.get_text_config().max_position_embeddings
    kind: Any = StreamedLM if isinstance(model, StreamedModel) else FittingLM
    return kind(model, tokenizer, batch_size, limit)


def _metrics(result: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, float | None]]]:
    """Each value that lm-eval gives, with its standard error, None where it gives none."""
    for name, value in result.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = result.get(f"{metric}_stderr,{kind}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            yield name, {"value": float(value), "stderr": float(stderr) if known else None}  # type: ignore[arg-type]


def _shipped_config(task: str) -> dict[str, Any]:
    definition, examples = _shipped_files(task)
    config = yaml.safe_load(definition.read_text())
    config["dataset_kwargs"] = {"data_files": {"test": str(examples)}}
    return config


def _shipped_files(task: str) -> tuple[Path, Path]:
    """Its definition and its examples."""
    return _tasks_folder() / f"{task}.yaml", _tasks_folder() / f"{task}.jsonl"


def _tasks_folder() -> Path:
    return Path(str(files("moeprune.resources"))) / "tasks"
