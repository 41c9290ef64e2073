"""Gradients of a loss with respect to what the routed experts compute, handed out batch by batch and layer by layer.

Two losses, one recorder. The parameters stay frozen: a graph begins at the experts' pre-activations, and what arrives
there on the way back is handed out and dropped at once, so that no weight gradient of the model is ever held.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.calibration.recorder import OUTPUT_NORM_EPS, at_least_float32
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.layers.streaming import Model, StreamedModel, devices_of, skeleton
from moeprune.models.layers.walk import walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.contract import gate_and_up, project_down
from moeprune.models.runtime.dispatch import Dispatch, combine, dispatch


@dataclass(frozen=True)
class ExpertGradients:
    """One MoE layer and one batch; A = T * K assignments of tokens to experts, sorted by expert.

    ``h`` is the channel activation ``act(gate) * up``, ``f = W_down h`` the expert's output before its gate is applied;
    a name that begins with ``d`` is the gradient of the batch's loss with respect to the rest of the name. Values keep
    the model's dtype. Rows of padding have zero gradients.
    """

    layer: int  # index among the MoE layers
    experts: nn.Module
    routed: Dispatch
    valid_A: Tensor  # bool, False for padding
    x_AH: Tensor
    h_AC: Tensor
    dpre_activation_AI: Tensor  # I = 2C: gate, then up
    dh_AC: Tensor
    df_AH: Tensor


Receiver = Callable[[ExpertGradients], None]


def language_model_gradients(
    model: Model, windows: TokenWindows, batch_size: int, receive: Receiver, label: str
) -> None:
    """Hand out gradients of the language-modelling loss, summed over the predicted tokens, in nats.

    An ordinary backward pass through the model: later layers' routers count with the gates that they give. Padding is
    neither predicted nor predicted from.

    Raises InputError for a model that is streamed from disk: the backward pass needs all layers at once.
    """
    if isinstance(model, StreamedModel):
        raise InputError(
            "Gradients of the language_model loss need the whole model in memory.",
            change="Use loss=block_local, or load the model whole.",
        )
    graphs = [_ExpertGraph(index, layer, receive) for index, layer in enumerate(moe_layers(model))]
    with frozen(model), ExitStack() as replaced:
        for graph in graphs:
            replaced.enter_context(replaced_forward(graph.layer.experts, graph.routed_output))
        for input_ids_BT, mask_BT in _batches(model, windows, batch_size, graphs, label):
            with torch.enable_grad():
                logits_BTV = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits
                predicts_BT = (mask_BT[:, 1:] * mask_BT[:, :-1]).bool()
                targets_BT = input_ids_BT[:, 1:].masked_fill(~predicts_BT, -100)
                predictions_NV = at_least_float32(logits_BTV[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(predictions_NV, targets_BT.flatten(), reduction="sum")
            loss.backward()


def block_local_gradients(
    model: Model,
    windows: TokenWindows,
    batch_size: int,
    alpha: float,
    receive: Receiver,
    label: str,
    workspace: Workspace = IN_MEMORY,
) -> None:
    """Hand out gradients of each layer's own loss, where all routed experts of the layer are scaled by alpha:

        sum_t q_t ||y'_t - y_t||^2,     y' - y = (alpha - 1) s m,     q_t = 1 / (||y_t||^2 + eps)

    with s = 1 in most families (`MoeLayer.output_scale`). The loss' gradient with respect to the gated sum m' = alpha m
    is ``2 (alpha - 1) s^2 q m``; the scaling gives another alpha. The graph of a layer spans its experts only and is
    gone before the next layer runs. The model itself, which all layers read, is not scaled, and routing is held fixed.

    Raises InputError for a model in float16: gradients are of the size of q, which it cannot hold.
    """
    if skeleton(model).dtype == torch.float16:
        raise InputError(
            "Gradients of the block_local loss are too small for float16.",
            change="Use model.compute_dtype=bfloat16 or float32.",
        )
    moe = enumerate(moe_layers(skeleton(model)))
    graph_in = {layer.decoder_layer: _ExpertGraph(index, layer, receive) for index, layer in moe}
    batches, device = list(windows.batches(batch_size)), devices_of(model)[0]
    for visit in walk_layers(model, batches, label, workspace):
        if visit.layer in graph_in:
            graph = graph_in[visit.layer]
            with frozen(visit.layer), _backward_inside_the_layer(graph, alpha):
                for _, mask_BT in batches:
                    graph.expect(mask_BT.to(device).flatten().bool())
                    next(visit.outputs)


class _ExpertGraph:
    """Computes a layer's routed output on a graph that hands out the gradients on the way back."""

    def __init__(self, index: int, layer: MoeLayer, receive: Receiver) -> None:
        self.index, self.layer, self._receive = index, layer, receive

    def expect(self, valid_T: Tensor) -> None:
        """Say which tokens of the next batch count (bool [T]); the others are padding."""
        self.valid_T = valid_T

    def routed_output(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """``m_TH``; stands in for the experts' forward."""
        experts = self.layer.experts
        routed = dispatch(experts_TK, gates_TK, self.layer.expert_count, self.layer.gates_inputs)
        x_AH = routed.inputs(hidden_TH)
        pre_activation_AI = torch.cat([gate_and_up(experts, e, x_AH[rows]) for e, rows in routed.active()])
        if not pre_activation_AI.requires_grad:  # nothing before this layer needs a gradient: the graph begins here
            pre_activation_AI.requires_grad_()
        gate_AC, up_AC = pre_activation_AI.chunk(2, dim=-1)
        h_AC = gated_activation(experts)(gate_AC, up_AC)
        f_AH = torch.cat([project_down(experts, e, h_AC[rows]) for e, rows in routed.active()])
        self._hand_out(routed, hidden_TH.detach(), pre_activation_AI, h_AC, f_AH)
        return combine(f_AH, routed, len(hidden_TH))

    def _hand_out(
        self, routed: Dispatch, hidden_TH: Tensor, pre_activation_AI: Tensor, h_AC: Tensor, f_AH: Tensor
    ) -> None:
        """Hook the three tensors. Their gradients arrive in the order f, h, pre-activation, so the last one hands out.

        The hooks hold no tensor of the graph: it would keep itself alive. Nor do they hold the inputs of all
        assignments, K times those of the tokens, in every layer until the backward pass comes.
        """
        arrived: dict[str, Tensor] = {}
        valid_A, plain_h_AC = self.valid_T[routed.token_A], h_AC.detach()

        def hand_out(gradient_AI: Tensor) -> None:
            x_AH = routed.inputs(hidden_TH)
            self._receive(
                ExpertGradients(
                    self.index, self.layer.experts, routed, valid_A, x_AH, plain_h_AC, gradient_AI, **arrived
                )
            )
            arrived.clear()

        f_AH.register_hook(lambda gradient_AH: arrived.update(df_AH=gradient_AH))
        h_AC.register_hook(lambda gradient_AC: arrived.update(dh_AC=gradient_AC))
        pre_activation_AI.register_hook(hand_out)


@contextmanager
def _backward_inside_the_layer(graph: _ExpertGraph, alpha: float) -> Iterator[None]:
    """Within the context, the layer goes backward through its experts as soon as its output is known."""
    mixed: list[Tensor] = []

    def routed_output(hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        with torch.enable_grad():
            mixed.append(graph.routed_output(hidden_TH.detach(), experts_TK, gates_TK.detach()))
        return mixed[0].detach()

    def backward(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
        m_TH = mixed.pop()
        y_TH = at_least_float32(output if isinstance(output, Tensor) else output[0]).reshape(m_TH.shape)
        q_T = graph.valid_T / (y_TH.square().sum(dim=-1) + OUTPUT_NORM_EPS)
        weight_T = 2 * alpha * (alpha - 1) * graph.layer.output_scale**2 * q_T
        m_TH.backward((weight_T.unsqueeze(-1) * m_TH.detach()).to(m_TH.dtype))

    hook = graph.layer.decoder_layer.register_forward_hook(backward)
    try:
        with replaced_forward(graph.layer.experts, routed_output):
            yield
    finally:
        hook.remove()


def _batches(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int, graphs: list[_ExpertGraph], label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for input_ids_BT, mask_BT in tqdm(windows.batches(batch_size), desc=label, unit="batch"):
        for graph in graphs:
            graph.expect(mask_BT.to(device).flatten().bool())
        yield input_ids_BT.to(device), mask_BT.to(device)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the context the module computes ``forward``."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter needs a gradient; afterwards those do that did before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
