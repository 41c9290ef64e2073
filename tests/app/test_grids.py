"""A sweep that is the union of several grids: which jobs, in which order, and what is no grid."""

from itertools import product

import pytest
from omegaconf import OmegaConf

from moeprune.app.grids import jobs_of_grids
from moeprune.app.sweep_record import SweepRecord
from moeprune.errors import InputError


def jobs(params=None, grids=None, words=()) -> list[str]:
    return [" ".join(job) for job in jobs_of_grids(params or {}, grids, list(words))]


def test_without_grids_it_is_every_combination_the_last_changing_fastest():
    expected = [f"a={a} b={b} c=0" for a, b in product([1, 2], "xy")]
    assert jobs({"a": "1,2"}, None, ["b=x,y", "c=0"]) == expected


def test_grids_come_one_after_the_other_each_on_top_of_the_common_settings():
    grids = [{"ratio": 0}, {"ratio": "0.25,0.5", "method": "reap,mone"}]
    assert jobs({"model": "m"}, grids, ["seed=1"]) == [
        "model=m ratio=0 seed=1",
        "model=m ratio=0.25 method=reap seed=1", "model=m ratio=0.25 method=mone seed=1",
        "model=m ratio=0.5 method=reap seed=1", "model=m ratio=0.5 method=mone seed=1",
    ]  # fmt: skip


def test_a_grid_goes_before_the_common_settings_and_the_command_line_before_both():
    grids = [{"ratio": "0.1,0.2"}, {"seed": 7}]
    assert jobs({"ratio": 0.5}, grids) == ["ratio=0.1", "ratio=0.2", "ratio=0.5 seed=7"]
    assert jobs({"ratio": 0.5}, grids, ["ratio=0.9"]) == ["ratio=0.9", "ratio=0.9 seed=7"]


def test_a_job_that_comes_out_twice_runs_once_whatever_the_order_of_its_settings():
    grids = [{"a": "1,2", "b": 3}, {"b": "3,4", "a": 2}]
    assert jobs(None, grids) == ["a=1 b=3", "a=2 b=3", "b=4 a=2"]


def test_values_are_what_the_command_line_makes_of_them():
    grids = OmegaConf.create([{"order": "[a,b],[b,a]", "surgery": None, "x": True, "text": "'1,2'"}])
    assert jobs(None, grids) == [f"order=[{order}] surgery=null x=True text='1,2'" for order in ("a,b", "b,a")]
    assert jobs({"a": "range(1,3)"}) == ["a=1", "a=2"]


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ("ratio=0.5", "is no list of grids"),
        ([], "is no list of grids"),
        ({"ratio": "0.5"}, "is no list of grids"),
        (["ratio=0.5"], r"grids\[0\]=ratio=0.5 is no mapping"),
        ([{"ratio": 0}, {"ratio": [0.25, 0.5]}], r"grids\[1\]: ratio: \[0.25, 0.5\] is not possible"),
        ([{"ratio": ""}], "is not possible"),
        ([{"ratio": "interval(0,1)"}], "is no list of values"),
    ],
)
def test_what_is_no_grid_is_told(grids, said):
    with pytest.raises(InputError, match=said):
        jobs(None, grids)


@pytest.fixture
def two_grids(tiny) -> list[str]:
    grids = "[{ratio: 0},{ratio: '0.25,0.5', seed: '0,1'}]"
    return ["--multirun", *tiny, f"hydra.sweeper.grids={grids}", "until=calibration"]


def test_a_sweep_numbers_its_jobs_over_all_grids_and_batches(here, two_grids):
    outcome = here(*two_grids, "hydra.sweep.dir=runs/sweep", "hydra.sweeper.max_batch_size=2")
    assert outcome.code == 0, outcome.err
    record = SweepRecord.read(outcome.place / "runs" / "sweep")
    own = [[word for word in job.overrides if word.startswith(("ratio", "seed"))] for job in record.jobs]
    assert [job.number for job in record.jobs] == [0, 1, 2, 3, 4]
    assert own == [["ratio=0"], *([f"ratio={ratio}", f"seed={seed}"] for ratio in ("0.25", "0.5") for seed in (0, 1))]
    assert len(outcome.manifests) == 5
    assert OmegaConf.load(outcome.place / "runs" / "sweep" / "multirun.yaml").until == "calibration"


def test_a_malformed_grid_is_told_before_a_job_is_started(here, tiny):
    outcome = here("--multirun", *tiny, "hydra.sweeper.grids=[{ratio: [0.25,0.5]}]")
    assert outcome.code == 2 and not outcome.manifests
    assert "hydra.sweeper.grids[0]: ratio" in outcome.err and "Traceback" not in outcome.err


def test_a_search_has_one_space(here, tiny):
    outcome = here("--multirun", *tiny, "hydra/sweeper=optuna", "hydra.sweeper.grids=[{ratio: 0.5}]", "ratio=0.25,0.5")
    assert outcome.code == 2 and not outcome.manifests
    assert "hydra.sweeper.grids" in outcome.err


def test_a_job_is_composed_once(here, two_grids, monkeypatch):
    from moeprune.app.launching import compose

    composed = []
    monkeypatch.setattr(compose, "_composed", lambda *_: composed.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(*two_grids)
    assert composed == [1]
