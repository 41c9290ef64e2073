"""A task as the user names it: by name alone, or with a number of examples and a metric."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moeprune.errors import InputError

ENTRIES = ("name", "fewshot", "metric")
# The first of these that a task has is its accuracy, where no metric is chosen.
ACCURACY_METRICS = ("acc,none", "exact_match,none", "exact_match,strict-match", "pass@1,create_test")


@dataclass(frozen=True)
class TaskChoice:
    """A task that lm-eval knows, or one that ships with the package.

    ``fewshot`` examples are shown before each question, as many as the task says when None. ``metric`` is one of those
    that lm-eval gives, such as ``acc_norm`` or ``exact_match,flexible-extract``; the task's accuracy when None.
    """

    name: str
    fewshot: int | None = None
    metric: str | None = None

    @classmethod
    def of(cls, entry: object) -> "TaskChoice":
        """The choice that an entry of ``evaluation.tasks`` stands for. Raises InputError."""
        if isinstance(entry, str):
            return cls(entry)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise InputError(
                f"The task {entry} has no name.",
                change="Write a task as arc_easy or {name: arc_easy, metric: acc_norm}.",
            )
        unknown = [str(key) for key in entry if key not in ENTRIES]
        if unknown:
            raise InputError(f"{unknown[0]} is no setting of a task.", possible=ENTRIES, given=unknown[0])
        choice = cls(**entry)
        if choice.fewshot is not None and (type(choice.fewshot) is not int or choice.fewshot < 0):
            raise InputError(
                f"Task {choice.name}: fewshot={choice.fewshot} is not possible.", change="Use a whole number from 0 up."
            )
        return choice

    def metric_of(self, names: Collection[str]) -> str:
        """The chosen one of lm-eval's ``names``, such as "acc,none". Raises InputError where none or several are."""
        if self.metric is None:
            found = [name for name in ACCURACY_METRICS if name in names][:1]
        else:
            found = [name for name in names if self.metric in (name, name.partition(",")[0])]
        if len(found) != 1:
            raise InputError(
                f"Task {self.name!r} has {'several metrics' if found else 'no metric'} {self.metric or 'accuracy'}.",
                possible=names,
                change=f'Choose one as in {{name: {self.name}, metric: "{next(iter(found or names))}"}}.',
            )
        return found[0]


def task_choices(entries: Sequence[object]) -> tuple[TaskChoice, ...]:
    """The choices in their order. Raises InputError for what is no list of tasks, or names one twice."""
    if isinstance(entries, str):
        raise InputError(f"tasks={entries} is no list.", change=f"Write evaluation.tasks=[{entries}].")
    choices = tuple(TaskChoice.of(entry) for entry in entries)
    names = [choice.name for choice in choices]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"The task {twice[0]} is named twice.", change="Name it once; results go by the name.")
    return choices
