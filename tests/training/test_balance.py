"""The load-balancing loss: 1 when balanced, otherwise what a loop over experts gives."""

import pytest
import torch

from moeprune.models.adapter import Routing
from moeprune.training.balance import expert_load_LE, load_balancing_loss


def routing_of(logits_TE, experts_TK) -> Routing:
    return Routing(logits_TE, torch.ones_like(experts_TK, dtype=torch.float32), experts_TK)


def random_routing(tokens, experts, top_k, seed) -> Routing:
    logits_TE = 3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return routing_of(logits_TE, logits_TE.topk(top_k, dim=1).indices)


def test_a_balanced_layer_has_loss_one():
    """Every expert gets as many tokens, and the probabilities are equal."""
    experts_TK = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    balanced = routing_of(torch.zeros(4, 4), experts_TK)
    torch.testing.assert_close(load_balancing_loss([balanced, balanced]), torch.tensor(1.0))


def test_one_expert_for_all_tokens_costs_the_number_of_experts():
    logits_TE = torch.full((5, 8), -100.0)
    logits_TE[:, 2] = 100
    collapsed = routing_of(logits_TE, torch.full((5, 1), 2))
    torch.testing.assert_close(load_balancing_loss([collapsed]), torch.tensor(8.0))


@pytest.mark.parametrize(("experts", "top_k", "seed"), [(8, 2, 0), (6, 1, 1), (5, 4, 2)])
def test_loss_equals_a_loop_over_layers_and_experts(experts, top_k, seed):
    routing = [random_routing(20, experts, top_k, seed), random_routing(20, experts, top_k, seed + 10)]
    expected = 0.0
    for layer in routing:
        for expert in range(experts):
            share = sum(expert in chosen for chosen in layer.experts_TK.tolist()) / 20
            probability = sum(float(row.double().softmax(0)[expert]) for row in layer.logits_TE) / 20
            expected += experts / top_k * share * probability / len(routing)
    assert float(load_balancing_loss(routing)) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_pulls_down_the_experts_with_most_tokens():
    logits_TE = torch.zeros(6, 3, requires_grad=True)
    load_balancing_loss([routing_of(logits_TE, torch.zeros(6, 1, dtype=torch.int64))]).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_where_no_token_counts_nothing_is_out_of_balance():
    logits_TE = torch.randn(4, 3, requires_grad=True)
    routing = [Routing(logits_TE, torch.full((4, 1), 1.0), torch.zeros(4, 1, dtype=torch.int64))] * 2
    loss = load_balancing_loss(routing, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits_TE.grad, torch.zeros(4, 3))


def test_load_is_the_share_of_assignments_of_each_expert():
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 1]])
    torch.testing.assert_close(
        expert_load_LE([routing_of(torch.zeros(3, 4), experts_TK)]), torch.tensor([[3 / 6, 2 / 6, 1 / 6, 0]])
    )
