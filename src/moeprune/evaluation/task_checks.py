"""What can be wrong with a task, told before a model is loaded."""

from pathlib import Path
from typing import Any

from moeprune.errors import InputError
from moeprune.evaluation.generated_code import code_may_run, require_permission
from moeprune.evaluation.seeding import seeded
from moeprune.evaluation.task_choice import TaskChoice
from moeprune.evaluation.task_files import HarnessTask, known_tasks

FETCH_CODE_METRIC = "python -c \"import evaluate; evaluate.load('code_eval')\""
# What a task may ask of a model whose layers stay on disk.
ONE_PASS = ("multiple_choice", "loglikelihood")

_NO_FILTER = ({"name": "none"},)


def check_harness_task(task: HarnessTask, choice: TaskChoice, run_generated_code: bool, streams: bool) -> None:
    """Fetch the data of a task of lm-eval where they are not on this machine yet.

    Raises InputError for a task that needs a permission or a library that is not there, has not the chosen metric or
    number of examples, generates text while the model ``streams``, or whose data cannot be had.
    """
    unsafe = runs_code(task)
    if unsafe:
        require_permission(choice.name, run_generated_code)
    names = _metrics_of(task)
    if names and not any("/" in name for name in names):  # a function gives its values names of its own
        choice.metric_of(names)
    if streams and not all(
        "class" in config or config.get("output_type") in ONE_PASS for config in task.leaves.values()
    ):
        raise InputError(
            f"Task {choice.name!r} does more than choose among answers; on layers from disk it would take for ever.",
            change="Use tasks that choose among answers, or a model that fits in memory: model.streaming=never.",
        )
    if choice.fewshot and any(config.get("num_fewshot") == 0 for config in task.leaves.values()):
        raise InputError(
            f"Task {choice.name}: fewshot={choice.fewshot} is not possible, it is defined without examples.",
            change="Leave fewshot out.",
        )
    with code_may_run(unsafe):
        _import_functions(task)
        if not all(_is_on_this_machine(config) for config in task.leaves.values()):
            load_harness_task(task)


def runs_code(task: HarnessTask) -> bool:
    """Whether the task runs code that a model has written."""
    return any(config.get("unsafe_code") for config in task.leaves.values())


def load_harness_task(task: HarnessTask) -> Any:
    """The task with its data, as lm-eval's ``evaluate`` takes it. Raises InputError where the data cannot be had."""
    try:
        with seeded():
            return task.manager.load([task.name])
    except Exception as error:  # datasets and the hub's client raise a dozen kinds
        paths = sorted({str(config.get("dataset_path")) for config in task.leaves.values()})
        if "gated" in str(error).lower():
            change = (
                f"Accept its terms at https://huggingface.co/datasets/{paths[0]}, then log in with hf auth login, "
                "or set HF_TOKEN."
            )
        else:
            change = (
                "Check the connection. For a machine without one, start the same run with until=calibration where "
                "there is one; HF_HOME names the folder that keeps the data."
            )
        raise InputError(
            f"The data of task {task.name!r} ({', '.join(paths)}) cannot be had: {error}", change=change
        ) from error


def _metrics_of(task: HarnessTask) -> list[str]:
    """What lm-eval will call the values of a task or group. Raises InputError for a group that has none."""
    is_group = task.config.get("group") == task.name
    given = task.config.get("aggregate_metric_list" if is_group else "metric_list")
    if is_group and not given:
        raise InputError(
            f"Task {task.name!r} is a group of tasks without a mean over them.",
            change=f"Name those that you want: {', '.join(sorted(task.leaves))}.",
        )
    of_tasks = [filters["name"] for leaf in task.leaves.values() for filters in leaf.get("filter_list") or _NO_FILTER]
    names = []
    for each in given or ():
        own = each.get("filter_list") or of_tasks
        names += [f"{each['metric']},{kind}" for kind in dict.fromkeys([own] if isinstance(own, str) else own)]
    return names


def _import_functions(task: HarnessTask) -> None:
    """Import what the task's files need. Raises InputError where that is not possible here."""
    from lm_eval.tasks._yaml_loader import load_yaml  # reads one file, and no others

    try:
        for name in task.leaves:
            if name in known_tasks():
                load_yaml(known_tasks()[name])
    except Exception as error:  # a task's module may do anything when it is imported
        told = f"Task {task.name!r} cannot be loaded: {error}"
        if "antlr4" in str(error):
            raise InputError(
                told,
                change="It needs another antlr4 than this program, and so an environment of its own: save the model "
                "with save_model and run lm-eval there, as docs/evaluation.md says.",
            ) from error
        if "code_eval" in str(error):
            raise InputError(
                told,
                change="The metric that runs code is fetched from the hub and then kept; where there is a network, "
                f"run: {FETCH_CODE_METRIC}",
            ) from error
        raise InputError(told, change="Install what it names, or leave the task out.") from error


def _is_on_this_machine(config: Any) -> bool:
    """Whether a task's data are in the cache of the library that fetches them, as far as its folders tell."""
    from datasets import config as library
    from datasets.naming import camelcase_to_snakecase

    path, subset = config.get("dataset_path"), config.get("dataset_name")
    if path is None or Path(path).exists():
        return True
    owner, _, name = str(path).rpartition("/")
    folder = Path(library.HF_DATASETS_CACHE) / "___".join(filter(None, [owner, camelcase_to_snakecase(name)]))
    return (folder / subset if subset else folder).is_dir()
