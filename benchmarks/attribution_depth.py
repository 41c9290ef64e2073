"""Attribution of all channels: the paper's procedure against the closed form, at growing depth, on the same batches.

The paper (arXiv 2606.18304) takes layer after layer: a forward pass through the layers before it, then the block
forward twice (intact, and scaled by alpha) and backward. Its cost grows with the square of the depth; one statistics
pass, with every other statistic in it, grows with the depth. Both give the same scores, which is checked.

python benchmarks/attribution_depth.py
"""

import statistics
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.runtime.dispatch import combine, dispatch
from moeprune.scoring.attribution import AttributionScorer

ALPHA = 0.9
BATCH_SIZE = 8
ROUNDS = 3


def main() -> None:
    print("| layers | paper's procedure s | one statistics pass s | ratio |\n|---|---|---|---|")
    for depth in (8, 16, 24):
        model = _model(depth)
        tokens = torch.randint(0, model.config.vocab_size, (16, 128), generator=torch.Generator().manual_seed(0))
        windows = TokenWindows(tokens, torch.ones_like(tokens))
        paper_s, ours_s = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            by_paper_LEC = paper_attribution_LEC(model, windows)
            middle = time.perf_counter()
            ours_LEC = AttributionScorer(ALPHA)(collect_statistics(model, windows, BATCH_SIZE)).channel_LEC
            paper_s.append(middle - start)
            ours_s.append(time.perf_counter() - middle)
        scale = float(by_paper_LEC.abs().max())
        torch.testing.assert_close(ours_LEC, by_paper_LEC, rtol=1e-3, atol=1e-4 * scale)
        paper, ours = statistics.median(paper_s), statistics.median(ours_s)
        print(f"| {depth} | {paper:.2f} | {ours:.2f} | {paper / ours:.1f} |", flush=True)


def _model(depth: int) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=256, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


class _EndOfPrefixError(Exception):
    """Ends a forward pass where the scored layer begins."""


def paper_attribution_LEC(model: PreTrainedModel, windows: TokenWindows) -> Tensor:
    """``-mask dLoss/dmask`` at mask = alpha, one mask per channel, layer by layer [L, E, C]."""
    scores = []
    for layer in moe_layers(model):
        experts, _, width = layer.experts.down_proj.shape
        score_EC = torch.zeros(experts, width, dtype=torch.float64)
        for input_ids, mask in windows.batches(BATCH_SIZE):
            args, kwargs = _inputs_of(model, layer, input_ids, mask)
            score_EC += _block_attribution_EC(layer, args, kwargs)
        scores.append(score_EC)
    return torch.stack(scores)


@torch.no_grad()
def _inputs_of(model: PreTrainedModel, layer: MoeLayer, input_ids: Tensor, mask: Tensor) -> tuple[tuple, dict]:
    """The prefix forward: what the decoder layer is called with."""
    caught: list[tuple[tuple, dict]] = []

    def stop(_module: object, args: tuple, kwargs: dict) -> None:
        caught.append((args, kwargs))
        raise _EndOfPrefixError

    hook = layer.decoder_layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    except _EndOfPrefixError:
        pass
    finally:
        hook.remove()
    return caught[0]


def _block_attribution_EC(layer: MoeLayer, args: tuple, kwargs: dict) -> Tensor:
    experts, _, width = layer.experts.down_proj.shape
    mask_EC = torch.full((experts, width), ALPHA, requires_grad=True)
    with torch.no_grad():
        y_BTH = layer.decoder_layer(*args, **kwargs)
    layer.experts.forward = _masked_forward(layer, mask_EC)
    try:
        scaled_BTH = layer.decoder_layer(*args, **kwargs)
    finally:
        del layer.experts.forward
    error_BT = (scaled_BTH - y_BTH).square().sum(dim=-1)
    loss = (error_BT / (y_BTH.square().sum(dim=-1) + OUTPUT_NORM_EPS)).sum()
    (gradient_EC,) = torch.autograd.grad(loss, mask_EC)
    return -ALPHA * gradient_EC.double()


def _masked_forward(layer: MoeLayer, mask_EC: Tensor):
    def forward(hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        routed = dispatch(experts_TK, gates_TK, len(mask_EC))
        x_AH = hidden_TH[routed.token_A]
        outputs = []
        for expert, rows in routed.active():
            gate, up = (x_AH[rows] @ layer.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            h = layer.experts.act_fn(gate) * up * mask_EC[expert]
            outputs.append(h @ layer.experts.down_proj[expert].T)
        return combine(torch.cat(outputs), routed, len(hidden_TH))

    return forward


if __name__ == "__main__":
    main()
