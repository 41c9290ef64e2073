"""Planted models compute what they should, and merging pairs or dropping spares gives back what they were made of."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moeprune.allocation.budget import Budget
from moeprune.allocation.merging import LinkageMergeAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.calibration.all_tokens import AllTokensPass
from moeprune.calibration.sample import Calibration
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.text import EmbeddedText
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.workspace import Workspace
from moeprune.models.shape import embedded_models, local_folder, read_shape, read_sizes
from moeprune.models.source import ModelSource
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.scoring.merging import HcSmoeScorer
from moeprune.scoring.weights import with_expert_weights
from moeprune.surgery.prune import prune

QWEN = "tiny_qwen3_moe"
# In float64; DeepSeek-V2's routers compute in float32 whatever the model does.
TOLERANCE = {QWEN: 1e-11, "tiny_deepseek_v2": 1e-4}
each_dense = pytest.mark.parametrize("dense", embedded_models())


@pytest.fixture(autouse=True, scope="module")
def own_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("planted")))
        yield


@pytest.fixture
def exact_softmax(monkeypatch):
    """Qwen3-MoE's routers compute their softmax in float32; here in float64, so that only the structure is compared."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim, dtype=torch.float64))


def source_of(name):
    return ModelSource(name, f"embedded:{name}", "bfloat16", "float32", 8, 16, device="cpu")


def windows_of(source, count):
    text = EmbeddedText(["prose", "scripture", "speeches", "code", "arithmetic"], "training")
    return Calibration(text, count, 96, 8, seed=0).sample(source.tokenizer())


@torch.no_grad()
def logits_of(model, windows):
    return model(windows.input_ids_NT).logits


def in_float64(name):
    folder = local_folder(f"embedded:{name}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


@each_dense
def test_pairs_compute_what_the_model_without_them_does(dense, exact_softmax):
    windows = windows_of(source_of(dense), 5)
    expected = logits_of(in_float64(dense), windows)
    found = logits_of(in_float64(f"{dense}_pairs"), windows)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dense], atol=TOLERANCE[dense])


@each_dense
@pytest.mark.parametrize(("kind", "per_token"), [("pairs", 8), ("spares", 4)])
def test_a_planted_model_has_every_expert_twice(dense, kind, per_token):
    dense_folder, folder = (local_folder(f"embedded:{name}") for name in (dense, f"{dense}_{kind}"))
    before, after = read_shape(dense_folder), read_shape(folder)
    assert (after.layers, after.experts, after.width, after.top_k) == (
        before.layers, 2 * before.experts, before.width, per_token,
    )  # fmt: skip
    assert read_sizes(folder).routed_parameters == 2 * read_sizes(dense_folder).routed_parameters
    layers = zip(*(moe_layers(source_of(name).load()) for name in (dense, f"{dense}_{kind}")), strict=True)
    for plain, planted in layers:
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(plain.experts, name)
            assert torch.equal(getattr(planted.experts, name), torch.cat([weights, weights]))
        copies = plain.router.weight / (1 if kind == "pairs" else 4)
        assert torch.equal(planted.router.weight, torch.cat([plain.router.weight, copies]))


def statistics_of(source):
    model, windows = source.load(), windows_of(source, 20)
    return model, windows, collect_statistics(model, windows, 8, Workspace())


def half_of(source, at_once):
    return Budget.for_model(source.shape(), ratio=0.5, alignment=at_once, minimum_width=at_once)


def test_merging_the_pairs_gives_the_model_without_them():
    source = source_of(f"{QWEN}_pairs")
    model, windows, statistics = statistics_of(source)
    scores = HcSmoeScorer()(statistics, AllTokensPass()(model, windows, 8, Workspace()))
    scores = with_expert_weights(scores, statistics)
    plan = LinkageMergeAllocator("average")(scores, half_of(source, 96))
    assert torch.equal(plan.merge.leader_LE % 16, torch.arange(32).remainder(16).expand(4, 32))
    merged = prune(model, plan)
    assert {len(layer.stored_widths) for layer in moe_layers(merged)} == {16}
    torch.testing.assert_close(
        logits_of(merged, windows), logits_of(source_of(QWEN).load(), windows), rtol=1e-3, atol=1e-3
    )


def test_dropping_the_least_used_experts_takes_the_spares_and_gives_the_model_without_them():
    source = source_of(f"{QWEN}_spares")
    model, windows, statistics = statistics_of(source)
    plan = WholeExpertsAllocator()(FrequencyScorer()(statistics), half_of(source, 96))
    assert torch.equal(plan.widths_LE > 0, torch.arange(32).lt(16).expand(4, 32))
    dropped = prune(model, plan)
    torch.testing.assert_close(
        logits_of(dropped, windows), logits_of(source_of(QWEN).load(), windows), rtol=1e-5, atol=1e-5
    )


def test_a_planted_model_is_made_once_and_the_same_every_time(tmp_path, monkeypatch):
    first = source_of(f"{QWEN}_pairs").identity()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = local_folder(f"embedded:{QWEN}_pairs")
    assert folder.is_relative_to(tmp_path)
    assert source_of(f"{QWEN}_pairs").identity() == first
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert local_folder(f"embedded:{QWEN}_pairs") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_place_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"(?s)tiny_qwen3_moe_pairs is made when it is first used.*XDG_CACHE_HOME"):
        local_folder(f"embedded:{QWEN}_pairs")


def test_a_name_that_does_not_exist_lists_the_planted_ones_too():
    with pytest.raises(InputError, match=r"Did you mean: .*tiny_qwen3_moe_pairs"):
        local_folder("embedded:tiny_qwen3_moe_pair")


def test_conf_names_them_all():
    conf = Path(__file__).parents[2] / "conf/model"
    named = {file.stem for file in conf.glob("*.yaml") if f"path: embedded:{file.stem}\n" in file.read_text()}
    planted = {f"{dense}_{kind}" for dense in embedded_models() for kind in ("pairs", "spares")}
    assert named == planted | set(embedded_models())
    assert json.loads((local_folder(f"embedded:{QWEN}_spares") / "config.json").read_text())["num_experts_per_tok"] == 4
