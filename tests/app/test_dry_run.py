"""The dry run: what it says of each job, that nothing is left behind, and what it finds wrong."""

import re
from collections import Counter

import pytest
import torch

from moeprune.models.footprint.peak import Activations, adapter_parameters
from moeprune.models.footprint.prediction import shape_of
from moeprune.recovery.adapters import Adapters
from moeprune.report.tables.footprint import GPUS
from moeprune.surgery.prune import prune
from moeprune.types import Plan

DRY = ("--multirun", "hydra/launcher=dry_run")


@pytest.fixture
def wide(monkeypatch) -> None:
    monkeypatch.setattr("moeprune.app.terminal.LOG_FILE_WIDTH", 400)


def test_jobs_of_models_that_are_not_here_have_sizes_and_the_published_ones_beside_them(here, wide):
    outcome = here(
        *DRY, "model=qwen1_5_moe_a2_7b", "ratio=0.25,0.5", "quantizer=nf4_double", "calibration=c4", "tracking=none",
        "hydra.sweep.dir=runs/sweep",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "6.71 (4.27x)" in outcome.out and "6.71 GB (d) +0.0%, 5.6 GB (i) +0.0%" in outcome.out
    assert "2 jobs could run" in outcome.out
    assert "1 calibration, 1 statistics, 2 pruned, 2 quantized, 5 evaluation" in " ".join(outcome.out.split())
    assert not list(outcome.place.iterdir())


def test_the_stages_it_counts_are_those_that_the_sweep_computes(here, tiny):
    words = [
        *tiny, "ratio=0.25,0.5", "quantizer=nf4", "hydra.sweeper.grids=[{scorer: 'activation,moe_i2'},{method: reap}]",
        "allocator=whole_experts", "surgery=none", "hydra.sweep.dir=runs/sweep",
    ]  # fmt: skip
    dry = here(*DRY, *words)
    assert dry.code == 0, dry.err
    assert here("--multirun", *words).code == 0
    stages = Counter(path.parent.relative_to(dry.place / "cache").as_posix() for path in dry.place.glob("cache/*/*"))
    stages |= {"pass/expert_subsets": len(list(dry.place.glob("cache/pass/expert_subsets/*")))}
    told = " ".join(dry.out.split()).split("share a cache: ")[1]
    for stage in ("calibration", "statistics", "pass/expert_subsets", "pruned", "quantized"):
        assert f"{stages[stage]} {stage}" in told
    evaluated = list(dry.place.glob("cache/evaluation/*/size/*"))
    assert f"{len(evaluated)} evaluation" in told


def test_what_is_wrong_is_told_with_the_jobs_that_it_stops_after_the_table_of_the_others(here, tiny):
    grids = "[{ratio: '0.5,2'},{scorer: reap, seed: '0,1'},{scorer: none_such},{recoverie: dora}]"
    outcome = here(*DRY, *tiny, f"hydra.sweeper.grids={grids}")
    assert outcome.code == 2
    assert "1 job could run" in outcome.out
    assert "5 of 6 jobs could not run." in outcome.err
    assert "Job 1: ratio=2 " in outcome.err and "ratio=2.0 is not possible" in outcome.err
    assert "Job 2-3: scorer=reap seed=0" in outcome.err and "ranks whole experts only" in outcome.err
    assert "Job 4: " in outcome.err and "scorer=none_such does not exist" in outcome.err
    assert "Job 5: " in outcome.err and "recoverie" in outcome.err
    assert "Traceback" not in outcome.err and not list(outcome.place.glob("runs/*"))


def test_generated_code_needs_its_permission_here_too(here, wide):
    words = [*DRY, "model=qwen1_5_moe_a2_7b", "evaluation=paper", "evaluation.tasks=[humaneval]", "tracking=none"]
    refused = here(*words, "seed=0")
    assert refused.code == 2 and "evaluation.run_generated_code=true" in refused.err
    allowed = here(*words, "evaluation.run_generated_code=true", "seed=0")
    assert allowed.code == 0
    row = next(line for line in allowed.out.splitlines() if "H100" in line)
    assert row.split()[-2:] == ["-", "-"]  # text is not generated layer by layer


@pytest.mark.parametrize("sweeper", ["optuna", "rerun"])
def test_jobs_that_depend_on_others_are_refused(here, tiny, sweeper):
    jobs = ["hydra.sweeper.jobs=[0]"] if sweeper == "rerun" else []
    outcome = here(*DRY, *tiny, f"hydra/sweeper={sweeper}", *jobs)
    assert outcome.code == 2 and f"hydra/sweeper={sweeper}" in outcome.err
    assert not list(outcome.place.iterdir())


def test_a_single_run_has_no_launcher(here, tiny):
    outcome = here("hydra/launcher=dry_run", *tiny)
    assert outcome.code == 2 and "Add --multirun" in outcome.err


def test_peaks_grow_with_what_is_done(here, wide):
    """Gradients through the whole model and adapters need more than a forward pass; streaming needs less."""
    grids = "[{method: reap},{method: heapr},{method: reap, recovery: dora}]"
    words = ["model=qwen3_30b_a3b", "ratio=0.25", "evaluation=paper_choices", "tracking=none"]
    outcome = here(*DRY, *words, f"hydra.sweeper.grids={grids}")
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if "method=" in line and any(gpu in line for gpu in GPUS)]
    plain, backward, recovered = ([float(n) for n in re.findall(r" (\d+\.\d)(?= )", row)] for row in rows)
    assert plain[1] < 10 < 56 < plain[0] < backward[0]
    assert plain[0] < recovered[0] == recovered[1]
    assert rows[1].split()[-2:] == ["-", "-"] and len(backward) == 1


def test_adapters_are_counted_as_they_are_attached(build_model):
    model = build_model("qwen3_renormalised", torch.float32)
    shape, hidden = shape_of(model), model.config.hidden_size
    widths_LE = [[8 + 4 * (expert % 2) for expert in range(shape.experts)] for _ in range(shape.layers)]
    kept = tuple(tuple(torch.arange(width) for width in widths_E) for widths_E in widths_LE)
    channels = sum(map(sum, widths_LE))
    for dora in (False, True):
        adapters = Adapters(3, 6, 0.0, dora, 1e-3, 0, 1, 1e-3)
        trained = prune(build_model("qwen3_renormalised", torch.float32), Plan(kept, shape.width))
        adapters.attach(trained, seed=0)
        counted = sum(parameter.numel() for group in adapters.groups(trained) for parameter in group.parameters)
        assert adapter_parameters(shape, hidden, channels, 3, dora) == counted


def test_activations_of_a_batch(build_model):
    model = build_model("qwen3_renormalised", torch.float32)
    config, shape = model.config, shape_of(model)
    batch = Activations(10, shape, config, itemsize=2)
    layer = 2 * (10 * config.hidden_size * 2) + 10 * 3 * shape.top_k * shape.width * 2
    logits = 10 * config.vocab_size * 6
    assert (batch.layer, batch.logits) == (layer, logits)
    assert batch.backward(checkpointing=False) == config.num_hidden_layers * layer + 2 * logits
    kept = config.num_hidden_layers * 10 * config.hidden_size * 2
    assert batch.backward(checkpointing=True) == kept + layer + 2 * logits


def test_an_interruption_says_that_nothing_was_done_and_none_ends_without_a_count(here, tiny, monkeypatch):
    outcome = here(*DRY, *tiny, "ratio=2,3")
    assert outcome.code == 2 and "could run." not in outcome.out

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeprune.app.launching.planned.Planner.plan", interrupt)
    outcome = here(*DRY, *tiny, "seed=0,1")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "Interrupted. Nothing was run, and nothing written."
