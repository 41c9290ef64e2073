"""What holds for every choice of surgery: nothing removed changes nothing, and all comes back from disk."""

from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from surgery_plans import everything, plan_of, random_channels_and_empty_experts

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.compressed.files import structure_of
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.layers.walk import run_through
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import prune

CONF = sorted((Path(__file__).parents[2] / "conf" / "surgery").glob("*.yaml"))
every_choice = pytest.mark.parametrize("file", CONF, ids=lambda file: file.stem)


def surgery_of(file: Path, ratio: float):
    """The surgery as a run builds it."""
    config = OmegaConf.merge({"ratio": ratio}, {"surgery": OmegaConf.load(file)})
    return instantiate(config.surgery)


@pytest.fixture
def operated(tiny_model, many_windows):
    """``operated(file)``: the tiny model after a surgery that has something to do."""

    def operate(file):
        statistics = collect_statistics(tiny_model, many_windows, batch_size=40)
        unstructured = file.stem == "wanda_unstructured"
        plan = plan_of(tiny_model, everything if unstructured else random_channels_and_empty_experts)
        run_through(surgery_of(file, 0.5)(tiny_model, plan, statistics, many_windows, 16))
        return tiny_model

    return operate


@every_choice
@torch.no_grad()
def test_removing_nothing_changes_nothing(build_model, model_name, many_windows, file):
    plain, operated = (build_model(model_name, torch.float32) for _ in range(2))
    statistics = collect_statistics(operated, many_windows, batch_size=40)
    plan = plan_of(plain, everything)
    prune(plain, plan)
    layers = list(surgery_of(file, 0.0)(operated, plan, statistics, many_windows, 16))
    assert [(name, layer) for _, name, layer in layers] == list(decoder_layers(operated))
    assert operated.state_dict().keys() == plain.state_dict().keys()
    ids = many_windows.input_ids_NT
    assert torch.equal(operated(ids).logits, plain(ids).logits)


@every_choice
@torch.no_grad()
def test_the_result_comes_back_from_disk_bit_for_bit(operated, byte_tokenizer, many_windows, tmp_path, file):
    model = operated(file)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert structure_of(loaded) == structure_of(model)
    ids = many_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_choice
@torch.no_grad()
def test_the_quantised_result_comes_back_from_disk_bit_for_bit(operated, byte_tokenizer, many_windows, tmp_path, file):
    model = operated(file)
    rows = [layer.experts.slot_of_row for layer in moe_layers(model)]
    biases = [layer.experts.bias_EH for layer in moe_layers(model)]
    run_through(NF4Quantizer()(model, None, 1))
    for layer, slot_of_row, bias_EH in zip(moe_layers(model), rows, biases, strict=True):
        assert layer.experts.slot_of_row == slot_of_row
        assert (layer.experts.bias_EH is None) == (bias_EH is None)
        assert bias_EH is None or torch.equal(layer.experts.bias_EH, bias_EH)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert structure_of(loaded) == structure_of(model)
    ids = many_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_choice
def test_a_model_that_is_pruned_already_is_refused(tiny_model, many_windows, file):
    statistics = collect_statistics(tiny_model, many_windows, batch_size=40)
    plan = plan_of(tiny_model, everything)
    prune(tiny_model, plan)
    with pytest.raises(InputError, match="pruned already"):
        surgery_of(file, 0.5)(tiny_model, plan, statistics, many_windows, 16)


@pytest.mark.parametrize(
    "file", [file for file in CONF if "empty_experts" in OmegaConf.load(file)], ids=lambda file: file.stem
)
def test_a_row_policy_that_does_not_exist_is_refused_before_anything_runs(file):
    config = OmegaConf.merge(OmegaConf.load(file), {"empty_experts": "drop_row"})
    with pytest.raises(InstantiationException) as raised:
        instantiate(config)
    assert isinstance(raised.value.__cause__, InputError)
