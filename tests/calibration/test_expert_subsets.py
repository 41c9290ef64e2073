"""The search for subsets of experts against brute force with a restricted router computed by hand."""

import copy
import dataclasses
from itertools import combinations

import pytest
import torch
from pass_checks import left_as_it_was, padded

from moeprune.calibration.expert_subsets import ExpertSubsetPass, ExpertSubsets
from moeprune.calibration.subset_search import GeneticSearch
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.surgery.prune import prune
from moeprune.types import Plan

# The routers' softmax is in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class SlowLayer:
    """Loss of a subset: logits of the others masked, gates as the family defines them, experts one by one."""

    def __init__(self, model, saw) -> None:
        self._saw = saw
        self._renormalise = bool(getattr(model.config, "norm_topk_prob", False))
        self._scale = getattr(model.config, "routed_scaling_factor", 1.0)
        experts = saw.layer.experts
        gate_TEC, up_TEC = torch.einsum("th,eih->tei", saw.x_TH, experts.gate_up_proj).chunk(2, dim=-1)
        self._f_TEH = torch.einsum("tec,ehc->teh", experts.act_fn(gate_TEC) * up_TEC, experts.down_proj)

    def output_TH(self, live):
        masked_TE = torch.full_like(self._saw.logits_TE, -torch.inf)
        masked_TE[:, list(live)] = self._saw.logits_TE[:, list(live)]
        gates_TK, experts_TK = masked_TE.float().softmax(dim=-1).topk(self._saw.layer.top_k)
        if self._renormalise:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        chosen_TKH = self._f_TEH.gather(1, experts_TK.unsqueeze(-1).expand(-1, -1, self._f_TEH.shape[2]))
        return (self._scale * gates_TK.double().unsqueeze(-1) * chosen_TKH).sum(dim=1)

    def loss(self, live) -> float:
        return float((self._saw.m_TH - self.output_TH(live)).norm())


@torch.no_grad()
def slow_layers(model, windows, seen_layers):
    with seen_layers(model) as seen:
        model.base_model(windows.input_ids_NT)
    return [(saw, SlowLayer(model, saw)) for saw in seen]


def kept(subsets: ExpertSubsets, layer: int, count: int) -> list[int]:
    return subsets.keep_LEE[layer, count - 1].nonzero().flatten().tolist()


@torch.no_grad()
def test_exhaustive_search_finds_the_best_subset_of_every_size(tiny_model_64, random_windows, seen_layers):
    subsets = ExpertSubsetPass(exhaustive_up_to=8)(tiny_model_64, random_windows, 5)
    for layer, (saw, slow) in enumerate(slow_layers(tiny_model_64, random_windows, seen_layers)):
        everyone = range(saw.layer.expert_count)
        for count in range(saw.layer.top_k, len(everyone)):
            losses = {subset: slow.loss(subset) for subset in combinations(everyone, count)}
            best = min(losses.values())
            torch.testing.assert_close(float(subsets.loss_LE[layer, count - 1]), best, **CLOSE)
            torch.testing.assert_close(losses[tuple(kept(subsets, layer, count))], best, **CLOSE)


@torch.no_grad()
def test_greedy_search_eliminates_the_least_harmful_expert_each_time(tiny_model_64, random_windows, seen_layers):
    subsets = ExpertSubsetPass(exhaustive_up_to=2)(tiny_model_64, random_windows, 5)
    for layer, (saw, slow) in enumerate(slow_layers(tiny_model_64, random_windows, seen_layers)):
        left = list(range(saw.layer.expert_count))
        while len(left) > saw.layer.top_k:
            losses = {gone: slow.loss([e for e in left if e != gone]) for gone in left}
            left.remove(min(losses, key=losses.get))
            assert kept(subsets, layer, len(left)) == left
            torch.testing.assert_close(float(subsets.loss_LE[layer, len(left) - 1]), min(losses.values()), **CLOSE)


@torch.no_grad()
def test_bred_subsets_lose_what_they_say_and_no_more_than_elimination(tiny_model_64, random_windows, seen_layers):
    greedy = ExpertSubsetPass(exhaustive_up_to=2)
    search = dataclasses.replace(greedy, genetic=GeneticSearch(population=6, generations=4))
    subsets = search(tiny_model_64, random_windows, 5)
    eliminated = greedy(tiny_model_64, random_windows, 5)
    best = ExpertSubsetPass()(tiny_model_64, random_windows, 5)
    assert (subsets.loss_LE <= eliminated.loss_LE).all() and (subsets.loss_LE >= best.loss_LE).all()
    assert torch.equal(subsets.removal_loss_LE, eliminated.removal_loss_LE)
    for layer, (saw, slow) in enumerate(slow_layers(tiny_model_64, random_windows, seen_layers)):
        for count in range(saw.layer.top_k, saw.layer.expert_count):
            live = kept(subsets, layer, count)
            assert len(live) == count
            torch.testing.assert_close(float(subsets.loss_LE[layer, count - 1]), slow.loss(live), **CLOSE)


def test_few_experts_are_searched_exhaustively_whatever_the_search(tiny_model_64, random_windows):
    plain = ExpertSubsetPass()
    bred = dataclasses.replace(plain, genetic=GeneticSearch(population=1, generations=1))
    found, expected = bred(tiny_model_64, random_windows, 5), plain(tiny_model_64, random_windows, 5)
    assert all(torch.equal(value, vars(expected)[name]) for name, value in vars(found).items())


@torch.no_grad()
def test_removal_loss_is_that_of_one_expert_less(tiny_model_64, random_windows, seen_layers):
    subsets = ExpertSubsetPass(exhaustive_up_to=2)(tiny_model_64, random_windows, 5)
    for layer, (saw, slow) in enumerate(slow_layers(tiny_model_64, random_windows, seen_layers)):
        everyone = range(saw.layer.expert_count)
        losses = [slow.loss([e for e in everyone if e != gone]) for gone in everyone]
        torch.testing.assert_close(subsets.removal_loss_LE[layer].tolist(), losses, **CLOSE)


@torch.no_grad()
def test_the_loss_is_what_pruning_to_the_subset_does_to_the_layer(tiny_model_64, random_windows, seen_layers):
    subsets = ExpertSubsetPass(exhaustive_up_to=2)(tiny_model_64, random_windows, 5)
    count = moe_layers(tiny_model_64)[0].expert_count - 2
    width = moe_layers(tiny_model_64)[0].widths[0]
    everything, nothing = torch.arange(width), torch.arange(0)
    keep_LE = subsets.keep_LEE[:, count - 1].tolist()
    plan = Plan(tuple(tuple(everything if live else nothing for live in layer) for layer in keep_LE), width)
    with seen_layers(tiny_model_64) as seen:
        tiny_model_64.base_model(random_windows.input_ids_NT)
    pruned = moe_layers(prune(copy.deepcopy(tiny_model_64), plan))
    for layer, saw in enumerate(seen):
        _, gates_TK, experts_TK = pruned[layer].router(saw.x_TH)
        output_TH = pruned[layer].experts(saw.x_TH, experts_TK, gates_TK)
        loss = float((saw.m_TH - output_TH).norm())
        torch.testing.assert_close(float(subsets.loss_LE[layer, count - 1]), loss, **CLOSE)


def test_rows_below_top_k_mark_none_and_the_last_row_all(tiny_model_64, random_windows):
    subsets = ExpertSubsetPass(exhaustive_up_to=2)(tiny_model_64, random_windows, 5)
    expert_count = subsets.keep_LEE.shape[1]
    assert subsets.keep_LEE.sum(dim=2).tolist() == [[0, *range(2, expert_count + 1)]] * len(subsets.keep_LEE)
    assert torch.isinf(subsets.loss_LE[:, 0]).all()
    assert (subsets.loss_LE[:, -1] == 0).all()


def test_padding_and_batch_size_do_not_count_and_few_tokens_are_a_sample(tiny_model_64, random_windows):
    search = ExpertSubsetPass(exhaustive_up_to=2)
    plain = search(tiny_model_64, random_windows, 5)
    for windows, batch_size in ((padded(random_windows, 6), 5), (random_windows, 2)):
        torch.testing.assert_close(search(tiny_model_64, windows, batch_size).loss_LE, plain.loss_LE, **CLOSE)
    few = dataclasses.replace(search, tokens=11)
    assert (few(tiny_model_64, random_windows, 5).removal_loss_LE < plain.removal_loss_LE).all()
    first = TokenWindows(random_windows.input_ids_NT[:1], random_windows.mask_NT[:1])
    assert torch.equal(few(tiny_model_64, first, 5).loss_LE, search(tiny_model_64, first, 5).loss_LE)


def test_the_model_is_left_as_it_was(tiny_model, random_windows):
    with left_as_it_was(tiny_model, random_windows.input_ids_NT):
        ExpertSubsetPass(exhaustive_up_to=2)(tiny_model, random_windows, 2)


def test_it_survives_a_round_trip(tmp_path):
    subsets = ExpertSubsets(torch.rand(2, 3, 3) > 0.5, torch.tensor([[torch.inf, 1, 0]] * 2), torch.rand(2, 3))
    subsets.save(tmp_path / "subsets.safetensors")
    loaded = ExpertSubsetPass().load(tmp_path / "subsets.safetensors")
    assert loaded.keep_LEE.dtype == torch.bool
    assert all(torch.equal(value, vars(subsets)[name]) for name, value in vars(loaded).items())


def test_what_cannot_shrink_is_refused(tiny_model, random_windows):
    router = moe_layers(tiny_model)[1].router
    router.num_group, router.topk_method = 2, "group_limited_greedy"
    with pytest.raises(InputError, match="groups of experts"):
        ExpertSubsetPass()(tiny_model, random_windows, 5)
    router.num_group, router.top_k = 1, moe_layers(tiny_model)[1].expert_count
    with pytest.raises(InputError, match="none can be removed"):
        ExpertSubsetPass()(tiny_model, random_windows, 5)
    with pytest.raises(InputError, match="tokens=0"):
        ExpertSubsetPass(tokens=0)
