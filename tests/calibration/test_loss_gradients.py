"""Sums of gradients against autograd through dense experts, in float64, and what must not change them."""

import dataclasses
from dataclasses import fields

import pytest
import torch
from dense_experts import trace_block_local, trace_language_model
from pass_checks import assert_close_to_scale, left_as_it_was, padded

from moeprune.calibration.loss_gradients import LossGradientPass, LossGradients
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers

LOSSES = ["language_model", "block_local"]
FIELDS = [field.name for field in fields(LossGradients)]


def assert_same(actual: LossGradients, expected: LossGradients, tolerance: float, skip: tuple[str, ...] = ()) -> None:
    for name in FIELDS:
        if name not in skip:
            assert_close_to_scale(getattr(actual, name), getattr(expected, name), tolerance)


def assert_sums_of(gradients: LossGradients, layer: int, traced, tolerance: float) -> None:
    contribution_TEC = traced.h_TEC * traced.dh_TEC
    expected = {
        "contribution_sum_LEC": contribution_TEC.sum(dim=0),
        "contribution_abs_sum_LEC": contribution_TEC.abs().sum(dim=0),
        "contribution_sq_sum_LEC": contribution_TEC.square().sum(dim=0),
        "gradient_sq_sum_LEC": traced.dh_TEC.square().sum(dim=0),
    }
    for name, value in expected.items():
        assert value.abs().max() > 0
        assert_close_to_scale(getattr(gradients, name)[layer], value, tolerance)
    assert torch.equal(gradients.routed_tokens_LE[layer], traced.routed_TE.sum(dim=0).double())


def joined(batches, layer: int):
    """Traced of one layer over all batches: tokens one after the other, weight saliency summed."""
    traced = [batch[layer] for batch in batches]
    tokens = {name: torch.cat([getattr(one, name) for one in traced]) for name in ("routed_TE", "h_TEC", "dh_TEC")}
    saliency_EC = sum(one.weight_saliency_EC for one in traced)
    return dataclasses.replace(traced[0], **tokens, weight_saliency_EC=saliency_EC)


def test_language_model_gradients_equal_autograd_through_dense_experts(tiny_model_64, random_windows):
    """Batches of two against the same batches: routers compute in float32, where the batch's shape shows."""
    gradients = LossGradientPass("language_model")(tiny_model_64, random_windows, 2)
    batches = trace_language_model(tiny_model_64, random_windows, 2)
    for layer in range(len(moe_layers(tiny_model_64))):
        traced = joined(batches, layer)
        assert_sums_of(gradients, layer, traced, 1e-5)
        assert_close_to_scale(gradients.weight_saliency_sum_LEC[layer], traced.weight_saliency_EC, 1e-5)


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_block_local_gradients_equal_autograd_of_each_layers_loss(tiny_model_64, random_windows, seen_layers, alpha):
    with seen_layers(tiny_model_64) as seen:
        gradients = LossGradientPass("block_local", alpha)(tiny_model_64, random_windows, 5)
    for layer, saw in enumerate(seen):
        traced = trace_block_local(saw, alpha)
        assert_sums_of(gradients, layer, traced, 1e-10)
        assert_close_to_scale(gradients.weight_saliency_sum_LEC[layer], traced.weight_saliency_EC, 1e-10)


def test_block_local_gradients_equal_the_closed_forms_of_the_statistics(tiny_model_64, random_windows):
    gradients = LossGradientPass("block_local", 0.8)(tiny_model_64, random_windows, 5)
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    scale = 2 * 0.8 * (1 - 0.8)
    assert_close_to_scale(gradients.contribution_sum_LEC, -scale * statistics.attribution_sum_LEC, 1e-10)
    assert_close_to_scale(gradients.contribution_abs_sum_LEC, scale * statistics.saliency_sum_LEC, 1e-10)
    assert_close_to_scale(gradients.gradient_sq_sum_LEC, scale**2 * statistics.gradient_sq_sum_LEC, 1e-10)
    assert torch.equal(gradients.routed_tokens_LE, statistics.routed_tokens_LE)


def test_first_order_predicts_a_small_change_of_the_loss(tiny_model_64, random_windows):
    """Scaling one down column by 1 + step scales what the channel adds: the loss changes by step * sum h d."""
    gradients = LossGradientPass("language_model")(tiny_model_64, random_windows, 5)
    contribution_EC = gradients.contribution_sum_LEC[-1]
    expert, channel = divmod(int(contribution_EC.abs().argmax()), contribution_EC.shape[1])
    # The norms of the families compute in float32, so the step is not smaller.
    layer, step = moe_layers(tiny_model_64)[-1], 1e-2
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            column = layer.experts.down_proj[expert, :, channel]
            before = column.clone()
            column.mul_(1 + sign * step)
            log_p = tiny_model_64(random_windows.input_ids_NT).logits[:, :-1].log_softmax(dim=-1)
            losses.append(-log_p.gather(2, random_windows.input_ids_NT[:, 1:, None]).sum())
            column.copy_(before)
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(contribution_EC[expert, channel], slope, rtol=1e-2, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_never_counts(tiny_model_64, random_windows, loss):
    plain = LossGradientPass(loss)(tiny_model_64, random_windows, 5)
    assert_same(LossGradientPass(loss)(tiny_model_64, padded(random_windows, 6), 5), plain, 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_batch_size_shows_in_the_weight_saliency_only(tiny_model_64, random_windows, loss):
    together = LossGradientPass(loss)(tiny_model_64, random_windows, 5)
    alone = LossGradientPass(loss)(tiny_model_64, random_windows, 1)
    assert_same(alone, together, 1e-5, skip=("weight_saliency_sum_LEC",))
    assert (alone.weight_saliency_sum_LEC >= together.weight_saliency_sum_LEC * (1 - 1e-5)).all()
    assert (alone.weight_saliency_sum_LEC > together.weight_saliency_sum_LEC * 1.01).any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(tiny_model, random_windows, monkeypatch, loss, interrupted):
    tiny_model.base_model.embed_tokens.weight.requires_grad_(False)
    with left_as_it_was(tiny_model, random_windows.input_ids_NT), monkeypatch.context() as patched:
        if not interrupted:
            LossGradientPass(loss)(tiny_model, random_windows, 2)
            return
        last = tiny_model.base_model.layers[-1].post_attention_layernorm
        patched.setitem(vars(last), "forward", lambda _hidden: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            LossGradientPass(loss)(tiny_model, random_windows, 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_expert_that_no_token_reaches_sums_to_zero(tiny_model_64, random_windows, loss):
    def one_for_zero(_router, _inputs, output):
        logits_TE, gates_TK, experts_TK = output
        return logits_TE, gates_TK, experts_TK.masked_fill(experts_TK == 0, 1)

    moe_layers(tiny_model_64)[0].router.register_forward_hook(one_for_zero)
    gradients = LossGradientPass(loss)(tiny_model_64, random_windows, 5)
    for name in FIELDS:
        assert (getattr(gradients, name)[0, 0] == 0).all()
        assert (getattr(gradients, name)[0, 1] != 0).any()


def test_loss_gradients_survive_a_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shape = [(2, 3) if name.endswith("_LE") else (2, 3, 4) for name in FIELDS]
    gradients = LossGradients(*(torch.rand(size, generator=generator, dtype=torch.float64) for size in shape))
    gradients.save(tmp_path / "gradients.safetensors")
    loaded = LossGradientPass("block_local").load(tmp_path / "gradients.safetensors")
    assert all(torch.equal(getattr(loaded, name), getattr(gradients, name)) for name in FIELDS)


def test_another_loss_is_refused():
    with pytest.raises(InputError, match=r"(?s)loss=local does not exist.*Did you mean: block_local"):
        LossGradientPass("local")


def test_nothing_is_predicted_from_padding_on_the_left(tiny_model_64, random_windows):
    """Positions are relative, so windows that begin later give the same gradients."""
    plain = LossGradientPass("language_model")(tiny_model_64, random_windows, 5)
    right = padded(random_windows, 3)
    left = TokenWindows(right.input_ids_NT.roll(3, dims=1), right.mask_NT.roll(3, dims=1))
    assert_same(LossGradientPass("language_model")(tiny_model_64, left, 5), plain, 1e-4)
