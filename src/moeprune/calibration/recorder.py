"""Runs the experts of a layer while recording what the statistics need.

A layer is recorded in two steps. While the model computes the routed output ``m``, each expert's intermediate values
are held. When the decoder layer's output ``y`` is known, they are reduced to sums and dropped. No backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeprune.models.adapter import MoeLayer, Routing
from moeprune.models.dispatch import combine, dispatch

# Keeps q finite where a layer output is exactly zero; ||y||^2 is of the order of the hidden size.
OUTPUT_NORM_EPS = 1e-6

# The rows of the accumulators below, in the order in which `_reduce_expert` stacks them.
CHANNEL_SUMS = (
    "channel_sum", "channel_sq_sum", "gated_channel_sq_sum", "removal_sum", "attribution_sum", "gate_sq_sum",
    "up_sq_sum",
)  # fmt: skip
HIDDEN_SUMS = ("output_sum", "output_sq_sum", "input_sq_sum")
EXPERT_SUMS = (
    "routed_tokens", "gate_sum", "output_norm_sum", "output_sq_norm_sum", "gated_output_norm_sum", "removal_sum",
)  # fmt: skip


@dataclass(frozen=True)
class _ExpertPass:
    """What one expert computed for the n rows routed to it: x [n, H], gate, up and h [n, C], f [n, H]."""

    expert: int
    token_n: Tensor
    weight_n: Tensor
    x_nH: Tensor
    gate_nC: Tensor
    up_nC: Tensor
    h_nC: Tensor
    f_nH: Tensor


class LayerRecorder:
    """Float64 sums of one MoE layer over all batches that it recorded."""

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer
        self._experts = layer.experts
        experts, hidden, width = layer.experts.down_proj.shape
        self._channel_ESC = torch.zeros(experts, len(CHANNEL_SUMS), width, dtype=torch.float64)
        self._channel_max_EC = torch.zeros(experts, width, dtype=torch.float64)
        self._hidden_ESH = torch.zeros(experts, len(HIDDEN_SUMS), hidden, dtype=torch.float64)
        self._expert_ES = torch.zeros(experts, len(EXPERT_SUMS), dtype=torch.float64)
        self._probability_sum_E = torch.zeros(experts, dtype=torch.float64)
        self._entropy_sum = torch.zeros((), dtype=torch.float64)
        self._routed_output_loss = torch.zeros((), dtype=torch.float64)
        self._passes: list[_ExpertPass] = []

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

    def sums(self) -> dict[str, Tensor]:
        """The fields of `Statistics` for this layer, by their names without the L axis."""
        width = self._experts.down_proj.shape[2]
        row_norm_EC = torch.linalg.vector_norm(self._experts.gate_up_proj.detach(), dim=2, dtype=torch.float64)
        column_norm_EC = torch.linalg.vector_norm(self._experts.down_proj.detach(), dim=1, dtype=torch.float64)
        return {
            **{f"{name}_EC": self._channel_ESC[:, row] for row, name in enumerate(CHANNEL_SUMS)},
            **{f"{name}_EH": self._hidden_ESH[:, row] for row, name in enumerate(HIDDEN_SUMS)},
            **{f"{name}_E": self._expert_ES[:, row] for row, name in enumerate(EXPERT_SUMS)},
            "gated_channel_sq_max_EC": self._channel_max_EC,
            "probability_sum_E": self._probability_sum_E,
            "gate_row_norm_EC": row_norm_EC[:, :width].cpu(),
            "up_row_norm_EC": row_norm_EC[:, width:].cpu(),
            "down_column_norm_EC": column_norm_EC.cpu(),
            "routed_output_loss": self._routed_output_loss,
            "router_entropy_sum": self._entropy_sum,
        }

    def _keep_routing(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        log_probability_TE = Routing(*output).logits_TE[self._valid_T].double().log_softmax(dim=-1)
        probability_TE = log_probability_TE.exp()
        self._probability_sum_E += probability_TE.sum(dim=0).cpu()
        self._entropy_sum -= (probability_TE * log_probability_TE).sum().cpu()

    def _run_experts(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The experts' forward; holds each expert's values until the layer's output is known."""
        routed = dispatch(experts_TK, gates_TK, len(self._expert_ES))
        x_AH = hidden_TH[routed.token_A]
        for expert, rows in routed.active():
            x_nH = x_AH[rows]
            gate_nC, up_nC = (x_nH @ self._experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            h_nC = self._experts.act_fn(gate_nC) * up_nC
            f_nH = h_nC @ self._experts.down_proj[expert].T
            gate_n = routed.gate_A[rows]
            self._passes.append(_ExpertPass(expert, routed.token_A[rows], gate_n, x_nH, gate_nC, up_nC, h_nC, f_nH))
        self._mixed_TH = combine(torch.cat([one.f_nH for one in self._passes]), routed, len(hidden_TH))
        return self._mixed_TH

    def _reduce_layer(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
        layer_output = output if isinstance(output, Tensor) else output[0]
        y_TH = _at_least_float32(layer_output.reshape(-1, layer_output.shape[-1]))
        m_TH = _at_least_float32(self._mixed_TH)
        valid_T = self._valid_T.to(y_TH.dtype)
        q_T = valid_T / (y_TH.square().sum(dim=-1) + OUTPUT_NORM_EPS)
        self._routed_output_loss += (q_T @ m_TH.square().sum(dim=-1)).double().cpu()
        for one in self._passes:
            self._reduce_expert(one, m_TH, q_T, valid_T)
        self._passes.clear()

    def _reduce_expert(self, one: _ExpertPass, m_TH: Tensor, q_T: Tensor, valid_T: Tensor) -> None:
        h_nC, f_nH = _at_least_float32(one.h_nC), _at_least_float32(one.f_nH)
        valid_n, q_n = valid_T[one.token_n], q_T[one.token_n]
        g_n = one.weight_n.to(q_n.dtype)  # some routers give float32 gates whatever the model's dtype
        down_HC = _at_least_float32(self._experts.down_proj[one.expert])

        h_sq_nC, f_sq_nH = h_nC.square(), f_nH.square()
        gated_h_sq_nC = (valid_n * g_n.square()).unsqueeze(-1) * h_sq_nC
        projected_nC = m_TH[one.token_n] @ down_HC  # <w_c, m_t>
        channel_SC = [
            valid_n @ h_nC,
            valid_n @ h_sq_nC,
            gated_h_sq_nC.sum(dim=0),
            q_n @ gated_h_sq_nC,
            (q_n * g_n) @ (h_nC * projected_nC),
            valid_n @ _at_least_float32(one.gate_nC).square(),
            valid_n @ _at_least_float32(one.up_nC).square(),
        ]
        hidden_SH = [valid_n @ f_nH, valid_n @ f_sq_nH, valid_n @ _at_least_float32(one.x_nH).square()]
        f_sq_norm_n = f_sq_nH.sum(dim=-1)
        f_norm_n = f_sq_norm_n.sqrt()
        expert_S = [
            valid_n.sum(),
            valid_n @ g_n,
            valid_n @ f_norm_n,
            valid_n @ f_sq_norm_n,
            (valid_n * g_n) @ f_norm_n,
            (q_n * g_n.square()) @ f_sq_norm_n,
        ]
        self._channel_ESC[one.expert] += torch.stack(channel_SC).double().cpu()
        self._hidden_ESH[one.expert] += torch.stack(hidden_SH).double().cpu()
        self._expert_ES[one.expert] += torch.stack(expert_S).double().cpu()
        largest_C = gated_h_sq_nC.amax(dim=0).double().cpu()
        self._channel_max_EC[one.expert] = torch.maximum(self._channel_max_EC[one.expert], largest_C)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
