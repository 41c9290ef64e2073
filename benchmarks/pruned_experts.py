"""Speed of a pruned expert block against the dense one, for one token (decode) and many (prefill).

The dense block is transformers' own, in its fastest implementation on this machine. Channels are removed unevenly, as
coverage does. python benchmarks/pruned_experts.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.models.adapter import moe_layers
from moeprune.surgery.prune import prune
from moeprune.types import Plan

EXPERTS, TOP_K, WIDTH, HIDDEN, BLOCK = 32, 4, 704, 512, 16
ROUNDS = 15


def main() -> None:
    shape = f"hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, top-{TOP_K}"
    print(f"float32, {shape}, {torch.get_num_threads()} threads\n")
    print("| channels removed | tokens | dense ms | pruned ms | speed-up |\n|---|---|---|---|---|")
    for ratio in (0.25, 0.5, 0.75):
        dense, pruned = (moe_layers(model)[0].experts for model in (_model(), prune(_model(), _uneven_plan(ratio))))
        for tokens in (1, 4, 512, 2048):
            batch = _batch(tokens)
            dense_ms, pruned_ms = _alternate(lambda: dense(*batch), lambda: pruned(*batch))  # noqa: B023
            print(
                f"| {ratio:.0%} | {tokens} | {dense_ms:.2f} | {pruned_ms:.2f} | {dense_ms / pruned_ms:.2f} |",
                flush=True,
            )


def _model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=WIDTH,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def _uneven_plan(ratio: float) -> Plan:
    """Widths spread around the mean, in blocks, that together remove ``ratio`` of the channels."""
    mean = round((1 - ratio) * WIDTH / BLOCK)
    spread = min(mean - 1, WIDTH // BLOCK - mean)
    blocks = [mean + offset for half in range(EXPERTS // 2) for offset in (half % (spread + 1), -(half % (spread + 1)))]
    return Plan((tuple(torch.arange(count * BLOCK) for count in blocks),), WIDTH)


def _batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    experts = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    return hidden, experts, torch.full((tokens, TOP_K), 1 / TOP_K)


@torch.no_grad()
def _alternate(*works: Callable[[], object]) -> list[float]:
    """Median milliseconds of each piece of work, measured in turns."""
    milliseconds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for times, work in zip(milliseconds, works, strict=True):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times[1:]) for times in milliseconds]


if __name__ == "__main__":
    main()
