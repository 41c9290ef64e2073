"""Recovery of the model's own weights: what trains, and in which precision."""

import pytest
import torch

from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.recovery.weights import AllWeights, Routers


@pytest.mark.parametrize("rate", [-1e-4, float("nan"), float("inf")])
def test_a_learning_rate_that_cannot_be_is_refused_at_once(rate):
    for weights in (AllWeights, Routers):
        with pytest.raises(InputError, match="learning rate"):
            weights(learning_rate=rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_train_in_float32(pruned, dtype):
    model = pruned(dtype)
    weights = AllWeights(learning_rate=1e-5)
    weights.attach(model, seed=0)
    (group,) = weights.groups(model)
    assert group.learning_rate == 1e-5
    assert {id(p) for p in group.parameters} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_routers_train_and_in_float32(pruned, dtype):
    model = pruned(dtype)
    weights = Routers(learning_rate=1e-6)
    weights.attach(model, seed=0)
    (group,) = weights.groups(model)
    assert group.learning_rate == 1e-6
    routers = {id(layer.router.weight) for layer in moe_layers(model)}
    assert {id(p) for p in group.parameters} == routers == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert {layer.router.weight.dtype for layer in moe_layers(model)} == {torch.float32}


def test_routers_train_beside_quantised_weights(quantized, token_ids):
    model = quantized()
    weights = Routers(learning_rate=1e-2)
    weights.attach(model, seed=0)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for group in weights.groups(model) for p in group.parameters)
