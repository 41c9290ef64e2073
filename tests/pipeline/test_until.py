"""Stopping before the end of the road: what is computed then, and that a later run finds it."""

import pytest

from moeprune.errors import InputError
from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.run import run, run_until
from moeprune.pipeline.until import STAGE_OF, check_until
from moeprune.quantization.nf4 import NF4Quantizer


@pytest.mark.parametrize("until", [stop for stop in STAGE_OF if stop != "recover"])
def test_the_road_ends_at_the_stage_asked_for_and_a_run_reuses_all_of_it(until, experiment, tmp_path):
    asked = experiment(quantizer=NF4Quantizer(block_size=64))
    cache = StageCache(tmp_path)
    walked = run_until(asked, cache, until)
    assert walked[-1].stage == STAGE_OF[until]
    assert not list((tmp_path / "evaluation").glob("*")), "nothing is evaluated"
    before = {record.parent.name for record in tmp_path.rglob("stage.json")}
    result = run(asked, cache)
    assert before == {artifact.key for artifact in result.stages if artifact.cached}
    assert {artifact.key for artifact in walked} <= before


def test_a_run_can_stop_only_after_a_stage_that_it_has():
    check_until("recover", ["recovery"])
    with pytest.raises(InputError, match=r"until=recover is not possible with recovery=none"):
        check_until("recover", ["quantizer"])
    with pytest.raises(InputError, match="Did you mean: score"):
        check_until("scores", [])
