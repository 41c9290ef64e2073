"""Where a checkpoint lies and how its experts are shaped; needs no torch, so a wrong request is refused at once."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from math import prod
from pathlib import Path

from moeprune.errors import InputError, ModelError
from moeprune.models.headers import read_header, read_json
from moeprune.models.planted import planted_folder, planted_names

EMBEDDED = "embedded:"
_LAYER = r"(?P<layer>.*\.layers\.\d+\.(?:.*\.)?"
# The down projection of one expert [H, C].
_EXPERT_DOWN = re.compile(_LAYER + r"experts)\.(?P<expert>\d+)\.(?:down_proj|w2)\.weight$")
# Those of all experts of a layer, [E, H, C] or [E, C, H]; the second name is GraniteMoE's.
_FUSED_DOWN = re.compile(_LAYER + r"(?:experts|block_sparse_moe))\.(?:down_proj|output_linear\.weight)$")
_FUSED_UP = re.compile(_LAYER + r"(?:experts|block_sparse_moe))\.(?:gate_up_proj|input_linear\.weight)$")
_ROUTED = re.compile(
    _LAYER + r"(?:experts\.(?:\d+\.(?:gate_proj|up_proj|down_proj|w[123])\.\w+|(?:gate_up_proj|down_proj)\w*)|"
    r"block_sparse_moe\.(?:input|output)_linear\.weight))$"
)
_QUANTISED = ("U8", "I8", "I16", "I32")
# What config.json calls the number of experts per token; the second name is ERNIE's.
_TOP_K = ("num_experts_per_tok", "moe_k")
# Families whose routers choose as many experts as they were made for, whatever the config says.
_FIXED_TOP_K = ("phimoe",)
# The groups that transformers' config class of these DeepSeek families takes where config.json names none.
_UNSAID_GROUPS = {"deepseek_v3": 8, "deepseek_v32": 8}
_IN_LAYER = re.compile(r".*\.layers\.(?P<index>\d+)\.")
# Parts that are not loaded with the language model: those that predict further tokens, and those that see.
_LEFT_OUT = re.compile(r"(?:.*\.)?(?:mtp|vision|visual|multi_modal)\w*\.")


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
    """The folder of ``embedded:NAME``, or of a local path; None for what must be a hub name.

    Those of `moeprune.models.planted` are made when they are first asked for.

    Raises InputError for an embedded name or a path that does not exist.
    """
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        if name in embedded_models():
            return _embedded_root() / name
        planted = {made: dense for dense in embedded_models() for made in planted_names(dense)}
        if name in planted:
            return planted_folder(_embedded_root() / planted[name], name)
        known = [*embedded_models(), *planted]
        raise InputError(f"Embedded model {name!r} does not exist.", possible=known, given=name)
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


def read_shape(folder: Path, experts_per_token: int | None = None) -> ExpertShape:
    """The experts' shape from the safetensors headers and the config's experts per token and groups of experts.

    ``experts_per_token``, where it is given, takes the place of the config's.

    Raises ModelError when the checkpoint is incomplete, damaged, quantised, or has no routed experts of one shape;
    InputError as `sent_to_experts` does.
    """
    config = _text_config(folder)
    experts_of: dict[str, int] = {}
    fused_up: dict[str, list[int]] = {}
    fused_down: dict[str, list[int]] = {}
    widths: set[int] = set()
    for name, entry in _loaded_tensors(folder, config):
        if _ROUTED.match(name) and entry["dtype"] in _QUANTISED:
            raise ModelError(f"The experts in {folder} are quantised ({name}).\nUse the checkpoint in bfloat16.")
        if match := _EXPERT_DOWN.match(name):
            experts_of[match["layer"]] = max(experts_of.get(match["layer"], 0), int(match["expert"]) + 1)
            widths.add(entry["shape"][1])
        elif match := _FUSED_DOWN.match(name):
            fused_down[match["layer"]] = entry["shape"]
        elif match := _FUSED_UP.match(name):
            fused_up[match["layer"]] = entry["shape"]
    for layer, shape in fused_down.items():
        experts_of[layer] = shape[0]
        widths.add(_fused_width(fused_up.get(layer), shape))
    top_k = _top_k(config)
    if len(set(experts_of.values())) != 1 or len(widths) != 1 or not isinstance(top_k, int):
        raise ModelError(
            f"{folder} ({config.get('model_type', 'unknown type')}) is no MoE checkpoint that can be pruned.\n"
            "Looked for: tensors '...layers.N...experts.M.down_proj.weight' (or '...w2.weight', or fused "
            f"'...experts.down_proj'), all of one width, and {' or '.join(_TOP_K)} in config.json.\n"
            f"Found: {len(experts_of)} layers with experts, widths {sorted(widths)}, experts per token {top_k}.\n"
            "Use a checkpoint of a family that docs/model.md lists, and one that is not pruned."
        )
    experts = next(iter(experts_of.values()))
    stored = ExpertShape(len(experts_of), experts, widths.pop(), top_k, _routes_by_group(config))
    return sent_to_experts(stored, experts_per_token, str(config.get("model_type")))


def sent_to_experts(shape: ExpertShape, experts_per_token: int | None, family: str) -> ExpertShape:
    """The shape of a model whose tokens are sent to so many experts; None: as many as before.

    Raises InputError for a number that its routers cannot choose.
    """
    if experts_per_token in (None, shape.top_k):
        return shape
    asked = f"model.experts_per_token={experts_per_token} is not possible: "
    if family in _FIXED_TOP_K:
        raise InputError(
            f"{asked}routers of the family {family} always choose {shape.top_k}.", change="Use null or another model."
        )
    # Where groups are chosen first, the experts of the others are out of reach.
    most = shape.top_k if shape.routes_by_group else shape.experts
    if not 1 <= experts_per_token <= most:
        raise InputError(
            f"{asked}a layer has {shape.experts} experts, and a token can be sent to 1 to {most} of them.",
            change=f"Use a number in that range, or null for the checkpoint's own {shape.top_k}.",
        )
    return replace(shape, top_k=experts_per_token)


def read_top_k(folder: Path) -> int | None:
    """How many experts a token is sent to by the checkpoint's config. Raises ModelError when that is damaged."""
    return _top_k(_text_config(folder))


def read_context(folder: Path) -> int | None:
    """How many tokens the model was made to see at once; None where the config does not say. Raises ModelError."""
    context = _text_config(folder).get("max_position_embeddings")
    return context if isinstance(context, int) else None


def _top_k(config: dict) -> int | None:
    return next((config[key] for key in _TOP_K if key in config), None)


def _fused_width(up: list[int] | None, down: list[int]) -> int:
    """C of a fused ``down`` [E, H, C], or, in GPT-OSS and Llama 4, [E, C, H] beside an ``up`` of [E, H, 2C]."""
    transposed = up is not None and up[2] == 2 * down[1]
    return down[1] if transposed else down[2]


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
    for name, entry in _loaded_tensors(folder, _text_config(folder)):
        total += prod(entry["shape"])
        routed += prod(entry["shape"]) if _ROUTED.match(name) else 0
    return ModelSizes(total, routed)


def _text_config(folder: Path) -> dict:
    """config.json, or the part of it that describes the language model, where the model has others beside it."""
    config = read_json(folder / "config.json")
    return config.get("text_config", config)


def _loaded_tensors(folder: Path, config: dict) -> Iterator[tuple[str, dict]]:
    """(name, entry of the header) of the tensors that belong to the language model.

    Layers for predicting further tokens, which transformers does not load, lie behind the last layer (DeepSeek-V3) or
    have names that begin with ``mtp`` (Qwen3-Next, ERNIE).
    """
    layers = config.get("num_hidden_layers", math.inf)
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            match = _IN_LAYER.match(name)
            if not _LEFT_OUT.match(name) and (match is None or int(match["index"]) < layers):
                yield name, entry


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelError when there are none or some of the index are missing."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    if not names:
        raise ModelError(f"{index} is damaged: it names no weights.")
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing[:3])}.\n"
            "Only safetensors checkpoints are read; download the missing files."
        )
    return [folder / name for name in sorted(names)]
