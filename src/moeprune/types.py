"""What flows between the stages: frozen values, whose tensor names carry their axes.

    L  MoE layers           T  tokens                     K  experts a token is sent to
    E  routed experts       C  channels of an expert      H  hidden size

The statistics live in ``calibration/statistics.py``; here are the values that every room shares.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.errors import NumericalError


@dataclass(frozen=True)
class ExpertWeights:
    """What allocators may weigh the experts of a layer by, whatever the scorer; float64, at least 0 up to rounding."""

    attribution_LE: Tensor  # A_e, see `moeprune.scoring.attribution`
    usage_LE: Tensor  # tokens routed to e
    router_LE: Tensor  # sum of the gates
    removal_LE: Tensor  # R_e, the block-local loss of removing e alone


@dataclass(frozen=True)
class Scores:
    """How much each part of the routed experts matters; float64, higher is more useful.

    ``channel_LEC`` ranks channels inside an expert; None from a scorer that ranks whole experts only.
    ``expert_LE`` ranks experts inside a layer. ``layer_L`` is the block-local loss of the layer (at least 0).
    ``subset_LEE`` (bool), from scorers that choose experts together: row k - 1 marks the k experts to keep.
    ``distance_LEE``, from scorers for merging: how different two experts of a layer are.
    ``weights`` is filled in by the pipeline. Raises NumericalError for NaN or infinity.
    """

    channel_LEC: Tensor | None
    expert_LE: Tensor
    layer_L: Tensor
    subset_LEE: Tensor | None = None
    distance_LEE: Tensor | None = None
    weights: ExpertWeights | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors().items():
            if not torch.isfinite(value).all():
                raise NumericalError(f"The scorer gave {name} with NaN or infinity; no plan can be made of it.")

    def save(self, path: Path) -> None:
        """Write as safetensors, in float64 (subsets as bool)."""
        tensors = {
            # A copy each: two names may share one tensor, which the format does not allow.
            name: value.to(torch.bool if value.dtype == torch.bool else torch.float64, copy=True).contiguous()
            for name, value in self._tensors().items()
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        tensors = load_file(path)
        names = [field.name for field in fields(ExpertWeights)]
        weights = {name: tensors.pop(f"weights.{name}") for name in names if f"weights.{name}" in tensors}
        channel_LEC = tensors.pop("channel_LEC", None)
        return cls(channel_LEC, **tensors, weights=ExpertWeights(**weights) if weights else None)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.weights is not None:
            tensors.update({f"weights.{name}": value for name, value in vars(self.weights).items()})
        return tensors


@dataclass(frozen=True)
class Merge:
    """Which experts of a layer become one.

    ``leader_LE`` (int64) names for every expert the one whose place it shares; a leader names itself. The weights of a
    group are averaged by ``weight_LE`` (float64, normalised within the group); with ``align_channels`` the channels of
    each member are first permuted to match its leader's.
    """

    leader_LE: Tensor
    weight_LE: Tensor
    align_channels: bool


@dataclass(frozen=True)
class Plan:
    """Which channels every expert keeps, and which experts are merged.

    ``kept[l][e]`` holds the sorted int64 channel indices that expert e of MoE layer l keeps. What becomes of the router
    row of an expert that keeps none is the surgery's choice. With ``merge``, leaders keep all channels and the others
    none; every router row stays and leads to its leader. ``width`` is C before pruning, ``note`` says what rounding
    changed about the request.
    """

    kept: tuple[tuple[Tensor, ...], ...]
    width: int
    note: str = ""
    merge: Merge | None = None

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
        tensors = {"widths_LE": self.widths_LE, "kept_channels": channels}
        metadata = {"width": str(self.width), "note": self.note}
        if self.merge is not None:
            tensors.update(leader_LE=self.merge.leader_LE, weight_LE=self.merge.weight_LE)
            metadata["align_channels"] = str(self.merge.align_channels)
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        widths_LE = tensors["widths_LE"]
        layers, experts = widths_LE.shape
        pieces = tensors["kept_channels"].split(widths_LE.flatten().tolist())
        kept = tuple(tuple(pieces[layer * experts : (layer + 1) * experts]) for layer in range(layers))
        merge = None
        if "leader_LE" in tensors:
            merge = Merge(tensors["leader_LE"], tensors["weight_LE"], metadata["align_channels"] == "True")
        return cls(kept, int(metadata["width"]), metadata["note"], merge)
