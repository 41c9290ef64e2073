"""The whole road on tiny random models: what it finds, what it reuses, what a change makes new."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.calibration.text import TextFiles
from moeprune.errors import BudgetError, InputError
from moeprune.models.layers.walk import each_layer
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.run import run
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.scoring.activation import ActivationScorer
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.scoring.gradient import EndToEndScorer, HeaprScorer
from moeprune.surgery.bias import MeanBias
from moeprune.types import Plan

FAMILIES = ("qwen3_renormalised", "deepseek_v2")
STAGES = [
    "calibration", "statistics", "calibration_report", "scores", "plan", "diagnostics", "pruned", "evaluation/dense",
    "evaluation/pruned",
]  # fmt: skip


@dataclass(frozen=True)
class ScaledDown:
    """Stands for a recovery: every expert's output times ``factor``; it notes whether it saw four-bit weights."""

    factor: float = 0.5

    @torch.no_grad()
    def __call__(self, load, dense, tokenizer, folder):
        model = load()
        assert dense().num_parameters() > 0 and tokenizer.bos_token_id is not None
        (folder / "recovery.json").write_text(json.dumps({"steps": 0, "factor": self.factor}))
        for module in model.modules():
            if isinstance(module, RaggedExperts):
                for expert in module:
                    expert.down_proj.weight.mul_(self.factor)
        return model


@dataclass(frozen=True)
class Rounded:
    """Stands for a quantizer: weights of experts with three binary digits."""

    name: str = "coarse"
    needs_calibration: bool = False

    @torch.no_grad()
    def __call__(self, model, windows, batch_size, workspace):
        assert (windows is not None) == self.needs_calibration
        for depth, name, layer in each_layer(model, "round", workspace):
            for module in layer.modules():
                if isinstance(module, Expert):
                    module.down_proj.weight.copy_((module.down_proj.weight * 8).round() / 8)
            yield depth, name, layer


@pytest.fixture
def cache(tmp_path) -> StageCache:
    return StageCache(tmp_path / "cache")


def computed(result) -> list[str]:
    return [artifact.stage for artifact in result.stages if not artifact.cached]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_meets_its_budget_measures_both_models_and_a_second_run_reuses_every_stage(family, experiment, cache):
    result = run(experiment(family), cache)
    assert [artifact.stage for artifact in result.stages] == STAGES
    assert computed(result) == STAGES
    assert result.plan.removed_ratio == 0.5
    assert result.plan.widths_LE.tolist() == Plan.load(result.files["plan.safetensors"]).widths_LE.tolist()
    assert list(result.variants) == ["dense", "pruned"]
    dense, pruned = result.variants.values()
    assert pruned["parameters"]["routed"] == dense["parameters"]["routed"] / 2
    removed = dense["parameters"]["routed"] - pruned["parameters"]["routed"]
    live = result.plan.widths_LE > 0
    router_rows = int((~live).sum()) * 32
    assert pruned["parameters"]["total"] == dense["parameters"]["total"] - removed - router_rows
    assert pruned["bytes"]["with_overhead"] == 4 * pruned["parameters"]["total"]
    for metrics in (dense, pruned):
        assert set(metrics["perplexity"]) == {"numbers", "letters"}
        assert metrics["perplexity_tokens"] == {"numbers": 90, "letters": 90}
        mean = math.exp(sum(map(math.log, metrics["perplexity"].values())) / 2)
        assert metrics["mean_perplexity"] == pytest.approx(mean)

    again = run(experiment(family), cache)
    assert computed(again) == []
    assert again.variants == result.variants
    assert [artifact.key for artifact in again.stages] == [artifact.key for artifact in result.stages]


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_nothing_leaves_the_perplexity_as_it_was(family, experiment, cache):
    result = run(experiment(family, ratio=0.0), cache)
    assert result.plan.removed_ratio == 0
    dense, pruned = result.variants["dense"], result.variants["pruned"]
    for text in dense["perplexity"]:
        assert pruned["perplexity"][text] == pytest.approx(dense["perplexity"][text], rel=1e-6)
    assert pruned["parameters"] == dense["parameters"]


def test_a_run_in_a_fresh_cache_gives_the_same_numbers(experiment, tmp_path):
    first, second = (run(experiment(), StageCache(tmp_path / name)) for name in ("one", "two"))
    assert first.variants == second.variants
    assert [artifact.key for artifact in first.stages] == [artifact.key for artifact in second.stages]


def test_a_change_makes_new_only_what_follows_from_it(experiment, cache, texts):
    base = experiment()
    run(base, cache)
    changes = {
        "scorer": (replace(base, scorer=ActivationScorer()), STAGES[3:7] + STAGES[8:]),
        "allocator": (replace(base, allocator=UniformAllocator()), STAGES[4:7] + STAGES[8:]),
        "ratio": (replace(base, ratio=0.25), STAGES[4:7] + STAGES[8:]),
        "calibration": (replace(base, calibration=replace(base.calibration, windows=5)), STAGES[:7] + STAGES[8:]),
        "evaluation": (replace(base, evaluation=replace(base.evaluation, windows=5)), [STAGES[2], *STAGES[7:]]),
        "warning": (replace(base, fewest_tokens=1), ["calibration_report"]),
        "surgery": (replace(base, surgery=MeanBias()), ["pruned", "evaluation/pruned"]),
        "name of the model": (replace(base, model=replace(base.model, name="another name")), []),
        "storage": (replace(base, model=replace(base.model, dtype="bfloat16")), ["pruned", "evaluation/pruned"]),
        "precision": (replace(base, model=replace(base.model, compute_dtype="bfloat16")), STAGES),
    }
    for what, (changed, expected) in changes.items():
        assert computed(run(changed, cache)) == expected, what


def test_recovery_and_quantizer_are_plain_dataclasses_that_follow_each_other(experiment, cache):
    result = run(experiment(recovery=ScaledDown(), quantizer=Rounded()), cache)
    assert list(result.variants) == ["dense", "pruned", "pruned+recovered", "pruned+recovered+coarse"]
    assert computed(result) == [
        *STAGES[:7], "recovered", "quantized", *STAGES[7:],
        "evaluation/pruned-recovered", "evaluation/pruned-recovered-coarse",
    ]  # fmt: skip
    assert len({metrics["mean_perplexity"] for metrics in result.variants.values()}) == 4

    stronger = run(experiment(recovery=ScaledDown(0.25), quantizer=Rounded()), cache)
    assert computed(stronger) == [
        "recovered", "quantized", "evaluation/pruned-recovered", "evaluation/pruned-recovered-coarse",
    ]  # fmt: skip
    assert stronger.as_metrics()["recovery_details"] == {"steps": 0, "factor": 0.25}
    unrecovered = run(experiment(quantizer=Rounded()), cache)
    assert "recovery_details" not in unrecovered.as_metrics()
    assert list(unrecovered.variants) == ["dense", "pruned", "pruned+coarse"]
    assert computed(unrecovered) == ["quantized", "evaluation/pruned-coarse"]


def test_the_order_of_recovery_and_quantizer_is_a_setting(experiment, cache):
    both = experiment(recovery=ScaledDown(), quantizer=Rounded())
    usual = run(both, cache)
    turned = run(replace(both, order=("prune", "quantize", "recover")), cache)
    assert list(turned.variants) == ["dense", "pruned", "pruned+coarse", "pruned+coarse+recovered"]
    assert computed(turned) == [
        "quantized", "recovered", "evaluation/pruned-coarse", "evaluation/pruned-coarse-recovered",
    ]  # fmt: skip
    # Halving after rounding is not rounding after halving.
    last = [list(result.variants.values())[-1]["mean_perplexity"] for result in (usual, turned)]
    assert last[0] != last[1]


def test_a_quantizer_that_looks_at_calibration_windows_is_keyed_by_them(experiment, cache):
    for quantizer, inputs in ((Rounded(), ["pruned"]), (Rounded(needs_calibration=True), ["pruned", "calibration"])):
        walked = {artifact.stage: artifact for artifact in run(experiment(quantizer=quantizer), cache).stages}
        record = json.loads((walked["quantized"].folder / "stage.json").read_text())
        assert record["inputs"] == [walked[stage].key for stage in inputs]


def test_a_run_in_four_bits_is_smaller_on_disk(experiment, cache):
    result = run(experiment(quantizer=NF4Quantizer(block_size=64)), cache)
    assert list(result.variants) == ["dense", "pruned", "pruned+nf4"]
    pruned, quantized = result.variants["pruned"], result.variants["pruned+nf4"]
    assert quantized["parameters"] == pruned["parameters"]
    assert quantized["bytes"]["with_overhead"] < pruned["bytes"]["with_overhead"]
    assert quantized["bytes"]["ideal"] < quantized["bytes"]["with_overhead"]


def test_a_scorer_that_asks_for_a_pass_gets_it_once(experiment, cache):
    """Two scorers and two ratios share one backward pass."""
    run(experiment(), cache)
    first = run(experiment(scorer=HeaprScorer()), cache)
    assert computed(first) == ["pass/loss_gradients", *STAGES[3:7], STAGES[8]]
    other_ratio = run(experiment(scorer=HeaprScorer(), ratio=0.25), cache)
    assert computed(other_ratio) == [*STAGES[4:7], STAGES[8]]
    other_scorer = run(experiment(scorer=EndToEndScorer()), cache)
    assert computed(other_scorer) == [*STAGES[3:7], STAGES[8]]
    assert "pass/loss_gradients" in [artifact.stage for artifact in other_scorer.stages]


def test_the_results_name_the_files_worth_keeping(experiment, cache):
    files = run(experiment(), cache).files
    assert list(files) == ["plan.safetensors", "diagnostics.json", "calibration.json"]
    report = json.loads(files["calibration.json"].read_text())
    assert set(report["shared_ngrams"]) == {"numbers", "letters"}
    assert len(json.loads(files["diagnostics.json"].read_text())["kept_channels"]) == 2


def test_whole_experts_by_frequency_need_no_channel_scores(experiment, cache):
    result = run(experiment(scorer=FrequencyScorer(), allocator=WholeExpertsAllocator()), cache)
    assert result.plan.widths_LE.sort(dim=1).values.tolist() == [[0] * 4 + [16] * 4] * 2


def test_an_impossible_budget_is_refused_before_anything_is_computed(experiment, cache):
    for impossible in (experiment(ratio=0.99), experiment(ratio=0.875, allocator=WholeExpertsAllocator())):
        with pytest.raises(BudgetError):
            run(impossible, cache)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": TextFiles({"text": "/no/such/text"})}, "/no/such/text does not exist"),
        ({"sequence_length": 10_000}, r"evaluation\.sequence_length=10000, but .* at most 512 tokens"),
        ({"sequence_length": 2}, "leaves nothing to predict"),
        ({"tasks": ["word_ordr"]}, "Task 'word_ordr' does not exist"),
        ({"tasks": ["humaneval"]}, r"set evaluation\.run_generated_code=true"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_anything_is_computed(experiment, cache, change, message):
    base = experiment()
    with pytest.raises(InputError, match=message):
        run(replace(base, evaluation=replace(base.evaluation, **change)), cache)
    assert not cache.root.exists()


def test_metrics_are_plain_values_that_name_plan_variants_and_stages(experiment, cache):
    metrics = run(experiment(), cache).as_metrics()
    assert metrics["plan"]["removed_channels"] == 128
    assert metrics["plan"]["total_channels"] == 256
    assert len(metrics["plan"]["live_experts"]) == 2
    assert [variant["name"] for variant in metrics["variants"]] == ["dense", "pruned"]
    assert [stage["stage"] for stage in metrics["stages"]] == STAGES
    assert all(stage["seconds"] >= 0 and stage["peak_memory_gib"] > 0 for stage in metrics["stages"])
