"""Runs the experts of a layer while recording what the statistics need.

The gate g in the sums is the weight with which an expert's output f enters the layer's output, and m = sum g f: it
contains what a family multiplies the routed output with (GraniteMoE), and is 1 where the router's gate scales the
expert's input (Llama 4), so that x, h and f contain that. ``gate_sum`` alone sums the router's gates. The bias of a
down projection (GPT-OSS) is part of f and m, but of no channel.

A layer is recorded in two steps. While the model computes the routed output ``m``, each expert's intermediate values
are held. When the decoder layer's output ``y`` is known, they are reduced to sums and dropped. No backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.models.adapter import MoeLayer, Routing
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.contract import gate_and_up, project_down
from moeprune.models.runtime.dispatch import Dispatch, combine, dispatch

# Keeps q finite where a layer output is exactly zero; ||y||^2 is of the order of the hidden size.
OUTPUT_NORM_EPS = 1e-6

# So many rows are reduced at once: enough for long vector operations, few enough to stay near the cache.
ROWS_AT_ONCE = 2048

# Sums over an expert's rows, as (name, weight of a row, value of a channel in that row).
CHANNEL_SUMS = (
    ("channel_sum", "valid", "h"),
    ("channel_sq_sum", "valid", "h^2"),
    ("gated_channel_sq_sum", "g^2", "h^2"),
    ("removal_sum", "q g^2", "h^2"),
    ("attribution_sum", "q g", "h p"),
    ("saliency_sum", "q g", "|h p|"),
    ("gradient_sq_sum", "q^2 g^2", "p^2"),
    ("gate_sq_sum", "valid", "gate^2"),
    ("up_sq_sum", "valid", "up^2"),
)
ROW_WEIGHTS = ("valid", "g^2", "q g^2", "q g", "q^2 g^2")
CHANNEL_VALUES = ("h", "h^2", "h p", "|h p|", "p^2", "gate^2", "up^2")
WEIGHT_OF_SUM = [ROW_WEIGHTS.index(weight) for _, weight, _ in CHANNEL_SUMS]
VALUE_OF_SUM = [CHANNEL_VALUES.index(value) for _, _, value in CHANNEL_SUMS]
HIDDEN_SUMS = ("output_sum", "output_sq_sum", "input_sq_sum")
WEIGHT_NORMS = (
    "gate_row_norm", "gate_row_abs_sum", "gate_row_input_norm", "up_row_norm", "up_row_abs_sum", "up_row_input_norm",
    "down_column_norm", "down_column_abs_sum",
)  # fmt: skip
EXPERT_SUMS = (
    "routed_tokens", "gate_sum", "output_norm_sum", "output_sq_norm_sum", "gated_output_norm_sum",
    "changed_output_norm_sum", "removal_sum",
)  # fmt: skip


@dataclass(frozen=True)
class _Held:
    """What the experts of a layer computed for one batch, rows sorted by expert."""

    routed: Dispatch
    x_AH: Tensor
    gate_up_AC: Tensor
    h_AC: Tensor
    f_AH: Tensor
    m_TH: Tensor


@dataclass(frozen=True)
class _TokenWeights:
    """What the reductions need to know of each token, at least float32; all 0 for padding."""

    valid_T: Tensor
    q_T: Tensor
    change_T: Tensor  # 1 - cos of the layer's output without and with the routed experts


class LayerRecorder:
    """Float64 sums of one MoE layer over all batches that it recorded."""

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer
        self._experts = layer.experts
        self._activation = gated_activation(layer.experts)
        experts, hidden, width = layer.experts.down_proj.shape
        self._channel_ESC = torch.zeros(experts, len(CHANNEL_SUMS), width, dtype=torch.float64)
        self._channel_max_EC = torch.zeros(experts, width, dtype=torch.float64)
        self._hidden_ESH = torch.zeros(experts, len(HIDDEN_SUMS), hidden, dtype=torch.float64)
        self._expert_ES = torch.zeros(experts, len(EXPERT_SUMS), dtype=torch.float64)
        self._probability_sum_E = torch.zeros(experts, dtype=torch.float64)
        self._logit_product_EE = torch.zeros(experts, experts, dtype=torch.float64)
        self._entropy_sum = torch.zeros((), dtype=torch.float64)
        self._routed_output_loss = torch.zeros((), dtype=torch.float64)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context every forward pass is recorded; the model is as before when it ends."""
        router_hook = self._layer.router.register_forward_hook(self._keep_routing)
        layer_hook = self._layer.decoder_layer.register_forward_hook(self._reduce_layer)
        self._experts.forward = self._run_experts
        try:
            yield
        finally:
            del self._experts.forward
            router_hook.remove()
            layer_hook.remove()

    def expect(self, valid_T: Tensor) -> None:
        """Say which tokens of the next batch count (bool [T]); the others are padding."""
        self._valid_T = valid_T

    def absorb(self, other: "LayerRecorder") -> None:
        """Add what another recorder of the same layer, on another device, saw."""
        self._channel_ESC += other._channel_ESC
        self._channel_max_EC = self._channel_max_EC.maximum(other._channel_max_EC)
        self._hidden_ESH += other._hidden_ESH
        self._expert_ES += other._expert_ES
        self._probability_sum_E += other._probability_sum_E
        self._logit_product_EE += other._logit_product_EE
        self._entropy_sum += other._entropy_sum
        self._routed_output_loss += other._routed_output_loss

    def sums(self) -> dict[str, Tensor]:
        """The fields of `Statistics` for this layer, by their names without the L axis."""
        input_sq_sum_EH = self._hidden_ESH[:, HIDDEN_SUMS.index("input_sq_sum")]
        return {
            **{f"{name}_EC": self._channel_ESC[:, row] for row, (name, _, _) in enumerate(CHANNEL_SUMS)},
            **{f"{name}_EH": self._hidden_ESH[:, row] for row, name in enumerate(HIDDEN_SUMS)},
            **{f"{name}_E": self._expert_ES[:, row] for row, name in enumerate(EXPERT_SUMS)},
            "gated_channel_sq_max_EC": self._channel_max_EC,
            "probability_sum_E": self._probability_sum_E,
            "logit_product_EE": self._logit_product_EE,
            "routed_output_loss": self._routed_output_loss,
            "router_entropy_sum": self._entropy_sum,
            **_weight_norms(self._experts, input_sq_sum_EH.sqrt()),
        }

    def _keep_routing(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        logits_TE = Routing(*output).logits_TE[self._valid_T].double()
        log_probability_TE = logits_TE.log_softmax(dim=-1)
        probability_TE = log_probability_TE.exp()
        self._probability_sum_E += probability_TE.sum(dim=0).cpu()
        self._logit_product_EE += (logits_TE.T @ logits_TE).cpu()
        self._entropy_sum -= (probability_TE * log_probability_TE).sum().cpu()

    def _run_experts(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The experts' forward; holds their values until the layer's output is known."""
        experts, hidden, width = self._experts.down_proj.shape
        routed = dispatch(experts_TK, gates_TK, experts, self._layer.gates_inputs)
        x_AH = routed.inputs(hidden_TH)
        gate_up_AC = x_AH.new_empty(len(x_AH), 2 * width)
        for expert, rows in routed.active():
            gate_and_up(self._experts, expert, x_AH[rows], out=gate_up_AC[rows])
        h_AC = self._activation(gate_up_AC[:, :width], gate_up_AC[:, width:])
        f_AH = x_AH.new_empty(len(x_AH), hidden)
        for expert, rows in routed.active():
            project_down(self._experts, expert, h_AC[rows], out=f_AH[rows])
        m_TH = combine(f_AH, routed, len(hidden_TH))
        self._held = _Held(routed, x_AH, gate_up_AC, h_AC, f_AH, m_TH)
        return m_TH

    def _reduce_layer(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
        layer_output = output if isinstance(output, Tensor) else output[0]
        y_TH = at_least_float32(layer_output.reshape(-1, layer_output.shape[-1]))
        m_TH = at_least_float32(self._held.m_TH) * self._layer.output_scale
        valid_T = self._valid_T.to(y_TH.dtype)
        y_sq_T, m_sq_T, ym_T = (torch.linalg.vecdot(a, b) for a, b in ((y_TH, y_TH), (m_TH, m_TH), (y_TH, m_TH)))
        q_T = valid_T / (y_sq_T + OUTPUT_NORM_EPS)
        weights = _TokenWeights(valid_T, q_T, valid_T * _one_minus_cosine_T(y_sq_T, m_sq_T, ym_T))
        self._routed_output_loss += (q_T @ m_sq_T).double().cpu()
        for experts in _expert_groups(self._held.routed.counts):
            self._reduce_experts(experts, self._held, m_TH, weights)
        del self._held

    def _reduce_experts(self, experts: "_ExpertRows", held: _Held, m_TH: Tensor, weights: _TokenWeights) -> None:
        """Add the rows of a few neighbouring experts to the sums."""
        rows = experts.rows
        token_n = held.routed.token_A[rows]
        # Some routers give float32 gates whatever the model's dtype.
        g_n = held.routed.gate_A[rows].to(m_TH.dtype) * self._layer.output_scale
        gate_A = held.routed.gate_A if held.routed.input_gate_A is None else held.routed.input_gate_A
        valid_n, q_n = weights.valid_T[token_n], weights.q_T[token_n]
        weight_Sn = torch.stack([valid_n, valid_n * g_n**2, q_n * g_n**2, q_n * g_n, (q_n * g_n) ** 2])
        value_nVC = self._channel_values(experts, held, m_TH[token_n])
        gated_h_sq_nC = weight_Sn[1].unsqueeze(-1) * value_nVC[:, CHANNEL_VALUES.index("h^2")]

        f_nH = at_least_float32(held.f_AH[rows])
        hidden_S_nH = (f_nH, f_nH.square(), at_least_float32(held.x_AH[rows]).square())
        f_sq_norm_n = hidden_S_nH[1].sum(dim=-1)
        f_norm_n = f_sq_norm_n.sqrt()
        gf_norm_n = g_n * f_norm_n
        of_row_nS = torch.stack([torch.ones_like(g_n), gate_A[rows].to(g_n.dtype), f_norm_n, f_sq_norm_n, gf_norm_n,
                                 weights.change_T[token_n] * gf_norm_n, weight_Sn[2] * f_sq_norm_n], dim=1)  # fmt: skip

        # One product for a few experts at once, with a row that marks the tokens of each: fewer, longer operations.
        of_expert_En = valid_n.new_zeros(len(experts.index), len(valid_n))
        channel, largest = [], []
        for row, each in enumerate(experts.split()):
            of_expert_En[row, each] = valid_n[each]
            sums_SVC = (weight_Sn[:, each] @ value_nVC[each].flatten(1)).unflatten(1, value_nVC.shape[1:])
            channel.append(sums_SVC[WEIGHT_OF_SUM, VALUE_OF_SUM])
            largest.append(gated_h_sq_nC[each].amax(dim=0))
        index = experts.index
        hidden_ESH = torch.stack([of_expert_En @ value_nH for value_nH in hidden_S_nH], dim=1)
        self._channel_ESC[index] += torch.stack(channel).double().cpu()
        self._hidden_ESH[index] += hidden_ESH.double().cpu()
        self._expert_ES[index] += (of_expert_En @ of_row_nS).double().cpu()
        self._channel_max_EC[index] = self._channel_max_EC[index].maximum(torch.stack(largest).double().cpu())

    def _channel_values(self, experts: "_ExpertRows", held: _Held, m_nH: Tensor) -> Tensor:
        """The `CHANNEL_VALUES` of each row [n, V, C], with p = <w_c, m_t>."""
        h_nC = at_least_float32(held.h_AC[experts.rows])
        gate_up_nC = at_least_float32(held.gate_up_AC[experts.rows])
        value_nVC = h_nC.new_empty(len(h_nC), len(CHANNEL_VALUES), h_nC.shape[1])
        p_nC = torch.empty_like(h_nC)
        for expert, each in zip(experts.index, experts.split(), strict=True):
            torch.mm(m_nH[each], at_least_float32(self._experts.down_proj[expert]), out=p_nC[each])
        value_nVC[:, 0] = h_nC
        torch.mul(h_nC, h_nC, out=value_nVC[:, 1])
        torch.mul(h_nC, p_nC, out=value_nVC[:, 2])
        torch.abs(value_nVC[:, 2], out=value_nVC[:, 3])
        torch.mul(p_nC, p_nC, out=value_nVC[:, 4])
        torch.mul(gate_up_nC, gate_up_nC, out=value_nVC[:, 5:].flatten(1))
        return value_nVC


@dataclass(frozen=True)
class _ExpertRows:
    """Neighbouring experts that got tokens, and the rows of each among the batch's assignments."""

    index: list[int]
    counts: list[int]
    start: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + sum(self.counts))

    def split(self) -> list[slice]:
        """The rows of each expert, counted from the first row of all."""
        ends = [sum(self.counts[: at + 1]) for at in range(len(self.counts))]
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


def _expert_groups(counts: list[int]) -> Iterator[_ExpertRows]:
    """Groups of experts with about `ROWS_AT_ONCE` rows together."""
    start = 0
    index: list[int] = []
    held: list[int] = []
    for expert, count in enumerate(counts):
        if held and sum(held) + count > ROWS_AT_ONCE:
            yield _ExpertRows(index, held, start)
            start, index, held = start + sum(held), [], []
        if count:
            index.append(expert)
            held.append(count)
    if held:
        yield _ExpertRows(index, held, start)


def _one_minus_cosine_T(y_sq_T: Tensor, m_sq_T: Tensor, ym_T: Tensor) -> Tensor:
    """``1 - cos(y - m, y)`` from the products of y and m; 1 where either vector is 0.

    By ``sin^2 / (1 + cos)``: where routed experts move a token little, one minus the cosine itself would cancel.
    """
    norms_sq_T = (y_sq_T - 2 * ym_T + m_sq_T).clamp(min=0) * y_sq_T
    safe_T = norms_sq_T.where(norms_sq_T > 0, 1.0)
    cosine_T = ((y_sq_T - ym_T) / safe_T.sqrt()).clamp(-1, 1)
    sine_sq_T = ((y_sq_T * m_sq_T - ym_T.square()) / safe_T).clamp(0, 1)
    return torch.where(cosine_T > 0, sine_sq_T / (1 + cosine_T), 1 - cosine_T).where(norms_sq_T > 0, 1.0)


@torch.no_grad()
def _weight_norms(experts: Any, input_norm_EH: Tensor) -> dict[str, Tensor]:
    """L2 and L1 norms of each channel's weights, and of its gate and up rows the L1 norm weighted by the inputs'."""
    expert_count, hidden_size, width = experts.down_proj.shape
    options: dict[str, Any] = {"dtype": torch.promote_types(experts.down_proj.dtype, torch.float32),
                               "device": experts.down_proj.device}  # fmt: skip
    norms = {f"{name}_EC": torch.empty(expert_count, width, dtype=torch.float64) for name in WEIGHT_NORMS}
    # Used for one expert after the other: memory that is new each time costs more than what is computed in it.
    gate_up_IH = torch.empty(2 * width, hidden_size, **options)
    down_HC = torch.empty(hidden_size, width, **options)
    for expert, input_norm_H in enumerate(input_norm_EH):
        gate_up_IH.copy_(experts.gate_up_proj[expert])
        for name, weight_CH in zip(("gate_row", "up_row"), gate_up_IH.chunk(2), strict=True):
            norms[f"{name}_norm_EC"][expert] = torch.linalg.vector_norm(weight_CH, dim=1)
            weight_CH.abs_()
            norms[f"{name}_abs_sum_EC"][expert] = weight_CH.sum(dim=1)
            norms[f"{name}_input_norm_EC"][expert] = weight_CH @ input_norm_H.to(weight_CH)
        down_HC.copy_(experts.down_proj[expert])
        norms["down_column_norm_EC"][expert] = torch.linalg.vector_norm(down_HC, dim=0)
        norms["down_column_abs_sum_EC"][expert] = down_HC.abs_().sum(dim=0)
    return norms


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for squares and sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
