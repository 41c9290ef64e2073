"""Fused expert weights whose parts lie apart in a checkpoint: read straight to their places.

transformers reads all parts, stacks them, and joins gate and up: at its highest, memory for 2.6 layers. Most of a layer
are its experts, so here each part is read once to where it belongs, and no second copy exists.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key

from moeprune.models.layers.stored import StoredTensor

# More readers do not read faster from one disk.
READERS = 4


@dataclass(frozen=True)
class FoundTensor:
    """A tensor in the files, the ``key`` of the model that it belongs to, and the converter and pattern that say so."""

    name: str
    tensor: StoredTensor
    key: str
    converter: WeightConverter | None
    pattern: str | None


@dataclass(frozen=True)
class ExpertStack:
    """The parameter ``key`` [E, rows, columns]: row blocks of one or several projections, each a tensor per expert."""

    key: str
    projections: tuple[tuple[FoundTensor, ...], ...]

    @property
    def names(self) -> set[str]:
        """The parts' names in the files."""
        return {part.name for projection in self.projections for part in projection}

    def read(self, empty: Tensor, device: torch.device) -> Tensor:
        """The stack, of the shape and precision of ``empty``."""
        stack = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(lambda place: place[0].read_into(place[1]), self._places(stack)):
                pass
        return stack

    def _places(self, stack: Tensor) -> Iterator[tuple[StoredTensor, Tensor]]:
        first = 0
        for projection in self.projections:
            rows = projection[0].tensor.shape[0]
            for expert, part in enumerate(projection):
                yield part.tensor, stack[expert, first : first + rows]
            first += rows


def expert_stacks(found: Iterable[FoundTensor]) -> list[ExpertStack]:
    """The parameters among ``found`` that transformers would stack along the experts, and then perhaps join by rows."""
    parts_of: dict[str, list[FoundTensor]] = {}
    for part in found:
        if part.converter is not None and _stacks(part.converter):
            parts_of.setdefault(part.key, []).append(part)
    stacks = []
    for key, parts in parts_of.items():
        parts.sort(key=lambda part: dot_natural_key(part.name))
        patterns = parts[0].converter.source_patterns if parts[0].converter else []
        projections = (tuple(part for part in parts if part.pattern == pattern) for pattern in patterns)
        stacks.append(ExpertStack(key, tuple(filter(None, projections))))
    return stacks


def _stacks(converter: WeightConverter) -> bool:
    if len(converter.target_patterns) != 1 or not converter.operations:
        return False
    first, *rest = converter.operations
    if type(first) is not MergeModulelist or first.dim != 0:
        return False
    joins = len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1
    return joins if len(converter.source_patterns) > 1 else not rest
