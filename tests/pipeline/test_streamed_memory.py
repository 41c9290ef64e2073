"""A checkpoint that is larger than the memory it may take is compressed within it.

Measured is the most anonymous memory that was seen, every few milliseconds: the kernel's own mark of the resident peak
also counts mapped files, and lacks what was reclaimed of them meanwhile.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

LAYERS = 8
MIB = 2**20
# For activations, what is outside the layers, and what libraries set up when they are first used.
ALLOWANCE = 60 * MIB

PROGRAM = """
import json, sys, threading, time, torch
from pathlib import Path
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import TextFiles
from moeprune.evaluation.evaluate import Evaluation
from moeprune.models.source import ModelSource
from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.experiment import Experiment
from moeprune.pipeline.run import run
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.surgery.refit import Refit

torch.set_num_threads(1)
folder, cache, text, streaming = sys.argv[1:]

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.003)

texts = TextFiles({"text": text})
limits = {"streaming": streaming, "activations_gib": 0.0}
source = ModelSource("large", folder, "float32", "float32", alignment=64, minimum_width=64, device="cpu", **limits)
experiment = Experiment(
    model=source,
    calibration=Calibration(texts, windows=4, sequence_length=32, batch_size=2, seed=0),
    scorer=AttributionScorer(),
    allocator=CoverageAllocator(),
    ratio=0.5,
    evaluation=Evaluation(texts, windows=2, sequence_length=32, batch_size=2),
    surgery=Refit(),
    quantizer=NF4Quantizer(),
)
before, seen = anonymous(), []  # without what the imports took
threading.Thread(target=watch, daemon=True).start()
result = run(experiment, StageCache(Path(cache)))
loaded = [name for name in ("lightning", "lm_eval", "datasets", "matplotlib") if name in sys.modules]
peak, perplexity = max(seen) - before, result.variants["pruned+nf4"]["mean_perplexity"]
print(json.dumps({"peak": peak, "perplexity": perplexity, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, byte_tokenizer):
    """A folder with 8 layers of 24 MiB each."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        vocab_size=257, hidden_size=256, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="50MB")
    byte_tokenizer.save_pretrained(folder)
    return folder


def compressed(large, tmp_path, streaming: str) -> dict:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n} and {n * n}" for n in range(300)))
    command = [sys.executable, "-c", PROGRAM, str(large), str(tmp_path / streaming), str(text), streaming]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its memory")
def test_a_checkpoint_larger_than_the_memory_allowed_is_compressed_within_it(large, tmp_path):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    streamed, in_memory = (compressed(large, tmp_path, streaming) for streaming in ("always", "never"))
    allowed = 3 * size / LAYERS + ALLOWANCE
    assert allowed < min(size, in_memory["peak"])
    assert streamed["peak"] < min(allowed, in_memory["peak"] / 2)
    assert streamed["perplexity"] == in_memory["perplexity"]
    # It neither trains nor asks tasks.
    assert streamed["loaded"] == in_memory["loaded"] == []
