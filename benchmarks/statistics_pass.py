"""Cost of the statistics pass against a plain forward pass (with the language-model head, as users run it) of the same
batches; both sides are measured alternately, the ratio is that of their medians.

python benchmarks/statistics_pass.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.source import ModelSource

BATCH_SIZE = 16
ROUNDS = 9


def main() -> None:
    print("| model | tokens | plain forward s | statistics pass s | ratio |\n|---|---|---|---|---|")
    for name, model in _models():
        tokens = torch.randint(0, model.config.vocab_size, (32, 128), generator=torch.Generator().manual_seed(0))
        windows = TokenWindows(tokens, torch.ones_like(tokens))
        plain, recorded = _alternate(
            lambda model=model, windows=windows: _forward(model, windows),
            lambda model=model, windows=windows: collect_statistics(model, windows, BATCH_SIZE),
        )
        print(f"| {name} | {tokens.numel()} | {plain:.2f} | {recorded:.2f} | {recorded / plain:.2f} |", flush=True)


def _models() -> list[tuple[str, PreTrainedModel]]:
    embedded = [
        (name, ModelSource(name, f"embedded:{name}", "bfloat16", "float32", 8, 16).load())
        for name in ("tiny_qwen3_moe", "tiny_deepseek_v2")
    ]
    # Expert shape closer to published models: there matrix products outweigh the element-wise sums.
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=384,
    )  # fmt: skip
    torch.manual_seed(0)
    return [*embedded, ("random, hidden 1024, 32 experts of 384", Qwen3MoeForCausalLM(config).eval())]


@torch.no_grad()
def _forward(model: PreTrainedModel, windows: TokenWindows) -> None:
    for input_ids, mask in windows.batches(BATCH_SIZE):
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def _alternate(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each piece of work, measured in turns."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for times, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


if __name__ == "__main__":
    main()
