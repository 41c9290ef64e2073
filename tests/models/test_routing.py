"""Another number of experts per token: as if the checkpoint's config said so, in every family, until it is exported."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build_family, save_as_the_hub_does
from hydra import compose, initialize_config_dir

from moeprune.app.check import checked
from moeprune.app.footprint import Unpruned
from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import BudgetError, InputError
from moeprune.export.checkpoint import open_checkpoint
from moeprune.export.shape import stock_shape
from moeprune.export.stock import stock_model
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.footprint.prediction import predict
from moeprune.models.layers.streaming import skeleton
from moeprune.models.layers.workspace import Workspace
from moeprune.models.shape import ExpertShape, sent_to_experts
from moeprune.models.source import ModelSource
from moeprune.surgery.prune import prune
from moeprune.types import Plan

CONF = Path(__file__).parents[2] / "conf"
FIXED = "phimoe"
OWN_TOP_K = {"mixtral": 2, "gpt_oss": 2, "llama4": 2, "minimax": 2, "granitemoe": 2}
KEYS = ("num_experts_per_tok", "moe_k")

every_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name != FIXED])
one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


def source_of(folder, **settings):
    return ModelSource("tiny", str(folder), "float32", "float32", 8, 8, device="cpu", **settings)


def say_in_config(folder, count):
    """Write the number into config.json, whatever the family calls it."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    (key,) = [key for key in KEYS if key in values]
    file.write_text(json.dumps(values | {key: count}))


def logits_of(source, windows):
    with torch.no_grad():
        return source.load()(windows.input_ids_NT).logits


@every_family
@pytest.mark.parametrize("count", [1, 5])
def test_a_family_computes_what_it_would_if_its_config_said_so(family, count, tmp_path, random_windows):
    save_as_the_hub_does(build_family(family, torch.float32), tmp_path)
    source = source_of(tmp_path, experts_per_token=count)
    asked = logits_of(source, random_windows)
    as_stored = logits_of(source_of(tmp_path), random_windows)
    say_in_config(tmp_path, count)
    assert torch.equal(asked, logits_of(source_of(tmp_path), random_windows))
    assert not torch.equal(asked, as_stored)


@every_family
def test_the_checkpoints_own_number_changes_nothing(family, tmp_path, random_windows):
    save_as_the_hub_does(build_family(family, torch.float32), tmp_path)
    plain, asked = source_of(tmp_path), source_of(tmp_path, experts_per_token=OWN_TOP_K.get(family, 3))
    assert asked.identity() == plain.identity()
    assert asked.shape() == plain.shape()
    assert torch.equal(logits_of(asked, random_windows), logits_of(plain, random_windows))


def test_a_router_that_always_chooses_as_many_is_refused(tmp_path):
    save_as_the_hub_does(build_family(FIXED, torch.float32), tmp_path)
    with pytest.raises(InputError, match="experts_per_token=1 is not possible: routers of the family phimoe always"):
        source_of(tmp_path, experts_per_token=1).load()
    source_of(tmp_path, experts_per_token=2).load()


def test_identity_and_shape_follow_the_number(tiny_checkpoint):
    plain, fewer = source_of(tiny_checkpoint), source_of(tiny_checkpoint, experts_per_token=1)
    assert fewer.identity() == {**plain.identity(), "experts_per_token": 1}
    assert fewer.shape() == dataclasses.replace(plain.shape(), top_k=1)


def test_streamed_and_in_memory_see_as_many_tokens_per_expert(tiny_checkpoint, random_windows, tmp_path):
    statistics = []
    for streaming in ("never", "always"):
        model = source_of(tiny_checkpoint, experts_per_token=1, streaming=streaming).load()
        statistics.append(collect_statistics(model, random_windows, 2, Workspace(tmp_path / streaming, 1.0)))
        assert {layer.top_k for layer in moe_layers(skeleton(model))} == {1}
    in_memory, streamed = (each.routed_tokens_LE for each in statistics)
    assert torch.equal(in_memory, streamed)
    assert (in_memory.sum(dim=1) == random_windows.input_ids_NT.numel()).all()


def test_a_pruned_checkpoint_and_its_export_say_the_number(tiny_checkpoint, byte_tokenizer, random_windows, tmp_path):
    source = source_of(tiny_checkpoint, experts_per_token=1)
    shape, model = source.shape(), source.load()
    kept = tuple(tuple(torch.arange(shape.width // 2) for _ in range(shape.experts)) for _ in range(shape.layers))
    pruned = prune(model, Plan(kept, shape.width))
    (tmp_path / "pruned").mkdir()
    save_compressed(pruned, byte_tokenizer, tmp_path / "pruned", torch.float32)
    # Read again by a source that says nothing of it.
    again = source_of(tiny_checkpoint).load_compressed(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(random_windows.input_ids_NT).logits, pruned(random_windows.input_ids_NT).logits)
    checkpoint = open_checkpoint(tmp_path / "pruned")
    assert checkpoint.family_config["num_experts_per_tok"] == 1
    assert stock_model(checkpoint, stock_shape(checkpoint, pad=False)).config.num_experts_per_tok == 1


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_a_number_out_of_range_is_refused_before_a_model_is_loaded(count):
    with pytest.raises(InputError, match=f"experts_per_token={count} is not possible"):
        sent_to_experts(ExpertShape(layers=2, experts=8, width=16, top_k=2), count, "qwen3_moe")


def test_where_groups_are_chosen_first_fewer_are_possible_and_more_are_not():
    grouped = ExpertShape(layers=2, experts=8, width=16, top_k=2, routes_by_group=True)
    assert sent_to_experts(grouped, 1, "deepseek_v3").top_k == 1
    with pytest.raises(InputError, match="can be sent to 1 to 2 of them"):
        sent_to_experts(grouped, 3, "deepseek_v3")


def config_of(*overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", [*overrides, "tracking=none"])


def test_the_config_is_checked_against_the_checkpoint():
    with pytest.raises(InputError, match=r"model\.experts_per_token=17 is not possible: a layer has 16 experts"):
        checked(config_of("model.experts_per_token=17"))
    assert checked(config_of("model.experts_per_token=1")).model.experts_per_token == 1


def test_fewer_experts_per_token_let_more_be_removed():
    """Top-4 of 16 experts cannot stay where 15 of 16 go; top-1 can."""
    asked = ("method=frequency", "ratio=0.9375", "model.minimum_width=96", "model.alignment=96")
    with pytest.raises(BudgetError, match="top-4"):
        checked(config_of(*asked))
    checked(config_of(*asked, "model.experts_per_token=1"))


def test_predicted_sizes_count_as_many_experts_as_active():
    def unpruned(count):
        path = "embedded:tiny_qwen3_moe"
        return Unpruned(ModelSource("tiny", path, "bfloat16", "float32", 8, 16, experts_per_token=count))

    def active(model):
        widths_LE = [[model.shape.width] * model.shape.experts] * model.shape.layers
        return predict(model.model, widths_LE, torch.bfloat16).parameters.active

    own, fewer = unpruned(None), unpruned(1)
    expert = 3 * 96 * 192  # gate, up and down
    assert (own.shape.top_k, fewer.shape.top_k) == (4, 1)
    assert active(own) - active(fewer) == 4 * 3 * expert
