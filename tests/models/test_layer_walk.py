"""Walking layer by layer gives bit for bit what the model computes, and leaves the model as it was."""

import pytest
import torch

from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.layer_walk import walk_layers


@pytest.fixture(params=["no padding", "padding at the end", "padding at the start"])
def windows(request, random_windows) -> TokenWindows:
    """Five windows of 11 tokens; with padding, window i lacks 2 i tokens."""
    mask_NT = torch.ones_like(random_windows.mask_NT)
    for index, row in enumerate(mask_NT):
        if request.param == "padding at the end":
            row[11 - 2 * index :] = 0
        elif request.param == "padding at the start":
            row[: 2 * index] = 0
    return TokenWindows(random_windows.input_ids_NT, mask_NT)


@torch.no_grad()
def outputs_of_the_model(model, batches):
    """What every decoder layer gave for every batch while the whole model ran."""
    seen = [[] for _ in decoder_layers(model)]
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output, calls=calls: calls.append(output.flatten(0, 1)))
        for (_, layer), calls in zip(decoder_layers(model), seen, strict=True)
    ]
    for input_ids_BS, mask_BS in batches:
        model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_hidden_states_are_those_of_the_model_bit_for_bit(tiny_model, model_name, windows):
    batches = windows.batches(2)
    expected = outputs_of_the_model(tiny_model, batches)
    assert len(expected) == (3 if model_name == "deepseek_v2" else 2)
    layers = [layer for _, layer in decoder_layers(tiny_model)]
    walked = []
    for layer, outputs in walk_layers(tiny_model, batches, "walk"):
        walked.append(layer)
        results = list(outputs)
        for (valid_T, y_TH), (_, mask_BS), of_model in zip(results, batches, expected[len(walked) - 1], strict=True):
            assert torch.equal(y_TH, of_model)
            assert torch.equal(valid_T, mask_BS.flatten().bool())
            assert not y_TH.requires_grad
    assert walked == layers


@pytest.mark.parametrize("asked", [0, 1], ids=["no outputs asked for", "one batch asked for"])
def test_batches_that_nobody_asks_for_are_run_all_the_same(tiny_model, random_windows, asked):
    batches = random_windows.batches(2)
    expected = outputs_of_the_model(tiny_model, batches)
    *before, last = decoder_layers(tiny_model)
    for layer, outputs in walk_layers(tiny_model, batches, "walk"):
        if layer is last[1]:
            assert all(
                torch.equal(y_TH, of_model) for (_, y_TH), of_model in zip(outputs, expected[len(before)], strict=True)
            )
        elif asked:
            next(outputs)


@torch.no_grad()
def test_a_layer_may_change_when_its_outputs_are_used_up(tiny_model, random_windows):
    batches = random_windows.batches(2)
    expected = outputs_of_the_model(tiny_model, batches)
    for depth, (layer, outputs) in enumerate(walk_layers(tiny_model, batches, "walk")):
        assert all(torch.equal(y, of_model) for (_, y), of_model in zip(outputs, expected[depth], strict=True))
        for parameter in layer.parameters():
            parameter.zero_()


def test_the_model_is_left_as_it_was(tiny_model, random_windows):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    logits = tiny_model(random_windows.input_ids_NT).logits
    for _layer, _outputs in walk_layers(tiny_model, random_windows.batches(2), "walk"):
        break
    assert all("forward" not in vars(layer) for _, layer in decoder_layers(tiny_model))
    assert torch.equal(tiny_model(random_windows.input_ids_NT).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_moe_layers_are_among_the_walked(tiny_model, random_windows):
    walked = [layer for layer, _ in walk_layers(tiny_model, random_windows.batches(5), "walk")]
    assert all(any(layer.decoder_layer is one for one in walked) for layer in moe_layers(tiny_model))
