"""Choices that do not go together are refused before anything is computed."""

from dataclasses import dataclass

import pytest

from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.keep_all import KeepAllAllocator
from moeprune.allocation.merging import DominantMergeAllocator, LinkageMergeAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.errors import InputError
from moeprune.pipeline.compatibility import check_compatible
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.scoring.merging import HcSmoeScorer, MSmoeScorer
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
