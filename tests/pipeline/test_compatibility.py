"""Choices that do not go together are refused before anything is computed."""

import json
import shutil
from dataclasses import dataclass, replace

import pytest

from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.keep_all import KeepAllAllocator
from moeprune.allocation.merging import DominantMergeAllocator, LinkageMergeAllocator
from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import (
    GlobalWholeExpertsAllocator,
    ImportanceWholeExpertsAllocator,
    WholeExpertsAllocator,
)
from moeprune.errors import InputError
from moeprune.pipeline.compatibility import check_compatible
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.scoring.gradient import EndToEndScorer, SaliencyScorer, SnipScorer
from moeprune.scoring.merging import HcSmoeScorer, MSmoeScorer
from moeprune.scoring.released_attribution import ReleasedAttributionScorer
from moeprune.scoring.subsets import MoeI2Scorer, NaeeScorer
from moeprune.surgery.bias import MeanBias
from moeprune.surgery.cut import Cut
from moeprune.surgery.refit import Refit
from moeprune.surgery.wanda import UnstructuredWanda


@dataclass(frozen=True)
class Silent:
    """A plug-in that says nothing about itself."""


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((FrequencyScorer(), CoverageAllocator(), Cut()), "ranks whole experts only"),
        ((AttributionScorer(), LinkageMergeAllocator(), Cut()), "AttributionScorer gives none"),
        ((HcSmoeScorer(), LinkageMergeAllocator(), Refit()), "merging removes none"),
        ((MSmoeScorer(), DominantMergeAllocator(), MeanBias()), "merging removes none"),
        ((AttributionScorer(), CoverageAllocator(), UnstructuredWanda(0.5)), "method=wanda_unstructured"),
        ((AttributionScorer(), KeepAllAllocator(), Cut()), "leaves the work to the surgery"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        check_compatible(*choices)


@pytest.mark.parametrize(
    "choices",
    [
        (AttributionScorer(), CoverageAllocator(), Refit()),
        (AttributionScorer(), WholeExpertsAllocator(), MeanBias()),
        (FrequencyScorer(), WholeExpertsAllocator(), Cut()),
        (HcSmoeScorer(), LinkageMergeAllocator(), Cut("keep_row")),
        (FrequencyScorer(), KeepAllAllocator(), UnstructuredWanda(0.5)),
        (Silent(), Silent(), Silent()),
        (Silent(), CoverageAllocator(), Cut()),
    ],
)
def test_choices_that_go_together_pass(choices):
    check_compatible(*choices)


def test_an_experiment_refuses_them_before_it_computes(experiment):
    with pytest.raises(InputError, match="merging removes none"):
        experiment(scorer=MSmoeScorer(), allocator=DominantMergeAllocator(), surgery=Refit()).check()


@pytest.fixture
def grouped(experiment, checkpoints, tmp_path):
    """``grouped(ratio=0.25, ...)``: an experiment on a model whose routers choose one of two groups of 3 experts."""
    folder = tmp_path / "grouped"
    shutil.copytree(checkpoints("deepseek_v2"), folder)
    config = json.loads((folder / "config.json").read_text())
    groups = {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
    (folder / "config.json").write_text(json.dumps({**config, **groups}))

    def make(**parts):
        base = experiment("deepseek_v2", **parts)
        return replace(base, model=replace(base.model, path=str(folder)))

    return make


@pytest.mark.parametrize(
    "allocator", [WholeExpertsAllocator(), GlobalWholeExpertsAllocator(), ImportanceWholeExpertsAllocator()]
)
def test_whole_experts_may_not_take_rows_along_where_routers_choose_groups(grouped, experiment, allocator):
    parts = {"scorer": FrequencyScorer(), "allocator": allocator}
    for surgery in (Cut(), MeanBias()):
        refused = r"(?s)ratio=0\.5.*groups of experts, which cannot shrink.*surgery=keep_rows.*allocator=uniform"
        with pytest.raises(InputError, match=refused):
            grouped(**parts, surgery=surgery).check()
    grouped(**parts, surgery=Cut("keep_row")).check()
    grouped(**parts, surgery=MeanBias("keep_row")).check()
    grouped(**parts, ratio=0.05).check()  # less than one expert
    experiment("deepseek_v2", **parts).check()


@pytest.mark.parametrize(
    "parts",
    [
        {"allocator": UniformAllocator()},
        {"allocator": CoverageAllocator()},  # may empty no expert
        {"scorer": HcSmoeScorer(), "allocator": LinkageMergeAllocator()},  # merged experts keep their rows
        {"scorer": MSmoeScorer(), "allocator": DominantMergeAllocator()},
    ],
)
def test_what_need_not_take_rows_along_passes_where_routers_choose_groups(grouped, parts):
    grouped(**parts).check()


@pytest.mark.parametrize("scorer", [NaeeScorer(), MoeI2Scorer()])
@pytest.mark.parametrize("row", ["keep_row", "remove_row"])
def test_subsets_of_experts_cannot_be_tried_where_routers_choose_groups(grouped, experiment, scorer, row):
    parts = {"scorer": scorer, "allocator": WholeExpertsAllocator(), "surgery": Cut(row)}
    with pytest.raises(InputError, match=r"(?s)ExpertSubsetPass.*groups of experts, which cannot shrink.*scorer=reap"):
        grouped(**parts).check()
    experiment("deepseek_v2", **parts).check()


@pytest.mark.parametrize(
    ("scorer", "refused"),
    [
        (SnipScorer(), True),
        (EndToEndScorer("block_local"), True),
        (ReleasedAttributionScorer(), True),
        (SnipScorer("language_model"), False),
        (SaliencyScorer(), False),  # in closed form
        (AttributionScorer(), False),
    ],
)
def test_gradients_too_small_for_float16_are_refused_before_anything_is_computed(experiment, scorer, refused):
    base = experiment(scorer=scorer)
    in_half = replace(base, model=replace(base.model, compute_dtype="float16"))
    if refused:
        with pytest.raises(InputError, match=r"(?s)float16.*model\.compute_dtype=bfloat16"):
            in_half.check()
    else:
        in_half.check()
    for wider in ("bfloat16", "float32"):
        replace(base, model=replace(base.model, compute_dtype=wider)).check()


@pytest.mark.parametrize("part", ["calibration", "evaluation", "training_data"])
def test_sequences_longer_than_the_model_was_made_for_are_refused_before_anything_is_computed(experiment, part):
    base = experiment()
    context = base.model.context()
    assert context == 512

    def with_length(length):
        if part == "training_data":
            return replace(base, recovery=Recovering(Length(length)))
        return replace(base, **{part: replace(getattr(base, part), sequence_length=length)})

    with pytest.raises(InputError, match=rf"{part}\.sequence_length=513, but .* at most 512 tokens"):
        with_length(513).check_on(base.model.shape(), context)
    with_length(512).check_on(base.model.shape(), context)
    with_length(513).check_on(base.model.shape(), None)  # a config that does not say
    if part != "training_data":
        with pytest.raises(InputError, match="513"):
            with_length(513).check()


@dataclass(frozen=True)
class Length:
    """Training data, as far as its length."""

    sequence_length: int


@dataclass(frozen=True)
class Recovering:
    """A recovery, as far as its data."""

    data: Length
