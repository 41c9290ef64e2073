"""The split of the embedded text."""

import pytest

from moeprune.embedded.arithmetic import arithmetic_lines
from moeprune.embedded.corpus import DOMAINS, domain_lines, task_lines, training_text, validation_text
from moeprune.errors import InputError


@pytest.fixture(scope="module", params=DOMAINS)
def parts(request):
    domain = request.param
    return domain, training_text(domain).split("\n"), validation_text(domain).split("\n"), task_lines(domain)


def test_no_held_out_line_occurs_in_the_training_text(parts):
    _, training, validation, tasks = parts
    assert not set(training) & set(validation)
    assert not set(training) & set(tasks)


def test_validation_and_tasks_share_no_sentence(parts):
    _, _, validation, tasks = parts
    shared = set(validation) & set(tasks)
    assert all(len(line.split()) <= 5 for line in shared)
    assert len(shared) < 0.02 * len(tasks)


def test_training_text_is_all_but_every_twentieth_block(parts):
    domain, training, validation, tasks = parts
    lines = domain_lines(domain)
    assert training[:950] == list(lines[:950])
    assert set(validation) <= set(lines)
    assert len(training) / len(lines) == pytest.approx(0.95, abs=0.005)
    assert len(training) + len(validation) + len(tasks) <= len(lines)


def test_every_domain_has_enough_held_out_text(parts):
    _, _, validation, tasks = parts
    assert len("\n".join(validation)) > 20_000
    assert len("\n".join(tasks)) > 20_000


def test_an_unknown_domain_is_named_with_the_possible_ones():
    with pytest.raises(InputError, match=r"'poetry' does not exist.\nPossible: prose, scripture"):
        training_text("poetry")


def test_arithmetic_is_right_and_the_same_for_the_same_seed():
    lines = arithmetic_lines(500, seed=3)
    assert lines == arithmetic_lines(500, seed=3)
    assert lines != arithmetic_lines(500, seed=4)
    for problem, result in (line.split(" = ") for line in lines if "=" in line):
        left, operator, right = problem.split()
        answer = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator]
        assert int(result) == answer
    for given, ordered in (line[5:].split(" -> ") for line in lines if line.startswith("sort ")):
        assert [int(number) for number in ordered.split()] == sorted(int(number) for number in given.split())
