"""The Optuna sweeper: the search space, parallel batches, failures, and going on after a kill; jobs here are light."""

import json
import math
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus

from moeprune.app.search import FOUND, JOURNAL, Search, Space
from moeprune.errors import InputError

optuna = pytest.importorskip("optuna")

SPACE = ("ratio=0.5", "x=interval(-1.0,1.0)", "kind=a,b")


def returned(value: object) -> JobReturn:
    result = JobReturn()
    result.status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
    result.return_value = value
    return result


class Jobs:
    """Launches a function of x and kind in the place of runs, and remembers what it was asked."""

    def __init__(self, objective=lambda x, kind: x**2 + (kind == "b")) -> None:
        self.objective = objective
        self.batches: list[tuple[int, list[list[str]]]] = []

    def __call__(self, batch, first):
        self.batches.append((first, batch))
        return [returned(self._one(dict(word.split("=") for word in overrides))) for overrides in batch]

    def _one(self, chosen):
        try:
            return self.objective(float(chosen["x"]), chosen["kind"])
        except ZeroDivisionError as error:
            return error


def search(folder: Path, **settings) -> Search:
    words = settings.pop("words", SPACE)
    defaults = {"trials": 12, "parallel": 4, "direction": "minimize", "sampler": "tpe", "seed": 0}
    return Search(**{**defaults, **settings}, sweep_dir=folder, space=Space.of(words))


def test_the_space_is_what_hydra_means():
    space = Space.of(
        ["a=x,y", "b=range(1,6,2)", "c=interval(0.0,2.0)", "d=int(interval(16,256))", "e=tag(log,interval(1e-5,1e-3))",
         "f=range(0.0,1.0,0.5)", "g=[1,2],[3]", "ratio=0.5"]
    )  # fmt: skip
    made = optuna.distributions
    assert space.choices == {
        "a": made.CategoricalDistribution(["x", "y"]),
        "b": made.IntDistribution(1, 5, step=2),
        "c": made.FloatDistribution(0.0, 2.0),
        "d": made.IntDistribution(16, 256),
        "e": made.FloatDistribution(1e-5, 1e-3, log=True),
        "f": made.CategoricalDistribution(["0.0", "0.5"]),
        "g": made.CategoricalDistribution(["[1,2]", "[3]"]),
    }
    assert list(space.fixed) == ["ratio=0.5"]


def test_the_command_line_goes_before_the_experiment():
    space = Space.of(["a=1,2", "b=1,2", "a=3", "b=4,5"])
    assert (list(space.fixed), list(space.choices)) == (["a=3"], ["b"])


@pytest.mark.parametrize("words", [["ratio=0.5"], ["x=interval(1,0)"], ["x=tag(log,interval(0,1))"], ["x=range(3,3)"]])
def test_a_space_without_choice_is_an_error(words):
    with pytest.raises(InputError):
        Space.of(words)


@pytest.mark.parametrize("settings", [{"trials": 0}, {"trials": "many"}, {"parallel": None}, {"seed": -1},
                                      {"direction": "down"}, {"sampler": "grid"}])  # fmt: skip
def test_settings_that_cannot_be_are_errors(tmp_path, settings):
    with pytest.raises(InputError):
        search(tmp_path, **settings)


def test_trials_come_in_batches_with_fixed_overrides_and_numbers_of_their_own(tmp_path):
    jobs = Jobs()
    search(tmp_path, trials=10).run(jobs)
    assert [(first, len(batch)) for first, batch in jobs.batches] == [(0, 4), (4, 4), (8, 2)]
    assert all(overrides[0] == "ratio=0.5" for _, batch in jobs.batches for overrides in batch)
    assert len({tuple(overrides) for _, batch in jobs.batches for overrides in batch}) == 10


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_the_best_trial_is_found_and_written(tmp_path, direction, sign):
    jobs = Jobs(lambda x, kind: sign * (x**2 + (kind == "b")))
    search(tmp_path, trials=40, direction=direction).run(jobs)
    found = json.loads((tmp_path / FOUND).read_text())
    assert found["best"]["overrides"]["kind"] == "a"
    assert abs(found["best"]["overrides"]["x"]) < 0.1
    assert abs(found["best"]["objective"]) == min(abs(row["objective"]) for row in found["trials"])
    assert len(found["trials"]) == 40


def test_a_trial_that_fails_leaves_the_others_and_is_raised_at_the_end(tmp_path):
    jobs = Jobs(lambda x, kind: 1 / 0 if kind == "b" else x**2)
    with pytest.raises(ZeroDivisionError):
        search(tmp_path).run(jobs)
    assert sum(len(batch) for _, batch in jobs.batches) == 12
    assert all(row["overrides"]["kind"] == "a" for row in json.loads((tmp_path / FOUND).read_text())["trials"])


def test_an_objective_that_is_no_number_is_a_failed_trial(tmp_path):
    search(tmp_path).run(Jobs(lambda x, kind: math.nan if kind == "b" else x**2))
    assert all(row["overrides"]["kind"] == "a" for row in json.loads((tmp_path / FOUND).read_text())["trials"])


def test_jobs_without_an_objective_cannot_be_searched(tmp_path):
    with pytest.raises(InputError, match="until"):
        search(tmp_path).run(Jobs(lambda x, kind: None))


def test_a_killed_search_goes_on_and_tries_again_what_was_under_way(tmp_path):
    first = Jobs()

    def dies_in_the_second_batch(batch, number):
        if number >= 4:
            raise KeyboardInterrupt
        return first(batch, number)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path).run(dies_in_the_second_batch)
    second = Jobs()
    search(tmp_path).run(second)
    assert second.batches[0][0] == 8  # trials 4 to 7 were under way; their folders stay as they are
    assert sum(len(batch) for _, batch in second.batches) == 8
    before = {tuple(overrides) for _, batch in first.batches for overrides in batch}
    assert not before & {tuple(overrides) for _, batch in second.batches for overrides in batch}
    assert len(json.loads((tmp_path / FOUND).read_text())["trials"]) == 12


def test_a_finished_search_launches_nothing(tmp_path):
    search(tmp_path).run(Jobs())
    again = Jobs()
    assert search(tmp_path).run(again) == []
    assert again.batches == []


@pytest.mark.parametrize(
    "settings", [{"direction": "maximize"}, {"words": ("x=interval(-1.0,1.0)", "kind=a,b,c")}, {"damaged": True}]
)
def test_another_search_does_not_go_on_in_the_directory(tmp_path, settings):
    search(tmp_path, trials=4).run(Jobs())
    if settings.pop("damaged", False):
        with (tmp_path / JOURNAL).open("a") as journal:
            journal.write('{"op_code":\n{"op_code": 4}\n')
    jobs = Jobs()
    with pytest.raises(InputError, match="cannot go on with these settings"):
        search(tmp_path, trials=8, **settings).run(jobs)
    assert jobs.batches == []


def test_a_search_of_real_runs(here, tiny):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.trials=3", "hydra.sweeper.parallel=2", "hydra.sweep.dir=search"]
    outcome = here("--multirun", *words, *tiny, "ratio=interval(0.25,0.75)", "allocator=coverage,uniform")
    assert outcome.code == 0, outcome.err
    found = json.loads((outcome.place / "search" / FOUND).read_text())
    for row in found["trials"]:
        metrics = json.loads((outcome.place / "search" / str(row["trial"]) / "metrics.json").read_text())
        assert row["objective"] == metrics["variants"][-1]["mean_perplexity"]
        assert metrics["ratio"] == pytest.approx(row["overrides"]["ratio"])
    assert len(found["trials"]) == 3
