"""The layers of adapters: what they compute is PEFT's, and what DoRA remembers is never out of date."""

import copy

import pytest
import torch
from peft import LoraConfig, LoraModel
from torch import nn

from moeprune.models.compressed import low_rank
from moeprune.models.compressed.low_rank import AdaptedLinear, remembered_norms

RANK, ALPHA = 3, 12.0


class Holder(nn.Module):
    """A model for PEFT: one linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.one = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def adapted(linear_of: Holder, *, ours: bool, use_dora: bool = True, dropout: float = 0.0) -> nn.Module:
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=use_dora, lora_dropout=dropout, target_modules=["one"]
    )  # fmt: skip
    if ours:
        config._register_custom_module({nn.Linear: AdaptedLinear})
    model = copy.deepcopy(linear_of)
    LoraModel(model, config, "a")
    return model.one


def norms_of_the_sum(layer) -> torch.Tensor:
    """||W + s B A|| row by row, from the matrices themselves."""
    a, b = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    return torch.stack([(row + ALPHA / RANK * (b[o] @ a)).norm() for o, row in enumerate(layer.base_layer.weight)])


@pytest.fixture(params=[(7, 5), (1, 4), (16, 1)], ids=str)
def layers(request):
    """The same DoRA, PEFT's and ours, in float64."""

    def build(dropout: float = 0.0, bias: bool = True):
        torch.manual_seed(0)
        holder = Holder(*request.param, bias, torch.float64)
        theirs, ours = (adapted(holder, ours=ours, dropout=dropout) for ours in (False, True))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.data = mine.data = torch.randn_like(mine)
        return theirs, ours

    return build


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_and_its_gradients_are_pefts(layers, dropout, bias):
    theirs, ours = layers(dropout, bias)
    x = torch.randn(6, ours.in_features, dtype=torch.float64)
    for training in (True, False):
        results = []
        for layer in (theirs, ours):
            layer.train(training).zero_grad()
            torch.manual_seed(1)
            inputs = x.clone().requires_grad_()
            output = layer(inputs)
            output.square().sum().backward()
            trained = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
            results.append((output, inputs.grad, trained))
        (output, gradient, trained), (own_output, own_gradient, own_trained) = results
        torch.testing.assert_close(own_output, output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-12, atol=1e-12)
        assert own_trained.keys() == trained.keys() and len(trained) == 3
        for name, value in trained.items():
            torch.testing.assert_close(own_trained[name], value, rtol=1e-11, atol=1e-11)


def test_norms_are_those_of_the_sum(layers):
    _, ours = layers()
    norms_O = ours.lora_magnitude_vector["a"].norms(ours, "a")
    torch.testing.assert_close(norms_O, norms_of_the_sum(ours), rtol=1e-12, atol=0)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Grows by one whenever norms are computed."""
    calls: list[int] = []
    real = low_rank._row_norms
    monkeypatch.setattr(low_rank, "_row_norms", lambda *given: calls.append(1) or real(*given))
    return calls


def changes_of(layer):
    """Ways in which the factors come to change; those of fused optimizers do not show in a parameter's version."""
    factor = layer.lora_B["a"].weight
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        yield torch.optim.AdamW(trained, lr=0.1, **options).step
    yield lambda: layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
    yield lambda: factor.detach().copy_(torch.ones_like(factor))
    yield lambda: setattr(factor, "data", 2 * factor.data)


def test_norms_are_computed_once_between_two_steps_and_anew_after_each(layers, computed):
    _, ours = layers()
    computed.clear()
    x = torch.randn(3, ours.in_features, dtype=torch.float64)
    with remembered_norms():
        for count, change in enumerate(changes_of(ours), start=1):
            for _ in range(3):
                ours(x).sum().backward()
            assert len(computed) == count
            change()
            torch.testing.assert_close(ours.lora_magnitude_vector["a"].norms(ours, "a"), norms_of_the_sum(ours))


def test_outside_of_training_norms_are_never_out_of_date(layers, computed):
    _, ours = layers()
    x = torch.randn(3, ours.in_features, dtype=torch.float64)
    with remembered_norms():
        ours(x)
    for change in changes_of(ours):
        ours(x).sum().backward()
        change()
        torch.testing.assert_close(ours.lora_magnitude_vector["a"].norms(ours, "a"), norms_of_the_sum(ours))
    ours.requires_grad_(False)
    before = len(computed)
    for _ in range(3):
        ours(x)
    assert len(computed) == before + 1


def test_a_model_that_was_evaluated_in_inference_mode_still_trains(layers):
    _, ours = layers()
    x = torch.randn(3, ours.in_features, dtype=torch.float64)
    with torch.inference_mode():
        ours(x)
    ours(x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_a_row_of_zeros_stays_zero_and_gives_finite_gradients():
    torch.manual_seed(0)
    holder = Holder(6, 4, False, torch.float32)
    holder.one.weight.data[1] = 0
    layer = adapted(holder, ours=True)
    output = layer(torch.randn(3, 6))
    output.square().sum().backward()
    assert (output[:, 1] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    layer.merge(safe_merge=True)
    assert (layer.base_layer.weight[1] == 0).all()


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_computes_what_unmerged_does(use_dora, dtype):
    torch.manual_seed(0)
    layer = adapted(Holder(12, 9, True, dtype), ours=True, use_dora=use_dora).eval()
    layer.lora_B["a"].weight.data = torch.randn_like(layer.lora_B["a"].weight)
    x = torch.randn(20, 12, dtype=dtype)
    with torch.no_grad():
        before = layer(x)
        layer.merge(safe_merge=True)
        after = layer.get_base_layer()(x)
    assert before.dtype == after.dtype == dtype
    assert (after - before).norm() / before.norm() < 4 * torch.finfo(dtype).eps
