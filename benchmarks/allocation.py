"""Time of the allocators at the shape of Qwen3-30B-A3B (48 layers x 128 experts x 768 channels), and how much their
plans cover against the bound for as many channels; all allocators in turns in one process, medians.

Scores are synthetic: channel scores log-normal with sigma 1, times an expert's scale, log-normal with sigma 1; an
expert's score is the sum of its channels', a layer's loss that of its experts times a log-normal with sigma 1 (seed 0).
Ratio 0.5, blocks of 128 channels, minimum width 128. Objective, bound and gap are of ``optimal_coverage`` at its
defaults: what each allocator covers in these weights, not what it was made to maximise.

python benchmarks/allocation.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.optimal_coverage import OptimalCoverageAllocator, coverage_certificate
from moeprune.allocation.ranking import RankingAllocator
from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import GlobalWholeExpertsAllocator, WholeExpertsAllocator
from moeprune.types import Plan, Scores

LAYERS, EXPERTS, CHANNELS, TOP_K = 48, 128, 768, 8
ROUNDS = 5

ALLOCATORS: dict[str, Callable[[Scores, Budget], Plan]] = {
    "optimal_coverage": OptimalCoverageAllocator(),
    "coverage": CoverageAllocator(),
    "coverage, most_score": CoverageAllocator(reallocation="most_score"),
    "coverage, uniform_coverage": CoverageAllocator(between_layers="uniform_coverage"),
    "u_shaped": CoverageAllocator(between_layers="u_shaped"),
    "loss": CoverageAllocator(between_layers="loss", smoothing="none"),
    "channel_ranking": RankingAllocator("layer"),
    "global": RankingAllocator("model"),
    "uniform": UniformAllocator(),
    "whole_experts": WholeExpertsAllocator(),
    "whole_experts_global": GlobalWholeExpertsAllocator(),
}


def main() -> None:
    scores = synthetic_scores()
    budget = Budget(0.5, LAYERS, EXPERTS, CHANNELS, TOP_K, alignment=128, minimum_width=128)
    seconds: dict[str, list[float]] = {name: [] for name in ALLOCATORS}
    plans = {}
    for _ in range(ROUNDS):
        for name, allocator in ALLOCATORS.items():
            start = time.perf_counter()
            plans[name] = allocator(scores, budget)
            seconds[name].append(time.perf_counter() - start)
    print("| allocator | seconds | objective | bound | gap % |\n|---|---|---|---|---|")
    for name, plan in plans.items():
        found = coverage_certificate(scores, plan, budget)
        median = statistics.median(seconds[name])
        print(f"| {name} | {median:.2f} | {found.objective:.3f} | {found.upper_bound:.3f} | {100 * found.gap:.4f} |")


def synthetic_scores() -> Scores:
    generator = torch.Generator().manual_seed(0)

    def log_normal(sigma: float, *size: int) -> torch.Tensor:
        return (sigma * torch.randn(*size, generator=generator, dtype=torch.float64)).exp()

    channel_LEC = log_normal(1, LAYERS, EXPERTS, CHANNELS) * log_normal(1, LAYERS, EXPERTS, 1)
    expert_LE = channel_LEC.sum(dim=-1)
    return Scores(channel_LEC, expert_LE, expert_LE.sum(dim=-1) * log_normal(1, LAYERS))


if __name__ == "__main__":
    main()
