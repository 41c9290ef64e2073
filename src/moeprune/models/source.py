"""A model as the user names it: where it comes from, in which precision it is kept and computed, how it may be cut."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moeprune.errors import InputError, ModelError, require_choice, require_positive
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.reader import checkpoint_tensors, load_compressed
from moeprune.models.digest import file_digest
from moeprune.models.expected import require_expected
from moeprune.models.families import to_contract
from moeprune.models.layers.stored import StoredTensor, stored_tensors
from moeprune.models.layers.streaming import Model, skeleton, stream_compressed, stream_dense
from moeprune.models.routing import send_to_experts
from moeprune.models.shape import ExpertShape, local_folder, read_context, read_shape, read_top_k, weight_files

log = logging.getLogger(__name__)

AUTO, ALWAYS, NEVER = "auto", "always", "never"
# A model that takes more of the free memory than this is streamed: activations and statistics need the rest.
LARGEST_SHARE_OF_MEMORY = 0.6
# Where Linux says how much memory the processes of a container, or of a job on a cluster, may use.
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
ALIGNMENT_BYTES = 64  # of what PyTorch itself puts into memory

# Configs and vocabularies; a model card does not change results.
DESCRIBING_SUFFIXES = (".json", ".model", ".txt")


@dataclass(frozen=True)
class ModelSource:
    """A dense MoE checkpoint: ``embedded:NAME``, a local folder, or a hub name.

    ``dtype`` is what weights are stored in (and bytes counted in), ``compute_dtype`` what the forward pass uses.
    ``alignment`` and ``minimum_width`` are the model's default block and least expert width, in channels.

    ``streaming`` says whether decoder layers stay on disk and come into memory one at a time: ``always``, ``never``, or
    ``auto``, which does so when the weights take more than 60% of the free memory. Results are the same bit for bit.
    ``activations_gib`` is how much of the hidden states a walk over streamed layers keeps in memory; the rest is read
    from files. ``device`` "auto" and "cuda" are the first GPU, and all of them where layers are streamed.

    ``experts_per_token`` is how many experts a token is sent to, in the dense model and in all that is made of it; None
    is as many as the checkpoint says. ``expected`` are facts that the checkpoint's config must have; they fix all
    shapes.

    Raises InputError for settings that do not exist.
    """

    name: str
    path: str
    dtype: str
    compute_dtype: str
    alignment: int
    minimum_width: int
    device: str = "auto"
    revision: str | None = None
    streaming: str = AUTO
    activations_gib: float = 4.0
    expected: Mapping[str, Any] | None = None
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        if self.experts_per_token is not None:
            require_positive(self, "experts_per_token")
        require_choice("model.streaming", str(self.streaming), (AUTO, ALWAYS, NEVER))
        if not self.activations_gib >= 0:
            raise InputError(
                f"model.activations_gib={self.activations_gib} is not possible.", change="Use a number like 4."
            )

    @property
    def storage_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def computation_dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    @property
    def placement(self) -> torch.device:
        """``device``, where "auto" is the GPU when there is one. Raises InputError for what is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"model.device={self.device}, but no GPU is available.", change="Use model.device=auto.")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InputError(
                f"model.device={self.device} is no device.", possible=("auto", "cpu", "cuda"), given=self.device
            ) from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"model.device={self.device}, but there are {torch.cuda.device_count()} GPUs, counted from 0.",
                change="Use model.device=auto.",
            )
        return device

    @property
    def placements(self) -> tuple[torch.device, ...]:
        """The devices that compute when layers are streamed: every GPU unless one is named. Raises InputError."""
        first = self.placement
        if first.type == "cuda" and first.index is None:
            return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
        return (first,)

    def folder(self) -> Path:
        """The local folder, downloaded from the hub where needed. Raises InputError or ModelError."""
        local = local_folder(self.path)
        if local is not None:
            return local
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "README.md", "LICENSE*", "NOTICE*"]
        try:
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"{self.path} is neither a local folder nor to be had from the hub: {error}\n"
                "Check the name and the connection, or give model.path a local folder."
            ) from error

    def identity(self) -> dict[str, object]:
        """What results depend on: the checkpoint's content and the computing precision; not its place."""
        folder = self.folder()
        digest = hashlib.sha256()
        described = sorted(file for file in folder.iterdir() if file.suffix in DESCRIBING_SUFFIXES)
        for file in [*described, *weight_files(folder)]:
            digest.update(file.name.encode() + b"\0" + file_digest(file))
        own: dict[str, object] = {"content": digest.hexdigest(), "compute_dtype": self.compute_dtype}
        if self.experts_per_token in (None, read_top_k(folder)):
            return own
        return {**own, "experts_per_token": self.experts_per_token}

    def shape(self) -> ExpertShape:
        """The shape of the experts, from the files' headers. Raises as `moeprune.models.shape.read_shape` does."""
        return read_shape(self.folder(), self.experts_per_token)

    def context(self) -> int | None:
        """Raises as `moeprune.models.shape.read_context` does."""
        return read_context(self.folder())

    def load(self) -> Model:
        """The dense model for inference.

        Raises ModelError when it is damaged or has no routed experts, InputError for an impossible
        ``experts_per_token``.
        """
        folder = self.folder()
        require_expected(folder, self.expected)
        if self.experts_per_token is not None:
            self.shape()
        model: Model
        if self.streams():
            model = stream_dense(folder, self.computation_dtype, self.placements, self.activations_gib)
        else:
            model = self._in_memory(folder)
        moe_layers(skeleton(model))
        send_to_experts(skeleton(model), self.experts_per_token)
        return model

    def streams(self) -> bool:
        """Whether `load` gives a model whose decoder layers stay on disk. Raises ModelError for a damaged file."""
        folder = self.folder()
        tensors = [tensor for file in weight_files(folder) for tensor in stored_tensors(file).values()]
        return self._streams(folder, tensors)

    def load_compressed(self, folder: Path) -> Model:
        """A compressed form of this model for inference, computing where and as this one does.

        Raises ModelError when it is damaged.
        """
        if self._streams(folder, checkpoint_tensors(folder).values()):
            return stream_compressed(folder, self.computation_dtype, self.placements, self.activations_gib)
        model: torch.nn.Module = load_compressed(folder, self.computation_dtype)
        return model.to(self.placement)  # type: ignore[return-value]

    def _in_memory(self, folder: Path) -> PreTrainedModel:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.computation_dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"The checkpoint in {folder} cannot be loaded: {error}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise ModelError(
                f"The checkpoint in {folder} cannot be loaded: it lacks {', '.join(sorted(info['missing_keys'])[:3])}."
            )
        to_contract(model)
        # What lies in memory as in the file, at any address, sends matrix products other ways, with other roundings.
        for parameter in model.parameters():
            if parameter.data_ptr() % ALIGNMENT_BYTES:
                parameter.data = parameter.data.clone()
        return model.to(self.placement).eval()

    def _streams(self, folder: Path, tensors: Iterable[StoredTensor]) -> bool:
        if self.streaming != AUTO:
            return self.streaming == ALWAYS
        needed = sum(_bytes_in_memory(tensor, self.computation_dtype) for tensor in tensors)
        free = free_bytes(self.placement)
        streams = needed > LARGEST_SHARE_OF_MEMORY * free
        log.info(
            "%s %s: its weights take %.1f GiB in %s, and %.1f GiB are free on %s",
            folder, "is streamed" if streams else "fits in memory", needed / 2**30, self.compute_dtype,
            free / 2**30, self.placement,
        )  # fmt: skip
        return streams

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer. Raises ModelError when it is missing, or the config is not the expected one."""
        folder = self.folder()
        require_expected(folder, self.expected)
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def _bytes_in_memory(tensor: StoredTensor, dtype: torch.dtype) -> int:
    return prod(tensor.shape) * (dtype if tensor.dtype.is_floating_point else tensor.dtype).itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is left on the device; on the CPU also to the container or job, where Linux limits one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(limit - own for limit in _memory_limits())])


def _memory_limits() -> Iterator[int]:
    """What the process's control groups and those around them allow, in bytes; in either version of control groups."""
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (
            (CONTROL_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (CONTROL_GROUPS, "memory.max")
        )
        group = root / own.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no limit there
                yield int((folder / name).read_text())
            if folder == root:
                break
