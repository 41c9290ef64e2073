"""Walking layer by layer gives bit for bit what the model computes, and leaves the model as it was."""

import math

import pytest
import torch
from quantising import quantised
from torch import nn

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.compressed.eight_bit import eight_bit_linear
from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.layers.streaming import stream_compressed, stream_dense
from moeprune.models.layers.walk import _replica, each_layer, on_every_share, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.grouped import GroupedLinear
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

EVERYWHERE = QuantizedParts(embeddings=True, head=True)


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
    for visit in walk_layers(tiny_model, batches, "walk"):
        walked.append(visit.layer)
        results = list(visit.outputs)
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
    for visit in walk_layers(tiny_model, batches, "walk"):
        if visit.layer is last[1]:
            assert all(
                torch.equal(y_TH, of_model)
                for (_, y_TH), of_model in zip(visit.outputs, expected[len(before)], strict=True)
            )
        elif asked:
            next(visit.outputs)


@torch.no_grad()
def test_a_layer_may_change_when_its_outputs_are_used_up(tiny_model, random_windows):
    batches = random_windows.batches(2)
    expected = outputs_of_the_model(tiny_model, batches)
    for visit in walk_layers(tiny_model, batches, "walk"):
        assert all(
            torch.equal(y, of_model) for (_, y), of_model in zip(visit.outputs, expected[visit.depth], strict=True)
        )
        for parameter in visit.layer.parameters():
            parameter.zero_()


def test_the_model_is_left_as_it_was(tiny_model, random_windows):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    logits = tiny_model(random_windows.input_ids_NT).logits
    for _visit in walk_layers(tiny_model, random_windows.batches(2), "walk"):
        break
    assert all("forward" not in vars(layer) for _, layer in decoder_layers(tiny_model))
    assert torch.equal(tiny_model(random_windows.input_ids_NT).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_moe_layers_are_among_the_walked(tiny_model, random_windows):
    walked = [visit.layer for visit in walk_layers(tiny_model, random_windows.batches(5), "walk")]
    assert all(any(layer.decoder_layer is one for one in walked) for layer in moe_layers(tiny_model))


def walked_outputs(model, batches, *, workspace=IN_MEMORY, change=None, propagate="dense", shares=False):
    """What every layer gave, as {depth: [y_TH of each batch]}; ``change(layer)`` comes after the outputs."""
    seen = {}
    for visit in walk_layers(model, batches, "walk", workspace, propagate):
        if shares:
            parts = on_every_share(visit.shares, lambda share: [y_TH for _, y_TH in share.outputs])
            seen[visit.depth] = [y_TH for part in parts for y_TH in part]
        else:
            seen[visit.depth] = [y_TH for _, y_TH in visit.outputs]
        if change is not None:
            change(visit.layer)
    return seen


def assert_same_outputs(actual, expected):
    assert actual.keys() == expected.keys()
    for depth, outputs in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(actual[depth], outputs, strict=True))


@torch.no_grad()
def halve_experts(layer):
    for module in layer.modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.Tensor):
            module.down_proj.mul_(0.5)


def test_changed_layers_are_seen_by_the_later_ones_if_asked_for(build_model, model_name, windows):
    """What layer N gives is what the model gives there when the layers before it are changed, and it is not."""
    batches = windows.batches(2)
    seen = walked_outputs(build_model(model_name, torch.float32), batches, change=halve_experts, propagate="changed")
    model = build_model(model_name, torch.float32)
    for depth, (_, layer) in enumerate(decoder_layers(model)):
        expected = outputs_of_the_model(model, batches)[depth]
        assert all(torch.equal(a, b) for a, b in zip(seen[depth], expected, strict=True))
        halve_experts(layer)


@pytest.mark.parametrize("propagate", ["dense", "changed"])
def test_several_devices_compute_what_one_does(tiny_model, tiny_checkpoint, random_windows, propagate):
    """Two replicas on the CPU, a thread each."""
    batches = random_windows.batches(1)
    two = stream_dense(tiny_checkpoint, torch.float32, (torch.device("cpu"),) * 2)
    seen = walked_outputs(two, batches, change=halve_experts, propagate=propagate, shares=True)
    assert_same_outputs(seen, walked_outputs(tiny_model, batches, change=halve_experts, propagate=propagate))


@pytest.mark.parametrize("quantizer", [NF4Quantizer(), NearestQuantizer("rtn3", bits=3, parts=EVERYWHERE)])
def test_a_quantised_model_is_walked_on_several_devices_as_in_memory(
    tiny_model, random_windows, byte_tokenizer, tmp_path, quantizer
):
    batches, width = random_windows.batches(1), moe_layers(tiny_model)[0].widths[0]
    kept = [[torch.arange(width - 2 * e) for e in range(layer.expert_count)] for layer in moe_layers(tiny_model)]
    model = quantised(prune(tiny_model, Plan(tuple(map(tuple, kept)), width)), quantizer)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    two = stream_compressed(tmp_path, torch.float32, (torch.device("cpu"),) * 2)
    assert_same_outputs(walked_outputs(two, batches, shares=True), walked_outputs(model, batches))


def test_a_replica_of_a_grouped_layer_on_another_device_leaves_it_where_it_is():
    layer = nn.Sequential(GroupedLinear(16, 8, 4, 8, "nearest"))
    replica = _replica(layer, torch.device("meta"))
    assert all(tensor.is_meta for tensor in replica.state_dict().values())
    assert not any(tensor.is_meta for tensor in layer.state_dict().values())
    assert replica[0].storage == layer[0].storage


def test_batches_are_split_evenly_over_devices(tiny_checkpoint, random_windows):
    two = stream_dense(tiny_checkpoint, torch.float32, (torch.device("cpu"),) * 2)
    visit = next(walk_layers(two, random_windows.batches(1), "walk"))
    assert [share.batches for share in visit.shares] == [range(2), range(2, 5)]
    assert visit.shares[0].layer is visit.layer
    assert visit.shares[1].layer is not visit.layer


def test_replicas_are_dropped_with_their_layer(tiny_checkpoint, random_windows):
    two = stream_dense(tiny_checkpoint, torch.float32, (torch.device("cpu"),) * 2)
    for visit in walk_layers(two, random_windows.batches(1), "walk"):
        replica = visit.shares[1].layer
        assert not any(parameter.is_meta for parameter in replica.parameters())
        next(visit.outputs)
    assert all(parameter.is_meta for parameter in replica.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_replica_on_another_device_leaves_the_quantised_layer_where_it_is(bits):
    """The meta device stands for another GPU."""
    weight_OI, x_TI = torch.randn(64, 64), torch.randn(3, 64)
    four, eight = four_bit_linear(weight_OI, None, block_size=64, nested=True), eight_bit_linear(weight_OI, None)
    layer = nn.Sequential(four if bits == 4 else eight)
    replica = _replica(layer, torch.device("meta"))
    assert replica[0].weight.is_meta
    assert (replica[0].weight.quant_state.absmax if bits == 4 else replica[0].weight.SCB).is_meta
    assert not (layer[0].weight.quant_state.absmax if bits == 4 else layer[0].weight.SCB).is_meta
    assert torch.allclose(layer(x_TI), x_TI @ weight_OI.T, atol=10 if bits == 4 else 1)


@pytest.mark.parametrize("propagate", ["dense", "changed"])
def test_a_streamed_model_is_walked_as_one_in_memory(tiny_model, tiny_checkpoint, windows, propagate):
    batches = windows.batches(2)
    streamed = stream_dense(tiny_checkpoint, torch.float32, (torch.device("cpu"),))
    seen = walked_outputs(streamed, batches, change=halve_experts, propagate=propagate)
    assert_same_outputs(seen, walked_outputs(tiny_model, batches, change=halve_experts, propagate=propagate))
    assert all(parameter.is_meta for _, layer in decoder_layers(streamed.model) for parameter in layer.parameters())


@pytest.mark.parametrize("activations_gib", [0, math.inf])
@pytest.mark.parametrize("propagate", ["dense", "changed"])
def test_an_interrupted_walk_goes_on_where_it_stopped(
    build_model, model_name, random_windows, tmp_path, propagate, activations_gib
):
    batches = random_windows.batches(2)
    whole = walked_outputs(build_model(model_name, torch.float32), batches, change=halve_experts, propagate=propagate)
    model, finished = build_model(model_name, torch.float32), []

    def fail_at_the_last(layer):
        if layer is list(decoder_layers(model))[-1][1]:
            raise KeyboardInterrupt
        halve_experts(layer)
        finished.append(layer)

    workspace = Workspace(tmp_path / "walk", activations_gib)
    with pytest.raises(KeyboardInterrupt):
        walked_outputs(model, batches, workspace=workspace, change=fail_at_the_last, propagate=propagate)
    assert workspace.depth == len(finished) == len(whole) - 1
    seen = walked_outputs(
        build_model(model_name, torch.float32), batches, workspace=workspace, change=halve_experts, propagate=propagate
    )
    assert_same_outputs(seen, {len(whole) - 1: whole[len(whole) - 1]})
    assert not walked_outputs(model, batches, workspace=workspace, propagate=propagate)


@pytest.mark.parametrize("other", ["other tokens", "other batches", "another purpose"])
def test_a_walk_does_not_go_on_from_the_state_of_another(tiny_model, random_windows, tmp_path, other):
    walked_outputs(tiny_model, random_windows.batches(2), workspace=Workspace(tmp_path))
    ids_NT = random_windows.input_ids_NT.roll(1) if other == "other tokens" else random_windows.input_ids_NT
    batches = TokenWindows(ids_NT, random_windows.mask_NT).batches(3 if other == "other batches" else 2)
    with pytest.raises(InputError, match="Use an empty folder"):
        next(walk_layers(tiny_model, batches, "refit" if other == "another purpose" else "walk", Workspace(tmp_path)))


def test_each_layer_comes_once_and_from_the_workspaces_depth_on(tiny_model, tmp_path):
    expected = [(depth, name, layer) for depth, (name, layer) in enumerate(decoder_layers(tiny_model))]
    assert list(each_layer(tiny_model, "cut")) == expected
    layers = each_layer(tiny_model, "cut", Workspace(tmp_path))
    assert [next(layers), next(layers)] == expected[:2]
    layers.close()
    assert list(each_layer(tiny_model, "cut", Workspace(tmp_path))) == expected[1:]
    assert list(each_layer(tiny_model, "cut", Workspace(tmp_path))) == []
