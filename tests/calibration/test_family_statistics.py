"""Statistics and passes on every family, against loops over tokens through transformers' own, untouched modules."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, build_family, out_of_reach
from pass_checks import assert_close_to_scale, left_as_it_was, padded
from torch import Tensor
from torch.nn import functional as F

from moeprune.calibration.all_tokens import AllTokensPass
from moeprune.calibration.expert_subsets import ExpertSubsetPass
from moeprune.calibration.loss_gradients import BLOCK_LOCAL, LANGUAGE_MODEL, LossGradientPass
from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import collect_statistics
from moeprune.models.adapter import moe_layers
from moeprune.models.families import to_contract

every_family = pytest.mark.parametrize("family", FAMILIES)
# Biases, another activation, or gates that scale inputs; and one as most are.
unusual_family = pytest.mark.parametrize("family", ["gpt_oss", "llama4", "granitemoe", "deepseek_v3"])
STORED_TRANSPOSED = ("gpt_oss", "llama4")
# What these families multiply the routed output with.
OUTPUT_SCALE = {"granitemoe": 0.7, "minimax": 0.8}


@dataclass(frozen=True)
class Computed:
    """What one expert makes of one token: expert input x [H], h [C], f [H]."""

    x: Tensor
    h: Tensor
    f: Tensor


class StockLayer:
    """One MoE layer of a model that nobody touched: the inputs of its experts, its outputs, and its weights."""

    def __init__(self, family: str, name: str, model: torch.nn.Module) -> None:
        self.family = family
        block = model.get_submodule(name.rpartition(".")[0])
        self.experts = block.experts
        self.router = block.router if hasattr(block, "router") else block.gate
        self.seen: dict[str, list[Tensor]] = {"x_TH": [], "y_TH": []}
        self.decoder_layer = model.get_submodule(".".join(name.split(".")[:3]))
        self.block = block

    @contextmanager
    def watched(self):
        def keep_input(_module, inputs):
            self.seen["x_TH"].append(inputs[0].reshape(-1, inputs[0].shape[-1]))

        def keep_output(_module, _inputs, output):
            output = output if isinstance(output, Tensor) else output[0]
            self.seen["y_TH"].append(output.reshape(-1, output.shape[-1]))

        hooks = [
            self.block.register_forward_pre_hook(keep_input),
            self.decoder_layer.register_forward_hook(keep_output),
        ]
        yield
        for hook in hooks:
            hook.remove()

    @property
    def x_TH(self) -> Tensor:
        return torch.cat(self.seen["x_TH"])

    @property
    def y_TH(self) -> Tensor:
        return torch.cat(self.seen["y_TH"])

    def routes(self, x_TH: Tensor) -> list[dict[int, float]]:
        """{expert: gate} of each token."""
        if self.family == "llama4":
            scores_TE, _ = self.router(x_TH)
            return [{e: s for e, s in enumerate(scores) if s > 0} for scores in scores_TE.tolist()]
        _, gates_TK, experts_TK = self.router(x_TH)
        return [dict(zip(e, g, strict=True)) for e, g in zip(experts_TK.tolist(), gates_TK.tolist(), strict=True)]

    def columns(self, expert: int) -> Tensor:
        """``w_c`` for every channel c [C, H]."""
        down = self.experts.down_proj[expert]
        return down if self.family in STORED_TRANSPOSED else down.T

    def compute(self, expert: int, x: Tensor, input_gate: float = 1.0) -> Computed:
        x = input_gate * x
        if self.family == "gpt_oss":
            both = x @ self.experts.gate_up_proj[expert] + self.experts.gate_up_proj_bias[expert]
            gate, up = both[0::2].clamp(max=1.5), both[1::2].clamp(-1.5, 1.5)
            h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            return Computed(x, h, h @ self.columns(expert) + self.experts.down_proj_bias[expert])
        weight = self.experts.gate_up_proj[expert]
        both = x @ weight if self.family == "llama4" else weight @ x
        h = F.silu(both[:24]) * both[24:]
        return Computed(x, h, h @ self.columns(expert))


def stock_layers(family, windows) -> tuple[torch.nn.Module, list[StockLayer]]:
    """A model at the contract, and what another one of the same weights, as transformers has it, saw of the windows."""
    model, stock = build_family(family), build_family(family)
    to_contract(model)
    layers = [StockLayer(family, layer.name, stock) for layer in moe_layers(model)]
    with torch.no_grad():
        for layer in layers:
            with layer.watched():
                stock(windows.input_ids_NT)
    return model, layers


def looped(layer: StockLayer) -> dict[str, Tensor]:
    """Sums over tokens, one token and one expert at a time."""
    experts, width, hidden = len(layer.experts.down_proj), 24, 32
    sums = {
        "routed_tokens": torch.zeros(experts), "gate_sum": torch.zeros(experts), "removal_sum_E": torch.zeros(experts),
        "output_norm_sum": torch.zeros(experts), "output_sum": torch.zeros(experts, hidden),
        "input_sq_sum": torch.zeros(experts, hidden), "attribution_sum": torch.zeros(experts, width),
        "removal_sum": torch.zeros(experts, width), "channel_sq_sum": torch.zeros(experts, width),
        "routed_output_loss": torch.zeros(()),
    }  # fmt: skip
    sums = {name: values.double() for name, values in sums.items()}
    for x, y, routes in zip(layer.x_TH, layer.y_TH, layer.routes(layer.x_TH), strict=True):
        q = 1 / (y @ y + OUTPUT_NORM_EPS)
        computed, output_gates = {}, {}
        for expert, gate in routes.items():
            scales_input = layer.family == "llama4"
            computed[expert] = layer.compute(expert, x, gate if scales_input else 1.0)
            output_gates[expert] = OUTPUT_SCALE.get(layer.family, 1.0) * (1.0 if scales_input else gate)
        m = sum(output_gates[expert] * one.f for expert, one in computed.items())
        sums["routed_output_loss"] += q * (m @ m)
        for expert, one in computed.items():
            g = output_gates[expert]
            sums["routed_tokens"][expert] += 1
            sums["gate_sum"][expert] += routes[expert]
            sums["removal_sum_E"][expert] += q * g * g * (one.f @ one.f)
            sums["output_norm_sum"][expert] += one.f.norm()
            sums["output_sum"][expert] += one.f
            sums["input_sq_sum"][expert] += one.x**2
            sums["attribution_sum"][expert] += q * g * one.h * (layer.columns(expert) @ m)
            sums["removal_sum"][expert] += q * g * g * one.h**2
            sums["channel_sq_sum"][expert] += one.h**2
    return sums


@every_family
@torch.no_grad()
def test_statistics_equal_a_loop_over_tokens(family, random_windows):
    model, layers = stock_layers(family, random_windows)
    with left_as_it_was(model, random_windows.input_ids_NT):
        statistics = collect_statistics(model, padded(random_windows, extra=3), batch_size=2)
    # Gates in float32, and reductions that run in another order when the text is padded.
    tolerance = 1e-5 if family == "minimax" else 1e-6
    for index, layer in enumerate(layers):
        sums = looped(layer)
        assert sums["routed_tokens"].sum() == 55 * len(layer.routes(layer.x_TH)[0])
        for name, field in (
            ("routed_tokens", "routed_tokens_LE"),
            ("gate_sum", "gate_sum_LE"),
            ("removal_sum_E", "removal_sum_LE"),
            ("output_norm_sum", "output_norm_sum_LE"),
            ("output_sum", "output_sum_LEH"),
            ("input_sq_sum", "input_sq_sum_LEH"),
            ("attribution_sum", "attribution_sum_LEC"),
            ("removal_sum", "removal_sum_LEC"),
            ("channel_sq_sum", "channel_sq_sum_LEC"),
            ("routed_output_loss", "routed_output_loss_L"),
        ):
            assert_close_to_scale(getattr(statistics, field)[index], sums[name], tolerance)


@every_family
@torch.no_grad()
def test_the_loss_of_a_layer_is_that_of_truly_scaled_experts(family, random_windows):
    """Run again, with all experts' outputs times 0.9 inside a decoder layer that nobody touched."""
    model, stock = build_family(family), build_family(family)
    to_contract(model)
    statistics = collect_statistics(model, random_windows, batch_size=5)
    for index, layer in enumerate(moe_layers(model)):
        decoder_layer = stock.get_submodule(".".join(layer.name.split(".")[:3]))
        calls = []
        hook = decoder_layer.register_forward_hook(lambda *call, calls=calls: calls.append(call[1:]), with_kwargs=True)
        stock(random_windows.input_ids_NT, use_cache=False)
        hook.remove()
        arguments, keywords, output = calls[0]
        experts = stock.get_submodule(layer.name)
        hook = experts.register_forward_hook(lambda _module, _inputs, m_TH: 0.9 * m_TH)
        changed = decoder_layer(*arguments, **keywords)
        hook.remove()
        y, changed_y = (each if isinstance(each, Tensor) else each[0] for each in (output, changed))
        loss = ((changed_y - y).square().sum(dim=-1) / (y.square().sum(dim=-1) + OUTPUT_NORM_EPS)).sum()
        torch.testing.assert_close(0.1**2 * statistics.routed_output_loss_L[index], loss, atol=0, rtol=1e-5)


@every_family
def test_gradients_inside_a_layer_equal_the_closed_form(family, random_windows):
    """``-h dLoss/dh = 2 alpha (1 - alpha) q g h <w_c, m>``, also with biases, clamps and gates on the inputs."""
    model = build_family(family)
    to_contract(model)
    statistics = collect_statistics(model, random_windows, batch_size=2)
    with left_as_it_was(model, random_windows.input_ids_NT):
        gradients = LossGradientPass(BLOCK_LOCAL, alpha=0.9)(model, random_windows, batch_size=2)
    closed_form = 2 * 0.9 * 0.1 * statistics.attribution_sum_LEC
    assert_close_to_scale(-gradients.contribution_sum_LEC, closed_form, 1e-9)


@every_family
def test_half_precision_is_recorded_with_its_rounding(family, random_windows):
    """Gates that are float32 in some families, and outputs that are not, meet in every sum."""
    sums = []
    for dtype in (torch.bfloat16, torch.float32):
        model = build_family(family, torch.bfloat16).to(dtype)
        to_contract(model)
        sums.append(collect_statistics(model, random_windows, batch_size=5))
    half, single = (each.routed_output_loss_L for each in sums)
    torch.testing.assert_close(half[0], single[0], atol=0, rtol=0.1)


def summed_loss(model, ids_NT: Tensor) -> Tensor:
    """-log p of every token after its window's first."""
    log_p_NTV = model(ids_NT, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
    return -log_p_NTV.gather(2, ids_NT[:, 1:, None]).sum()


@every_family
def test_language_model_gradients_equal_those_of_the_untouched_model(family, random_windows):
    """``sum_t h dLoss/dh`` of channel c is ``<w_c, dLoss/dw_c>``."""
    model, stock = build_family(family), build_family(family)
    to_contract(model)
    gradients = LossGradientPass(LANGUAGE_MODEL)(model, random_windows, batch_size=2)
    summed_loss(stock, random_windows.input_ids_NT).backward()
    for index, layer in enumerate(moe_layers(model)):
        down = stock.get_submodule(layer.name).down_proj
        hidden_axis = 2 if family in STORED_TRANSPOSED else 1
        expected_EC = (down * down.grad).sum(dim=hidden_axis)
        assert_close_to_scale(gradients.contribution_sum_LEC[index], expected_EC.detach(), 1e-6)


def channel_sums(parameter: Tensor, family: str) -> Tensor:
    """``sum |W * dLoss/dW|`` over what belongs to each channel [E, C], of one parameter of stock experts."""
    values = (parameter * parameter.grad).abs()
    if values.dim() == 2:  # a bias of gate and up
        return values.unflatten(1, (-1, 2)).sum(dim=2)
    if values.shape[1:] in ((24, 32), (32, 24)):  # of down
        return values.sum(dim=2 if family in STORED_TRANSPOSED else 1)
    by_row = values.sum(dim=1 if family in STORED_TRANSPOSED else 2)
    return by_row.unflatten(1, (-1, 2)).sum(dim=2) if family == "gpt_oss" else by_row.unflatten(1, (2, -1)).sum(dim=1)


@unusual_family
def test_the_saliency_of_a_channels_weights_counts_its_biases(family, random_windows):
    model, stock = build_family(family), build_family(family)
    to_contract(model)
    gradients = LossGradientPass(LANGUAGE_MODEL)(model, random_windows, batch_size=5)
    summed_loss(stock, random_windows.input_ids_NT).backward()
    for index, layer in enumerate(moe_layers(model)):
        parameters = dict(stock.get_submodule(layer.name).named_parameters())
        parameters.pop("down_proj_bias", None)  # of no channel
        expected_EC = sum(channel_sums(parameter, family) for parameter in parameters.values())
        assert_close_to_scale(gradients.weight_saliency_sum_LEC[index], expected_EC.detach(), 1e-6)


@unusual_family
@torch.no_grad()
def test_outputs_on_all_tokens_equal_a_loop_over_tokens(family, random_windows):
    model, layers = stock_layers(family, random_windows)
    found = AllTokensPass(groups=2)(model, padded(random_windows, extra=2), batch_size=2)
    for index, layer in enumerate(layers):
        for expert in range(len(layer.experts.down_proj)):
            mean_H = torch.stack([layer.compute(expert, x).f for x in layer.x_TH]).mean(dim=0)
            assert_close_to_scale(found.mean_output_LEH[index, expert], mean_H, 1e-9)


@unusual_family
@torch.no_grad()
def test_the_loss_without_an_expert_equals_true_rerouting(family, random_windows):
    """The expert's logit is out of reach in the untouched router; gates are the family's."""
    model, layers = stock_layers(family, random_windows)
    found = ExpertSubsetPass(exhaustive_up_to=0)(model, random_windows, batch_size=2)

    def routed_outputs(layer: StockLayer) -> Tensor:
        outputs = []
        for x, routes in zip(layer.x_TH, layer.routes(layer.x_TH), strict=True):
            scales_input = family == "llama4"
            outputs.append(
                sum(layer.compute(e, x, g).f if scales_input else g * layer.compute(e, x).f for e, g in routes.items())
            )
        return torch.stack(outputs)

    for index, layer in enumerate(layers):
        whole_TH = routed_outputs(layer)
        for gone in (0, 3):
            with out_of_reach(layer.router, [gone]):
                loss = (whole_TH - routed_outputs(layer)).norm()
            torch.testing.assert_close(found.removal_loss_LE[index, gone], loss, atol=1e-6, rtol=1e-5)
