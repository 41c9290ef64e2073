"""``hydra/sweeper=optuna``: Optuna proposes trials, a launcher runs them as jobs, and their objective is told back.

What is known lies in ``optuna.journal`` in the sweep's directory, so that a search goes on where it was killed; job N,
in folder N, is trial N. What was found is in ``search.json``.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus

from moeprune.app.manifest import write_atomically
from moeprune.errors import InputError, require_choice

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

JOURNAL, FOUND = "optuna.journal", "search.json"
DIRECTIONS, SAMPLERS = ("minimize", "maximize"), ("tpe", "random")

# The overrides of each job of a batch, and the number of the first -> what the jobs returned.
Launch = Callable[[list[list[str]], int], Sequence[JobReturn]]


@dataclass(frozen=True)
class Space:
    """What a search may choose: a distribution per setting; ``fixed`` overrides are in every trial."""

    choices: Mapping[str, "BaseDistribution"]
    fixed: Sequence[str]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Space":
        """From overrides in Hydra's syntax; of two for one setting the later counts.

        ``a,b`` and ``choice(a,b)`` are values, ``range(1,5)`` whole numbers from 1 to 4 (as in a sweep),
        ``interval(0,1)`` numbers between; ``int(interval(16,256))`` whole ones, ``tag(log,interval(1e-5,1e-3))`` on a
        logarithmic scale. Raises InputError where nothing is to be chosen, or a range is empty.
        """
        choices: dict[str, BaseDistribution] = {}
        fixed: dict[str, str] = {}
        for word, override in zip(words, OverridesParser.create().parse_overrides(list(words)), strict=True):
            key = override.get_key_element()
            choices.pop(key, None)
            fixed.pop(key, None)
            if override.is_sweep_override():
                try:
                    choices[key] = _distribution(override)
                except ValueError as error:
                    raise InputError(f"{word} cannot be searched: {error}") from error
            else:
                fixed[key] = word
        if not choices:
            example = "ratio=interval(0.2,0.6)"
            raise InputError("There is nothing to search for.", change=f"Give a setting several values: {example}.")
        return cls(choices, tuple(fixed.values()))


@dataclass(frozen=True)
class Search:
    """A search of ``trials`` trials in all, ``parallel`` at a time. ``sampler``: tpe or random.

    Raises InputError for settings that cannot be, and where Optuna is not installed.
    """

    trials: int
    parallel: int
    direction: str
    sampler: str
    seed: int
    sweep_dir: Path
    space: Space

    def __post_init__(self) -> None:
        for name, least in {"trials": 1, "parallel": 1, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(
                    f"hydra.sweeper.{name}={value} is not possible.", change=f"Use a whole number of at least {least}."
                )
        require_choice("hydra.sweeper.direction", self.direction, DIRECTIONS)
        require_choice("hydra.sweeper.sampler", self.sampler, SAMPLERS)

    def run(self, launch: Launch) -> list[Sequence[JobReturn]]:
        """Launch batches until all trials have ended. Raises the error of the first that failed, at the end."""
        study, batches = self._study(), []
        while (left := self.trials - _ended(study)) > 0:
            with self._of_one_search():
                asked = [study.ask(dict(self.space.choices)) for _ in range(min(left, self.parallel))]
            results = launch([self._overrides(trial) for trial in asked], asked[0].number)
            for trial, result in zip(asked, results, strict=True):
                _tell(study, trial, result)
            batches.append(results)
            self._write(study)
        self._write(study)
        for result in (result for batch in batches for result in batch):
            _ = result.return_value  # raises the error of a job that failed
        return batches

    def _study(self) -> "Study":
        """The study in the sweep's directory; what was under way when it was killed is tried again."""
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(self.sweep_dir / JOURNAL))
        with self._of_one_search():
            storage = optuna.storages.JournalStorage(backend)
            study = optuna.create_study(
                storage=storage, study_name="moeprune", direction=self.direction, load_if_exists=True
            )
            if study.direction.name.lower() != self.direction:  # Optuna would keep its own without a word
                raise ValueError(f"its direction is {study.direction.name.lower()}")
        known = study.get_trials(deepcopy=False)
        seed = self.seed + len(known)  # the same seed again would propose the same trials again
        study.sampler = (
            optuna.samplers.TPESampler(seed=seed) if self.sampler == "tpe" else optuna.samplers.RandomSampler(seed)
        )
        for trial in (trial for trial in known if trial.state == optuna.trial.TrialState.RUNNING):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        if known:
            log.info("the search goes on after %d trials", _ended(study))
        return study

    @contextmanager
    def _of_one_search(self) -> Iterator[None]:
        """Raise InputError where the search in the directory is another, or its journal is damaged."""
        try:
            yield
        except ValueError as error:
            raise InputError(
                f"The search in {self.sweep_dir / JOURNAL} cannot go on with these settings: {error}",
                change="Give the command that began it, or choose another hydra.sweep.dir for a new search.",
            ) from error

    def _overrides(self, trial: "Trial") -> list[str]:
        return [*self.space.fixed, *(f"{name}={value}" for name, value in trial.params.items())]

    def _write(self, study: "Study") -> None:
        """Write ``search.json``: the best trial and all others."""
        optuna = _optuna()
        rows: list[dict[str, Any]] = [
            {"trial": trial.number, "objective": trial.value, "overrides": dict(trial.params)}
            for trial in study.get_trials(deepcopy=False)
            if trial.state == optuna.trial.TrialState.COMPLETE
        ]
        sign = 1 if self.direction == "minimize" else -1
        rows.sort(key=lambda row: sign * row["objective"])
        best = rows[0] if rows else None
        content = {"direction": self.direction, "fixed": list(self.space.fixed), "best": best, "trials": rows}
        write_atomically(self.sweep_dir / FOUND, json.dumps(content, indent=1))
        if best is not None:
            chosen = " ".join(f"{name}={value}" for name, value in best["overrides"].items())
            log.info("best of %d trials: %d, objective %.6g: %s", len(rows), best["trial"], best["objective"], chosen)


def _distribution(override: Override) -> "BaseDistribution":
    distributions = _optuna().distributions
    value, key = override.value(), override.get_key_element()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        kind = distributions.IntDistribution if isinstance(value.start, int) else distributions.FloatDistribution
        if value.start >= value.end:
            raise InputError(f"{key}: interval({value.start},{value.end}) is empty.", change="Give the smaller first.")
        return kind(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = list(value.range())
        if numbers and all(isinstance(number, int) for number in numbers) and numbers[0] < numbers[-1]:
            return distributions.IntDistribution(numbers[0], numbers[-1], step=numbers[1] - numbers[0])
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def _tell(study: "Study", trial: "Trial", result: JobReturn) -> None:
    """Give a job's objective back; a job that failed, or whose objective is no finite number, is a failed trial."""
    failed = _optuna().trial.TrialState.FAIL
    if result.status is not JobStatus.COMPLETED:
        study.tell(trial, state=failed)
        return
    value = result.return_value
    if value is None:
        raise InputError("The jobs have no objective.", change="Leave until out: only a whole run can be compared.")
    if math.isfinite(value):
        study.tell(trial, float(value))
    else:
        log.warning("trial %d: objective %s counts as failed", trial.number, value)
        study.tell(trial, state=failed)


def _ended(study: "Study") -> int:
    """Trials that count: all but those that were tried again."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get("again") for trial in trials}
    return sum(trial.state.is_finished() and trial.number not in again for trial in trials)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "hydra/sweeper=optuna needs Optuna, which is not installed.", change="pip install 'moeprune[optuna]'"
        ) from error
    return optuna
