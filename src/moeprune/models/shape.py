"""Where a checkpoint lies and how its experts are shaped; needs no torch, so a wrong request is refused at once."""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path

from moeprune.errors import InputError, ModelError

EMBEDDED = "embedded:"
_EXPERT_DOWN = re.compile(r"(?P<layer>.*\.layers\.\d+\..*experts)\.(?P<expert>\d+)\.(?:down_proj|w2)\.weight$")
_ROUTED = re.compile(
    r".*\.layers\.\d+\..*\bexperts\.(?:\d+\.(?:gate_proj|up_proj|down_proj|w[123])\.\w+|(?:gate_up_proj|down_proj)\w*)$"
)
_FUSED_DOWN = re.compile(r"(?P<layer>.*\.layers\.\d+\..*experts)\.down_proj$")
# The groups that transformers' config class of these DeepSeek families takes where config.json names none.
_UNSAID_GROUPS = {"deepseek_v3": 8, "deepseek_v32": 8}
_IN_LAYER = re.compile(r"(?P<stack>.*)\.layers\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class ExpertShape:
    """MoE layers, routed experts per layer, channels per expert, and experts per token.

    ``routes_by_group``: routers first choose among groups of neighbouring experts, so they cannot lose rows.
    """

    layers: int
    experts: int
    width: int
    top_k: int
    routes_by_group: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a checkpoint, and those of its routed experts."""

    total_parameters: int
    routed_parameters: int


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(entry.name for entry in _embedded_root().iterdir() if (entry / "config.json").exists())


def _embedded_root() -> Path:
    return Path(str(files("moeprune.resources"))) / "models"


def local_folder(path: str) -> Path | None:
    """The folder of ``embedded:NAME`` or of a local path; None for what must be a hub name.

    Raises InputError for an embedded name or a path that does not exist.
    """
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        if name not in embedded_models():
            raise InputError(f"Embedded model {name!r} does not exist.", possible=embedded_models(), given=name)
        return _embedded_root() / name
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(
            f"Model path {path!r} is not a folder.",
            change="Give model.path the folder of a checkpoint (config.json, *.safetensors), a hub name such as "
            "Qwen/Qwen1.5-MoE-A2.7B, or choose model=tiny_qwen3_moe.",
        )
    return None


def read_shape(folder: Path) -> ExpertShape:
    """The experts' shape from the safetensors headers and the config's experts per token and groups of experts.

    Raises ModelError when the checkpoint is incomplete, damaged, or has no routed experts of one shape.
    """
    config = _read_json(folder / "config.json")
    experts_of: dict[str, int] = {}
    widths: set[int] = set()
    for name, shape in _loaded_tensors(folder, config):
        if match := _EXPERT_DOWN.match(name):
            layer = match["layer"]
            experts_of[layer] = max(experts_of.get(layer, 0), int(match["expert"]) + 1)
            widths.add(shape[1])
        elif match := _FUSED_DOWN.match(name):
            experts_of[match["layer"]] = shape[0]
            widths.add(shape[2])
    top_k = config.get("num_experts_per_tok")
    if len(set(experts_of.values())) != 1 or len(widths) != 1 or not isinstance(top_k, int):
        raise ModelError(
            f"{folder} ({config.get('model_type', 'unknown type')}) is no MoE checkpoint that can be pruned.\n"
            "Looked for: tensors '...layers.N...experts.M.down_proj.weight' (or fused '...experts.down_proj'), all of "
            f"one width, and num_experts_per_tok in config.json. Found: {len(experts_of)} layers with experts, widths "
            f"{sorted(widths)}, num_experts_per_tok {top_k}.\nUse a Qwen-MoE or DeepSeek checkpoint that is not pruned."
        )
    experts = next(iter(experts_of.values()))
    return ExpertShape(len(experts_of), experts, widths.pop(), top_k, _routes_by_group(config))


def _routes_by_group(config: dict) -> bool:
    """What `MoeLayer.routes_by_group` will say of the loaded model."""
    family = str(config.get("model_type"))
    if family == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        return False  # this family alone listens to topk_method
    groups = config.get("n_group", _UNSAID_GROUPS.get(family))
    return isinstance(groups, int) and groups > 1


def read_sizes(folder: Path) -> ModelSizes:
    """Parameter counts from the safetensors headers; tied weights, stored once, count once.

    Raises ModelError when the checkpoint is incomplete or damaged.
    """
    total = routed = 0
    for name, shape in _loaded_tensors(folder, _read_json(folder / "config.json")):
        total += prod(shape)
        routed += prod(shape) if _ROUTED.match(name) else 0
    return ModelSizes(total, routed)


def _loaded_tensors(folder: Path, config: dict) -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of the tensors that belong to the model.

    Layers for predicting further tokens, which transformers does not load, lie behind the last layer (DeepSeek-V3) or
    in a stack named ``mtp`` (Qwen3-Next).
    """
    layers = config.get("num_hidden_layers", math.inf)
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            match = _IN_LAYER.match(name)
            if match is None or (match["stack"] != "mtp" and int(match["index"]) < layers):
                yield name, entry["shape"]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelError when there are none or some of the index are missing."""
    index = folder / "model.safetensors.index.json"
    names = set(_read_json(index).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    if not names:
        raise ModelError(f"{index} is damaged: it names no weights.")
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing[:3])}.\n"
            "Only safetensors checkpoints are read; download the missing files."
        )
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file.

    Raises ModelError when the file is truncated or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes were expected, {file.stat().st_size} are there")
    except (ValueError, struct.error, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}.\nCopy or download it again.") from error
    return header


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise ModelError(f"{file.parent} is no checkpoint: it has no {file.name}.") from None
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    return values
