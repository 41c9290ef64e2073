"""Seconds and bytes of each quantizer on one decoder layer of Qwen3-30B-A3B's shape, a quarter of its channels removed.

Widths differ from expert to expert, as coverage leaves them. Weights and tokens are random: what they compute says
nothing. Each quantizer gets the same layer and, where it asks for them, the same calibration tokens; seconds include
the forward passes that it makes. On a GPU it uses bfloat16 there; on a CPU, bfloat16 weights as checkpoints have them.

    python benchmarks/quantizers.py           # 128 experts: about 8 GB of memory, and minutes
    python benchmarks/quantizers.py --experts 32   # a quarter of the layer's experts, and of the calibration tokens
    python benchmarks/quantizers.py --quick   # 8 experts of a quarter of the sizes
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.layers.walk import run_through
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.hqq import HQQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
VOCABULARY = 1024
LAYERS = 48  # of the whole model
RUN_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    experts: int
    width: int
    calibration_tokens: int

    @property
    def widths(self) -> list[int]:
        """1/2, 2/3, 5/6 and all of the channels in turn: three quarters in all."""
        return [self.width * share // 6 for share in (3, 4, 5, 6)] * (self.experts // 4)

    def with_experts(self, experts: int) -> "Shape":
        """So many of the experts, each with as many tokens as before."""
        name = self.name if experts == self.experts else f"{self.name}; here {experts} of them"
        return replace(
            self, name=name, experts=experts, calibration_tokens=self.calibration_tokens * experts // self.experts
        )

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(  # type: ignore[call-arg]
            vocab_size=VOCABULARY, hidden_size=self.hidden, num_hidden_layers=1, num_attention_heads=self.hidden // 64,
            num_key_value_heads=4, head_dim=128, num_experts=self.experts, num_experts_per_tok=8,
            moe_intermediate_size=self.width, norm_topk_prob=True, max_position_embeddings=4096,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip


QUICK = Shape("hidden 512, 8 experts of up to 192 channels", 512, 8, 192, 2048)
PUBLISHED = Shape("Qwen3-30B-A3B: hidden 2048, 128 experts of up to 768 channels", 2048, 128, 768, 32768)
QUANTIZERS = (
    Int8Quantizer(),
    NearestQuantizer("rtn8", bits=8),
    NF4Quantizer(),
    NF4Quantizer("nf4_double", double_quantization=True),
    *(kind(f"{name}{bits}", bits=bits) for bits in (4, 3, 2) for name, kind in
      (("rtn", NearestQuantizer), ("hqq", HQQQuantizer), ("gptq", GPTQQuantizer))),
)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small layer")
    parser.add_argument("--experts", type=int, default=PUBLISHED.experts, help="a multiple of 4")
    asked = parser.parse_args()
    shape = QUICK if asked.quick else PUBLISHED.with_experts(asked.experts)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, bfloat16, torch {torch.__version__}")
    torch.manual_seed(0)
    pruned = pruned_model(shape)
    calibration, batch_size = windows_of(shape.calibration_tokens, 256), 8
    weights = sum(linear.weight.numel() for linear in QuantizedParts().names(pruned).values())
    print(f"\n### One layer ({shape.name})\n")
    print(
        f"{weights / 1e6:.1f} million weights in experts and attention; {shape.calibration_tokens} calibration tokens."
    )
    print(f"The run is of {RUN_TOKENS} tokens.\n")
    row("quantizer", "seconds", f"minutes for {LAYERS} layers", "MB", "bits a weight", "run")
    row(*["---"] * 6)
    dense_bytes, dense_run = layer_bytes(pruned), run_seconds(pruned)
    row("16 bits", "", "", f"{dense_bytes / 1e6:.1f}", f"{8 * dense_bytes / weights:.2f}", f"{1e3 * dense_run:.0f} ms")
    for quantizer in QUANTIZERS:
        model: Any = copy.deepcopy(pruned)
        seconds = quantizing_seconds(model, quantizer, calibration, batch_size)
        size, run = layer_bytes(model), run_seconds(model)
        row(
            quantizer.name, f"{seconds:.2f}", f"{seconds * LAYERS / 60:.1f}", f"{size / 1e6:.1f}",
            f"{8 * size / weights:.2f}", f"{run / dense_run:.2f}x",
        )  # fmt: skip


def pruned_model(shape: Shape) -> PreTrainedModel:
    model = Qwen3MoeForCausalLM(shape.config()).to(DTYPE).eval()
    assert {layer.expert_count for layer in moe_layers(model)} == {shape.experts}
    kept = tuple(torch.arange(width) for width in shape.widths)
    return prune(model, Plan((kept,), shape.width)).to(DEVICE)  # type: ignore[arg-type]


def windows_of(tokens: int, length: int) -> TokenWindows:
    input_ids_NT = torch.randint(1, VOCABULARY, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))


def quantizing_seconds(model: PreTrainedModel, quantizer: Any, windows: TokenWindows, batch_size: int) -> float:
    synchronise()
    start = time.perf_counter()
    run_through(quantizer(model, windows if quantizer.needs_calibration else None, batch_size))
    synchronise()
    return time.perf_counter() - start


def run_seconds(model: PreTrainedModel) -> float:
    """The fastest of three runs, after one to warm up."""
    input_ids_1T = windows_of(RUN_TOKENS, RUN_TOKENS).input_ids_NT.to(DEVICE)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model(input_ids_1T, logits_to_keep=1)
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def layer_bytes(model: nn.Module) -> int:
    """What is stored of the decoder layer, scales included; norms and the router too."""
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if ".layers." in name)


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def row(*cells: Sequence[str] | str) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
