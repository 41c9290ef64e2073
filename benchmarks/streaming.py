"""Memory and time of compressing a checkpoint layer by layer, at the layer shape of Qwen3-30B-A3B.

python benchmarks/streaming.py --layers 6 12 24 --folder /path/with/space

For each number of layers a checkpoint of random weights is written (about 1.2 GB a layer, bfloat16), then each step
runs in a process of its own: the statistics of the calibration tokens, and pruning 50% with NF4 after it. Printed are
the highest resident memory of the process, which should not grow with the layers, and seconds per layer beside what
must be spent at least: reading the layer's file, and one forward pass of the layer over the same tokens.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.embedded.tokenizer import train_tokenizer
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import CheckpointWriter
from moeprune.models.layers.streaming import stream_compressed, stream_dense
from moeprune.models.layers.walk import run_through, walk_layers
from moeprune.models.layers.workspace import Workspace
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import cut_layers
from moeprune.types import Plan

HIDDEN, EXPERTS, WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 2048, 128, 768, 32, 4, 128
VOCAB_SIZE = 4096
DTYPE = torch.bfloat16
DEVICES = (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
STEPS = ("statistics", "compress")
GIB = 2**30


def main() -> None:
    settings = _parser().parse_args()
    windows = windows_of(settings.windows, settings.length)
    if settings.step is not None:
        run_step(settings.step, settings.folder, windows, settings.batch_size)
        return
    make_shards(settings.folder / "shards", max(settings.layers))
    activations = 2 * windows.input_ids_NT.numel() * HIDDEN / GIB
    print(f"{windows.input_ids_NT.numel()} tokens: hidden states of {activations:.2f} GiB")
    print("| layers | step | s a layer | read + forward s | ratio | peak GiB | weights of a layer GiB |")
    print("|---|---|---|---|---|---|---|")
    for layers in settings.layers:
        folder = settings.folder / str(layers)
        make_checkpoint(folder, settings.folder / "shards", layers)
        least = _in_own_process("least", folder)
        for step in STEPS:
            cost = _in_own_process(step, folder)
            each, lower = cost["seconds"] / layers, least["read"] + least["forward"]
            print(
                f"| {layers} | {step} | {each:.1f} | {least['read']:.1f} + {least['forward']:.1f} | {each / lower:.2f} "
                f"| {cost['peak'] / GIB:.2f} | {least['bytes'] / GIB:.2f} |",
                flush=True,
            )
        shutil.rmtree(folder)
    if not settings.keep:
        shutil.rmtree(settings.folder / "shards")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Memory and time of compressing layer by layer.")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--folder", type=Path, required=True, help="2.5 GB of space for each of the most layers")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next time")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--step", choices=(*STEPS, "least"), help=argparse.SUPPRESS)
    return parser


def _in_own_process(step: str, folder: Path) -> dict[str, float]:
    """What the step printed at its end, run with the same settings on a checkpoint."""
    arguments = [*sys.argv[1:], "--step", step, "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, folder: Path, windows: TokenWindows, batch_size: int) -> None:
    work = {"statistics": statistics, "compress": compress, "least": least}[step]
    started = time.perf_counter()
    found = work(folder, windows, batch_size) or {}
    cost = {"seconds": time.perf_counter() - started, "peak": peak_bytes()}
    print(json.dumps(cost | found))


def peak_bytes() -> int:
    """The highest resident memory of this process; unlike getrusage's, never that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make_shards(folder: Path, layers: int) -> None:
    """Random weights, one file per layer; files that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(-1, layers):
        file = folder / _shard(layer)
        if not file.exists():
            save_file(dict(_outside() if layer < 0 else _layer_weights(layer)), file, {"format": "pt"})


def _shard(layer: int) -> str:
    return f"layer-{layer}.safetensors" if layer >= 0 else "outside.safetensors"


def make_checkpoint(folder: Path, shards: Path, layers: int) -> None:
    """A checkpoint of the first layers: links to their files, config, index and tokenizer."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, num_experts=EXPERTS, num_experts_per_tok=8,
        moe_intermediate_size=WIDTH, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    train_tokenizer([], 257).save_pretrained(folder)
    index: dict[str, str] = {}
    for name in map(_shard, range(-1, layers)):
        (folder / name).symlink_to((shards / name).resolve())
        with safe_open(shards / name, framework="pt") as stored:
            index |= dict.fromkeys(stored.keys(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE) * 0.02


def _outside() -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", _random(VOCAB_SIZE, HIDDEN)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=DTYPE)
    yield "lm_head.weight", _random(VOCAB_SIZE, HIDDEN)


def _layer_weights(layer: int) -> Iterator[tuple[str, Tensor]]:
    at = f"model.layers.{layer}"
    for part, out, into in (
        ("q_proj", HEADS * HEAD_DIM, HIDDEN),
        ("k_proj", KEY_HEADS * HEAD_DIM, HIDDEN),
        ("v_proj", KEY_HEADS * HEAD_DIM, HIDDEN),
        ("o_proj", HIDDEN, HEADS * HEAD_DIM),
    ):
        yield f"{at}.self_attn.{part}.weight", _random(out, into)
    for norm, size in (
        ("self_attn.q_norm", HEAD_DIM),
        ("self_attn.k_norm", HEAD_DIM),
        ("input_layernorm", HIDDEN),
        ("post_attention_layernorm", HIDDEN),
    ):
        yield f"{at}.{norm}.weight", torch.ones(size, dtype=DTYPE)
    yield f"{at}.mlp.gate.weight", _random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        yield f"{at}.mlp.experts.{expert}.gate_proj.weight", _random(WIDTH, HIDDEN)
        yield f"{at}.mlp.experts.{expert}.up_proj.weight", _random(WIDTH, HIDDEN)
        yield f"{at}.mlp.experts.{expert}.down_proj.weight", _random(HIDDEN, WIDTH)


def windows_of(count: int, length: int) -> TokenWindows:
    input_ids_NT = torch.randint(1, VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(0))
    return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))


def statistics(folder: Path, windows: TokenWindows, batch_size: int) -> None:
    model = stream_dense(folder, DTYPE, DEVICES)
    collect_statistics(model, windows, batch_size, Workspace(folder / "walk", activations_gib=1.0))


def compress(folder: Path, windows: TokenWindows, batch_size: int) -> None:
    """Half of the channels of every expert go, then what is left is quantised: two passes over the layers."""
    model = stream_dense(folder, DTYPE, DEVICES)
    tokenizer = train_tokenizer([], 257)
    kept = tuple(tuple(torch.arange(WIDTH // 2) for _ in range(EXPERTS)) for _ in moe_layers(model.model))
    for step in ("pruned", "quantised"):
        target = folder / step
        target.mkdir()
        writer = CheckpointWriter(target, DTYPE)
        workspace = Workspace(folder / f"walk-{step}", activations_gib=1.0)
        if step == "pruned":
            layers = cut_layers(model, Plan(kept, WIDTH), workspace=workspace)
        else:
            layers = NF4Quantizer()(model, None, 1, workspace)
        for depth, name, layer in layers:
            writer.add_layer(depth, name, layer)
        writer.finish(model.model, tokenizer)
        model = stream_compressed(target, DTYPE, DEVICES)


def least(folder: Path, windows: TokenWindows, batch_size: int) -> dict[str, float]:
    """Nothing but the first layer: reads its file from the disk, then runs it over all tokens."""
    file = folder / "layer-0.safetensors"
    buffer = bytearray(64 * 2**20)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while stream.readinto(buffer):
            pass
        read = time.perf_counter() - started
    model = stream_dense(folder, DTYPE, DEVICES)
    walk = walk_layers(model, windows.batches(batch_size), "forward")
    visit = next(walk)
    started = time.perf_counter()
    run_through(visit.outputs)
    return {"read": read, "forward": time.perf_counter() - started, "bytes": file.stat().st_size}


if __name__ == "__main__":
    main()
