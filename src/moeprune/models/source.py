"""A model as the user names it: where it comes from, in which precision it is kept and computed, how it may be cut."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moeprune.errors import InputError, ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.shape import local_folder, weight_files

# Files up to this size are identified by their content, larger ones by header, size and time of change.
WHOLE_FILE_BYTES = 64 * 2**20
HEAD_BYTES = 2**20
# Configs and vocabularies; a model card does not change results.
DESCRIBING_SUFFIXES = (".json", ".model", ".txt")


@dataclass(frozen=True)
class ModelSource:
    """A dense MoE checkpoint: ``embedded:NAME``, a local folder, or a hub name.

    ``dtype`` is what weights are stored in (and bytes counted in), ``compute_dtype`` what the forward pass uses.
    ``alignment`` and ``minimum_width`` are the model's default block and least expert width, in channels.
    """

    name: str
    path: str
    dtype: str
    compute_dtype: str
    alignment: int
    minimum_width: int
    device: str = "auto"
    revision: str | None = None

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

    def folder(self) -> Path:
        """The local folder, downloaded from the hub where needed. Raises InputError or ModelError."""
        local = local_folder(self.path)
        if local is not None:
            return local
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model"]
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
            digest.update(file.name.encode() + b"\0" + _file_digest(file))
        return {"content": digest.hexdigest(), "compute_dtype": self.compute_dtype}

    def load(self) -> PreTrainedModel:
        """The dense model for inference. Raises ModelError when it is damaged or has no routed experts."""
        folder = self.folder()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.computation_dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"The checkpoint in {folder} cannot be loaded: {error}") from error
        moe_layers(model)
        return model.to(self.placement).eval()  # type: ignore[arg-type]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder(), local_files_only=True)


def _file_digest(file: Path) -> bytes:
    status = file.stat()
    if status.st_size <= WHOLE_FILE_BYTES:
        return hashlib.sha256(file.read_bytes()).digest()
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return hashlib.sha256(head + f"{status.st_size} {status.st_mtime_ns}".encode()).digest()
