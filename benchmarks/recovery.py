"""What a training step costs by what trains: LoRA, DoRA as PEFT computes it, DoRA as this package does, all weights.

A decoder layer of Qwen3-30B-A3B's kind with a quarter of its channels removed, in 16 bits or NF4, with embeddings and
head of a small vocabulary. A step is four micro-batches forward and backward, then AdamW. All take their steps in
turns. Routers have no adapter here. On a GPU it computes in bfloat16, on a CPU in float32.

    python benchmarks/recovery.py           # minutes; about 8 GB of memory
    python benchmarks/recovery.py --quick   # few experts, few rounds
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.low_rank import remembered_norms
from moeprune.models.layers.walk import run_through
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.recovery.adapters import Adapters
from moeprune.recovery.weights import AllWeights
from moeprune.surgery.prune import prune
from moeprune.types import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
VOCABULARY = 1024
MICRO_BATCHES = 4
RANK, ALPHA, DROPOUT = 32, 192, 0.05


@dataclass(frozen=True)
class Shape:
    hidden: int
    experts: int
    width: int
    top_k: int = 8

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.experts} experts of mean width {self.width * 3 // 4}, top-{self.top_k}"


HALVED, PUBLISHED, SMALL = Shape(1024, 64, 384), Shape(2048, 128, 768), Shape(256, 16, 128)


@dataclass(frozen=True)
class Contestant:
    """A model and its optimizer; ``context`` surrounds its steps."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, micro_batches: list[Tensor]) -> None:
        for input_ids_BT in micro_batches:
            with torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda"):
                loss = self.model(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few experts, few rounds")
    quick = parser.parse_args().quick
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {str(DTYPE).removeprefix('torch.')}, torch {torch.__version__}")
    shape = SMALL if quick else PUBLISHED if DEVICE == "cuda" else HALVED
    for four_bit in (False, True):
        base = pruned_model(shape, four_bit=four_bit)
        table(shape, base, four_bit=four_bit, rounds=3 if quick else 5)


def table(shape: Shape, base: PreTrainedModel, *, four_bit: bool, rounds: int) -> None:
    """Seconds of a step in units of LoRA's, for few tokens an expert and for many."""
    contestants = {
        "lora": ours(base, use_dora=False),
        "dora (PEFT)": pefts_dora(base),
        "dora": ours(base, use_dora=True),
        **({} if four_bit else {"full": all_weights(base)}),
    }
    storage = "NF4" if four_bit else str(DTYPE).removeprefix("torch.")
    print(f"\n**Weights in {storage} ({shape}; rank {RANK}, {MICRO_BATCHES} micro-batches a step)**\n")
    print("| tokens in a micro-batch | an expert gets | lora ms | " + " | ".join(list(contestants)[1:]) + " |")
    print("|" + "---|" * (2 + len(contestants)))
    for tokens in (256, 2048):
        seconds = alternate(contestants, tokens, rounds)
        lora = seconds.pop("lora")
        ratios = " | ".join(f"{value / lora:.2f}x" for value in seconds.values())
        print(f"| {tokens} | {tokens * shape.top_k // shape.experts} | {1e3 * lora:.0f} | {ratios} |")


def alternate(contestants: dict[str, Contestant], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of each one's step, after one that does not count."""
    generator = torch.Generator().manual_seed(tokens)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        drawn = [torch.randint(VOCABULARY, (1, tokens), generator=generator).to(DEVICE) for _ in range(MICRO_BATCHES)]
        for name, contestant in contestants.items():
            with contestant.context():
                # Norms that were remembered are forgotten by entering: each step computes them once, as in training.
                start = time.perf_counter()
                contestant.step(drawn)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def pruned_model(shape: Shape, *, four_bit: bool) -> PreTrainedModel:
    """One layer whose experts keep half of their channels or all."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=shape.experts, num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.width,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(DTYPE)
    widths = [shape.width // 2 if expert % 2 else shape.width for expert in range(shape.experts)]
    prune(model, Plan((tuple(torch.arange(width) for width in widths),), shape.width))
    if four_bit:
        run_through(NF4Quantizer()(model, None, 1))
    return model.to(DEVICE)


def ours(base: PreTrainedModel, *, use_dora: bool) -> Contestant:
    model = copy.deepcopy(base)
    adapters = Adapters(
        rank=RANK, alpha=ALPHA, dropout=DROPOUT, use_dora=use_dora, learning_rate=1e-4,
        router_rank=0, router_alpha=1, router_learning_rate=0,
    )  # fmt: skip
    adapters.attach(model, seed=0)
    return contestant(model, remembered_norms)


def pefts_dora(base: PreTrainedModel) -> Contestant:
    model = copy.deepcopy(base)
    (layer,) = moe_layers(model)
    model.config.model_type = "pruned"  # else PEFT looks for the family's fused experts
    model.is_loaded_in_4bit = True
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, use_dora=True,
        target_modules=rf"{layer.name}\.\d+\.(?:gate|up|down)_proj",
    )  # fmt: skip
    LoraModel(model, config, "default")
    return contestant(model)


def all_weights(base: PreTrainedModel) -> Contestant:
    model = copy.deepcopy(base)
    AllWeights(learning_rate=1e-5).attach(model, seed=0)
    return contestant(model)


def contestant(model: PreTrainedModel, context: Callable[[], AbstractContextManager[None]] = nullcontext) -> Contestant:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contestant(model.train(), torch.optim.AdamW(trained, lr=1e-6, fused=True), context)


if __name__ == "__main__":
    main()
