"""What surgeries need beside a model and a plan."""

import pytest
import torch
from transformers import PreTrainedModel

from moeprune.calibration.statistics import Statistics, collect_statistics
from moeprune.calibration.windows import TokenWindows


@pytest.fixture
def many_windows() -> TokenWindows:
    """40 windows of 11 random tokens; in every other one the last three are padding."""
    input_ids_NT = torch.randint(1, 257, (40, 11), generator=torch.Generator().manual_seed(2))
    mask_NT = torch.ones_like(input_ids_NT)
    mask_NT[::2, 8:] = 0
    return TokenWindows(input_ids_NT, mask_NT)


@pytest.fixture
def statistics_64(tiny_model_64: PreTrainedModel, many_windows: TokenWindows) -> Statistics:
    return collect_statistics(tiny_model_64, many_windows, batch_size=16)


@pytest.fixture
def routed_tokens(seen_layers, many_windows):
    """``routed_tokens(model)``: by MoE layer and expert ``(x, g, h, f, q)`` of its calibration tokens, one by one."""

    def gather(model):
        with seen_layers(model) as seen:
            model(input_ids=many_windows.input_ids_NT, attention_mask=many_windows.mask_NT)
        valid_T = many_windows.mask_NT.flatten().bool()
        found = []
        for one in seen:
            experts = one.layer.experts
            tokens_of = [[] for _ in range(one.layer.expert_count)]
            for token in valid_T.nonzero().flatten().tolist():
                q = 1 / (one.y_TH[token].double() @ one.y_TH[token].double() + 1e-6)
                for gate, expert in zip(one.gates_TK[token], one.experts_TK[token].tolist(), strict=True):
                    x_H = one.x_TH[token]
                    gate_C, up_C = (experts.gate_up_proj[expert] @ x_H).chunk(2)
                    h_C = experts.act_fn(gate_C) * up_C
                    tokens_of[expert].append((x_H, gate, h_C, experts.down_proj[expert] @ h_C, q))
            found.append([[torch.stack(part) for part in zip(*tokens, strict=True)] for tokens in tokens_of])
        return found

    with torch.no_grad():
        yield gather
