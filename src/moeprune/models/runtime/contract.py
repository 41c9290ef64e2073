"""What the package relies on in every family's routed experts, and how the outliers are made to keep it.

The contract: ``router(h_TH)`` gives ``(logits_TE, gates_TK, experts_TK)``, and ``experts(h_TH, experts_TK, gates_TK)``
the routed output ``m_TH``. ``experts.gate_up_proj`` [E, 2C, H] holds the gate rows, then the up rows, of each expert;
``experts.down_proj`` [E, H, C]; where a family has biases, ``gate_up_bias`` [E, 2C] and ``down_bias`` [E, H]. How gate
and up combine is `gated_activation`. Nearly all families of transformers keep it as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from .activations import GatedActivation, gated_activation
from .dispatch import combine, dispatch


def gate_and_up(experts: Any, expert: int, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
    """Gate and up pre-activations of one expert side by side [T, 2C]."""
    weight_HI = experts.gate_up_proj[expert].T
    bias_EI = getattr(experts, "gate_up_bias", None)
    if bias_EI is None:
        return torch.mm(x_TH, weight_HI, out=out)
    return torch.addmm(bias_EI[expert], x_TH, weight_HI, out=out)


def project_down(experts: Any, expert: int, h_TC: Tensor, out: Tensor | None = None) -> Tensor:
    """``f = W_down h`` of one expert, with its bias where there is one [T, H]."""
    weight_CH = experts.down_proj[expert].T
    bias_EH = getattr(experts, "down_bias", None)
    if bias_EH is None:
        return torch.mm(h_TC, weight_CH, out=out)
    return torch.addmm(bias_EH[expert], h_TC, weight_CH, out=out)


def to_contract(module: nn.Module) -> None:
    """Replace, in place, every block of experts below ``module`` that does not keep the contract by one that does.

    ``module`` is a model or one decoder layer, on any device, meta included. What it computes stays the same, up to
    rounding. Transposed weights (GPT-OSS, Llama 4) are copied; nothing else is.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Llama4TextMoe):
                setattr(parent, name, GatedInputs(child))
            elif getattr(child, "is_transposed", False):
                setattr(parent, name, _transposed_back(child))


class ContractExperts(nn.Module):
    """Routed experts as the contract has them."""

    def __init__(
        self,
        gate_up_EIH: Tensor,
        down_EHC: Tensor,
        activation: GatedActivation,
        gate_up_bias_EI: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        gates_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_EIH)
        self.down_proj = nn.Parameter(down_EHC)
        if gate_up_bias_EI is not None:
            self.gate_up_bias = nn.Parameter(gate_up_bias_EI)
        if down_bias_EH is not None:
            self.down_bias = nn.Parameter(down_bias_EH)
        self.activation = activation
        self.gates_inputs = gates_inputs

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        routed = dispatch(experts_TK, gates_TK, len(self.down_proj), self.gates_inputs)
        x_AH = routed.inputs(hidden_TH)
        outputs = [hidden_TH.new_zeros(0, hidden_TH.shape[1])]
        for expert, rows in routed.active():
            gate_nC, up_nC = gate_and_up(self, expert, x_AH[rows]).chunk(2, dim=-1)
            outputs.append(project_down(self, expert, self.activation(gate_nC, up_nC)))
        return combine(torch.cat(outputs), routed, len(hidden_TH))


def _transposed_back(experts: Any) -> ContractExperts:
    """Experts stored as [E, H, 2C] and [E, C, H], gate and up columns one after the other or alternating."""

    def gate_rows_first(values: Tensor) -> Tensor:
        if experts.is_concatenated:
            return values.contiguous()
        return torch.cat([values[:, ::2], values[:, 1::2]], dim=1)

    gate_up_bias_EI = down_bias_EH = None
    if experts.has_bias:
        gate_up_bias_EI = gate_rows_first(experts.gate_up_proj_bias.detach())
        down_bias_EH = experts.down_proj_bias.detach()
    return ContractExperts(
        gate_rows_first(experts.gate_up_proj.detach().transpose(1, 2)),
        experts.down_proj.detach().transpose(1, 2).contiguous(),
        gated_activation(experts),
        gate_up_bias_EI,
        down_bias_EH,
    )


class SigmoidRouter(nn.Module):
    """Sends a token to the ``top_k`` experts with the largest logits; the gates are their sigmoids (Llama 4)."""

    def __init__(self, weight_EH: Tensor, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_EH)
        self.top_k = top_k

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], gates [T, K], experts [T, K]."""
        logits_TE = nn.functional.linear(hidden_TH, self.weight)
        chosen_TK, experts_TK = torch.topk(logits_TE, self.top_k, dim=1)
        return logits_TE, torch.sigmoid(chosen_TK.float()).to(chosen_TK.dtype), experts_TK


class GatedInputs(nn.Module):
    """Llama 4's block of a shared and routed experts: the gate scales what goes into an expert, not what comes out.

    The family's own block runs all experts on all tokens, those that were not chosen on zeros.
    """

    def __init__(self, block: Llama4TextMoe) -> None:
        super().__init__()
        stored = block.experts
        self.experts = ContractExperts(
            stored.gate_up_proj.detach().transpose(1, 2).contiguous(),
            stored.down_proj.detach().transpose(1, 2).contiguous(),
            gated_activation(stored),
            gates_inputs=True,
        )
        self.router = SigmoidRouter(block.router.weight.detach(), block.router.top_k)
        self.shared_expert = block.shared_expert

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, one row per token, and the router's logits, as the family's decoder layer expects."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        logits_TE, gates_TK, experts_TK = self.router(hidden_TH)
        return self.shared_expert(hidden_TH) + self.experts(hidden_TH, experts_TK, gates_TK), logits_TE
