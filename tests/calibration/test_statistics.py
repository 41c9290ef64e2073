"""The statistics against a slow loop over tokens, in float64, and what must not change them."""

import dataclasses

import pytest
import torch

from moeprune.calibration import recorder
from moeprune.calibration.recorder import OUTPUT_NORM_EPS, LayerRecorder
from moeprune.calibration.statistics import Statistics, collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import moe_layers

FIELDS = [field.name for field in dataclasses.fields(Statistics)]
# Every sum at this tolerance: float64 with another order of summation.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def between_shapes(model_name) -> dict[str, float]:
    """How close float64 sums of differently shaped batches must be.

    DeepSeek's router multiplies in float32 whatever the model's dtype, so there the batch shape shows in the gates.
    """
    tolerance = 1e-5 if model_name == "deepseek_v2" else 1e-12
    return {"rtol": tolerance, "atol": tolerance}


def assert_field_close(name: str, actual: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda message: f"{name}: {message}", **tolerance)


def assert_same_statistics(actual: Statistics, expected: Statistics, **tolerance: float) -> None:
    for name in FIELDS:
        assert_field_close(name, getattr(actual, name), getattr(expected, name), **tolerance)


def padded_windows(windows: TokenWindows, extra: int) -> TokenWindows:
    """The same windows with ``extra`` positions of a token that is not padding by its number, at the right end."""
    rows = len(windows.input_ids_NT)
    filler, zeros = torch.full((rows, extra), 7), torch.zeros(rows, extra, dtype=torch.int64)
    return TokenWindows(torch.cat([windows.input_ids_NT, filler], dim=1), torch.cat([windows.mask_NT, zeros], dim=1))


def loop_statistics(seen, valid_T):
    """The fields of one layer, token by token and expert by expert, straight from their definitions."""
    gate_up_EIH, down_EHC = seen.layer.experts.gate_up_proj.detach(), seen.layer.experts.down_proj.detach()
    experts, hidden, width = down_EHC.shape
    per_expert = [
        "routed_tokens_LE", "gate_sum_LE", "probability_sum_LE", "output_norm_sum_LE", "output_sq_norm_sum_LE",
        "gated_output_norm_sum_LE", "changed_output_norm_sum_LE", "removal_sum_LE",
    ]  # fmt: skip
    sums = {name: torch.zeros(experts, dtype=torch.float64) for name in per_expert}
    sums |= {name: torch.zeros(experts, hidden, dtype=torch.float64) for name in FIELDS if name.endswith("LEH")}
    sums |= {name: torch.zeros(experts, width, dtype=torch.float64) for name in FIELDS if name.endswith("LEC")}
    sums |= {name: torch.zeros((), dtype=torch.float64) for name in ("routed_output_loss_L", "router_entropy_sum_L")}
    sums["logit_product_LEE"] = torch.zeros(experts, experts, dtype=torch.float64)
    for token in valid_T.nonzero().flatten().tolist():
        x, y = seen.x_TH[token], seen.y_TH[token]
        q = 1 / (y.dot(y) + OUTPUT_NORM_EPS)
        probability = seen.logits_TE[token].double().softmax(0)
        logits = seen.logits_TE[token].double()
        sums["logit_product_LEE"] += logits.outer(logits)
        sums["probability_sum_LE"] += probability
        sums["router_entropy_sum_L"] -= sum(p * p.log() for p in probability)
        chosen = []
        for expert, gate in zip(seen.experts_TK[token].tolist(), seen.gates_TK[token].double(), strict=True):
            gate_C, up_C = gate_up_EIH[expert, :width] @ x, gate_up_EIH[expert, width:] @ x
            h_C = seen.layer.experts.act_fn(gate_C) * up_C
            chosen.append((expert, gate, gate_C, up_C, h_C, down_EHC[expert] @ h_C))
        m = sum(gate * f for _, gate, *_, f in chosen)
        sums["routed_output_loss_L"] += q * m.dot(m)
        change = max(0, 1 - torch.cosine_similarity(y - m, y, dim=0))
        for expert, gate, gate_C, up_C, h_C, f in chosen:
            sums["routed_tokens_LE"][expert] += 1
            sums["gate_sum_LE"][expert] += gate
            sums["output_norm_sum_LE"][expert] += f.norm()
            sums["output_sq_norm_sum_LE"][expert] += f.dot(f)
            sums["gated_output_norm_sum_LE"][expert] += gate * f.norm()
            sums["changed_output_norm_sum_LE"][expert] += gate * f.norm() * change
            sums["removal_sum_LE"][expert] += q * gate**2 * f.dot(f)
            sums["output_sum_LEH"][expert] += f
            sums["output_sq_sum_LEH"][expert] += f**2
            sums["input_sq_sum_LEH"][expert] += x**2
            sums["channel_sum_LEC"][expert] += h_C
            sums["channel_sq_sum_LEC"][expert] += h_C**2
            sums["gated_channel_sq_sum_LEC"][expert] += (gate * h_C) ** 2
            largest_C = sums["gated_channel_sq_max_LEC"][expert]
            sums["gated_channel_sq_max_LEC"][expert] = torch.maximum(largest_C, (gate * h_C) ** 2)
            sums["gate_sq_sum_LEC"][expert] += gate_C**2
            sums["up_sq_sum_LEC"][expert] += up_C**2
            for channel in range(width):
                inner = down_EHC[expert, :, channel].dot(m)
                sums["attribution_sum_LEC"][expert, channel] += q * gate * h_C[channel] * inner
                sums["saliency_sum_LEC"][expert, channel] += (q * gate * h_C[channel] * inner).abs()
                sums["gradient_sq_sum_LEC"][expert, channel] += (q * gate * inner) ** 2
                sums["removal_sum_LEC"][expert, channel] += q * gate**2 * h_C[channel] ** 2
    for expert in range(experts):
        input_norm_H = sums["input_sq_sum_LEH"][expert].sqrt()
        for channel in range(width):
            for name, row in (("gate", channel), ("up", width + channel)):
                weight_H = gate_up_EIH[expert, row]
                sums[f"{name}_row_norm_LEC"][expert, channel] = weight_H.norm()
                sums[f"{name}_row_abs_sum_LEC"][expert, channel] = sum(weight_H.abs())
                sums[f"{name}_row_input_norm_LEC"][expert, channel] = weight_H.abs().dot(input_norm_H)
            sums["down_column_norm_LEC"][expert, channel] = down_EHC[expert, :, channel].norm()
            sums["down_column_abs_sum_LEC"][expert, channel] = sum(down_EHC[expert, :, channel].abs())
    return sums


@pytest.mark.parametrize("rows_at_once", [1, 40, 4096])
def test_every_field_equals_a_loop_over_tokens(tiny_model_64, random_windows, seen_layers, rows_at_once, monkeypatch):
    monkeypatch.setattr(recorder, "ROWS_AT_ONCE", rows_at_once)
    windows = padded_windows(random_windows, extra=3)
    with seen_layers(tiny_model_64) as seen:
        statistics = collect_statistics(tiny_model_64, windows, batch_size=len(windows.input_ids_NT))
    assert statistics.tokens == random_windows.input_ids_NT.numel()
    layers = [loop_statistics(layer, windows.mask_NT.flatten()) for layer in seen]
    for name in FIELDS[1:]:
        expected = torch.stack([layer[name] for layer in layers])
        assert_field_close(name, getattr(statistics, name), expected, **EXACT)


def test_sums_are_float64_for_a_float32_model(tiny_model, random_windows):
    statistics = collect_statistics(tiny_model, random_windows, batch_size=2)
    assert {getattr(statistics, name).dtype for name in FIELDS} == {torch.float64}


def test_channels_of_an_expert_sum_to_the_expert(tiny_model_64, random_windows):
    """``sum_c q g h <w_c, m>`` over the experts of a layer is ``sum_t q ||m||^2``."""
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=2)
    torch.testing.assert_close(statistics.attribution_sum_LEC.sum(dim=(1, 2)), statistics.routed_output_loss_L, **EXACT)


def test_padding_never_counts(tiny_model_64, random_windows, between_shapes):
    plain = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    padded = collect_statistics(tiny_model_64, padded_windows(random_windows, extra=6), batch_size=5)
    assert_same_statistics(padded, plain, **between_shapes)


def test_windows_of_different_lengths_share_a_batch(tiny_model_64, random_windows, between_shapes):
    """Two windows of 11 and 4 tokens in one batch count as they do one by one."""
    ids = random_windows.input_ids_NT[:2]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    together = collect_statistics(tiny_model_64, TokenWindows(ids, mask), batch_size=2)
    long = collect_statistics(tiny_model_64, TokenWindows(ids[:1], mask[:1]), batch_size=1)
    short = collect_statistics(tiny_model_64, TokenWindows(ids[1:, :4], mask[1:, :4]), batch_size=1)
    for name in FIELDS:
        parts = getattr(long, name), getattr(short, name)
        if name.endswith("input_norm_LEC"):  # no sum: checked against the loop above
            continue
        if name.endswith(("norm_LEC", "abs_sum_LEC")):  # of the weights
            expected = parts[0]
        elif name.endswith("max_LEC"):
            expected = torch.maximum(*parts)
        else:
            expected = sum(parts)
        assert_field_close(name, getattr(together, name), expected, **between_shapes)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batch_size_does_not_change_the_sums(tiny_model_64, random_windows, batch_size, between_shapes):
    whole = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    parts = collect_statistics(tiny_model_64, random_windows, batch_size=batch_size)
    assert_same_statistics(parts, whole, **between_shapes)


def test_float32_sums_are_those_of_float64_up_to_rounding(build_model, model_name, random_windows):
    single = collect_statistics(build_model(model_name, torch.float32), random_windows, batch_size=2)
    double = collect_statistics(build_model(model_name, torch.float64), random_windows, batch_size=2)
    assert_same_statistics(single, double, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_how_far_tokens_move_is_exact_in_float32_where_they_hardly_move(build_model, model_name, random_windows):
    """One minus a cosine that is nearly one would lose all its digits."""
    sums = []
    for dtype in (torch.float32, torch.float64):
        model = build_model(model_name, dtype)
        for layer in moe_layers(model):
            layer.experts.down_proj.mul_(1e-3)
        sums.append(collect_statistics(model, random_windows, batch_size=5).changed_output_norm_sum_LE)
    torch.testing.assert_close(*sums, rtol=2e-3, atol=0)


def test_statistics_survive_a_round_trip(tiny_model, random_windows, tmp_path):
    statistics = collect_statistics(tiny_model, random_windows, batch_size=2)
    statistics.save(tmp_path / "statistics.safetensors")
    assert_same_statistics(Statistics.load(tmp_path / "statistics.safetensors"), statistics, rtol=0, atol=0)


def assert_as_before(model, state, logits, input_ids_BT) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in vars(layer.experts) for layer in moe_layers(model))
    assert torch.equal(model(input_ids_BT).logits, logits)


@torch.no_grad()
def test_the_model_is_bit_identical_after_recording(tiny_model, random_windows):
    ids = random_windows.input_ids_NT
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    logits = tiny_model(ids).logits
    collect_statistics(tiny_model, random_windows, batch_size=2)
    assert_as_before(tiny_model, state, logits, ids)


@torch.no_grad()
def test_the_model_is_bit_identical_after_an_error_while_recording(tiny_model, random_windows, monkeypatch):
    ids = random_windows.input_ids_NT
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    logits = tiny_model(ids).logits
    last = tiny_model.base_model.layers[-1].post_attention_layernorm
    calls = []

    def interrupted(_hidden):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return _hidden

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_statistics(tiny_model, random_windows, batch_size=2)
    vars(last).pop("forward", None)
    assert_as_before(tiny_model, state, logits, ids)


@torch.no_grad()
def test_a_recorded_forward_computes_what_the_model_computes(tiny_model, random_windows):
    ids = random_windows.input_ids_NT
    plain = tiny_model(ids).logits
    layer = moe_layers(tiny_model)[0]
    layer_recorder = LayerRecorder(layer)
    x_TH = torch.randn(9, layer.hidden_size, generator=torch.Generator().manual_seed(2))
    _, gates_TK, experts_TK = layer.router(x_TH)
    expected = layer.experts(x_TH, experts_TK, gates_TK)
    with layer_recorder.recording():
        torch.testing.assert_close(layer.experts(x_TH, experts_TK, gates_TK), expected, rtol=1e-6, atol=1e-6)
        layer_recorder.expect(torch.ones(ids.numel(), dtype=torch.bool))
        torch.testing.assert_close(tiny_model(ids).logits, plain, rtol=1e-5, atol=1e-5)
