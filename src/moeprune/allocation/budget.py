"""How much may be kept, in whole blocks; checked without torch, so that an impossible request is refused at once."""

import math
from dataclasses import dataclass

from moeprune.errors import BudgetError, InputError
from moeprune.models.shape import ExpertShape


@dataclass(frozen=True)
class Budget:
    """Channels to keep over the routed experts of ``layers`` MoE layers with ``experts`` experts of ``width`` each.

    ``ratio`` is the fraction of routed-expert channels to remove. Kept counts are multiples of ``alignment``; an expert
    keeps none or at least ``minimum_width``; at least ``top_k`` experts of a layer stay. What is kept is rounded up to
    what such widths can sum to, so never more than asked is removed.

    Raises InputError or BudgetError when these contradict each other.
    """

    ratio: float
    layers: int
    experts: int
    width: int
    top_k: int
    alignment: int
    minimum_width: int

    @classmethod
    def for_model(cls, shape: ExpertShape, *, ratio: float, alignment: int, minimum_width: int) -> "Budget":
        """The budget on a model whose experts have this shape."""
        return cls(ratio, shape.layers, shape.experts, shape.width, shape.top_k, alignment, minimum_width)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise InputError(
                f"ratio={self.ratio} is not possible: it is the fraction of routed-expert channels to remove.",
                change="Use a number from 0 up to, but not including, 1, for example ratio=0.5.",
            )
        if self.alignment < 1 or self.width % self.alignment:
            raise InputError(
                f"alignment={self.alignment} does not fit experts of width {self.width}: blocks must divide the width.",
                possible=[size for size in range(1, self.width + 1) if self.width % size == 0],
                change="Set model.alignment to one of them.",
            )
        if not 0 < self.minimum_width <= self.width or self.minimum_width % self.alignment:
            raise InputError(
                f"minimum_width={self.minimum_width} does not fit width {self.width} and alignment {self.alignment}.",
                change="Set model.minimum_width to a multiple of model.alignment, no larger than the width.",
            )
        if self.kept_channels < self.least_channels:
            most = 1 - self.least_channels / self.total_channels
            raise BudgetError(
                f"ratio={self.ratio} leaves {self.kept_channels} channels, but {self.layers} layers x top-{self.top_k} "
                f"experts x minimum width {self.minimum_width} need {self.least_channels}.\n"
                f"Use a ratio of at most {math.floor(most * 1e4) / 1e4}, or a smaller model.minimum_width."
            )

    @property
    def total_channels(self) -> int:
        return self.layers * self.experts * self.width

    @property
    def kept_channels(self) -> int:
        """The fewest channels, at least ``(1 - ratio) * total_channels``, that experts of allowed widths can sum to."""
        # The tolerance keeps 1 - 0.9 from costing a block, also where blocks are counted by the ten million.
        asked = self.alignment * math.ceil((1 - self.ratio) * self.total_channels / self.alignment - 1e-8)
        # One expert fewer cannot hold what was asked; so many may need more, where the minimum is near the width.
        return max(asked, math.ceil(asked / self.width) * self.minimum_width)

    @property
    def least_channels(self) -> int:
        """The fewest channels that leave every token its top-k experts."""
        return self.layers * self.top_k * self.minimum_width

    @property
    def rounding_note(self) -> str:
        """What rounding changed about the request; empty when nothing."""
        asked = self.ratio * self.total_channels
        removed = self.total_channels - self.kept_channels
        if abs(asked - removed) < 1e-6 * self.total_channels:
            return ""
        return (
            f"asked to remove {asked:.1f} channels; blocks of {self.alignment}, and for an expert none or at least "
            f"{self.minimum_width}, make it {removed}"
        )
