"""What each routed token met, one at a time, recomputed from the modules' inputs and outputs: the slow references."""

from dataclasses import dataclass

from torch import Tensor

from moeprune.calibration.recorder import OUTPUT_NORM_EPS


@dataclass(frozen=True)
class RoutedToken:
    """One token in one of its experts: gate g, expert input x [H], pre-activations and h [C], output f [H]; of the
    layer the routed output m [H] and the output y [H]."""

    g: Tensor
    x: Tensor
    gate_C: Tensor
    up_C: Tensor
    h_C: Tensor
    f: Tensor
    m: Tensor
    y: Tensor

    @property
    def q(self) -> Tensor:
        return 1 / (self.y.dot(self.y) + OUTPUT_NORM_EPS)


def tokens_of(seen, expert: int) -> list[RoutedToken]:
    """Every token of a `SeenLayer` that was routed to the expert, in order."""
    experts, width = seen.layer.experts, seen.layer.widths[expert]
    weight, down = experts.gate_up_proj[expert].detach(), experts.down_proj[expert].detach()
    found = []
    for token, slot in (seen.experts_TK == expert).nonzero().tolist():
        x = seen.x_TH[token]
        gate_C, up_C = weight[:width] @ x, weight[width:] @ x
        h_C = experts.act_fn(gate_C) * up_C
        g = seen.gates_TK[token, slot].double()
        found.append(RoutedToken(g, x, gate_C, up_C, h_C, down @ h_C, seen.m_TH[token], seen.y_TH[token]))
    return found


def matrices_of(seen, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate [C, H], up [C, H] and down projection [H, C] of one expert."""
    experts, width = seen.layer.experts, seen.layer.widths[expert]
    gate_up = experts.gate_up_proj[expert].detach()
    return gate_up[:width], gate_up[width:], experts.down_proj[expert].detach()
