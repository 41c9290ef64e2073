"""What flows between the stages: frozen values, whose tensor names carry their axes.

    L  MoE layers           T  tokens                     K  experts a token is sent to
    E  routed experts       C  channels of an expert      H  hidden size

The statistics live in ``calibration/statistics.py``; here are the values that every room shares.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.errors import NumericalError


@dataclass(frozen=True)
class Scores:
    """How much each part of the routed experts matters; float64, higher is more useful.

    ``channel_LEC`` ranks channels inside an expert; None from a scorer that ranks whole experts only.
    ``expert_LE`` ranks experts inside a layer. ``layer_L`` is the block-local loss of the layer (at least 0).
    Raises NumericalError for NaN or infinity.
    """

    channel_LEC: Tensor | None
    expert_LE: Tensor
    layer_L: Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not torch.isfinite(value).all():
                raise NumericalError(f"The scorer gave {name} with NaN or infinity; no plan can be made of it.")

    def save(self, path: Path) -> None:
        """Write as safetensors, in float64."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        save_file({name: value.double().contiguous() for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        tensors = load_file(path)
        return cls(tensors.get("channel_LEC"), tensors["expert_LE"], tensors["layer_L"])


@dataclass(frozen=True)
class Plan:
    """Which channels every expert keeps.

    ``kept[l][e]`` holds the sorted int64 channel indices that expert e of MoE layer l keeps; an expert that keeps none
    is removed with its router row, so its tokens are routed to the experts that stay. ``width`` is C before pruning,
    ``note`` says what rounding changed about the request.
    """

    kept: tuple[tuple[Tensor, ...], ...]
    width: int
    note: str = ""

    @property
    def widths_LE(self) -> Tensor:
        """Kept channels per expert, int64."""
        return torch.tensor([[len(channels) for channels in layer] for layer in self.kept])

    @property
    def kept_channels(self) -> int:
        return int(self.widths_LE.sum())

    @property
    def total_channels(self) -> int:
        return sum(len(layer) for layer in self.kept) * self.width

    @property
    def removed_ratio(self) -> float:
        """Fraction of all routed-expert channels that the plan removes."""
        return 1 - self.kept_channels / self.total_channels

    def save(self, path: Path) -> None:
        """Write as safetensors: ``widths_LE``, and all kept indices in one row, layer by layer, expert by expert."""
        channels = torch.cat([kept for layer in self.kept for kept in layer])
        metadata = {"width": str(self.width), "note": self.note}
        save_file({"widths_LE": self.widths_LE, "kept_channels": channels}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        with safe_open(path, framework="pt") as stored:
            widths_LE, channels = stored.get_tensor("widths_LE"), stored.get_tensor("kept_channels")
            metadata = stored.metadata()
        layers, experts = widths_LE.shape
        pieces = channels.split(widths_LE.flatten().tolist())
        kept = tuple(tuple(pieces[layer * experts : (layer + 1) * experts]) for layer in range(layers))
        return cls(kept, int(metadata["width"]), metadata["note"])
