"""The record of a sweep: what it was asked to do, kept over batches and reruns."""

import json
from dataclasses import replace

import pytest

from moeprune.app.sweep_record import RECORD, SweepJob, SweepRecord, job_number, task_overrides
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

FIRST = SweepJob(0, "0", ("ratio=0.5", "text='a, b'"), "12_0")


def test_what_was_written_is_read(tmp_path):
    record = SweepRecord.for_launch(tmp_path, ["-m", "ratio=0.5"], "slurm", "snapshot").with_jobs([FIRST])
    record.write(tmp_path)
    assert SweepRecord.read(tmp_path) == record
    assert record.driver == Process.this()
    assert [file.name for file in tmp_path.iterdir()] == [RECORD]


def test_a_later_batch_of_the_same_process_adds_its_jobs(tmp_path):
    SweepRecord.for_launch(tmp_path, ["-m"], "basic").with_jobs([FIRST]).write(tmp_path)
    second = SweepJob(1, "1", ())
    record = SweepRecord.for_launch(tmp_path, ["-m"], "local").with_jobs([second])
    assert (record.launcher, record.jobs) == ("local", (FIRST, second))


def test_another_sweep_into_the_same_directory_replaces_the_record(tmp_path):
    record = SweepRecord.for_launch(tmp_path, ["-m"], "basic").with_jobs([FIRST])
    record.write(tmp_path)
    content = json.loads((tmp_path / RECORD).read_text())
    content["driver"]["started"] = 1.0
    (tmp_path / RECORD).write_text(json.dumps(content))
    assert SweepRecord.for_launch(tmp_path, ["-m", "seed=1"], "basic").jobs == ()


def test_a_later_batch_finds_its_jobs_also_after_a_rerun_that_another_process_drives(tmp_path):
    record = SweepRecord.for_launch(tmp_path, ["-m"], "basic").with_jobs([FIRST])
    replace(record, driver=Process("n1", 7)).write(tmp_path)
    assert SweepRecord.for_launch(tmp_path, ["-m"], "basic") == record


def test_a_job_that_is_launched_again_replaces_itself_and_has_no_id_before(tmp_path):
    record = SweepRecord.for_launch(tmp_path, [], "slurm").with_jobs([FIRST, SweepJob(1, "1", (), "12_1")])
    again = record.driven_by_this_process(again=[1])
    assert [job.slurm_job_id for job in again.jobs] == ["12_0", None]
    assert [job.slurm_job_id for job in again.with_jobs([SweepJob(1, "1", (), "15")]).jobs] == ["12_0", "15"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{}], "command": [], "driver": {}}'])
def test_a_record_that_cannot_be_read_is_told(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match="cannot be read"):
        SweepRecord.read(tmp_path)


def test_a_directory_without_a_record_is_told(tmp_path):
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        SweepRecord.read(tmp_path)


def test_the_number_of_a_job_is_that_of_its_folder():
    assert job_number(["ratio=0.5"], 3) == 3
    assert job_number(["ratio=0.5", "hydra.sweep.subdir=17"], 0) == 17


def test_overrides_for_hydra_are_none_of_the_task():
    words = ["ratio=0.5", "hydra.sweep.subdir=1", "hydra/launcher=slurm", "+hydra.x=1", "hydrant=2"]
    assert task_overrides(words) == ("ratio=0.5", "hydrant=2")
