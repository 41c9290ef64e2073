"""What a run measured of each of its models, and what its stages took."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on ``n`` examples with its standard error (None where the harness gives none), as fractions of 1.

    ``metric`` is the harness's name of what was scored (``acc,none``), ``fewshot`` the number of solved examples shown
    first; None in metrics of before they were written down.
    """

    accuracy: float
    stderr: float | None
    n: int
    metric: str | None = None
    fewshot: int | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens a second while a prompt is read (prefill) and while new tokens are made one by one (decode)."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in all, in routed experts, and active for one token."""

    total: int
    routed: int
    active: int


@dataclass(frozen=True)
class ByteCounts:
    """Parameters times ideal bits; with scales and unquantised tensors; files as written (None where none were); the
    weights as they lie in memory while the model runs (None in metrics of before it was counted)."""

    ideal: int
    with_overhead: int
    on_disk: int | None
    in_memory: int | None = None


@dataclass(frozen=True)
class PartPrecision:
    """How one part of a model is stored: ``bits`` of a weight nominally, and with all scales and code books."""

    part: str
    format: str
    bits: float
    bits_with_overhead: float
    matrices: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class RecoveryDetails:
    """What a recovery cost and how it ended; each group of parameters that trained has its highest learning rate.

    ``merged``: whether nothing is left beside the weights. What storing the result moved the logits by:
    ``stored_difference``, the root mean square relative to their size, and ``stored_max_difference``, at most. A
    recovery of a user's own may leave these out.
    """

    training_tokens: int
    steps: int
    seconds: float
    trained_parameters: int
    learning_rates: Mapping[str, float]
    final_loss: float | None = None
    merged: bool | None = None
    stored_difference: float | None = None
    stored_max_difference: float | None = None


@dataclass(frozen=True)
class Variant:
    """One measured model of a run: dense, pruned, recovered, quantised; mappings go by text or task name.

    ``precision`` is empty in metrics of before it was written down; ``speed`` is None where it was not asked for.
    """

    name: str
    perplexity: Mapping[str, float]
    perplexity_tokens: Mapping[str, int]
    mean_perplexity: float
    tasks: Mapping[str, TaskScore]
    parameters: ParameterCounts
    bytes: ByteCounts
    precision: tuple[PartPrecision, ...]
    speed: Speed | None = None

    @property
    def expert_bits(self) -> float | None:
        """Nominal bits of a routed expert's weight; None where the run did not write them down."""
        return next((row.bits for row in self.precision if row.part == "routed experts"), None)


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run: how long it took, what it used at most, and whether the cache had it."""

    stage: str
    key: str
    cached: bool
    seconds: float
    peak_memory_gib: float | None


@dataclass(frozen=True)
class PlanSummary:
    """How many channels the plan removed, and how many experts of each layer still have any."""

    removed_channels: int
    total_channels: int
    removed_ratio: float
    live_experts: tuple[int, ...]
    note: str
