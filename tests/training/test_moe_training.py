"""Fine-tuning of MoE models: gradient checkpointing changes nothing, and the balance loss is about what routers did."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from moeprune.models.adapter import moe_layers
from moeprune.training.data import NO_LABEL, LabelledWindows
from moeprune.training.fine_tuning import FineTuning, ParameterGroup, fit

SETTINGS = FineTuning(
    epochs=1, batch_size=4, micro_batch_size=2, warmup_ratio=0.0, balance_weight=0.3, log_every=1, gradient_clip=1e9
)
PADDING = 3


def objective(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    loss = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    return {"loss": loss, "targets": (labels != NO_LABEL).sum()}


@pytest.fixture
def windows(random_windows) -> LabelledWindows:
    """Five windows of 11 tokens; the first 2 are prompt, and the last 3 padding."""
    labels_NT = random_windows.input_ids_NT.clone()
    labels_NT[:, :2] = NO_LABEL
    labels_NT[:, -PADDING:] = NO_LABEL
    return LabelledWindows(random_windows.input_ids_NT, labels_NT)


def with_adapters(model):
    """LoRA with dropout on all but the experts, so that what comes into the first layer has no gradient."""
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["o_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(model, config)


def whole(model):
    return model


def fitted(model, windows, settings, folder):
    """The model, and how many times its first router was called."""
    calls = []
    hook = moe_layers(model)[0].router.register_forward_hook(lambda *_: calls.append(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(model, [ParameterGroup("all", trained, 1e-3)], windows, objective, settings, folder)
    hook.remove()
    return model, len(calls)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("attach", [whole, with_adapters])
def test_gradient_checkpointing_gives_the_same_parameters_and_curve(build_model, model_name, windows, tmp_path, attach):
    """Routers are called once more in the backward pass, and the balance loss stays the same."""
    plain, calls = fitted(attach(build_model(model_name, torch.float64)), windows, SETTINGS, tmp_path / "plain")
    settings = dataclasses.replace(SETTINGS, gradient_checkpointing=True)
    again, more_calls = fitted(attach(build_model(model_name, torch.float64)), windows, settings, tmp_path / "again")
    assert (calls, more_calls) == (3, 6)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-9, atol=1e-10)
    for line, other in zip(curve_of(tmp_path / "plain"), curve_of(tmp_path / "again"), strict=True):
        assert other["balance"] == pytest.approx(line["balance"], rel=1e-9)
        assert other["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-9)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.modules())


def curve_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text().splitlines()]


def balance_by_loop(routing, rows) -> torch.Tensor:
    """Mean over layers of E / K * sum_e (share of tokens sent to e) * (mean probability of e), over some tokens."""
    total = 0
    for logits_TE, experts_TK in routing:
        experts, top_k = logits_TE.shape[1], experts_TK.shape[1]
        for expert in range(experts):
            share = sum(expert in experts_TK[row].tolist() for row in rows) / len(rows)
            probability = sum(logits_TE[row].float().softmax(0)[expert] for row in rows) / len(rows)
            total = total + experts / top_k * share * probability / len(routing)
    return total


def test_the_balance_loss_is_about_tokens_that_are_not_padding(build_model, model_name, windows, tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_size=5, micro_batch_size=5)
    model = build_model(model_name, torch.float64)
    routing = []
    hooks = [
        layer.router.register_forward_hook(lambda _module, _inputs, output: routing.append((output[0], output[2])))
        for layer in moe_layers(model)
    ]
    terms = objective(model, {"input_ids": windows.input_ids_NT, "labels": windows.labels_NT})
    for hook in hooks:
        hook.remove()
    balance = balance_by_loop(routing, [row for row in range(5 * 11) if row % 11 < 11 - PADDING])
    (terms["loss"] / terms["targets"] + 0.3 * balance).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    fitted(build_model(model_name, torch.float64), windows, settings, tmp_path)
    (line,) = curve_of(tmp_path)
    assert line["balance"] == pytest.approx(balance.item(), rel=1e-6)  # a softmax in float32, in both
    assert line["loss"] == pytest.approx((terms["loss"] / terms["targets"]).item(), rel=1e-9)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_without_a_balance_weight_routers_are_not_listened_to(build_model, windows, tmp_path):
    settings = dataclasses.replace(SETTINGS, balance_weight=0.0)
    fitted(build_model("qwen3_renormalised", torch.float64), windows, settings, tmp_path)
    assert all("balance" not in line for line in curve_of(tmp_path))
