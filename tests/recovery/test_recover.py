"""Recovery from end to end: data, training, storing; killed and gone on with."""

import json
import multiprocessing
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moeprune.errors import InputError, ModelError, NumericalError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.adapters import adapter_names
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.recovery import stored
from moeprune.recovery.objectives import Distillation, LanguageModelling
from moeprune.recovery.recover import Recovery
from moeprune.recovery.weights import AllWeights, Routers
from moeprune.training.data import LabelledWindows
from moeprune.training.fine_tuning import FineTuning

TRAINING = FineTuning(
    epochs=2, batch_size=4, micro_batch_size=2, warmup_ratio=0.25, checkpoint_every_steps=1, log_every=1, seed=3
)  # fmt: skip


@dataclass(frozen=True)
class Rhyme:
    """Windows of one line of bytes that a model learns fast; the last one without a label on its first half."""

    count: int = 10

    def __call__(self, tokenizer) -> LabelledWindows:
        line = torch.tensor([104, 101, 121, 33, 32, 104, 111, 33, 32, 10, 119, 111])
        ids_NT = torch.stack([line.roll(-index) for index in range(self.count)])
        labels_NT = ids_NT.clone()
        labels_NT[-1, :6] = -100
        return LabelledWindows(ids_NT, labels_NT)


@pytest.fixture
def recovery(adapters):
    def build(**settings) -> Recovery:
        plain = {
            "name": "test", "weights": adapters(), "objective": LanguageModelling(), "data": Rhyme(),
            "training": TRAINING, "dtype": "float32", "merge": True,
        }  # fmt: skip
        return Recovery(**plain | settings)

    return build


@pytest.fixture
def written(pruned, byte_tokenizer, tmp_path):
    """A function that loads the pruned model from its checkpoint; in float32 unless told otherwise."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_compressed(pruned(torch.float32), byte_tokenizer, folder, torch.float32)
    return lambda dtype=torch.float32: partial(load_compressed, folder, dtype)


def run(recovery, load, tokenizer, folder, dense=None):
    folder.mkdir(exist_ok=True)
    model = recovery(load, dense, tokenizer, folder)
    lines = [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text().splitlines()]
    return model, json.loads((folder / "recovery.json").read_text()), lines


def logits(model):
    with torch.no_grad():
        return model(input_ids=Rhyme()(None).input_ids_NT, use_cache=False).logits


@pytest.mark.parametrize("use_dora", [True, False])
def test_adapters_learn_and_are_merged(recovery, adapters, written, byte_tokenizer, tmp_path, use_dora):
    model, details, lines = run(
        recovery(weights=adapters(use_dora=use_dora)), written(), byte_tokenizer, tmp_path / "stage"
    )
    assert details["merged"] is True and adapter_names(model) == [] and not model.training
    assert details["stored_difference"] < 1e-5
    assert details["final_loss"] == lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert details["learning_rates"] == {"experts": 1e-2, "routers": 1e-3}
    assert details["steps"] == lines[-1]["step"] == 6
    assert details["training_tokens"] == 2 * Rhyme()(None).target_count
    assert details["trained_parameters"] > 0 and details["seconds"] > 0
    before = written()().state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    routers = {id(layer.router) for layer in moe_layers(model)}
    allowed = {f"{name}.weight" for name, module in model.named_modules() if id(module) in routers}
    assert moved and all(name in allowed or ".experts." in name for name in moved)
    save_compressed(model, byte_tokenizer, tmp_path / "stage", torch.float32)
    assert torch.equal(logits(load_compressed(tmp_path / "stage", torch.float32)), logits(model))


def test_kept_adapters_are_those_of_the_merged_model(recovery, written, byte_tokenizer, tmp_path):
    merged, _, _ = run(recovery(), written(), byte_tokenizer, tmp_path / "merged")
    kept, details, _ = run(recovery(merge=False), written(), byte_tokenizer, tmp_path / "kept")
    assert details["merged"] is False and set(adapter_names(kept)) == {"experts", "routers"}
    torch.testing.assert_close(logits(kept), logits(merged), rtol=1e-4, atol=1e-4)
    save_compressed(kept, byte_tokenizer, tmp_path / "kept", torch.float32)
    assert torch.equal(logits(load_compressed(tmp_path / "kept", torch.float32)), logits(kept))


@pytest.mark.parametrize("merge", [True, False, None])
def test_what_comes_back_is_what_is_stored(recovery, written, byte_tokenizer, tmp_path, merge):
    stage = tmp_path / "stage"
    model, details, _ = run(recovery(dtype="bfloat16", merge=merge), written(), byte_tokenizer, stage)
    assert 1e-5 < details["stored_difference"] < stored.TOLERANCE[torch.bfloat16]
    save_compressed(model, byte_tokenizer, stage, torch.bfloat16)
    assert torch.equal(logits(load_compressed(stage, torch.float32)), logits(model))


def test_a_model_computed_in_16_bits_comes_back_so(recovery, written, byte_tokenizer, tmp_path):
    for number, (weights, precision) in enumerate(
        [(recovery().weights, "32-true"), (AllWeights(1e-3), "32-true"), (Routers(1e-3), "bf16-mixed")]
    ):
        asked = recovery(weights=weights, dtype="bfloat16", training=replace(TRAINING, precision=precision))
        model, details, _ = run(asked, written(torch.bfloat16), byte_tokenizer, tmp_path / str(number))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert details["stored_difference"] < stored.TOLERANCE[torch.bfloat16]
    with pytest.raises(InputError, match="bf16-mixed"):
        run(recovery(weights=Routers(1e-3)), written(torch.bfloat16), byte_tokenizer, tmp_path / "refused")


def test_storing_that_changes_the_model_is_an_error(recovery, written, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(stored.TOLERANCE, torch.bfloat16, 1e-6)
    with pytest.raises(ModelError, match=r"changes its logits by 0\.0"):
        run(recovery(dtype="bfloat16"), written(), byte_tokenizer, tmp_path / "stage")


@pytest.mark.parametrize("weights", [AllWeights(3e-3), Routers(3e-2)], ids=["all", "routers"])
def test_the_models_own_weights_learn(recovery, written, byte_tokenizer, tmp_path, weights):
    training = replace(TRAINING, epochs=4)
    model, details, lines = run(
        recovery(weights=weights, training=training), written(), byte_tokenizer, tmp_path / "stage"
    )
    assert details["merged"] is True
    assert lines[-1]["loss"] < lines[0]["loss"]
    before = written()().state_dict()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    if isinstance(weights, Routers):
        assert len(still) == len(before) - len(moe_layers(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_on_quantised_weights_adapters_are_kept(recovery, quantized, byte_tokenizer, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_compressed(quantized(), byte_tokenizer, base, torch.float32)
    load = partial(load_compressed, base, torch.float32)
    model, details, lines = run(recovery(merge=None), load, byte_tokenizer, tmp_path / "stage")
    assert details["merged"] is False and lines[-1]["loss"] < lines[0]["loss"] - 0.2
    plain = load().state_dict()
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, plain[name.replace(".base_layer", "")]), name
    save_compressed(model, byte_tokenizer, tmp_path / "stage", torch.float32)
    assert torch.equal(logits(load_compressed(tmp_path / "stage", torch.float32)), logits(model))


def test_distillation_learns_from_the_dense_model(recovery, written, build_model, model_name, byte_tokenizer, tmp_path):
    objective = Distillation(cross_entropy_weight=0.0, kl_weight=1.0, temperature=1.0, top_k=32)
    dense = partial(build_model, model_name, torch.float32)
    asked = recovery(objective=objective, training=replace(TRAINING, epochs=6))
    model, _, lines = run(asked, written(), byte_tokenizer, tmp_path / "stage", dense)
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    assert adapter_names(model) == []


def test_what_quantised_weights_allow_is_said_beforehand(recovery):
    with pytest.raises(InputError, match=r"recovery\.merge=null, or order=\[prune,recover,quantize\]"):
        recovery(merge=True).check_quantized_base()
    with pytest.raises(InputError, match="quantised ones cannot train"):
        recovery(weights=AllWeights(1e-5)).check_quantized_base()
    for possible in (False, None):
        recovery(merge=possible).check_quantized_base()
    recovery(weights=Routers(1e-5)).check_quantized_base()
    assert not recovery(merge=False).merges and recovery(merge=True).merges and recovery(merge=None).merges
    assert recovery(weights=Routers(1e-5), merge=False).merges


@pytest.mark.parametrize("model_name", ["deepseek_v2"], indirect=True)
def test_two_processes_train_what_one_does(recovery, adapters, written, byte_tokenizer, tmp_path):
    asked = recovery(weights=adapters(dropout=0.0))
    alone, details, lines = run(asked, written(), byte_tokenizer, tmp_path / "alone")
    both = replace(asked, training=replace(TRAINING, devices=2, strategy="ddp"))
    together, same, same_lines = run(both, written(), byte_tokenizer, tmp_path / "together")
    assert same["training_tokens"] == details["training_tokens"] and same["steps"] == details["steps"]
    assert [line["loss"] for line in same_lines] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    torch.testing.assert_close(logits(together), logits(alone), rtol=1e-2, atol=1e-2)


def test_data_that_cannot_work_is_told_beforehand(recovery):
    @dataclass(frozen=True)
    class Missing(Rhyme):
        def check(self, tokenizer) -> None:
            raise InputError("no such file")

    recovery().check(None)
    with pytest.raises(InputError, match="no such file"):
        recovery(data=Missing()).check(None)


def test_divergence_is_an_error(recovery, adapters, written, byte_tokenizer, tmp_path):
    broken = recovery(weights=adapters(learning_rate=1e30))
    with pytest.raises(NumericalError):
        run(broken, written(), byte_tokenizer, tmp_path / "stage")


def test_a_finished_training_is_read_back(recovery, written, byte_tokenizer, tmp_path, monkeypatch):
    """As after a kill between the end of training and that of the stage."""
    first, details, _ = run(recovery(), written(), byte_tokenizer, tmp_path / "stage")
    monkeypatch.setattr(Rhyme, "__call__", None)
    second, again, _ = run(recovery(), written(), byte_tokenizer, tmp_path / "stage")
    assert again == details
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


def recover(recovery: Recovery, load, stage: Path) -> None:
    """What each killed process does."""
    torch.set_num_threads(1)
    recovery(load, None, None, stage)


@pytest.fixture(scope="module")
def server():
    """Processes that start at once, with everything heavy imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moeprune.recovery.recover", "moeprune.models.compressed.reader"])
    return context


@pytest.mark.parametrize("model_name", ["qwen3_plain_gates"], indirect=True)
def test_killed_three_times_it_ends_as_if_uninterrupted(server, recovery, written, byte_tokenizer, tmp_path):
    whole, details, lines = run(recovery(), written(), byte_tokenizer, tmp_path / "whole")
    stage = tmp_path / "stage"
    stage.mkdir()
    curve = stage / "walk" / "training" / "loss_curve.jsonl"
    for written_lines in (1, 3, 5):
        process = server.Process(target=recover, args=(recovery(), written(), stage))
        process.start()
        while process.is_alive() and (not curve.exists() or len(curve.read_text().splitlines()) < written_lines):
            time.sleep(0.002)
        process.kill()
        process.join()
    assert not (stage / "recovery.json").exists()
    resumed, again, lines_again = run(recovery(), written(), byte_tokenizer, stage)
    for one in (*lines, *lines_again, details, again):
        one.pop("seconds")
    assert lines_again == lines and again == details
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
