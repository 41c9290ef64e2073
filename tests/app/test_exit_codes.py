"""How a command ends: 0, 2 for what the user can change, 130 when interrupted, a traceback for a bug."""

import errno
import json
import os
import signal

import pytest

from moeprune.errors import CacheError


@pytest.fixture
def job_that(monkeypatch):
    """Let the command's job raise an error, or just end."""

    def install(error: BaseException | None) -> None:
        def run_job(_config: object) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr("moeprune.app.job.run_job", run_job)

    return install


def test_a_run_that_ends_well_gives_0(here, job_that):
    job_that(None)
    assert here().code == 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CacheError("the cache is full"), "moeprune: the cache is full\n"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), "moeprune: runs/x cannot be written: No space left.\n"),
    ],
)
def test_what_the_user_can_change_gives_2_and_one_message(here, job_that, error, told):
    job_that(error)
    outcome = here()
    assert outcome.code == 2
    assert told in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interruption_gives_130_and_says_how_to_go_on(here, job_that):
    job_that(KeyboardInterrupt())
    outcome = here()
    assert outcome.code == 130
    assert outcome.err == "Interrupted. Finished stages are kept; the same command goes on from them.\n"


def test_an_interrupted_run_says_so_in_its_manifest(here, monkeypatch):
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeprune.app.job._run", interrupt)
    outcome = here("tracking=none")
    assert outcome.code == 130
    (manifest,) = outcome.manifests
    assert json.loads(manifest.read_text())["status"] == "interrupted"


def test_a_run_that_the_cluster_ends_says_so_in_its_manifest(here, monkeypatch):
    monkeypatch.setattr("moeprune.app.job._run", lambda *_args: os.kill(os.getpid(), signal.SIGTERM))
    outcome = here("tracking=none")
    assert outcome.code == 130
    (manifest,) = outcome.manifests
    assert json.loads(manifest.read_text())["status"] == "interrupted"


def test_a_bug_is_not_hidden(here, job_that):
    job_that(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        here()
