"""Speed and memory of pruned models against the dense one: prefill and decode, a layer's experts and a small model.

The dense side is transformers' own code, in whichever of its implementations is fastest in that row. Channels are
removed unevenly, as coverage does. Both sides run in turns. On a GPU it uses bfloat16; it has not been run on one.

    python benchmarks/inference.py           # Qwen3-30B-A3B's layer too: about 8 GB of memory, and minutes
    python benchmarks/inference.py --quick   # small shapes, few rounds
"""

import argparse
import copy
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.runtime import kernels
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
RATIOS = (0.25, 0.5, 0.75)
BLOCK = 16  # channels; widths are multiples of it
CONTEXT = 128  # tokens in the cache where decoding begins
Work = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    experts: int
    width: int
    top_k: int
    layers: int = 4

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=1024, hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, num_experts=self.experts, num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.width, max_position_embeddings=8192,
        )  # fmt: skip


SMALL = Shape("hidden 512, 32 experts of width 704, top-4", 512, 32, 704, 4)
PUBLISHED = Shape("Qwen3-30B-A3B: hidden 2048, 128 experts of width 768, top-8", 2048, 128, 768, 8)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    quick = parser.parse_args().quick
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {str(DTYPE).removeprefix('torch.')}, torch {torch.__version__}")
    torch.manual_seed(0)
    random.seed(0)
    for shape in (SMALL,) if quick else (SMALL, PUBLISHED):
        layer_table(shape, rounds=9 if quick else 25)
    model_table(SMALL, rounds=5 if quick else 15)
    for shape in (SMALL,) if quick else (SMALL, PUBLISHED):
        kernel_table(shape, rounds=9 if quick else 25)


def layer_table(shape: Shape, rounds: int) -> None:
    """The routed experts alone: times the speed of the dense ones."""
    dense = _dense_layer(shape)
    pruned = {f"{ratio:.0%}": _prune(dense, ratio) for ratio in RATIOS}
    pruned["50% + NF4"] = _four_bit(_prune(dense, 0.5))
    _head(f"Experts of one layer ({shape.name})", "tokens", ["dense ms", "by", *pruned])
    _memory_row(dense, pruned)
    ratios = {}
    for tokens in (1, 4, 16, 512, 2048):
        batches = [_routed(shape, tokens, seed) for seed in range(8 if tokens < 512 else 1)]
        works = {name: _in_turn(layer, batches) for name, layer in pruned.items()}
        works |= _implementations(dense, tokens, _in_turn(dense, batches))
        seconds = _alternate(works, rounds if tokens < 512 else max(3, rounds // 4), cold=True)
        dense_s, name, ratios[f"{tokens} tokens"] = _compare(seconds, list(pruned))
        _row(tokens, [f"{1e3 * dense_s:.2f}", name, *_times(ratios[f"{tokens} tokens"])])
    _say_slower(ratios)


def model_table(shape: Shape, rounds: int) -> None:
    """Tokens a second of a random model, attention, router and head included."""
    dense = Qwen3MoeForCausalLM(shape.config()).to(DEVICE, DTYPE).eval()
    pruned = {f"{ratio:.0%}": _pruned_model(dense, ratio) for ratio in RATIOS}
    pruned["50% + NF4"] = _pruned_model(dense, 0.5, four_bit=True)
    _head(f"A model of {shape.layers} layers ({shape.name})", "work", ["dense tokens/s", "by", *pruned])
    _memory_row(dense, pruned)
    ratios = {}
    for phase, batch, tokens in (
        ("prefill", 1, 512), ("prefill", 1, 2048), ("decode", 1, 1), ("decode", 4, 1), ("decode", 16, 1),
    ):  # fmt: skip
        begin = _prefill if phase == "prefill" else _decode
        works = {name: begin(model, batch, tokens) for name, model in pruned.items()}
        works |= _implementations(dense, batch * tokens, begin(dense, batch, tokens))
        seconds = _alternate(works, rounds if phase == "decode" else max(3, rounds // 3))
        label = f"{phase} of {tokens}" if phase == "prefill" else f"decode, batch {batch}"
        dense_s, name, ratios[label] = _compare(seconds, list(pruned))
        _row(label, [f"{batch * tokens / dense_s:.0f}", name, *_times(ratios[label])])
    _say_slower(ratios)


def kernel_table(shape: Shape, rounds: int) -> None:
    """Every kernel on the same experts, half the channels removed: what `choose_kernel` rests on."""
    ragged = _prune(_dense_layer(shape), 0.5)
    names = ["one_token", "by_width"]
    _head(f"Kernels, times the speed of loop ({shape.name})", "tokens", ["loop ms", *names, "chosen"])
    for tokens in (1, 4, 16, 128, 512, 2048, 4096):
        batches = [_batch(ragged, shape, tokens, seed) for seed in range(8 if tokens < 128 else 1)]
        tried = [name for name in names if tokens == 1 or name != "one_token"]
        works = {name: _in_turn(getattr(kernels, name), [(batch,) for batch in batches]) for name in ("loop", *tried)}
        seconds = _alternate(works, rounds if tokens < 128 else max(3, rounds // 4), cold=True)
        base = seconds["loop"]
        ratios = [f"{base / seconds[name]:.2f}" if name in seconds else "" for name in names]
        _row(tokens, [f"{1e3 * base:.2f}", *ratios, kernels.choose_kernel(batches[0]).__name__])


def _implementations(dense: nn.Module, tokens: int, work: Work) -> dict[str, Work]:
    """The work of the dense side in transformers' own ways; batched_mm copies each chosen expert: far behind on CPU."""

    def using(name: str) -> Work:
        def switch_and_work() -> None:
            dense.config._experts_implementation = name
            work()

        return switch_and_work

    names = ["eager", "grouped_mm", *(["batched_mm"] if DEVICE == "cuda" and tokens <= 16 else [])]
    return {name: using(name) for name in names}


def _dense_layer(shape: Shape) -> Qwen3MoeExperts:
    with torch.device(DEVICE):
        experts = Qwen3MoeExperts(shape.config()).to(DTYPE).eval()
    for parameter in experts.parameters():
        parameter.normal_(std=0.02)
    return experts


def _widths(experts: int, width: int, ratio: float) -> list[int]:
    """Spread around the mean, in blocks; together they remove ``ratio`` of the channels."""
    mean = round((1 - ratio) * width / BLOCK)
    spread = min(mean - 1, width // BLOCK - mean)
    offsets = [half % (spread + 1) for half in range(experts // 2)]
    return [BLOCK * (mean + sign * offset) for offset in offsets for sign in (1, -1)]


def _prune(dense: Qwen3MoeExperts, ratio: float) -> RaggedExperts:
    """The first channels of each expert: which ones makes no difference to the speed."""
    count, hidden, width = dense.down_proj.shape
    experts = []
    for index, kept in enumerate(_widths(count, width, ratio)):
        expert = Expert(kept, hidden, device=DEVICE, dtype=DTYPE)
        expert.gate_proj.weight.copy_(dense.gate_up_proj[index, :kept])
        expert.up_proj.weight.copy_(dense.gate_up_proj[index, width : width + kept])
        expert.down_proj.weight.copy_(dense.down_proj[index, :, :kept])
        experts.append(expert)
    return RaggedExperts(experts, gated_activation(dense)).eval()


def _four_bit(ragged: RaggedExperts) -> RaggedExperts:
    for expert in ragged:
        for name, linear in list(expert.named_children()):
            setattr(expert, name, four_bit_linear(linear.weight, None, block_size=64, nested=True))
    return ragged


def _pruned_model(dense: Qwen3MoeForCausalLM, ratio: float, four_bit: bool = False) -> Qwen3MoeForCausalLM:
    """A copy of the dense model, but for the experts."""
    instead = {}
    for layer in dense.model.layers:
        ragged = _prune(layer.mlp.experts, ratio)
        instead[id(layer.mlp.experts)] = _four_bit(ragged) if four_bit else ragged
    return copy.deepcopy(dense, instead)


def _routed(shape: Shape, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, shape.hidden, generator=generator)
    experts_TK = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
    gates_TK = torch.full((tokens, shape.top_k), 1 / shape.top_k, dtype=DTYPE, device=DEVICE)
    return hidden_TH.to(DEVICE, DTYPE), experts_TK.to(DEVICE), gates_TK


def _batch(ragged: RaggedExperts, shape: Shape, tokens: int, seed: int) -> kernels.Batch:
    return kernels.Batch(ragged.experts, ragged.activation, *_routed(shape, tokens, seed))


def _in_turn(module: nn.Module, batches: Sequence[tuple]) -> Work:
    """Each call takes the next batch."""
    coming = itertools.cycle(batches)

    def work() -> None:
        module(*next(coming))

    return work


def _prefill(model: Qwen3MoeForCausalLM, batch: int, tokens: int) -> Work:
    input_ids_BT = torch.randint(1024, (batch, tokens), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)

    def work() -> None:
        model(input_ids_BT, logits_to_keep=1)

    return work


def _decode(model: Qwen3MoeForCausalLM, batch: int, tokens: int) -> Work:
    """Each call goes on by one token a window, after a context of CONTEXT tokens."""
    generator = torch.Generator().manual_seed(batch)
    cache = model(torch.randint(1024, (batch, CONTEXT), generator=generator).to(DEVICE)).past_key_values

    def work() -> None:
        next_B1 = torch.randint(1024, (batch, tokens), generator=generator).to(DEVICE)
        model(next_B1, past_key_values=cache)

    return work


def _alternate(works: dict[str, Work], rounds: int, cold: bool = False) -> dict[str, float]:
    """Median seconds of each piece of work, in turns of random order.

    ``cold`` reads as much memory before each as pushes weights out of the cache: in a model, other layers would.
    """
    others = torch.ones(2**26 if cold else 0, device=DEVICE)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in random.sample(list(works), len(works)):
            others.sum()
            _synchronise()
            start = time.perf_counter()
            works[name]()
            _synchronise()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _gib(module: nn.Module) -> float:
    """All that is stored: weights, and scales of quantised ones."""
    return sum(tensor.nbytes for tensor in module.state_dict().values()) / 2**30


def _compare(seconds: dict[str, float], pruned: Sequence[str]) -> tuple[float, str, dict[str, float]]:
    """Seconds of the fastest dense implementation, which it is, and how many times as fast each pruned one is."""
    name = min(seconds.keys() - set(pruned), key=seconds.__getitem__)
    return seconds[name], name, {other: seconds[name] / seconds[other] for other in pruned}


def _head(title: str, first: str, columns: Sequence[str]) -> None:
    print(f"\n### {title}\n\n| {first} | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|", flush=True)


def _row(label: object, cells: Sequence[str]) -> None:
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def _memory_row(dense: nn.Module, pruned: Mapping[str, nn.Module]) -> None:
    """The dense weights in GiB, and the pruned ones as a share of them."""
    shares = [f"{_gib(module) / _gib(dense):.0%}" for module in pruned.values()]
    _row("weights", [f"{_gib(dense):.2f} GiB", "", *shares])


def _times(ratios: dict[str, float]) -> list[str]:
    return [f"{ratio:.2f}x" for ratio in ratios.values()]


def _say_slower(ratios: dict[str, dict[str, float]]) -> None:
    slower = [
        f"{name} at {label} ({ratio:.2f}x)" for label, row in ratios.items() for name, ratio in row.items() if ratio < 1
    ]
    print(f"\nSlower than the dense ones: {', '.join(slower) if slower else 'none'}.", flush=True)


if __name__ == "__main__":
    main()
