"""Compressed checkpoints load with transformers alone, in a process that cannot import this package."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from families import FAMILIES, build_family
from quantising import quantised
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.files import INDEX
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.runtime.grouped import GroupedWeight
from moeprune.models.runtime.version import check_transformers
from moeprune.models.shape import embedded_models, local_folder
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.hqq import HQQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

pytestmark = pytest.mark.xdist_group("stranger")  # one process makes all cases, half a minute's work

TINY_MODELS = ("qwen3_renormalised", "qwen3_plain_gates", "deepseek_v2")
IDS = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(1))

STRANGER = """
import json, sys
sys.modules["moeprune"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
QUANTISED = ("Linear4bit", "Linear8bitLt", "GroupedLinear", "GroupedEmbedding")
said = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    for parameter in model.parameters():
        # Mapped files begin anywhere in memory, and the last bit of a product depends on where its factors begin.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        outputs = {"logits": model(ids).logits, "generated": model.generate(ids, max_new_tokens=5, do_sample=False)}
    save_file(outputs, folder + "/outputs.safetensors")
    in_groups = {name: tensor for name, tensor in model.named_buffers() if name.endswith(("codes", "scales", "zeros"))}
    rounded = []
    for dtype in (torch.bfloat16, torch.float16) if in_groups and "tiny" in folder else ():
        half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        loaded = dict(half.named_buffers())
        rounded += [name for name, tensor in in_groups.items() if not torch.equal(loaded[name], tensor)]
        rounded += [] if half(ids).logits.dtype == half.dtype else ["the logits"]
    said[folder] = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "rounded": rounded,
        "problems": [sorted(map(str, keys)) for keys in info.values() if keys],
        "quantised": sorted(name for name, part in model.named_modules() if type(part).__name__ in QUANTISED),
        "types": {name: str(tensor.dtype) for name, tensor in model.state_dict().items()},
    }
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Case:
    """A model as it was when it was written, and what the other process said of it."""

    model: PreTrainedModel
    folder: Path
    said: dict

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "outputs.safetensors")


def cut(model: PreTrainedModel) -> PreTrainedModel:
    """Widths that differ, and an expert removed with its router row where the router allows it."""
    to_contract(model)
    layers = moe_layers(model)
    width = layers[0].widths[0]
    kept = [[torch.arange(width - 2 * expert) for expert in range(layer.expert_count)] for layer in layers]
    if not layers[0].routes_by_group:
        kept[0][1] = torch.arange(0)
    return prune(model, Plan(tuple(map(tuple, kept)), width))


def half(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model as from_pretrained gives it in half precision: precisions as the family wants them."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


ALL_PARTS = QuantizedParts(embeddings=True, head=True)
QUANTIZERS = {
    "nf4": NF4Quantizer(),
    "nf4-double": NF4Quantizer(double_quantization=True),
    "int8": Int8Quantizer(),
    "nearest-3": NearestQuantizer("rtn3", bits=3, group_size=20),
    "gptq-2": GPTQQuantizer("gptq2", bits=2, fewest_tokens=8),
    "nf4-of-experts": NF4Quantizer(parts=QuantizedParts(attention=False, dense_mlp=False)),
    "nf4-everywhere": NF4Quantizer(parts=ALL_PARTS),
    "int8-everywhere": Int8Quantizer(parts=ALL_PARTS),
    "hqq-4-everywhere": HQQQuantizer("hqq4", bits=4, parts=ALL_PARTS),
}
FULL_PRECISION = ("deepseek_v3", "ernie4_5_moe", "gpt_oss", "llama4", "minimax")  # some weights or buffers in float32
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WITH_BIASES = ("deepseek", "ernie4_5_moe", "gpt_oss", "llama4")  # or otherwise special
ON_BOTH = ("nearest-3", "nf4-of-experts", "gptq-2", "nf4-everywhere", "hqq-4-everywhere")
# Where from, which, and how it is kept.
CASES = [
    *(f"tiny {name} {kind}" for name in TINY_MODELS for kind in ("float32", "nf4", "nf4-double")),
    *(f"tiny {name} {kind}" for name in ("qwen3_renormalised", "deepseek_v2") for kind in ON_BOTH),
    # Not DeepSeek-V2, whose attention has inputs of four dimensions; bitsandbytes' int8 fails on them.
    *(f"tiny qwen3_renormalised {kind}" for kind in ("int8", "int8-everywhere")),
    *(f"embedded {name} float32" for name in embedded_models()),
    *(f"family {name} float32" for name in FAMILIES),
    *(f"family {name} bfloat16" for name in FULL_PRECISION),
    "family gpt_oss float16",  # norms in float32, which they are not in bfloat16
    *(f"family {name} nf4" for name in WITH_BIASES),
    *(f"family {name} nearest-3" for name in ("gpt_oss", "llama4")),
    *(f"family {name} hqq-4-everywhere" for name in ("deepseek", "ernie4_5_moe", "phimoe")),
]


@pytest.fixture(scope="module")
def cases(build_model, byte_tokenizer, tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("checkpoints")

    def build(case: str) -> PreTrainedModel:
        origin, name, kind = case.split()
        if origin == "embedded":
            dense = AutoModelForCausalLM.from_pretrained(local_folder(f"embedded:{name}"), dtype=torch.float32)
        else:
            dense = build_model(name, torch.float32) if origin == "tiny" else build_family(name, torch.float32)
        if kind in HALVES:
            dense = half(dense, root / "dense" / name, HALVES[kind])
        return quantised(cut(dense), QUANTIZERS[kind]) if kind in QUANTIZERS else cut(dense)

    models = {case: build(case) for case in CASES}
    folders = {case: root / case.replace(" ", "-") for case in models}
    for case, model in models.items():
        folders[case].mkdir()
        save_compressed(model, byte_tokenizer, folders[case], model.dtype)
    arguments = [json.dumps(IDS.tolist()), *map(str, folders.values())]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout)
    return {case: Case(model, folders[case], said[str(folders[case])]) for case, model in models.items()}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_stranger_computes_the_same_bits(cases, case):
    case = cases[case]
    assert torch.equal(case.outputs["logits"], case.model(IDS).logits)
    assert torch.equal(case.outputs["generated"], case.model.generate(IDS, max_new_tokens=5, do_sample=False))
    assert case.said["problems"] == case.said["rounded"] == []
    assert case.said["class"] == f"Pruned{type(case.model).__name__}"
    assert case.said["dtype"] == str(case.model.dtype)
    assert case.said["types"] == {name: str(tensor.dtype) for name, tensor in case.model.state_dict().items()}


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[-1] in QUANTIZERS])
def test_a_stranger_has_the_same_matrices_quantised(cases, case):
    case = cases[case]
    kinds = Linear4bit | Linear8bitLt | GroupedWeight
    quantised = {name for name, part in case.model.named_modules() if isinstance(part, kinds)}
    assert set(case.said["quantised"]) == quantised
    for layer in moe_layers(case.model):
        assert {name for name in quantised if name.startswith(f"{layer.name}.")} == {
            f"{layer.name}.{expert}.{part}_proj"
            for expert in range(len(layer.stored_widths))
            for part in ("gate", "up", "down")
        }
    outside = {"model.embed_tokens"} if case.model.config.tie_word_embeddings else {"model.embed_tokens", "lm_head"}
    everywhere = case.folder.name.endswith("everywhere")
    assert {name for name in quantised if ".layers." not in name} == (outside if everywhere else set())


def test_the_tokenizer_comes_along(cases, byte_tokenizer):
    loaded = AutoTokenizer.from_pretrained(cases["tiny deepseek_v2 float32"].folder, trust_remote_code=True)
    assert loaded("two words").input_ids == byte_tokenizer("two words").input_ids


def test_the_checkpoint_is_sharded_and_its_code_stands_alone(cases):
    for case in cases.values():
        index = json.loads((case.folder / INDEX).read_text())
        assert len(set(index["weight_map"].values())) == case.model.config.num_hidden_layers + 1
        for file in case.folder.glob("*.py"):
            assert "moeprune" not in file.read_text(), file


@pytest.mark.parametrize("version", ["5.23.0", "5.24.1.dev0", "6.0", "5.23rc1"])
def test_newer_versions_of_transformers_are_taken(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.3", "5.22.9", "5.9.0"])
def test_older_versions_of_transformers_are_refused_with_what_to_do(version):
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or newer; .* pip install --upgrade"):
        check_transformers(version)
