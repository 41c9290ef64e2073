"""Sums of x x^T against loops over tokens, one at a time; padding never counts, and layers are left as they were."""

import pytest
import torch
from families import FAMILIES, build_family
from pass_checks import assert_close_to_scale, left_as_it_was
from torch import nn

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import skeleton, stream_compressed
from moeprune.models.layers.walk import walk_layers
from moeprune.quantization.hessians import InputSum, input_sums
from moeprune.surgery.prune import prune
from moeprune.types import Plan


def gathered(model, windows, batch_size) -> dict[str, InputSum]:
    """{name: sum} of every quantizable linear layer of the model."""
    batches, wanted = windows.batches(batch_size), list(QuantizedParts().names(skeleton(model)))
    found = {}
    for visit in walk_layers(model, batches, "test"):
        prefix = f"{visit.name}."
        paths = [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]
        for inputs in input_sums(visit, paths, batches):
            assert not found.keys() & {prefix + path for path in inputs.paths}
            found |= {prefix + path: inputs for path in inputs.paths}
    return found


@torch.no_grad()
def looped_over_experts(model, windows, seen_layers) -> dict[str, tuple[torch.Tensor, int]]:
    """{name: (sum, tokens)} of the routed experts' matrices, token by token; from one run over all windows."""
    with seen_layers(model) as seen:
        model(input_ids=windows.input_ids_NT, attention_mask=windows.mask_NT)
    sums: dict[str, list[torch.Tensor]] = {}
    for one in seen:
        experts = one.layer.experts
        for token in windows.mask_NT.flatten().nonzero().flatten().tolist():
            for row in one.experts_TK[token].tolist():
                slot, x_H = experts.slot_of_row[row], one.x_TH[token]
                gate_C, up_C = (getattr(experts[slot], part).weight @ x_H for part in ("gate_proj", "up_proj"))
                h_C = nn.functional.silu(gate_C) * up_C
                for part, inputs in (("gate_proj", x_H), ("up_proj", x_H), ("down_proj", h_C)):
                    sums.setdefault(f"{one.layer.name}.{slot}.{part}", []).append(torch.outer(inputs, inputs))
    return {name: (torch.stack(products).sum(dim=0), len(products)) for name, products in sums.items()}


@torch.no_grad()
def looped_over_tokens(model, windows, names) -> dict[str, tuple[torch.Tensor, int]]:
    """The same of layers that every token enters."""
    entered: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: entered.update({name: inputs[0]})
        )
        for name in names
    ]
    model(input_ids=windows.input_ids_NT, attention_mask=windows.mask_NT)
    for hook in hooks:
        hook.remove()
    tokens = windows.mask_NT.flatten().nonzero().flatten().tolist()
    rows = {name: inputs.reshape(-1, inputs.shape[-1]) for name, inputs in entered.items()}
    return {
        name: (torch.stack([torch.outer(x_TI[token], x_TI[token]) for token in tokens]).sum(dim=0), len(tokens))
        for name, x_TI in rows.items()
    }


def expected_sums(model, windows, seen_layers) -> dict[str, tuple[torch.Tensor, int]]:
    expected = looped_over_experts(model, windows, seen_layers)
    experts = tuple(f"{layer.name}." for layer in moe_layers(model))
    others = [name for name in QuantizedParts().names(model) if not name.startswith(experts)]
    return expected | looped_over_tokens(model, windows, others)


def assert_same_sums(found, expected):
    assert found.keys() == expected.keys()
    for name, (sum_II, tokens) in expected.items():
        assert found[name].tokens == tokens, name
        assert_close_to_scale(found[name].sum_II, sum_II.to(found[name].sum_II.dtype), 1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_sums_are_those_of_a_loop_over_the_tokens_that_count(pruned_64, padded_windows, seen_layers, batch_size):
    expected = expected_sums(pruned_64, padded_windows, seen_layers)
    with left_as_it_was(pruned_64, padded_windows.input_ids_NT):
        found = gathered(pruned_64, padded_windows, batch_size)
    assert_same_sums(found, expected)
    assert {each.sum_II.dtype for each in found.values()} == {torch.float64}


def test_windows_without_padding(pruned_64, random_windows, seen_layers):
    assert_same_sums(gathered(pruned_64, random_windows, 2), expected_sums(pruned_64, random_windows, seen_layers))


def test_layers_with_the_same_inputs_share_a_sum(pruned_64, random_windows):
    found = gathered(pruned_64, random_windows, 5)
    for name, inputs in found.items():
        parent, _, own = name.rpartition(".")
        if own in ("gate_proj", "up_proj"):
            assert inputs is found[f"{parent}.gate_proj"]
        if own in ("k_proj", "v_proj", "kv_a_proj_with_mqa"):
            assert inputs is found[f"{parent}.q_proj"]
        if own in ("down_proj", "o_proj"):
            assert inputs.paths == [name.partition("layers.")[2].partition(".")[2]]


def test_sums_of_16_bit_models_are_in_float32(build_model, random_windows):
    model = build_model("qwen3_renormalised", torch.bfloat16)
    layers = moe_layers(model)
    prune(model, Plan(tuple(tuple(torch.arange(16) for _ in range(8)) for _ in layers), 16))
    assert {each.sum_II.dtype for each in gathered(model, random_windows, 5).values()} == {torch.float32}


def test_devices_add_up(pruned_64, padded_windows, byte_tokenizer, seen_layers, tmp_path):
    """Two replicas on the CPU, a thread each."""
    expected = expected_sums(pruned_64, padded_windows, seen_layers)
    save_compressed(pruned_64, byte_tokenizer, tmp_path, torch.float64)
    assert_same_sums(gathered(load_compressed(tmp_path, torch.float64), padded_windows, 2), expected)
    streamed = stream_compressed(tmp_path, torch.float64, (torch.device("cpu"),) * 2)
    assert_same_sums(gathered(streamed, padded_windows, 2), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lets_its_inputs_be_seen(family, random_windows, padded_windows):
    """All matrices that every token enters are seen, with and without padding; so are experts, but for idle ones."""
    model = build_family(family, torch.float32)
    to_contract(model)
    layers = moe_layers(model)
    everything = tuple(tuple(torch.arange(width) for width in layer.widths) for layer in layers)
    prune(model, Plan(everything, layers[0].widths[0]))
    experts = tuple(f"{layer.name}." for layer in layers)
    for windows in (random_windows, padded_windows):
        found = gathered(model, windows, 3)
        missing = QuantizedParts().names(model).keys() - found.keys()
        assert [name for name in missing if not name.startswith(experts)] == []
        assert len(missing) < 0.3 * len(found)
        shared = [name for name in found if not name.startswith(experts)]
        assert {found[name].tokens for name in shared} == {windows.token_count}


def test_padding_that_cannot_be_told_from_tokens_is_a_model_error(pruned_64, padded_windows):
    class Folding(nn.Module):
        """Gives its layer two tokens in a row."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x_BSH):
            self.linear(x_BSH.flatten(0, 1)[::2])
            return self.linear(x_BSH)

    _, layer = next(iter(decoder_layers(pruned_64)))
    path = next(path for path, part in layer.named_modules() if isinstance(part, nn.Linear))
    layer.set_submodule(path, Folding(layer.get_submodule(path)))
    batches = padded_windows.batches(4)
    visit = next(walk_layers(pruned_64, batches, "test"))
    with pytest.raises(ModelError, match="some of which are padding"):
        input_sums(visit, [f"{path}.linear"], batches)


def test_one_token_windows(pruned_64):
    """The experts then see it one after the other, all the same tensor."""
    ids_NT = torch.tensor([[7], [9]])
    found = gathered(pruned_64, TokenWindows(ids_NT, torch.ones_like(ids_NT)), 1)
    for layer in moe_layers(pruned_64):
        tokens = [found[f"{layer.name}.{slot}.gate_proj"].tokens for slot in range(len(layer.experts))
                  if f"{layer.name}.{slot}.gate_proj" in found]  # fmt: skip
        assert sum(tokens) == 2 * layer.top_k
